"""What the validation part says of a model, which decides when training stops: how well it ranks all items,
or, where the model learns labels or values, how well it predicts those.

Legend: U users of a chunk, I items, H numbers of a pair, N examples.
"""

import itertools
from typing import Protocol

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
import torch.distributed as dist
from torch import Tensor

from recsys_dist.config import Config
from recsys_dist.deepfm.batches import side_batch
from recsys_dist.deepfm.examples import read_examples, targets
from recsys_dist.deepfm.items import Items, days_of, weekdays
from recsys_dist.deepfm.model import DeepFM, Side
from recsys_dist.deepfm.pairs import Pairs, before_valid
from recsys_dist.errors import DataError
from recsys_dist.evaluation.metrics import auc, calibration, grouped_auc, logloss
from recsys_dist.schema import SEEN_COLUMN, UNKNOWN, pairs, without_seen
from recsys_dist.workspace import Run

K = 10
NONE = np.empty(0, np.int64)
ROWS_AT_ONCE = 1 << 14
"""Examples that are looked up at once."""
CHUNK = 1 << 24
"""Numbers of the widest array [U, I, H] that a chunk of users makes: 64 MiB of float32."""


class Validation(Protocol):
    """Measures a model on a part."""

    metric: str
    """The figure that decides."""
    told: str
    """What it is measured with, in a line."""

    def figures(self, model: DeepFM, device: torch.device) -> dict[str, float]:
        """Every figure by name; that which decides is NaN where a prediction is not finite. Collective: each
        worker computes its share.
        """
        ...


LOWER_IS_BETTER = ("rmse",)


def validation(
    run: Run, items: Items, config: Config, split: str = "valid", recall: Run | None = None
) -> Validation:
    """How a model with these settings is measured on a part; `recall` has the tables of its pair fields."""
    kind = Ranking if config.deepfm.negatives else Predicting
    fields, paired = items.spec.side("pair"), None
    if fields:
        assert recall is not None
        paired = Pairs(fields, items, recall, before_valid(recall) if split == "valid" else "")
    return kind(run, items, config, split, paired)


class Ranking:
    """A fixed sample of the users with positives in a part, each to be ranked all items that may be listed.

    A user's fields are as of the part's start. The list is that of the day of the user's first positive event
    in the part, as in the evaluation: the items' fields are as of that day, and the context is what a list
    made the night before knows of it (FeatureSpec.context).

    Args:
        run: the features run.
        items: its items.
        config: seed and size of the sample.
        split: `valid` or `test`.
        paired: the model's pair fields, where it has any.
    """

    def __init__(
        self, run: Run, items: Items, config: Config, split: str = "valid", paired: Pairs | None = None
    ) -> None:
        spec = items.spec
        self.metric = config.deepfm.metric
        filter_seen = config.score.filter_seen
        state = run.table("users", filter=pc.field("as_of") == split)
        positives = read_examples(run, spec, [split], config.deepfm)
        events = without_seen(positives, state, filter_seen)
        if not len(events):
            raise DataError(
                f"{run.uri}: every positive example in split={split} is of an item that the user has seen, "
                f"and score.filter_seen={filter_seen} leaves those out. Try --set score.filter_seen=none."
            )
        users = np.unique(events["user"].to_numpy())
        left_out = len(np.unique(positives["user"].to_numpy())) - len(users)
        self.told = f"{split}: {min(len(users), config.deepfm.valid_users):,} users"
        if len(users) > config.deepfm.valid_users:
            self.told += f", drawn from {len(users):,}"
        if left_out:
            self.told += f"; {left_out:,} left out: all their positives were seen (filter_seen={filter_seen})"
        if len(users) > config.deepfm.valid_users:
            generator = np.random.default_rng([config.seed, 1])
            users = np.sort(generator.choice(users, config.deepfm.valid_users, replace=False))
        state = state.filter(pc.is_in(state["user"], pa.array(users))).sort_by("user")
        events = events.filter(pc.is_in(events["user"], pa.array(users)))
        events = events.sort_by([("user", "ascending"), ("timestamp", "ascending")])
        first = np.unique(events["user"].to_numpy(), return_index=True)[1]
        days = days_of(events["timestamp"].take(pa.array(first)))
        # Row by day, so that the users of a day stand together; a stable sort keeps them ascending.
        order = np.argsort(days, kind="stable")
        state, self.days = state.take(pa.array(order)), torch.from_numpy(days[order])
        columns = {field.name: state[field.name] for field in spec.side("user")}
        columns |= spec.context(weekdays(days[order]))
        self.user = side_batch(columns, spec.side("user", "context"))
        self.items = items
        self.paired = (paired, state[paired.history]) if paired else None
        # Users of equal item fields: of a day where they change from day to day, else all.
        starts = np.unique(self.days, return_index=True)[1] if spec.daily else np.array([0])
        self.groups = list(itertools.pairwise([*starts.tolist(), len(days)]))
        # Pairs ascend by row.
        rows, seen = pairs(state[SEEN_COLUMN[filter_seen]]) if filter_seen != "none" else (NONE, NONE)
        known = seen > UNKNOWN
        self.seen = rows[known], seen[known]
        rows = np.argsort(order)[np.searchsorted(users, events["user"].to_numpy())]
        ascending = np.argsort(rows, kind="stable")
        self.truth = rows[ascending], events["item"].to_numpy()[ascending]
        self.k = min(K, spec.n_items)

    def __len__(self) -> int:
        return len(self.user)

    def figures(self, model: DeepFM, device: torch.device) -> dict[str, float]:
        """See Validation."""
        return {self.metric: self.ndcg(model, device)}

    @torch.no_grad()
    def ndcg(self, model: DeepFM, device: torch.device) -> float:
        """The mean NDCG@10 of the sample's users. Collective: every worker ranks its share of the users."""
        training = model.training
        model.eval()
        # Lookups are collective too, so each worker looks up equally many rows.
        users = _gather(model.user_side(self.user.take(_share(len(self))).to(device)), len(self))
        total = torch.zeros(1, dtype=torch.float64, device=device)
        for first, last in self.groups:
            share = self.items.at(_share(len(self.items)) + 1, self.days[first : first + 1])
            items = _gather(model.item_side(share.to(device)), len(self.items))
            size = max(1, CHUNK // (len(self.items) * model.width))
            per_worker = -(-(last - first) // dist.get_world_size())
            start = first + dist.get_rank() * per_worker
            stop = min(start + per_worker, last)
            for chunk in range(start, stop, size):
                end = min(chunk + size, stop)
                pair = None
                if self.paired:
                    fields, history = self.paired
                    pair = fields.of_all(history.slice(chunk, end - chunk))[:, 1:].to(device)
                sides = users.rows(chunk, end).leading(-1, 1), items.leading(1, -1)
                logits = model.logits(*sides, pair=pair)
                total += self._ndcg(logits, chunk, end).sum()
        dist.all_reduce(total)
        model.train(training)
        return float(total) / len(self.user)

    def _ndcg(self, logits: Tensor, start: int, stop: int) -> Tensor:
        """NDCG@10 [U], ideal min(10, relevant), of the users `start` to before `stop` (Järvelin 2002).

        NaN where a score is not finite.
        """
        relevant = torch.zeros_like(logits, dtype=torch.bool)
        rows, items = (part.to(logits.device) for part in _within(self.truth, start, stop))
        relevant[rows, items - 1] = True
        rows, items = (part.to(logits.device) for part in _within(self.seen, start, stop))
        logits[rows, items - 1] = -torch.inf
        listable = self.items.listable(self.days[start:stop])[:, 1:].to(logits.device)
        logits.masked_fill_(~listable, -torch.inf)
        best = logits.topk(self.k)
        hits = relevant.gather(1, best.indices) & (best.values > -torch.inf)
        discount = 1 / torch.log2(torch.arange(2, self.k + 2, device=logits.device))
        ideal = discount.cumsum(0)[relevant.sum(1).clamp(max=self.k) - 1]
        ndcg = (hits * discount).sum(1) / ideal
        return torch.where(best.values[:, 0] < torch.inf, ndcg, torch.nan)  # NaN is the greatest to topk


class Predicting:
    """All examples of a part, with their own context and the items' fields as of the day of the event.

    Args:
        run: the features run.
        items: its items.
        config: the objective decides what is measured.
        split: `valid` or `test`.
        paired: the model's pair fields, where it has any.

    Raises:
        DataError: all labels are equal, so that nothing can be told apart.
    """

    def __init__(
        self, run: Run, items: Items, config: Config, split: str = "valid", paired: Pairs | None = None
    ) -> None:
        table = read_examples(run, items.spec, [split], config.deepfm)
        self.metric = config.deepfm.metric
        self.targets = targets(table, config.deepfm)
        if self.metric == "auc" and len(set(self.targets.tolist())) < 2:
            raise DataError(
                f"{run.uri}: all {len(self.targets)} examples in split={split} have the label "
                f"{self.targets[0]:g}, and AUC needs both. With positives alone, draw other items beside "
                f"them: deepfm.negatives of 1 or more."
            )
        self.users = table["user"].to_numpy()
        self.told = f"{split}: {len(table):,} examples of {len(np.unique(self.users)):,} users"
        self.paired = (paired, table[paired.history]) if paired else None
        self.user = side_batch(table, items.spec.side("user", "context"))
        self.items = torch.from_numpy(table["item"].to_numpy().astype(np.int64))
        self.days = torch.from_numpy(days_of(table["timestamp"]))
        self.catalogue = items

    def figures(self, model: DeepFM, device: torch.device) -> dict[str, float]:
        """See Validation: auc, gauc (within users), logloss and calibration of labels, rmse and mse of
        values.
        """
        logits = self.logits(model, device)
        if not np.isfinite(logits).all():
            return {self.metric: np.nan}
        if self.metric == "rmse":
            mse = float(np.mean((logits - self.targets) ** 2, dtype=np.float64))
            return {"rmse": mse**0.5, "mse": mse}
        return {
            "auc": auc(self.targets, logits),
            "gauc": grouped_auc(self.targets, logits, self.users),
            "logloss": logloss(self.targets, logits),
            "calibration": calibration(self.targets, logits),
        }

    @torch.no_grad()
    def logits(self, model: DeepFM, device: torch.device) -> np.ndarray:
        """[N] float32, of every example. Collective: each worker computes its share."""
        training = model.training
        model.eval()
        mine = _share(len(self.targets))
        # Equally many rows, in equally many steps, on every worker: lookups are collective.
        found = []
        for rows in mine.split(ROWS_AT_ONCE):
            user = model.user_side(self.user.take(rows).to(device))
            item = model.item_side(self.catalogue.at(self.items[rows], self.days[rows]).to(device))
            pair = None
            if self.paired:
                fields, history = self.paired
                of_rows = history.take(pa.array(rows.numpy()))
                pair = fields.of(of_rows, self.items[rows, None])[:, 0].to(device)
            found.append(model.logits(user, item, pair=pair))
        logits = torch.cat(found)
        if dist.get_world_size() > 1:
            whole = logits.new_empty(len(logits) * dist.get_world_size())
            dist.all_gather_into_tensor(whole, logits)
            logits = whole
        model.train(training)
        return logits[: len(self.targets)].float().cpu().numpy()


def _share(number: int) -> Tensor:
    """This worker's equal share of so many rows; where there are too few, the last ones repeat the first."""
    rank, size = dist.get_rank(), -(-number // dist.get_world_size())
    rows = torch.arange(rank * size, (rank + 1) * size)
    return torch.where(rows < number, rows, 0)


def _gather(side: Side, rows: int) -> Side:
    """All workers' shares, without the rows that only fill the last."""
    world_size = dist.get_world_size()
    if world_size == 1:
        return side
    parts = []
    for part in side:
        gathered = part.new_empty((len(part) * world_size, *part.shape[1:]))
        if gathered.numel():
            dist.all_gather_into_tensor(gathered, part.contiguous())
        parts.append(gathered[:rows])
    return Side(*parts)


def _within(found: tuple[np.ndarray, np.ndarray], start: int, stop: int) -> tuple[Tensor, Tensor]:
    first, last = np.searchsorted(found[0], [start, stop])
    rows, items = found[0][first:last] - start, found[1][first:last].astype(np.int64)
    return torch.from_numpy(rows), torch.from_numpy(items)

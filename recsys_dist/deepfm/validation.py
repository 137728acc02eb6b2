"""What the validation part says of a model, which decides when training stops: how well it ranks all items,
or, where the model learns labels or values, how well it predicts those.

Legend: U users of a chunk, I items, H numbers of a pair, N examples.
"""

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
from recsys_dist.deepfm.held_out import HeldOut
from recsys_dist.deepfm.items import Items, days_of
from recsys_dist.deepfm.model import DeepFM, Side
from recsys_dist.deepfm.pairs import Pairs
from recsys_dist.errors import DataError
from recsys_dist.evaluation.metrics import auc, calibration, grouped_auc, logloss, mse, rmse
from recsys_dist.workspace import Run

K = 10
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


def validation(run: Run, items: Items, config: Config, split: str = "valid") -> Validation:
    """How a model with these settings is measured on a part."""
    kind = Ranking if config.deepfm.negatives else Predicting
    return kind(run, items, config, split)


def users_of_part(
    run: Run, items: Items, config: Config, split: str, most: int, only: pa.Array | None = None
) -> HeldOut:
    """The users with positives in a part, as of its start.

    Args:
        run: the features run.
        items: its items.
        config: seed, and which items are left out of the lists.
        split: `valid` or `test`.
        most: users are drawn where there are more.
        only: of these users; None: of all.

    Raises:
        DataError: there is no positive, or all are of items that their users had seen.
    """
    state = run.table("users", filter=pc.field("as_of") == split)
    positives = read_examples(run, items.spec, [split], config.deepfm)
    if only is not None:
        positives = positives.filter(pc.is_in(positives["user"], only))
    filter_seen = config.score.filter_seen
    found = HeldOut(items, state, positives, filter_seen, most, config.seed)
    if not len(found):
        raise DataError(
            f"{run.uri}: every positive example in split={split} is of an item that the user has seen, "
            f"and score.filter_seen={filter_seen} leaves those out. Try --set score.filter_seen=none."
        )
    return found


class Ranking:
    """A fixed sample of the users with positives in a part, each to be ranked all items that may be listed;
    the users are as of the part's start (HeldOut).

    Args:
        run: the features run.
        items: its items.
        config: seed and size of the sample.
        split: `valid` or `test`.
        paired: the model's pair fields, where it has any.
        only: of these users; None: of all.
    """

    def __init__(
        self,
        run: Run,
        items: Items,
        config: Config,
        split: str = "valid",
        paired: Pairs | None = None,
        only: pa.Array | None = None,
    ) -> None:
        self.metric = config.deepfm.metric
        self.users = users_of_part(run, items, config, split, config.deepfm.valid_users, only)
        self.told = self.users.told(split)
        self.items, self.paired = items, paired
        self.k = min(K, items.spec.n_items)

    def __len__(self) -> int:
        return len(self.users)

    def figures(self, model: DeepFM, device: torch.device) -> dict[str, float]:
        """See Validation."""
        return {self.metric: self.ndcg(model, device)}

    @torch.no_grad()
    def ndcg(self, model: DeepFM, device: torch.device) -> float:
        """The mean NDCG@10 of the sample's users. Collective: every worker ranks its share of the users."""
        training = model.training
        model.eval()
        held_out = self.users
        # Lookups are collective too, so each worker looks up equally many rows.
        users = _gather(model.user_side(held_out.user.take(_share(len(self))).to(device)), len(self))
        total = torch.zeros(1, dtype=torch.float64, device=device)
        for first, last in held_out.groups:
            share = self.items.at(_share(len(self.items)) + 1, held_out.days[first : first + 1])
            items = _gather(model.item_side(share.to(device)), len(self.items))
            size = max(1, CHUNK // (len(self.items) * model.width))
            per_worker = -(-(last - first) // dist.get_world_size())
            start = first + dist.get_rank() * per_worker
            stop = min(start + per_worker, last)
            for chunk in range(start, stop, size):
                end = min(chunk + size, stop)
                pair = None
                if self.paired:
                    state = held_out.state.slice(chunk, end - chunk)
                    pair = self.paired.of_all(state)[:, 1:].to(device)
                sides = users.rows(chunk, end).leading(-1, 1), items.leading(1, -1)
                logits = model.logits(*sides, pair=pair)
                total += self._ndcg(logits, chunk, end).sum()
        dist.all_reduce(total)
        model.train(training)
        return float(total) / len(self)

    def _ndcg(self, logits: Tensor, start: int, stop: int) -> Tensor:
        """NDCG@10 [U], ideal min(10, relevant), of the users `start` to before `stop` (Järvelin 2002).

        NaN where a score is not finite.
        """
        relevant = torch.zeros_like(logits, dtype=torch.bool)
        rows, items, _ = (part.to(logits.device) for part in self.users.relevant(start, stop))
        relevant[rows, items - 1] = True
        allowed = self.users.allowed(start, stop)[:, 1:].to(logits.device)
        logits = logits.masked_fill(~allowed, -torch.inf)
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

    Raises:
        DataError: all labels are equal, so that nothing can be told apart.
    """

    def __init__(self, run: Run, items: Items, config: Config, split: str = "valid") -> None:
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
        self.user = side_batch(table, items.spec.side("user", "context"))
        self.items = torch.from_numpy(table["item"].to_numpy().astype(np.int64))
        self.days = torch.from_numpy(days_of(table["timestamp"]))
        self.catalogue = items

    def figures(self, model: DeepFM, device: torch.device) -> dict[str, float]:
        """See Validation and `predicted`."""
        logits = self.logits(model, device)
        if not np.isfinite(logits).all():
            return {self.metric: np.nan}
        return predicted(self.metric, self.targets, logits, self.users)

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
            found.append(model.logits(user, item))
        logits = torch.cat(found)
        if dist.get_world_size() > 1:
            whole = logits.new_empty(len(logits) * dist.get_world_size())
            dist.all_gather_into_tensor(whole, logits)
            logits = whole
        model.train(training)
        return logits[: len(self.targets)].float().cpu().numpy()


def predicted(
    metric: str, targets_N: np.ndarray, logits_N: np.ndarray, users_N: np.ndarray
) -> dict[str, float]:
    """How well examples are predicted: rmse and mse of values; auc, gauc (within users; none where no user
    has both labels), logloss and calibration of labels.

    Args:
        metric: that decides, `rmse` or `auc`.
        targets_N: [N] values or labels.
        logits_N: [N] predicted.
        users_N: [N] whose examples they are.
    """
    if metric == "rmse":
        return {"rmse": rmse(targets_N, logits_N), "mse": mse(targets_N, logits_N)}
    figures = {
        "auc": auc(targets_N, logits_N),
        "gauc": grouped_auc(targets_N, logits_N, users_N),
        "logloss": logloss(targets_N, logits_N),
        "calibration": calibration(targets_N, logits_N),
    }
    return {name: of for name, of in figures.items() if not np.isnan(of)}


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

"""NDCG@10 of the validation part, which decides when training stops.

Legend: U users of a chunk, I items, H width of the first hidden layer.
"""

import itertools

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
import torch.distributed as dist
from torch import Tensor

from recsys_dist.config import Config
from recsys_dist.deepfm.batches import side_batch
from recsys_dist.deepfm.examples import positives
from recsys_dist.deepfm.items import Items, days_of, weekdays
from recsys_dist.deepfm.model import DeepFM, Side
from recsys_dist.errors import DataError
from recsys_dist.schema import SEEN_COLUMN, UNKNOWN, pairs, without_seen
from recsys_dist.workspace import Run

K = 10
NONE = np.empty(0, np.int64)
CHUNK = 1 << 24
"""Numbers of the widest array [U, I, H] that a chunk of users makes: 64 MiB of float32."""


class Validation:
    """A fixed sample of the users with positives in a part, each to be ranked all items that may be listed.

    A user's fields are as of the part's start. The list is that of the day of the user's first positive event
    in the part, as in the evaluation: the items' fields are as of that day, and the context is what a list
    made the night before knows of it (FeatureSpec.context).

    Args:
        run: the features run.
        items: its items.
        config: seed and size of the sample.
        split: `valid` or `test`.
    """

    def __init__(self, run: Run, items: Items, config: Config, split: str = "valid") -> None:
        spec = items.spec
        filter_seen = config.score.filter_seen
        state = run.table("users", filter=pc.field("as_of") == split)
        events = without_seen(positives(run, spec, split), state, filter_seen)
        if not len(events):
            raise DataError(
                f"{run.uri}: every positive example in split={split} is of an item that the user has seen, "
                f"and score.filter_seen={filter_seen} leaves those out. Try --set score.filter_seen=none."
            )
        users = np.unique(events["user"].to_numpy())
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
            size = max(1, CHUNK // (len(self.items) * items.hidden.shape[1]))
            per_worker = -(-(last - first) // dist.get_world_size())
            start = first + dist.get_rank() * per_worker
            stop = min(start + per_worker, last)
            for chunk in range(start, stop, size):
                end = min(chunk + size, stop)
                logits = model.logits(users.rows(chunk, end).leading(-1, 1), items.leading(1, -1))
                total += self._ndcg(logits, chunk, end).sum()
        dist.all_reduce(total)
        model.train(training)
        return float(total) / len(self.user)

    def _ndcg(self, logits: Tensor, start: int, stop: int) -> Tensor:
        """NDCG@10 [U], ideal min(10, relevant), of the users `start` to before `stop` (Järvelin 2002)."""
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
        return (hits * discount).sum(1) / ideal


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
        dist.all_gather_into_tensor(gathered, part.contiguous())
        parts.append(gathered[:rows])
    return Side(*parts)


def _within(found: tuple[np.ndarray, np.ndarray], start: int, stop: int) -> tuple[Tensor, Tensor]:
    first, last = np.searchsorted(found[0], [start, stop])
    rows, items = found[0][first:last] - start, found[1][first:last].astype(np.int64)
    return torch.from_numpy(rows), torch.from_numpy(items)

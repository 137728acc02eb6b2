"""Users whose lists are made as of a moment, and what they had after it: what a ranking is measured on, or
learned from.

Legend: U users, I items (index 0 is unknown).
"""

import itertools
from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from torch import Tensor

from recsys_dist.deepfm.batches import side_batch
from recsys_dist.deepfm.items import Items, days_of, weekdays
from recsys_dist.schema import SEEN_COLUMN, UNKNOWN, SeenFilter, pairs, without_seen

NONE = np.empty(0, np.int64)


class HeldOut:
    """The users with events after the moment of items that their lists may have.

    The list is that of the day of the user's first such event, as in the evaluation: the items' fields are as
    of that day, and the context is what a list made the night before knows of it (FeatureSpec.context).

    Args:
        items: of the features run, with the model's fields.
        state: the users as of the moment: `user`, the fields of side user, and what they have seen, in the
            column that `filter_seen` names.
        positives: the positive events after it: `user`, `item`, `timestamp`.
        filter_seen: which items are left out of the lists.
        most: users are drawn where there are more.
        seed: of the draw.
    """

    def __init__(
        self,
        items: Items,
        state: pa.Table,
        positives: pa.Table,
        filter_seen: SeenFilter,
        most: int,
        seed: int,
    ) -> None:
        spec = items.spec
        self.items, self.filter_seen = items, filter_seen
        events = without_seen(positives, state, filter_seen)
        users = np.unique(events["user"].to_numpy())
        self.left_out = len(np.unique(positives["user"].to_numpy())) - len(users)
        """Users all of whose positives they had seen."""
        self.drawn_from = len(users)
        if len(users) > most:
            users = np.sort(np.random.default_rng([seed, 1]).choice(users, most, replace=False))
        state = state.filter(pc.is_in(state["user"], pa.array(users))).sort_by("user")
        events = events.filter(pc.is_in(events["user"], pa.array(users)))
        events = events.sort_by([("user", "ascending"), ("timestamp", "ascending"), ("item", "ascending")])
        first = np.unique(events["user"].to_numpy(), return_index=True)[1]
        days = days_of(events["timestamp"].take(pa.array(first)))
        # Row by day, so that the users of a day stand together; a stable sort keeps them ascending.
        order = np.argsort(days, kind="stable")
        self.state: pa.Table = state.take(pa.array(order))
        self.days = torch.from_numpy(days[order])
        columns = {field.name: self.state[field.name] for field in spec.side("user")}
        columns |= spec.context(weekdays(days[order]))
        self.user = side_batch(columns, spec.side("user", "context"))
        # Users of equal item fields: of a day where they change from day to day, else all.
        starts = np.unique(self.days, return_index=True)[1] if spec.daily else np.array([0])
        self.groups = list(itertools.pairwise([*starts.tolist(), len(days)]))
        """The first of the users for whom the items' fields are the same, and that after the last."""
        # Pairs ascend by row.
        rows, seen = (NONE, NONE)
        if filter_seen != "none":
            rows, seen = pairs(self.state[SEEN_COLUMN[filter_seen]])
        known = seen > UNKNOWN
        self._seen = rows[known], seen[known]
        owners = events["user"].to_numpy()
        rows = np.argsort(order)[np.searchsorted(users, owners)]
        ascending = np.argsort(rows, kind="stable")
        place = np.arange(len(owners)) - np.searchsorted(owners, owners)
        liked = events["item"].to_numpy().astype(np.int64)
        self._truth = rows[ascending], liked[ascending], place[ascending]

    def __len__(self) -> int:
        return len(self.user)

    def told(self, name: str) -> str:
        """How many they are, in a line."""
        told = f"{name}: {len(self):,} users"
        if len(self) < self.drawn_from:
            told += f", drawn from {self.drawn_from:,}"
        if self.left_out:
            seen = f"all their positives were seen (filter_seen={self.filter_seen})"
            told += f"; {self.left_out:,} left out: {seen}"
        return told

    def relevant(self, start: int, stop: int) -> list[Tensor]:
        """What the users `start` to before `stop` had after the moment: their rows, counted from `start`, the
        items, and each event's place among its user's, from 0 in time order; int64.
        """
        return _within(self._truth, start, stop)

    def allowed(self, start: int, stop: int) -> Tensor:
        """[U, I] bool: which items may be in the lists of the users `start` to before `stop`."""
        rows, items = _within(self._seen, start, stop)
        allowed = self.items.listable(self.days[start:stop]).expand(stop - start, -1).clone()
        allowed[rows, items] = False
        return allowed


def _within(found: Sequence[np.ndarray], start: int, stop: int) -> list[Tensor]:
    """Of arrays of which the first are ascending rows, the part of some rows; these count from the first."""
    first, last = np.searchsorted(found[0], [start, stop])
    rows, *others = (torch.from_numpy(of[first:last]) for of in found)
    return [rows - start, *others]

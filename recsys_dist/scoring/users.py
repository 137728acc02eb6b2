"""A batch of users as a Scorer sees them: their state as of a cut, the context, and what may be listed."""

from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from recsys_dist.deepfm.items import Items, weekdays
from recsys_dist.schema import SEEN_COLUMN, SeenFilter, pairs


@dataclass(frozen=True)
class Users:
    """B rows of a features run's users/, with the context columns added, each to get the list of a day."""

    table: pa.Table
    """Every user and context field of the FeatureSpec, and the lists `seen` and `liked`."""
    excluded: tuple[Tensor, Tensor]
    """(row, item) pairs that must not be listed, two [E] int64 tensors."""
    listable: Tensor
    """[B, I] or [1, I] bool: the items that may be listed on the day (Items.listable)."""
    days: Tensor
    """[B] int32, days since 1970 (UTC): the day of each list, which items' daily fields are as of."""

    def __len__(self) -> int:
        return self.table.num_rows

    @property
    def indices(self) -> Tensor:
        """[B] int64, the users' indices."""
        return torch.as_tensor(self.table["user"].to_numpy().astype(np.int64))


def with_context(items: Items, rows: pa.Table, days: np.ndarray, filter_seen: SeenFilter) -> Users:
    """Make a batch of rows of users/.

    Args:
        items: of the features run that the rows come from.
        rows: B rows.
        days: [B] int32, days since 1970 (UTC), that each list is for.
        filter_seen: which items of the user's are excluded.
    """
    for name, column in items.spec.context(weekdays(days)).items():
        rows = rows.append_column(name, column)
    column = SEEN_COLUMN.get(filter_seen)
    empty = torch.empty(0, dtype=torch.int64)
    excluded = tensor_pairs(rows[column]) if column else (empty, empty)
    moment = torch.as_tensor(days.astype(np.int32))
    return Users(rows.combine_chunks(), excluded, items.listable(moment), moment)


def tensor_pairs(column: pa.ChunkedArray) -> tuple[Tensor, Tensor]:
    """A list column as (row, value) pairs, two [E] int64 tensors."""
    rows, values = pairs(column)
    return torch.as_tensor(rows), torch.as_tensor(values)

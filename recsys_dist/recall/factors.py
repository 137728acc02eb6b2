"""Factors of users and items: ALS's.

Legend: B users of a batch, U users, I items (index 0 is unknown), R rank.
"""

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset
import torch
from torch import Tensor

from recsys_dist.schema import FACTORS_OF, FeatureSpec
from recsys_dist.workspace import Run


class FactorTables:
    """The factors of all items, and of users those that are asked for.

    Args:
        spec: of the features run.
        user_factors: of an als run (schema FACTORS).
        item_factors: likewise.
        most: users' factors of more bytes are not held, but read for the users of a batch.
    """

    def __init__(
        self,
        spec: FeatureSpec,
        user_factors: pa.dataset.Dataset,
        item_factors: pa.Table,
        most: int | None = None,
    ) -> None:
        n_users, n_items = spec.n_users, spec.n_items
        self.items_IR, self.known_I = _dense(item_factors, np.arange(n_items + 1))
        """float32, zeros where there are none; and bool: has the item any?"""
        self._user_factors = user_factors
        self.held: tuple[Tensor, Tensor] | None = None
        """Those of all users; None where they are read."""
        if most is None or 4 * (n_users + 1) * self.items_IR.shape[1] <= most:
            self.held = self._of(user_factors.to_table(), np.arange(n_users + 1))

    @classmethod
    def read(cls, spec: FeatureSpec, als: Run, folder: str = "", most: int | None = None) -> "FactorTables":
        """Those of an als run, or in a folder of it, which ends with a slash.

        Raises:
            FileNotFoundError: they are not there.
        """
        users, items = (f"{folder}{name}" for name in FACTORS_OF)
        return cls(spec, als.dataset(users), als.table(items), most)

    def of(self, users: np.ndarray) -> tuple[Tensor, Tensor]:
        """[B, R] float32 factors of users by index, zeros where there are none; and [B] bool: has one any?"""
        if self.held is not None:
            rows_B = torch.as_tensor(users.astype(np.int64))
            return self.held[0][rows_B], self.held[1][rows_B]
        if not len(users):
            return self.items_IR[:0], self.known_I[:0]
        indices, rows = np.unique(users, return_inverse=True)
        index = pc.field("index")
        between = (index >= int(indices[0])) & (index <= int(indices[-1]))
        found = self._user_factors.to_table(filter=between & index.isin(indices))
        users_UR, known_U = self._of(found, indices)
        rows_B = torch.as_tensor(rows)
        return users_UR[rows_B], known_U[rows_B]

    def _of(self, factors: pa.Table, indices: np.ndarray) -> tuple[Tensor, Tensor]:
        return _dense(factors, indices, self.items_IR.shape[1])


def _dense(factors: pa.Table, indices: np.ndarray, rank: int = 1) -> tuple[Tensor, Tensor]:
    """Factors of these indices, ascending: [N, R] with zeros where there are none; and [N] bool: is there
    one? Where nobody has any, R is `rank`.
    """
    vectors = factors["vector"].combine_chunks()
    rank = len(vectors[0]) if len(vectors) else rank
    dense = np.zeros((len(indices), rank), np.float32)
    row = np.searchsorted(indices, factors["index"].to_numpy())
    dense[row] = pc.list_flatten(vectors).to_numpy().reshape(len(row), rank)
    known = np.zeros(len(indices), bool)
    known[row] = True
    return torch.as_tensor(dense), torch.as_tensor(known)

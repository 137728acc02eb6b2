"""Items by what they are: vectors of their attributes' values, which items without events have as well.

Legend: B users, I items (index 0 is unknown), H history positions, V values of all attributes together, N
pairs of an item and a value that it has.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

ROOM = 1 << 22
"""Numbers of the arrays [V, B] and [I, B]: a few users at a time where there are many values or items."""
WHOLE = 1 << 20
"""Parts of 1 in the whole numbers that lists are compared by: sums of those do not depend on their order."""


class ItemVectors:
    """Vectors of length 1 in which each value of the item stands with its inverse document frequency
    log((1 + items) / (1 + items with the value)), so that what few items have counts most (Salton, Buckley,
    "Term-weighting approaches in automatic text retrieval", 1988). The inner product of two is their cosine.
    An item that has no value, or none that tells items apart, has the vector 0.

    Args:
        attributes: [I, .] int64 of each attribute, the items' values, 0 where there are fewer.
    """

    def __init__(self, attributes: Sequence[Tensor]) -> None:
        self.n = len(attributes[0]) - 1
        highest = [int(values.max()) for values in attributes]
        self.width = max(sum(highest), 1)
        keys, before = [], 0
        for values, high in zip(attributes, highest, strict=True):
            item, place = torch.nonzero(values, as_tuple=True)
            keys.append(item * self.width + before + values[item, place] - 1)
            before += high
        # Ascending by item; a value that an item has twice counts once.
        key_N = torch.unique(torch.cat(keys))
        item, self.value_N = key_N // self.width, key_N % self.width
        having_V = torch.bincount(self.value_N, minlength=self.width)
        # In float64, so that equal sums of other summands are equal again as float32.
        weight_N = torch.log((1 + self.n) / (1 + having_V.double()))[self.value_N]
        length_I = torch.zeros(self.n + 1, dtype=torch.float64).scatter_add_(0, item, weight_N**2).sqrt_()
        self.weight_N = weight_N / length_I[item].clamp(min=1e-12)
        self.first_I = torch.searchsorted(item, torch.arange(self.n + 2))
        """[I + 1]: where each item's pairs begin, and the end of the last one's."""

    def scores(self, history_BH: Tensor, share_BH: Tensor) -> Tensor:
        """[B, I] float32: the inner products of the items' vectors and of the sum of those of a history's
        items, each with its share.

        Args:
            history_BH: int64, 0 where there is no item.
            share_BH: float.
        """
        scores_BI = torch.empty(len(history_BH), self.n + 1)
        size = max(1, ROOM // max(self.n, self.width))
        for start in range(0, len(history_BH), size):
            rows = slice(start, start + size)
            user_VB = self._summed(history_BH[rows], share_BH[rows], self.weight_N)
            # The product with a sparse matrix, a row an item.
            found_IB = torch.nn.functional.embedding_bag(
                self.value_N,
                user_VB,
                self.first_I,
                mode="sum",
                per_sample_weights=self.weight_N,
                include_last_offset=True,
            )
            scores_BI[rows] = found_IB.T.float()
        return scores_BI

    def entries(self) -> tuple[Tensor, Tensor, Tensor]:
        """The vectors' numbers that may be other than 0, three [N] int64: item, value, and the number as so
        many parts of WHOLE.
        """
        item_N = torch.repeat_interleave(self.first_I.diff())
        return item_N, self.value_N, torch.round(self.weight_N * WHOLE).long()

    def likeness(self, lists_BK: Tensor) -> Tensor:
        """[B] float64: the mean cosine of two items of a list, NaN for a list of fewer than two.

        The cosines of all pairs add up to (|sum of vectors|^2 - sum of |vectors|^2) / 2. Computed in whole
        numbers: those of the vectors are rounded to multiples of 1 / WHOLE.

        Args:
            lists_BK: int64, 0 where there is no item; K is at most 1000, so that squares stay below 2^63.
        """
        length_B = (lists_BK != 0).sum(1)
        pairs_B = length_B * (length_B - 1)
        weight_N = self.entries()[2].double()  # and all sums of them exact
        square_I = torch.segment_reduce(weight_N.square(), "sum", offsets=self.first_I).long()
        found_B = torch.empty(len(lists_BK), dtype=torch.int64)
        size = max(1, ROOM // max(self.n, self.width))
        for start in range(0, len(lists_BK), size):
            rows = slice(start, start + size)
            sum_VB = self._summed(lists_BK[rows], torch.ones(lists_BK[rows].shape), weight_N).long()
            found_B[rows] = sum_VB.square().sum(0) - square_I[lists_BK[rows]].sum(1)
        return torch.where(pairs_B > 0, found_B.double() / (pairs_B * WHOLE**2).double(), torch.nan)

    def _summed(self, history_BH: Tensor, share_BH: Tensor, weight_N: Tensor) -> Tensor:
        """[V, B] float64: the sum of the vectors of each history's items, each with its share.

        Args:
            history_BH: int64, 0 where there is no item.
            share_BH: float.
            weight_N: of the pairs of an item and a value, in any unit.
        """
        row, place = torch.nonzero(history_BH, as_tuple=True)
        item = history_BH[row, place]
        first, count = self.first_I[item], self.first_I[item + 1] - self.first_I[item]
        owner = torch.repeat_interleave(count)
        pair = torch.arange(len(owner)) + (first - count.cumsum(0) + count)[owner]
        weight = share_BH[row, place][owner] * weight_N[pair]
        cell = self.value_N[pair] * len(history_BH) + row[owner]
        cells = self.width * len(history_BH)
        # Of nothing at all bincount makes whole numbers.
        summed = np.bincount(cell.numpy(force=True), weight.numpy(force=True), cells).astype(np.float64)
        return torch.as_tensor(summed).view(self.width, -1)

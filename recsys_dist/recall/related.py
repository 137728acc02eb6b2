"""A table of related items in memory, and what the items of a history say by it.

Legend: B users, I items (index 0 is unknown), N others of an item, H history positions.
"""

import functools

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from recsys_dist.schema import padded

SQUARE = 1 << 26
"""Weights of all pairs of items are looked up in one array where there are no more of them."""


class RelatedItems:
    """The others that each item speaks for, and how loud.

    Args:
        related: of a recall run (schema RELATED).
        n: number of items.
    """

    def __init__(self, related: pa.Table, n: int) -> None:
        related = related.sort_by([("item", "ascending"), ("other", "ascending")])
        item, other, weight = (related[name].to_numpy() for name in ("item", "other", "weight"))
        place = np.arange(len(item)) - np.searchsorted(item, item)
        others = np.zeros((n + 1, place.max(initial=0) + 1), np.int32)
        weights = np.zeros(others.shape, np.float32)
        others[item, place], weights[item, place] = other, weight
        self.others_IN = torch.as_tensor(others)
        """int32, 0 where there are fewer."""
        self.weights_IN = torch.as_tensor(weights)
        self.mean_weight = float(np.abs(weight).mean(dtype=np.float64)) if len(weight) else 1.0
        """Of their sizes, where some are below 0."""

    def add(self, scores_BI: Tensor, history_BH: Tensor, share_BH: Tensor) -> None:
        """Add to the scores what the items of a history say, each with its share."""
        # Place by place: a tensor of all of them would be H times as large.
        for place in range(history_BH.shape[1]):
            item_B = history_BH[:, place]
            spoken = self.weights_IN[item_B] * share_BH[:, place, None]
            scores_BI.scatter_add_(1, self.others_IN[item_B].long(), spoken)

    def few(self, number: int) -> bool:
        """Is it less work to look up what is said of so many items a user than to say it of all?"""
        return number < self.others_IN.shape[1] and len(self.others_IN) ** 2 <= SQUARE

    @functools.cached_property
    def square_II(self) -> Tensor:  # noqa: N802 (the shape)
        """Weight of each pair of items, 0 where there is none."""
        square_II = torch.zeros(len(self.others_IN), len(self.others_IN))
        return square_II.scatter_(1, self.others_IN.long(), self.weights_IN)

    def of(self, history_BH: Tensor, share_BH: Tensor, items_BC: Tensor) -> Tensor:
        """[B, C] what `add` would add to these items."""
        found_BC = torch.zeros(items_BC.shape)
        for place in range(history_BH.shape[1]):
            spoken = self.square_II[history_BH[:, place, None], items_BC]
            found_BC += spoken * share_BH[:, place, None]
        return found_BC

    def latest(self, history_BH: Tensor, values_BH: Tensor, items_BC: Tensor) -> Tensor:
        """[B, C] what `put` would set these items to."""
        found_BC = torch.zeros(items_BC.shape)
        for place in range(history_BH.shape[1]):
            related = self.square_II[history_BH[:, place, None], items_BC] != 0
            found_BC = torch.where(related, values_BH[:, place, None], found_BC)
        return found_BC

    def put(self, scores_BI: Tensor, history_BH: Tensor, values_BH: Tensor) -> None:
        """Set the related items of each place of a history to its value; later places win."""
        for place in range(history_BH.shape[1]):
            others_BN = self.others_IN[history_BH[:, place]].long()
            scores_BI.scatter_(1, others_BN, values_BH[:, place, None].expand(-1, others_BN.shape[1]))


def latest_of(column: pa.ChunkedArray) -> tuple[Tensor, Tensor]:
    """Histories, the most recent item last, as [B, H] int64 items, 0 after the last, and [B, H] their ages:
    how many came after, below 0 where there is no item.
    """
    length_B = torch.tensor(pa.compute.list_value_length(column).fill_null(0).to_numpy())
    width = int(length_B.max()) if len(length_B) else 0
    age_BH = length_B[:, None] - 1 - torch.arange(width)
    return torch.as_tensor(padded(column, width)), age_BH


def recent_share(age_BH: Tensor, recency: float) -> Tensor:
    """exp(-age / recency) of `latest_of`'s ages, 0 where there is no item."""
    return torch.where(age_BH >= 0, torch.exp(-age_BH.clamp(min=0) / recency), 0.0)

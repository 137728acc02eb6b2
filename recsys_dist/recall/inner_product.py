"""Exact top-K of scores and of inner products, ties broken by item index, excluded items left out.

Legend: B users, I items (index 0 is unknown and never listed), R rank, K list length.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from recsys_dist.schema import UNKNOWN


@dataclass(frozen=True)
class Lists:
    """Ranked items for a batch of users; a list that is too short ends in item 0 with score -inf."""

    items: Tensor
    """[B, K] int64"""
    scores: Tensor
    """[B, K] float32, descending; equal scores ascend by item."""


def top_k(
    scores_BI: Tensor,
    k: int,
    excluded: tuple[Tensor, Tensor] | None = None,
    listable: Tensor | None = None,
) -> Lists:
    """The K best items of each row.

    Args:
        scores_BI: [B, I] float32; changed in place where items are excluded.
        k: list length; may exceed the catalogue.
        excluded: (row, item) pairs, two [E] int64 tensors, that must not be listed.
        listable: [B, I] or [1, I] bool: no other item is listed.

    Raises:
        ValueError: a score is NaN.
    """
    scores_BI[:, UNKNOWN] = -torch.inf
    if excluded is not None:
        scores_BI[excluded] = -torch.inf
    if listable is not None:
        scores_BI.masked_fill_(~listable, -torch.inf)
    if torch.isnan(scores_BI).any():
        raise ValueError("a score is NaN")
    taken = min(k, scores_BI.shape[1])
    values, items = torch.topk(scores_BI, taken, dim=1, sorted=False)
    # topk leaves open which of several equal scores at the end of the list it takes.
    threshold = values.amin(dim=1, keepdim=True)
    tied = torch.nonzero((scores_BI >= threshold).sum(dim=1) > taken).squeeze(1)
    if len(tied):
        ordered = torch.sort(scores_BI[tied], dim=1, descending=True, stable=True)
        values[tied], items[tied] = ordered.values[:, :taken], ordered.indices[:, :taken]
    by_item = torch.argsort(items, dim=1)
    values, items = values.gather(1, by_item), items.gather(1, by_item)
    by_score = torch.sort(values, dim=1, descending=True, stable=True)
    values, items = by_score.values, items.gather(1, by_score.indices)
    items = torch.where(torch.isneginf(values), UNKNOWN, items)
    short = k - taken
    if short:
        values = torch.nn.functional.pad(values, (0, short), value=-torch.inf)
        items = torch.nn.functional.pad(items, (0, short), value=UNKNOWN)
    return Lists(items, values)


def nearest_items(
    users_BR: Tensor,
    items_IR: Tensor,
    k: int,
    excluded: tuple[Tensor, Tensor] | None = None,
    listable: Tensor | None = None,
) -> Lists:
    """The K items with the greatest inner product for each user, over all items (exact search).

    Args:
        users_BR: [B, R] float32.
        items_IR: [I, R] float32, row i the vector of item index i.
        k: list length.
        excluded: see `top_k`.
        listable: see `top_k`.
    """
    return top_k(users_BR @ items_IR.T, k, excluded, listable)

"""Exact top-K of scores and of inner products, ties broken by item index, excluded items left out.

To select K of many scores takes longer than to compute them. So the greatest of each group of columns is
found first, in one pass: whatever is among the K best is in one of the K groups with the greatest of these.

Legend: B users, I items (index 0 is unknown and never listed), R rank, K list length, G columns of a group,
N groups, T columns that are in none.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from recsys_dist.schema import UNKNOWN

GROUP = 32
"""Columns of a group."""
USERS_AT_ONCE = 256
"""Users whose scores are computed together: their products keep all cores busy and stay near them."""
GPU_SCORES = 1 << 31
"""Scores of the users that a GPU takes together: 8 GiB."""


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
    if listable is not None and len(listable) == 1:
        scores_BI[:, ~listable[0]] = -torch.inf
    elif listable is not None:
        scores_BI.masked_fill_(~listable, -torch.inf)
    taken = min(k, scores_BI.shape[1])
    values, items, open_B = _best(scores_BI, taken)
    tied = torch.nonzero(open_B).squeeze(1)
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


def _best(scores_BI: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """K greatest scores of each row in any order, their columns, and [B] bool: does it stay open which of
    several equal scores at the end of the list are taken?
    """
    n = scores_BI.shape[1] // GROUP
    if n <= k:
        _require_no_nan(scores_BI)
        best = torch.topk(scores_BI, k, dim=1, sorted=False)
        return best.values, best.indices, _tied(scores_BI, best.values)
    # Group g has the columns g, N + g, 2N + g, ..., so that the greatest are found column by column.
    grouped_BGN = scores_BI[:, : n * GROUP].unflatten(1, (GROUP, n))
    greatest_BN = grouped_BGN.amax(1)
    rest_BT = scores_BI[:, n * GROUP :]
    _require_no_nan(greatest_BN)
    _require_no_nan(rest_BT)
    groups = torch.topk(greatest_BN, k, dim=1, sorted=False)
    within = groups.indices[:, None, :].expand(-1, GROUP, -1)
    some_BM = torch.cat([grouped_BGN.gather(2, within).flatten(1), rest_BT], dim=1)
    columns_BM = torch.cat(
        [
            (within + n * torch.arange(GROUP, device=scores_BI.device)[None, :, None]).flatten(1),
            torch.arange(n * GROUP, scores_BI.shape[1], device=scores_BI.device).expand(len(scores_BI), -1),
        ],
        dim=1,
    )
    best = torch.topk(some_BM, k, dim=1, sorted=False)
    open_B = _tied(some_BM, best.values) | _tied(greatest_BN, groups.values)
    return best.values, columns_BM.gather(1, best.indices), open_B


def _tied(scores: Tensor, best: Tensor) -> Tensor:
    """[B] bool: are there more scores equal to the least of the best? Of -inf, which is no score, it is no
    matter.
    """
    least = best.amin(dim=1, keepdim=True)
    return ((scores >= least).sum(dim=1) > best.shape[1]) & (least.squeeze(1) > -torch.inf)


def _require_no_nan(scores: Tensor) -> None:
    if torch.isnan(scores).any():
        raise ValueError("a score is NaN")


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
        excluded: see `top_k`; its rows ascend.
        listable: see `top_k`.
    """
    found = []
    size = USERS_AT_ONCE if users_BR.device.type == "cpu" else max(1, GPU_SCORES // len(items_IR))
    scores = users_BR.new_empty(min(size, len(users_BR)), len(items_IR))
    for start in range(0, len(users_BR), size):
        users = users_BR[start : start + size]
        own = None
        if excluded is not None:
            ends = torch.tensor([start, start + len(users)], device=excluded[0].device)
            first, last = torch.searchsorted(excluded[0], ends).tolist()
            own = (excluded[0][first:last] - start, excluded[1][first:last])
        may = listable
        if listable is not None and len(listable) > 1:
            may = listable[start : start + len(users)]
        out = torch.mm(users, items_IR.T, out=scores[: len(users)])
        found.append(top_k(out, k, own, may))
    return Lists(torch.cat([part.items for part in found]), torch.cat([part.scores for part in found]))

"""Exact top-K of scores and of inner products, ties broken by item index, excluded items left out.

To select K of many scores takes longer than to compute them. So the greatest score of each small group of
columns is found first, in one pass, and of these that of each large group: where K large groups have a score
of at least t, the K best scores are at least t, and only few others are. These are put in order.

Legend: B users, I items (index 0 is unknown and never listed), R rank, K list length, F small groups, N large
ones, M candidates of all users together, W the most that one user has.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from recsys_dist.schema import UNKNOWN

SMALL, LARGE = 32, 4
"""Columns of a small group; small groups of a large one. Small groups are columns side by side, which is how
they are read fastest; large ones are far apart, because items side by side are equally popular."""
WIDEST = 4096
"""A user with more candidates has many equal scores: all his scores are put in order."""
SORTED = 4
"""So many times K candidates are put in order at once; of more the K best are taken first."""
USERS_AT_ONCE = 128
"""Users whose scores are computed together: their products keep all cores busy and stay near them."""
GPU_SCORES = 1 << 31
"""Scores of the users that a GPU takes together: 8 GiB."""


class NotANumber(ValueError):
    """A score is NaN."""


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
        scores_BI: [B, I] float32, contiguous; changed in place where items are excluded.
        k: list length; may exceed the catalogue.
        excluded: (row, item) pairs, two [E] int64 tensors, that must not be listed.
        listable: [B, I] or [1, I] bool: no other item is listed.

    Raises:
        NotANumber: a score is NaN.
    """
    scores_BI[:, UNKNOWN] = -torch.inf
    if excluded is not None:
        rows, items = excluded
        # Places of all scores in a row: with two indices it takes five times as long.
        scores_BI.view(-1).index_fill_(0, rows * scores_BI.shape[1] + items, -torch.inf)
    if listable is not None and len(listable) == 1:
        scores_BI[:, ~listable[0]] = -torch.inf
    elif listable is not None:
        scores_BI.masked_fill_(~listable, -torch.inf)
    taken = min(k, scores_BI.shape[1])
    values, items = _best(scores_BI, taken)
    items = torch.where(torch.isneginf(values), UNKNOWN, items)
    short = k - taken
    if short:
        values = torch.nn.functional.pad(values, (0, short), value=-torch.inf)
        items = torch.nn.functional.pad(items, (0, short), value=UNKNOWN)
    return Lists(items, values)


def _best(scores_BI: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """[B, K] the greatest scores of each row, descending, and their columns, of equal scores ascending."""
    n = scores_BI.shape[1] // (SMALL * LARGE)
    if n <= k:
        _require_no_nan(scores_BI)
        return _first(scores_BI, torch.arange(scores_BI.shape[1], device=scores_BI.device), k)
    grouped_BFS = scores_BI[:, : n * LARGE * SMALL].unflatten(1, (n * LARGE, SMALL))
    rest_BT = scores_BI[:, n * LARGE * SMALL :]
    greatest_BF = grouped_BFS.amax(2)
    _require_no_nan(greatest_BF)
    _require_no_nan(rest_BT)
    greatest_BN = greatest_BF.unflatten(1, (LARGE, n)).amax(1)
    least_B = torch.topk(greatest_BN, k, dim=1, sorted=False).values.amin(1)
    # What is -inf is not listed, however few others there are.
    least_B = least_B.clamp(min=torch.finfo(scores_BI.dtype).min)
    rows_G, groups_G = (greatest_BF >= least_B[:, None]).nonzero(as_tuple=True)
    # As windows of all scores in a row: to look them up by two indices takes ten times as long.
    windows = scores_BI.reshape(-1).unfold(0, SMALL, 1)
    some_GS = windows.index_select(0, rows_G * scores_BI.shape[1] + groups_G * SMALL)
    of_M, place_M = (some_GS >= least_B[rows_G, None]).nonzero(as_tuple=True)
    rest_rows, rest_place = (rest_BT >= least_B[:, None]).nonzero(as_tuple=True)
    rows_M = torch.cat([rows_G[of_M], rest_rows])
    columns_M = torch.cat([groups_G[of_M] * SMALL + place_M, rest_place + n * LARGE * SMALL])
    values_M = torch.cat([some_GS.view(-1)[of_M * SMALL + place_M], rest_BT[rest_rows, rest_place]])
    # A user's candidates side by side: first those of the groups, then those that are in none.
    ends_B = torch.bincount(rows_M[: len(of_M)], minlength=len(scores_BI))
    counts_B = torch.bincount(rows_M, minlength=len(scores_BI))
    slot_M = torch.cat(
        [
            torch.arange(len(part), device=rows_M.device) - (many_B.cumsum(0) - many_B - before_B)[part]
            for part, many_B, before_B in (
                (rows_M[: len(of_M)], ends_B, torch.zeros_like(ends_B)),
                (rest_rows, counts_B - ends_B, ends_B),
            )
        ]
    )
    many_B = counts_B > WIDEST
    width = max(int(counts_B.masked_fill(many_B, 0).max()), k)
    values_BW = scores_BI.new_full((len(scores_BI), width), -torch.inf)
    columns_BW = torch.zeros_like(values_BW, dtype=torch.int64)
    if many_B.any():
        few_M = ~many_B[rows_M]
        rows_M, slot_M, columns_M, values_M = (of[few_M] for of in (rows_M, slot_M, columns_M, values_M))
    place_M = rows_M * width + slot_M
    values_BW.view(-1).index_copy_(0, place_M, values_M)
    columns_BW.view(-1).index_copy_(0, place_M, columns_M)
    values, columns = _first(values_BW, columns_BW, k)
    if many_B.any():
        every = torch.arange(scores_BI.shape[1], device=scores_BI.device)
        values[many_B], columns[many_B] = _first(scores_BI[many_B], every, k)
    return values, columns


def _first(values_BW: Tensor, columns_BW: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """[B, K] the greatest values of each row, descending, and their columns; of equal values those that come
    first.

    Args:
        values_BW: [B, W].
        columns_BW: [B, W] or [W] int64.
        k: at most W.
    """
    columns_BW = columns_BW.expand_as(values_BW)
    if values_BW.shape[1] <= SORTED * k:
        ordered = torch.sort(values_BW, dim=1, descending=True, stable=True)
        return ordered.values[:, :k].contiguous(), columns_BW.gather(1, ordered.indices[:, :k])
    best = torch.topk(values_BW, k, dim=1, sorted=False)
    values, places = best.values, best.indices
    # More equal to the least of the best than are taken: which ones is open. Of -inf it is no matter.
    least_B = values.amin(dim=1)
    tied_B = ((values_BW >= least_B[:, None]).sum(dim=1) > k) & (least_B > -torch.inf)
    if tied_B.any():
        ordered = torch.sort(values_BW[tied_B], dim=1, descending=True, stable=True)
        values[tied_B], places[tied_B] = ordered.values[:, :k], ordered.indices[:, :k]
    by_place = torch.sort(places, dim=1)
    values, places = values.gather(1, by_place.indices), by_place.values
    by_value = torch.sort(values, dim=1, descending=True, stable=True)
    return by_value.values, columns_BW.gather(1, places.gather(1, by_value.indices))


def _require_no_nan(scores: Tensor) -> None:
    if scores.numel() and torch.isnan(scores.amax()):  # which is NaN where one is
        raise NotANumber("a score is NaN")


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

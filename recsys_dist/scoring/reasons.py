"""Why an item is in a user's list, computed from the model that ranked it.

Legend: B users, K list length, H history positions, D factors.
"""

import functools
from dataclasses import dataclass

import numpy as np
import pyarrow.compute as pc
import torch

from recsys_dist.deepfm.items import Items
from recsys_dist.deepfm.layers import recency
from recsys_dist.recall.inner_product import Lists
from recsys_dist.recall.popular import head_items
from recsys_dist.schema import UNKNOWN, padded
from recsys_dist.scoring.scorers import Ranker, Recent
from recsys_dist.scoring.users import Users

ITEMS = 3
"""At most so many items of the history are named."""


@dataclass(frozen=True)
class Reasons:
    """For each place of each list, the items of the user's history that speak for it."""

    items: np.ndarray
    """[B, K, 3] int64, strongest first, 0 where there are fewer."""
    contributions: np.ndarray
    """[B, K, 3] float32, each item's share of the logit's second-order term; above 0 where there is one."""


class Standing:
    """What can be said of an item for which nothing of the user's history speaks."""

    KINDS = np.array(["suggested", "popular", "new"])
    HEAD = 0.5
    """Share of the events that popular items have together."""

    def __init__(self, items: Items, recent: Recent) -> None:
        """Take the items of a features run, and a recall run's numbers of events by day."""
        self.items, self.recent = items, recent
        # The lists of a batch are of few days.
        self._of_day = functools.lru_cache(maxsize=64)(self._kinds)

    def kinds(self, listed_N: np.ndarray, day: int) -> np.ndarray:
        """[N] of items (from 1) on the morning of a day (since 1970).

        `popular`: one of the fewest that have half of the positive events of the days before that the source
        `recent` counts, or, where there are none, of the train part. `new`: nobody has had a positive event
        with it. `suggested`: neither.
        """
        return self.KINDS[self._of_day(day)[listed_N]]

    def _kinds(self, day: int) -> np.ndarray:
        """[I] int8, the unknown item first: places in KINDS, which take a byte an item and day."""
        recent_I = self.recent.before(day).numpy(force=True)[1:].astype(np.int64)
        counts_I = recent_I if recent_I.any() else self.items.counts
        untouched_I = (self.items.counts == 0) & ~self.recent.any_before(day)
        kinds_I = np.where(untouched_I, 2, head_items(counts_I, self.HEAD))
        return np.append([0], kinds_I).astype(np.int8)


@torch.inference_mode()
def reasons(ranker: Ranker, users: Users, lists: Lists) -> Reasons:
    """Attribute the interaction of history and listed item to the items of the history.

    A history field enters the FM as the mean (or sum, or weighted mean) of its items' embeddings, so that its
    second-order term with the listed item, <mean_j e_j, sum_i>, is a sum over j of <e_j, sum_i> / n: j's
    contribution.
    To what an encoder makes of a history an item contributes what would be missing without it.
    An item that occurs in several history fields adds up. Histories of items' attributes name no item and
    are left out; a model without a second order gives no reasons.
    """
    width = ranker.model.dim
    listed_BKD = torch.empty(*lists.items.shape, width)
    for rows, catalogue in ranker.by_day(users):
        listed_BKD[rows] = catalogue.sum[lists.items[rows]]
    places, contributions = [], []
    for field in ranker.model.user_fields if ranker.model.factorised else ():
        if field.kind != "history" or field.of != "item":
            continue
        column = users.table[field.name]
        history_BH = torch.as_tensor(padded(column, field.last or 1))
        length_B = torch.tensor(pc.fill_null(pc.list_value_length(column), 0).to_numpy())
        embedded_BHD = ranker.model.table(field.name)[history_BH][..., :width]
        if field.decay is not None:
            age_BH = length_B[:, None] - 1 - torch.arange(history_BH.shape[1])
            embedded_BHD = embedded_BHD * recency(age_BH, field.decay)[:, :, None]
        elif field.pooling == "encoder":
            there_BH = torch.arange(history_BH.shape[1]) < length_B[:, None]
            embedded_BHD = ranker.model.encoder(field.name).shares(embedded_BHD, there_BH)
        elif field.pooling == "mean":
            embedded_BHD = embedded_BHD / length_B.clamp(min=1)[:, None, None]
        share_BKH = torch.einsum("bkd,bhd->bkh", listed_BKD, embedded_BHD)
        share_BKH = share_BKH.masked_fill((history_BH == UNKNOWN)[:, None], 0)
        places.append(history_BH[:, None].expand_as(share_BKH))
        contributions.append(share_BKH)
    shape = (*lists.items.shape, ITEMS)
    if not places:
        return Reasons(np.zeros(shape, np.int64), np.zeros(shape, np.float32))
    items_BKH, order = torch.sort(torch.cat(places, dim=2), dim=2, stable=True)
    share_BKH = torch.cat(contributions, dim=2).gather(2, order)
    first = torch.ones_like(items_BKH, dtype=torch.bool)
    first[..., 1:] = items_BKH[..., 1:] != items_BKH[..., :-1]
    slot = torch.cumsum(first, dim=2) - 1
    total_BKH = torch.zeros_like(share_BKH).scatter_add_(2, slot, share_BKH)
    distinct_BKH = torch.zeros_like(items_BKH).scatter_(2, slot, items_BKH)
    best = torch.sort(total_BKH, dim=2, descending=True, stable=True)
    best_items = distinct_BKH.gather(2, best.indices)
    speaks = (best.values > 0) & (best_items != UNKNOWN) & (lists.items != UNKNOWN)[..., None]
    short = max(0, ITEMS - speaks.shape[2])
    kept = [
        torch.nn.functional.pad(torch.where(speaks, part, torch.zeros_like(part)), (0, short))[..., :ITEMS]
        for part in (best_items, best.values)
    ]
    return Reasons(kept[0].numpy(force=True), kept[1].numpy(force=True))

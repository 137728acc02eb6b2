"""Scorers: whatever ranks items for users. Popularity, ALS, next items, neighbours, FM, DeepFM over all
items, and two-stage.

Legend: B users, I items (index 0 is unknown), C candidates a user, S sources, K list length, R rank, N others
of an item, H history positions.
"""

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from recsys_dist.config import Recall
from recsys_dist.deepfm.batches import side_batch
from recsys_dist.deepfm.items import Items
from recsys_dist.deepfm.model import DeepFM, Side
from recsys_dist.recall.inner_product import Lists, nearest_items, top_k
from recsys_dist.schema import LATEST, UNKNOWN, FeatureSpec, padded
from recsys_dist.scoring.users import Users
from recsys_dist.workspace import Run


class Scorer(Protocol):
    """Ranks items for users."""

    def top_k(self, users: Users, k: int) -> Lists:
        """The best K items for each user, all of them listable and none excluded."""
        ...


class Popularity:
    """The items with the most positive train events, the same for everyone."""

    def __init__(self, items: Items) -> None:
        """Take the items of a features run."""
        self.counts_I = torch.from_numpy(np.append([0], items.counts).astype(np.float32))

    def top_k(self, users: Users, k: int) -> Lists:
        """See Scorer."""
        return top_k(self.counts_I.repeat(len(users), 1), k, users.excluded, users.listable)


class Factors:
    """Inner products of user and item factors: ALS. Who or what has no factors is not listed."""

    def __init__(self, spec: FeatureSpec, user_factors: pa.Table, item_factors: pa.Table) -> None:
        """Take the tables of an als run (schema FACTORS)."""
        self.users_UR, self.known_U = _dense(user_factors, spec.n_users)
        self.items_IR, self.known_I = _dense(item_factors, spec.n_items)

    def top_k(self, users: Users, k: int) -> Lists:
        """See Scorer."""
        listable = users.listable & self.known_I & self.known_U[users.indices, None]
        return nearest_items(self.users_UR[users.indices], self.items_IR, k, users.excluded, listable)


class Related:
    """Sums of what the items of the user's history say for others. What none speaks for is not listed."""

    def __init__(self, spec: FeatureSpec, related: pa.Table, recency: float) -> None:
        """Take a table of a recall run (schema RELATED), and how fast older items count less.

        An item of the history counts exp(-age / recency), where age is the number of later ones.
        """
        self.others_IN, self.weights_IN = _ragged(related, spec.n_items)
        self.shares = torch.exp(-torch.arange(LATEST) / recency)

    def top_k(self, users: Users, k: int) -> Lists:
        """See Scorer."""
        column = users.table["latest"]
        length_B = torch.tensor(pa.compute.list_value_length(column).to_numpy())
        history_BH = torch.from_numpy(padded(column, int(length_B.max()) if len(length_B) else 0))
        scores_BI = torch.zeros(len(users), len(self.others_IN))
        # Place by place, most recent last: a tensor of all of them would be H times as large.
        for place in range(history_BH.shape[1]):
            item_B = history_BH[:, place]
            share_B = self.shares[(length_B - 1 - place).clamp(min=0)]
            scores_BI.scatter_add_(
                1, self.others_IN[item_B].long(), self.weights_IN[item_B] * share_B[:, None]
            )
        scores_BI.masked_fill_(scores_BI <= 0, -torch.inf)
        return top_k(scores_BI, k, users.excluded, users.listable)


class NextItems(Related):
    """The items that followed the user's latest ones in others' histories."""

    def __init__(self, spec: FeatureSpec, recall: Run) -> None:
        """Take a recall run with the settings that it was made with."""
        super().__init__(spec, recall.table("next_items"), _settings(recall).next_items_recency)


class Neighbors(Related):
    """The items that have the same users as the user's latest ones."""

    def __init__(self, spec: FeatureSpec, recall: Run) -> None:
        """Take a recall run with the settings that it was made with; the first measure counts."""
        settings = _settings(recall)
        related = recall.table(f"neighbors/measure={settings.measures[0]}")
        super().__init__(spec, related, settings.neighbors_recency)


class Ranker:
    """A DeepFM with the item side of the whole catalogue, computed once, or once a day with daily fields."""

    def __init__(self, model: DeepFM, items: Items) -> None:
        """Take a published model and the items of the features run it was trained on."""
        self.spec = items.spec
        self.model = model
        self.items = items
        # The users of a batch are taken day by day, so no more than the last day is worth keeping.
        self._side = functools.lru_cache(maxsize=1)(self._item_side)

    def catalogue(self, day: int) -> Side:
        """[I] the item side of all items, the unknown one first, as of a day (days since 1970)."""
        return self._side(day if self.spec.daily else 0)

    def users(self, users: Users) -> Side:
        """The user side of a batch."""
        return self.model.user_side(side_batch(users.table, self.spec.side("user", "context")))

    def by_day(self, users: Users) -> Iterator[tuple[Tensor, Side]]:
        """The batch in groups for which the items' fields are the same: rows of it and the catalogue."""
        days = users.days if self.spec.daily else torch.zeros_like(users.days)
        for day in days.unique().tolist():
            yield torch.nonzero(days == day).squeeze(1), self.catalogue(day)

    def logits(self, users: Users, items_BC: Tensor) -> Tensor:
        """[B, C] logits of the given items for each user."""
        user = self.users(users)
        logits_BC = torch.empty(items_BC.shape)
        for rows, items in self.by_day(users):
            logits_BC[rows] = self.model.logits(user.take(rows[:, None]), items.take(items_BC[rows]))
        return logits_BC

    def _item_side(self, day: int) -> Side:
        every = torch.arange(len(self.items) + 1)
        return self.model.item_side(self.items.at(every, torch.tensor([day], dtype=torch.int32)))


class FM:
    """The FM part of a DeepFM alone, as an exact inner-product search.

    For one user the FM logit is a constant plus <sum_u, sum_i> + first_i + pair_i. The constant does not
    change the order.
    """

    def __init__(self, ranker: Ranker) -> None:
        """Use the FM part of this model."""
        self.ranker = ranker

    def top_k(self, users: Users, k: int) -> Lists:
        """See Scorer. The scores lack the user's constant."""
        user = self.ranker.users(users)
        scores_BI = torch.empty(len(users), len(self.ranker.items) + 1)
        for rows, items in self.ranker.by_day(users):
            if self.ranker.model.factorised:
                scores_BI[rows] = torch.addmm(items.first + items.pair, user.sum[rows], items.sum.T)
            else:
                scores_BI[rows] = items.first
        return top_k(scores_BI, k, users.excluded, users.listable)


class Exhaustive:
    """DeepFM over all items."""

    # [users, items, widest layer] is the largest tensor; this many users keep it small.
    USERS_AT_ONCE = 64

    def __init__(self, ranker: Ranker) -> None:
        """Rank with this model."""
        self.ranker = ranker

    def top_k(self, users: Users, k: int) -> Lists:
        """See Scorer."""
        user = self.ranker.users(users)
        scores_BI = torch.empty(len(users), len(self.ranker.items) + 1)
        for rows, items in self.ranker.by_day(users):
            for some in rows.split(self.USERS_AT_ONCE):
                scores_BI[some] = self.ranker.model.logits(user.take(some[:, None]), items.leading(1, -1))
        return top_k(scores_BI, k, users.excluded, users.listable)


@dataclass(frozen=True)
class Candidates:
    """What the sources propose: each user's distinct items, and the score that each has from each source."""

    items: Tensor
    """[B, C] int64, ascending, 0 where a user has fewer."""
    scores: Tensor
    """[B, C, S] float32, -inf where the source did not propose the item."""


class TwoStage:
    """Recall from several sources, then ranking by DeepFM. What a source may not list never enters."""

    def __init__(self, sources: dict[str, tuple[Scorer, int]], ranker: Ranker) -> None:
        """Take the sources by name, each with the number of items it proposes a user."""
        self.sources = sources
        self.ranker = ranker

    def candidates(self, users: Users) -> Candidates:
        """Merge what the sources propose."""
        lists = [scorer.top_k(users, quota) for scorer, quota in self.sources.values()]
        proposals_BC = torch.cat([part.items for part in lists], dim=1)
        source_C = torch.cat([torch.full((part.items.shape[1],), s) for s, part in enumerate(lists)])
        order = torch.argsort(proposals_BC, dim=1, stable=True)
        ascending = proposals_BC.gather(1, order)
        first = torch.ones_like(ascending, dtype=torch.bool)
        first[:, 1:] = ascending[:, 1:] != ascending[:, :-1]
        slot = torch.cumsum(first, dim=1) - 1
        items = torch.zeros_like(ascending).scatter_(1, slot, ascending)
        scores = torch.full((*items.shape, len(lists)), -torch.inf)
        rows = torch.arange(len(items))[:, None].expand_as(slot)
        # Where a list is too short it has item 0, and -inf as its score.
        proposed_BC = torch.cat([part.scores for part in lists], dim=1)
        scores[rows, slot, source_C[order]] = proposed_BC.gather(1, order)
        return Candidates(items, scores)

    def rank(self, users: Users, k: int) -> tuple[Lists, Tensor]:
        """The best K candidates for each user, and [B, K, S] their scores from the sources, as Candidates."""
        candidates = self.candidates(users)
        scores_BC = self.ranker.logits(users, candidates.items)
        scores_BC[candidates.items == UNKNOWN] = -torch.inf
        # A column in front stands for the unknown item, which top_k never lists.
        places = top_k(torch.nn.functional.pad(scores_BC, (1, 0), value=-torch.inf), k)
        slot = (places.items - 1).clamp(min=0)
        listed = places.items != UNKNOWN
        items = torch.where(listed, candidates.items.gather(1, slot), UNKNOWN)
        scores_BKS = candidates.scores[torch.arange(len(slot))[:, None], slot]
        return Lists(items, places.scores), scores_BKS.masked_fill(~listed[..., None], -torch.inf)

    def top_k(self, users: Users, k: int) -> Lists:
        """See Scorer."""
        return self.rank(users, k)[0]


def _settings(recall: Run) -> Recall:
    return Recall.model_validate(recall.manifest["config"]["recall"])


def _ragged(related: pa.Table, n: int) -> tuple[Tensor, Tensor]:
    """What each item says for others, [n + 1, N] int32 items and float32 weights, 0 where there are fewer."""
    related = related.sort_by([("item", "ascending"), ("other", "ascending")])
    item, other, weight = (related[name].to_numpy() for name in ("item", "other", "weight"))
    place = np.arange(len(item)) - np.searchsorted(item, item)
    others = np.zeros((n + 1, place.max(initial=0) + 1), np.int32)
    weights = np.zeros(others.shape, np.float32)
    others[item, place], weights[item, place] = other, weight
    return torch.from_numpy(others), torch.from_numpy(weights)


def _dense(factors: pa.Table, n: int) -> tuple[Tensor, Tensor]:
    """Factors by index, [n + 1, R] with zeros where there are none, and [n + 1] bool: is there one?"""
    vectors = factors["vector"].combine_chunks()
    rank = len(vectors[0]) if len(vectors) else 1
    dense = np.zeros((n + 1, rank), np.float32)
    index = factors["index"].to_numpy()
    dense[index] = pa.compute.list_flatten(vectors).to_numpy().reshape(len(index), rank)
    known = np.zeros(n + 1, bool)
    known[index] = True
    return torch.from_numpy(dense), torch.from_numpy(known)

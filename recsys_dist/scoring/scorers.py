"""Scorers: whatever ranks items for users. Popularity, ALS, FM, DeepFM over all items, and two-stage.

Legend: B users, I items (index 0 is unknown), C candidates a user, S sources, K list length, R rank.
"""

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from recsys_dist.deepfm.batches import side_batch
from recsys_dist.deepfm.model import DeepFM, Side
from recsys_dist.recall.inner_product import Lists, nearest_items, top_k
from recsys_dist.schema import UNKNOWN, FeatureSpec
from recsys_dist.scoring.users import Users


class Scorer(Protocol):
    """Ranks items for users."""

    def top_k(self, users: Users, k: int) -> Lists:
        """The best K items for each user, none of them excluded."""
        ...


class Popularity:
    """The items with the most positive train events, the same for everyone."""

    def __init__(self, items: pa.Table) -> None:
        """Take items/ of a features run."""
        self.counts_I = torch.from_numpy(np.append([0], items["count"].to_numpy()).astype(np.float32))

    def top_k(self, users: Users, k: int) -> Lists:
        """See Scorer."""
        return top_k(self.counts_I.repeat(len(users), 1), k, users.excluded)


class Factors:
    """Inner products of user and item factors: ALS. Who or what has no factors is not listed."""

    def __init__(self, spec: FeatureSpec, user_factors: pa.Table, item_factors: pa.Table) -> None:
        """Take the tables of an als run (schema FACTORS)."""
        self.users_UR, self.known_U = _dense(user_factors, spec.n_users)
        self.items_IR, self.known_I = _dense(item_factors, spec.n_items)

    def top_k(self, users: Users, k: int) -> Lists:
        """See Scorer."""
        scores_BI = self.users_UR[users.indices] @ self.items_IR.T
        scores_BI[:, ~self.known_I] = -torch.inf
        scores_BI[~self.known_U[users.indices]] = -torch.inf
        return top_k(scores_BI, k, users.excluded)


class Ranker:
    """A DeepFM with the item side of the whole catalogue computed once."""

    def __init__(self, spec: FeatureSpec, model: DeepFM, items: pa.Table) -> None:
        """Take a published model and items/ of the features run it was trained on."""
        self.spec = spec
        self.model = model
        fields = spec.side("item")
        schema = pa.schema([(field.name, field.arrow_type) for field in fields])
        unknown: dict[str, Any] = {field.name: [] if field.type == "indices" else 0 for field in fields}
        # Not concat_tables at once: the files' columns may be declared as never null.
        rows = pa.concat_tables(
            [pa.Table.from_pylist([unknown], schema), items.select(schema.names).cast(schema)]
        )
        self.items: Side = model.item_side(side_batch(rows, fields))

    def users(self, users: Users) -> Side:
        """The user side of a batch."""
        return self.model.user_side(side_batch(users.table, self.spec.side("user", "context")))

    def logits(self, user: Side, items_BC: Tensor) -> Tensor:
        """[B, C] logits of the given items for each user."""
        return self.model.logits(user.leading(-1, 1), Side(*(part[items_BC] for part in self.items)))


class FM:
    """The FM part of a DeepFM alone, as an exact inner-product search.

    For one user the FM logit is a constant plus <sum_u, sum_i> + first_i + pair_i: an inner product of
    (sum_u, 1) with (sum_i, first_i + pair_i). The constant does not change the order.
    """

    def __init__(self, ranker: Ranker) -> None:
        """Use the FM part of this model."""
        self.ranker = ranker
        items = ranker.items
        self.items_IR = torch.cat([items.sum, (items.first + items.pair)[:, None]], dim=1)

    def top_k(self, users: Users, k: int) -> Lists:
        """See Scorer. The scores lack the user's constant."""
        user = self.ranker.users(users)
        users_BR = torch.cat([user.sum, torch.ones(len(users), 1)], dim=1)
        return nearest_items(users_BR, self.items_IR, k, users.excluded)


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
        items = self.ranker.items.leading(1, -1)
        scores = [
            self.ranker.model.logits(user.rows(start, start + self.USERS_AT_ONCE).leading(-1, 1), items)
            for start in range(0, len(users), self.USERS_AT_ONCE)
        ]
        return top_k(torch.cat(scores), k, users.excluded)


@dataclass(frozen=True)
class Candidates:
    """What the sources propose: each user's distinct items, and which sources proposed each."""

    items: Tensor
    """[B, C] int64, ascending, 0 where a user has fewer."""
    proposed: Tensor
    """[B, C, S] bool"""


class TwoStage:
    """Recall from several sources, then ranking by DeepFM. A source's excluded items never enter."""

    def __init__(self, sources: dict[str, tuple[Scorer, int]], ranker: Ranker) -> None:
        """Take the sources by name, each with the number of items it proposes a user."""
        self.sources = sources
        self.ranker = ranker

    def candidates(self, users: Users) -> Candidates:
        """Merge what the sources propose."""
        lists = [scorer.top_k(users, quota).items for scorer, quota in self.sources.values()]
        proposals_BC = torch.cat(lists, dim=1)
        source_C = torch.cat([torch.full((part.shape[1],), s) for s, part in enumerate(lists)])
        order = torch.argsort(proposals_BC, dim=1, stable=True)
        ascending = proposals_BC.gather(1, order)
        first = torch.ones_like(ascending, dtype=torch.bool)
        first[:, 1:] = ascending[:, 1:] != ascending[:, :-1]
        slot = torch.cumsum(first, dim=1) - 1
        items = torch.zeros_like(ascending).scatter_(1, slot, ascending)
        proposed = torch.zeros(*items.shape, len(lists), dtype=torch.bool)
        rows = torch.arange(len(items))[:, None].expand_as(slot)
        proposed[rows, slot, source_C[order]] = True
        return Candidates(items, proposed & (items != UNKNOWN)[..., None])

    def rank(self, users: Users, k: int) -> tuple[Lists, Tensor]:
        """The best K candidates for each user, and which sources proposed each: [B, K, S] bool."""
        candidates = self.candidates(users)
        scores_BC = self.ranker.logits(self.ranker.users(users), candidates.items)
        scores_BC[candidates.items == UNKNOWN] = -torch.inf
        # A column in front stands for the unknown item, which top_k never lists.
        places = top_k(torch.nn.functional.pad(scores_BC, (1, 0), value=-torch.inf), k)
        slot = (places.items - 1).clamp(min=0)
        listed = places.items != UNKNOWN
        items = torch.where(listed, candidates.items.gather(1, slot), UNKNOWN)
        sources = candidates.proposed[torch.arange(len(slot))[:, None], slot] & listed[..., None]
        return Lists(items, places.scores), sources

    def top_k(self, users: Users, k: int) -> Lists:
        """See Scorer."""
        return self.rank(users, k)[0]


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

"""Scorers: whatever ranks items for users. Popularity, overall and recent, ALS, next items, neighbours,
content, FM, DeepFM over all items, and two-stage.

Legend: B users, I items (index 0 is unknown), C candidates a user, S sources, K list length, R rank, N rows
of a table, H history positions.
"""

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import pyarrow as pa
import pyarrow.compute
import pyarrow.dataset
import torch
from torch import Tensor

from recsys_dist.config import Recall
from recsys_dist.deepfm.batches import side_batch
from recsys_dist.deepfm.items import Items
from recsys_dist.deepfm.model import DeepFM, Side
from recsys_dist.deepfm.pairs import Pairs
from recsys_dist.deepfm.published import UserRows
from recsys_dist.errors import DataError
from recsys_dist.recall.content import ItemVectors
from recsys_dist.recall.factors import FactorTables
from recsys_dist.recall.inner_product import Lists, NotANumber, nearest_items, top_k
from recsys_dist.recall.related import RelatedItems, latest_of, recent_share
from recsys_dist.schema import UNKNOWN, FeatureSpec
from recsys_dist.scoring.users import Users
from recsys_dist.workspace import Run

PAIRS_AT_ONCE = {"cpu": 1 << 12, "cuda": 1 << 20}
"""Pairs of user and item that go through the model together: on a CPU few enough that what one layer writes
is still near when the next one reads it; on a GPU enough to fill it."""
RRF = 60
"""What is added to a rank before it is turned over, as in the paper on reciprocal rank fusion."""


class Scorer(Protocol):
    """Ranks items for users."""

    def top_k(self, users: Users, k: int) -> Lists:
        """The best K items for each user, all of them listable and none excluded."""
        ...


@contextmanager
def scored_by(name: str, users: Users) -> Iterator[None]:
    """Says which model's scores it is that are NaN.

    Raises:
        DataError: the block met one.
    """
    try:
        yield
    except NotANumber:
        ids = users.table["user_id"]
        who = f"for one of the {len(ids)} users from {ids[0].as_py()!r} to {ids[-1].as_py()!r}"
        raise no_score(f"{name}: a score is NaN, {who}") from None


def no_score(what: str) -> DataError:
    """What to say of a model with a score that is no number."""
    return DataError(
        f"{what}. What it was fitted from has no such numbers, so its run is damaged or diverged: make it "
        f"anew, with --force and smaller learning rates."
    )


class Popularity:
    """The items with the most positive train events, the same for everyone."""

    def __init__(self, items: Items, counts: np.ndarray | None = None) -> None:
        """Take the items of a features run; and [I] their numbers of events, if not of train."""
        counts = items.counts if counts is None else counts
        self.counts_I = torch.as_tensor(np.append([0], counts).astype(np.float32))

    def top_k(self, users: Users, k: int) -> Lists:
        """See Scorer."""
        return top_k(self.counts_I.repeat(len(users), 1), k, users.excluded, users.listable)


class Recent:
    """The items with the most counted events in the days before the list's, the same for all lists of a day.
    What has none is not listed.
    """

    def __init__(self, spec: FeatureSpec, recall: Run) -> None:
        """Take a recall run with the settings that it was made with."""
        daily = recall.table("daily").sort_by("day")
        self.days_N = daily["day"].cast(pa.int32()).to_numpy()
        self.items_N, self.counts_N = daily["item"].to_numpy(), daily["count"].to_numpy()
        self.window, self.n = _settings(recall).recent_days, spec.n_items

    def before(self, day: int) -> Tensor:
        """[I] float32, each item's number of events from `window` days before a day to before it."""
        first, last = np.searchsorted(self.days_N, [day - self.window, day])
        counts_I = np.bincount(
            self.items_N[first:last], weights=self.counts_N[first:last], minlength=self.n + 1
        )
        return torch.as_tensor(counts_I.astype(np.float32))

    def any_before(self, day: int) -> np.ndarray:
        """[I - 1] bool of the items from 1 on: have they a counted event on any day before?"""
        there_I = np.zeros(self.n + 1, bool)
        there_I[self.items_N[: np.searchsorted(self.days_N, day)]] = True
        return there_I[1:]

    def top_k(self, users: Users, k: int) -> Lists:
        """See Scorer."""
        scores_BI = torch.empty(len(users), self.n + 1)
        for day in users.days.unique().tolist():
            counts_I = self.before(day)
            scores_BI[users.days == day] = counts_I.masked_fill(counts_I == 0, -torch.inf)
        return top_k(scores_BI, k, users.excluded, users.listable)


class Factors:
    """Inner products of user and item factors: ALS. Who or what has no factors is not listed."""

    def __init__(self, tables: FactorTables) -> None:
        """Take the factors of users and items."""
        self.tables = tables

    def top_k(self, users: Users, k: int) -> Lists:
        """See Scorer."""
        users_BR, known_B = self.tables.of(users.table["user"].to_numpy())
        listable = users.listable & self.tables.known_I & known_B[:, None]
        return nearest_items(users_BR, self.tables.items_IR, k, users.excluded, listable)


class Related:
    """Sums of what the items of the user's history say for others. What none speaks for is not listed."""

    def __init__(self, spec: FeatureSpec, related: pa.Table, recency: float) -> None:
        """Take a table of a recall run (schema RELATED), and how fast older items count less.

        An item of the history counts exp(-age / recency), where age is the number of later ones.
        """
        self.related, self.recency, self.n = RelatedItems(related, spec.n_items), recency, spec.n_items

    def top_k(self, users: Users, k: int) -> Lists:
        """See Scorer."""
        history_BH, age_BH = latest_of(users.table["latest"])
        scores_BI = torch.zeros(len(users), self.n + 1)
        self.related.add(scores_BI, history_BH, recent_share(age_BH, self.recency))
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


class Linear(Related):
    """The items that a linear model of items says of the user's latest ones: `ease` or `transitions`."""

    def __init__(self, spec: FeatureSpec, recall: Run, name: str) -> None:
        """Take a recall run with the settings that it was made with, which name the model."""
        recency = getattr(_settings(recall), f"{name}_recency")
        super().__init__(spec, recall.table(f"linear/model={name}"), recency)


class Content:
    """The items whose attributes are most like those of the user's latest ones, whether or not anyone has had
    them. What has nothing in common with these is not listed.
    """

    def __init__(self, items: Items, recall: Run) -> None:
        """Take the items of a features run and a recall run with the settings that it was made with.

        An item of the history counts exp(-age / content_recency), where age is the number of later ones.

        Raises:
            ConfigError: recall.content names what is no categorical field of the items.
        """
        settings = _settings(recall)
        self.recency = settings.content_recency
        names = items.spec.attributes(settings.content, "recall.content")
        self.vectors = ItemVectors([items.values(name) for name in names])

    def top_k(self, users: Users, k: int) -> Lists:
        """See Scorer."""
        history_BH, age_BH = latest_of(users.table["latest"])
        scores_BI = self.vectors.scores(history_BH, recent_share(age_BH, self.recency))
        scores_BI.masked_fill_(scores_BI <= 0, -torch.inf)
        return top_k(scores_BI, k, users.excluded, users.listable)


class Ranker:
    """A DeepFM with the item side of the whole catalogue, computed once, or once a day with daily fields."""

    def __init__(
        self, model: DeepFM, items: Items, pairs: Pairs | None = None, rows: UserRows | None = None
    ) -> None:
        """Take a published model, the items of the features run it was trained on, its pair fields, and where
        its table of users is, if not in the model.
        """
        self.rows = rows
        self.spec = items.spec
        self.model = model
        self.items = items
        self.pairs = pairs
        # The users of a batch are taken day by day, so no more than the last day is worth keeping.
        self._side = functools.lru_cache(maxsize=1)(self._item_side)

    def catalogue(self, day: int) -> Side:
        """[I] the item side of all items, the unknown one first, as of a day (days since 1970)."""
        return self._side(day if self.spec.daily else 0)

    def users(self, users: Users) -> Side:
        """The user side of a batch."""
        return self.user_side(users.table)

    def user_side(self, rows: pa.Table) -> Side:
        """The user and context fields' part of rows that have them, and `user`."""
        rows = self.rows.put(rows) if self.rows else rows
        return self.model.user_side(side_batch(rows, self.spec.side("user", "context")))

    def by_day(self, users: Users) -> Iterator[tuple[Tensor, Side]]:
        """The batch in groups for which the items' fields are the same: rows of it and the catalogue."""
        days = users.days if self.spec.daily else torch.zeros_like(users.days)
        for day in days.unique().tolist():
            yield torch.nonzero(days == day).squeeze(1), self.catalogue(day)

    def logits(self, users: Users, items_BC: Tensor) -> Tensor:
        """[B, C] logits of the given items for each user."""
        user = self.users(users)
        logits_BC = torch.empty(items_BC.shape)
        pair_BCP = self.pairs.of(users.table, items_BC) if self.pairs else None
        size = max(1, PAIRS_AT_ONCE[items_BC.device.type] // max(1, items_BC.shape[1]))
        for of_day, items in self.by_day(users):
            for rows in of_day.split(size):
                pair = None if pair_BCP is None else pair_BCP[rows]
                sides = user.take(rows[:, None]), items.take(items_BC[rows])
                logits_BC[rows] = self.model.logits(*sides, pair=pair)
        return logits_BC

    def _item_side(self, day: int) -> Side:
        every = torch.arange(len(self.items) + 1)
        return self.model.item_side(self.items.at(every, torch.tensor([day], dtype=torch.int32)))


class FM:
    """The FM part of a DeepFM alone, as an exact inner-product search.

    For one user the FM logit is a constant plus <sum_u, sum_i> + first_i + pair_i. The constant does not
    change the order. What pair fields would add is left out.
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
                with torch.autocast(items.sum.device.type, enabled=False):
                    scores_BI[rows] = torch.addmm(items.first + items.pair, user.sum[rows], items.sum.T)
            else:
                scores_BI[rows] = items.first
        return top_k(scores_BI, k, users.excluded, users.listable)


class Exhaustive:
    """DeepFM over all items."""

    USERS_AT_ONCE = 32

    def __init__(self, ranker: Ranker) -> None:
        """Rank with this model."""
        self.ranker = ranker

    def top_k(self, users: Users, k: int) -> Lists:
        """See Scorer."""
        user = self.ranker.users(users)
        scores_BI = torch.empty(len(users), len(self.ranker.items) + 1)
        for rows, items in self.ranker.by_day(users):
            for some in rows.split(self.USERS_AT_ONCE):
                scores_BI[some] = self._scores(users, some, user.take(some[:, None]), items)
        return top_k(scores_BI, k, users.excluded, users.listable)

    def _scores(self, users: Users, rows: Tensor, user: Side, items: Side) -> Tensor:
        """[B, I] of some rows of the batch."""
        pairs, pair = self.ranker.pairs, None
        if pairs:
            pair = pairs.of_all(users.table.select(pairs.columns).take(pa.array(rows.numpy(force=True))))
        size = PAIRS_AT_ONCE[rows.device.type] // self.USERS_AT_ONCE
        parts = []
        for start in range(0, len(items.first), size):
            some = items.rows(start, start + size).leading(1, -1)
            own = None if pair is None else pair[:, start : start + size]
            parts.append(self.ranker.model.logits(user, some, pair=own))
        return torch.cat(parts, dim=1)


@dataclass(frozen=True)
class Source:
    """A Scorer whose best items are candidates."""

    scorer: Scorer
    quota: int
    """Number of items it proposes a user."""
    weight: float = 1.0
    """How much it counts where some candidates are left out."""


@dataclass(frozen=True)
class Candidates:
    """What the sources propose: each user's distinct items, and the score that each has from each source."""

    items: Tensor
    """[B, C] int64, ascending, 0 where a user has fewer."""
    scores: Tensor
    """[B, C, S] float32, -inf where the source did not propose the item."""


class TwoStage:
    """Recall from several sources, then ranking by DeepFM. What a source may not list never enters."""

    def __init__(self, sources: dict[str, Source], ranker: Ranker, most: int | None = None) -> None:
        """Take the sources by name, and how many candidates of a user are ranked at most (None: all)."""
        self.sources = sources
        self.ranker = ranker
        self.width = sum(source.quota for source in sources.values())
        """A user has at most so many candidates."""
        self.most = most
        if most is not None:
            self.width = min(self.width, most)

    def candidates(self, users: Users) -> Candidates:
        """Merge what the sources propose, and keep the `most` items of each user with the greatest sum of
        weight / (RRF + rank) over the sources that propose them, of equal ones those with the least index
        (reciprocal rank fusion: Cormack, Clarke, Buettcher, "Reciprocal rank fusion outperforms Condorcet
        and individual rank learning methods", 2009).
        """
        lists = []
        for name, source in self.sources.items():
            with scored_by(name, users):
                lists.append(source.scorer.top_k(users, source.quota))
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
        if self.most is None or self.most >= items.shape[1]:
            return Candidates(items, scores)
        # In float64, so that equal sums of other summands are equal again as float32.
        worth_C = torch.cat(
            [
                source.weight / (RRF + torch.arange(1, part.items.shape[1] + 1, dtype=torch.float64))
                for source, part in zip(self.sources.values(), lists, strict=True)
            ]
        )
        worth_BC = torch.zeros(items.shape, dtype=torch.float64).scatter_add_(1, slot, worth_C[order])
        places = _places(worth_BC.float().masked_fill(items == UNKNOWN, -torch.inf), self.most)
        # Ascending again, those that are no candidate's last.
        places = places.where(places >= 0, items.shape[1]).sort(dim=1).values
        places = places.where(places < items.shape[1], -1)
        kept, scores = taken(places, Lists(items, worth_BC), scores)
        return Candidates(kept.items, scores)

    def rank(self, users: Users, k: int) -> tuple[Lists, Tensor]:
        """The best K candidates for each user, and [B, K, S] their scores from the sources, as Candidates."""
        candidates = self.candidates(users)
        scores_BC = self.ranker.logits(users, candidates.items)
        scores_BC[candidates.items == UNKNOWN] = -torch.inf
        with scored_by("deepfm, which ranks the candidates", users):
            places_BK = _places(scores_BC, k)
        return taken(places_BK, Lists(candidates.items, scores_BC), candidates.scores)

    def top_k(self, users: Users, k: int) -> Lists:
        """See Scorer."""
        return self.rank(users, k)[0]


def _places(scores_BC: Tensor, k: int) -> Tensor:
    """[B, K] the columns of the K greatest scores above -inf, of equal ones the first, then -1."""
    # A column in front stands for the unknown item, which top_k never lists.
    return top_k(torch.nn.functional.pad(scores_BC, (1, 0), value=-torch.inf), k).items - 1


def taken(places_BK: Tensor, candidates: Lists, sources_BCS: Tensor) -> tuple[Lists, Tensor]:
    """The lists that some candidates make, and [B, K, S] their scores from the sources.

    Args:
        places_BK: int64, columns of the candidates, -1 where a list ends early.
        candidates: [B, C].
        sources_BCS: their scores from the sources.
    """
    slot, empty = places_BK.clamp(min=0), places_BK < 0
    lists = Lists(
        candidates.items.gather(1, slot).masked_fill(empty, UNKNOWN),
        candidates.scores.gather(1, slot).masked_fill(empty, -torch.inf),
    )
    scores_BKS = sources_BCS[torch.arange(len(slot))[:, None], slot]
    return lists, scores_BKS.masked_fill(empty[..., None], -torch.inf)


def _settings(recall: Run) -> Recall:
    return Recall.model_validate(recall.manifest["config"]["recall"])

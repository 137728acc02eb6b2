"""Pair fields: what a user's history says of an item, by the tables of a recall run, by ALS's factors, or by
what the items are.

Legend: B users, C items of each, I items (index 0 is unknown), H history positions, P pair fields, V values
of an item, G values of an attribute, R rank.
"""

from collections.abc import Mapping
from typing import Literal, NamedTuple

import pyarrow as pa
import torch
from torch import Tensor

from recsys_dist.config import LINEAR, SINCE, DeepFM, Recall
from recsys_dist.deepfm.items import Items
from recsys_dist.errors import ConfigError
from recsys_dist.recall.content import ItemVectors
from recsys_dist.recall.factors import FactorTables
from recsys_dist.recall.related import RelatedItems, latest_of, recent_share
from recsys_dist.schema import BEFORE_VALID, FACTORS_OF, LATE, UNKNOWN, FieldSpec
from recsys_dist.workspace import Run

Knows = Literal["all", "train", "early"]
"""All that a run was fitted on, the train part alone, or nothing of its late events."""
ROOM = 1 << 22
"""Numbers of the array [B, I] that users' items are looked up in, or [B, C, R] of factors: a few users at
a time where I is large."""
FEW = 100
"""To gather an item's factors takes about so many times as long as to multiply them among those of all."""


def pair_specs(settings: DeepFM) -> tuple[FieldSpec, ...]:
    """The fields of deepfm.pair."""
    return tuple(
        FieldSpec(
            name=pair.name, kind="pair", side="pair", type="value", cardinality=1, of=pair.measure,
            decay=pair.recency, attribute=pair.attribute, rank=pair.rank,
        )
        for pair in settings.pair
    )  # fmt: skip


class _Asked(NamedTuple):
    """Users whose values are asked for."""

    history: Tensor
    """[B, H] of `latest_of`."""
    age: Tensor
    """[B, H] likewise."""
    days: Tensor
    """[B, H] how long before the list's day each was; no columns where no field asks for it."""
    factors: Tensor
    """[B, R] ALS's; no columns where no field is of them."""


class Pairs:
    """The pair fields of users and items.

    Args:
        fields: of side pair.
        items: of the features run, with all of its fields.
        inputs: the runs with the tables, by stage: recall, and als where a field is of it.
        knows: which of their tables: those that know all that was fitted on, the train part alone, or
            nothing of its late events.
        factors: the als run's that know so much, where they are there already.
        most: else users' factors of more bytes are not held, but read for the users of a batch.

    Raises:
        ConfigError: the runs do not have them.
    """

    def __init__(
        self,
        fields: tuple[FieldSpec, ...],
        items: Items,
        inputs: Mapping[str, Run],
        knows: Knows = "all",
        factors: FactorTables | None = None,
        most: int | None = None,
    ) -> None:
        self.fields = fields
        history = items.spec.liked_history
        assert history is not None, "checked with the configuration"
        self.history = history.name
        recall = inputs["recall"]
        self.settings = Recall.model_validate(recall.manifest["config"]["recall"])
        self.n = len(items)
        places = {"next_items": "next_items", "neighbors": f"neighbors/measure={self.settings.measures[0]}"}
        places |= {name: f"linear/model={name}" for name in LINEAR}
        wanted = {"next_items" if field.of in SINCE else str(field.of) for field in fields} & set(places)
        where = tables_folder(recall, knows)
        self.tables = {name: _related(recall, f"{where}{places[name]}", self.n) for name in sorted(wanted)}
        self.factors = None
        if any(field.of == "als" for field in fields):
            self.factors = factors or _factors(inputs["als"], knows, items, most)
        self.vectors = None
        if any(field.of == "content" for field in fields):
            names = items.spec.attributes(self.settings.content, "recall.content")
            if not names:
                raise ConfigError("deepfm.pair: measure content needs a categorical field of side item")
            self.vectors = ItemVectors([items.values(name) for name in names])
        self.values_IV = {
            field.attribute: items.values(field.attribute) for field in fields if field.attribute
        }

    @property
    def columns(self) -> list[str]:
        """What is read of users."""
        return ["user", self.history, *(["latest_age"] if self._in_days else [])]

    @property
    def _in_days(self) -> bool:
        return any(field.of == "days_since" for field in self.fields)

    def of(self, users: pa.Table, items_BC: Tensor) -> Tensor:
        """[B, C, P] float32 of some items of each user.

        Args:
            users: [B] with the `columns`.
            items_BC: int64.
        """
        return self._found(users, items_BC)

    def of_all(self, users: pa.Table) -> Tensor:
        """[B, I + 1, P] float32 of all items, the unknown one first."""
        return self._found(users, None)

    def _found(self, users: pa.Table, items_BC: Tensor | None) -> Tensor:
        """[B, C, P] of these items of each user, or of all."""
        history_BH, age_BH = latest_of(users[self.history])
        factors_BR = torch.empty(len(users), 0)
        if self.factors:
            factors_BR, _ = self.factors.of(users["user"].to_numpy())
        days_BH = torch.empty(len(users), 0)
        if self._in_days:
            if "latest_age" not in users.column_names:
                raise ConfigError(
                    "Pair fields of measure days_since need the column latest_age of users/, which runs of "
                    "older versions lack. Run jobs/featurize.py and jobs/recall.py again."
                )
            days_BH = _days(users["latest_age"], age_BH)
        number = self.n + 1 if items_BC is None else items_BC.shape[1]
        found = torch.zeros(len(history_BH), number, len(self.fields))
        size = max(1, ROOM // (self.n + 1))
        for start in range(0, len(history_BH), size):
            rows = slice(start, start + size)
            asked = _Asked(history_BH[rows], age_BH[rows], days_BH[rows], factors_BR[rows])
            items = None if items_BC is None else items_BC[rows]
            of_all: dict[tuple[str, float], Tensor] = {}
            for column, field in enumerate(self.fields):
                found[rows, :, column] = self._values(field, asked, items, of_all)
        return found

    def _values(
        self,
        field: FieldSpec,
        users: _Asked,
        items_BC: Tensor | None,
        of_all: dict[tuple[str, float], Tensor],
    ) -> Tensor:
        """[B, C] of a field, or [B, I + 1].

        Args:
            field: of side pair.
            users: who is asked for.
            items_BC: None: all.
            of_all: the scores [B, I + 1] that other fields have asked for, by table and recency.
        """
        if field.of == "share":
            assert field.attribute
            return self._shares(self.values_IV[field.attribute], users.history, items_BC)
        assert field.of
        recency = 0.0
        if field.of not in ("als", *SINCE):
            recency = field.decay or getattr(self.settings, f"{field.of}_recency")
        key = field.of, recency
        if items_BC is not None and not field.rank and key not in of_all and self._few(field.of, items_BC):
            scores_BC = self._scores(field.of, recency, users, items_BC).masked_fill_(items_BC == UNKNOWN, 0)
        else:
            if key not in of_all:
                of_all[key] = self._scores(field.of, recency, users, None)
                of_all[key][:, UNKNOWN] = 0
            scores_BI = of_all[key]
            scores_BC = scores_BI if items_BC is None else scores_BI.gather(1, items_BC)
            if field.rank:
                return _log_ranks(scores_BC, scores_BI[:, 1:]).masked_fill_(
                    (torch.arange(self.n + 1) if items_BC is None else items_BC) == UNKNOWN, 0
                )
        if field.of in ("als", "content", *SINCE):
            return scores_BC
        scores_BC = scores_BC / self.tables[field.of].mean_weight
        # Scores of linear models are below 0 too.
        return scores_BC if field.of in LINEAR else scores_BC.log1p_()

    def _few(self, of: str, items_BC: Tensor) -> bool:
        """Is it less work to look up these items' scores than those of all?"""
        number = items_BC.shape[1]
        if of == "als":
            return number * FEW < self.n
        if of == "content":
            return False
        return self.tables["next_items" if of in SINCE else of].few(number)

    def _scores(self, of: str, recency: float, users: _Asked, items_BC: Tensor | None) -> Tensor:
        """[B, C] what a measure says of some items, or [B, I + 1] of all."""
        if of == "als":
            assert self.factors is not None
            items_IR = self.factors.items_IR
            if items_BC is None:
                return users.factors @ items_IR.T
            size = max(1, ROOM // max(1, items_BC.shape[1] * items_IR.shape[1]))
            of_some = zip(users.factors.split(size), items_BC.split(size), strict=True)
            return torch.cat([(items_IR[items] @ own.unsqueeze(-1)).squeeze(-1) for own, items in of_some])
        history_BH, age_BH = users.history, users.age
        if of == "content":
            assert self.vectors is not None
            return self.vectors.scores(history_BH, recent_share(age_BH, recency))
        since = of in SINCE
        table = self.tables["next_items" if since else of]
        if since:
            values_BH = 1 / (1 + (users.days if of == "days_since" else age_BH.clamp(min=0)))
        else:
            values_BH = recent_share(age_BH, recency)
        if items_BC is not None:
            return (table.latest if since else table.of)(history_BH, values_BH, items_BC)
        scores_BI = torch.zeros(len(history_BH), self.n + 1)
        (table.put if since else table.add)(scores_BI, history_BH, values_BH)
        return scores_BI

    def _shares(self, values_IV: Tensor, history_BH: Tensor, items_BC: Tensor | None) -> Tensor:
        """Of an attribute's values by item."""
        values_BM = values_IV[history_BH].flatten(1)
        counts_BG = torch.zeros(len(history_BH), int(values_IV.max()) + 1)
        counts_BG.scatter_add_(1, values_BM, torch.ones(values_BM.shape))
        counts_BG[:, UNKNOWN] = 0
        shares_BG = counts_BG / (history_BH != UNKNOWN).sum(1, keepdim=True).clamp(min=1)
        if items_BC is None:
            items_BC = torch.arange(len(values_IV)).expand(len(history_BH), -1)
        found = torch.zeros(items_BC.shape)
        for values_I in values_IV.T:
            found += shares_BG.gather(1, values_I[items_BC])
        return found / (values_IV != UNKNOWN).sum(1).clamp(min=1)[items_BC]


def _days(hours: pa.ChunkedArray, age_BH: Tensor) -> Tensor:
    """[B, H] the days since the items of histories, which end as the lists of hours do; items that are older
    than all of these are as old as the oldest.

    Args:
        hours: B lists, `latest_age` of users/.
        age_BH: of `latest_of`.
    """
    hours_BL, later_BL = latest_of(hours)
    if not hours_BL.shape[1]:
        return torch.zeros(age_BH.shape)
    # How many came after the first is the place of the last.
    place_BH = (later_BL[:, :1] - age_BH.clamp(min=0)).clamp(min=0)
    return hours_BL.gather(1, place_BH) / 24


def _log_ranks(scores_BC: Tensor, among_BI: Tensor) -> Tensor:
    """[B, C] log of 1 + how many of a user's scores are greater."""
    ascending_BI = among_BI.sort(1).values
    not_greater_BC = torch.searchsorted(ascending_BI, scores_BC.contiguous(), right=True)
    return (1 + among_BI.shape[1] - not_greater_BC).float().log()


def _related(recall: Run, name: str, n: int) -> RelatedItems:
    try:
        return RelatedItems(recall.table(name), n)
    except FileNotFoundError:
        raise ConfigError(
            f"{recall.uri} has no {name}, which the model's pair fields need. Run jobs/recall.py with "
            f"recall.late above 0, for example 0.2, and with the models in recall.linear that they name."
        ) from None


def _factors(als: Run, knows: Knows, items: Items, most: int | None) -> FactorTables:
    try:
        return FactorTables.read(items.spec, als, tables_folder(als, knows), most)
    except FileNotFoundError:
        raise ConfigError(
            f"{als.uri} has no {tables_folder(als, knows)}{FACTORS_OF[0]}, which pair fields of measure als "
            f"need. Run jobs/train_als.py with als.earlier=true, and with als.fit_on as deepfm.fit_on."
        ) from None


def tables_folder(run: Run, knows: Knows) -> str:
    """Folder of a recall or als run's tables, with a slash, that know so much; that of the run is empty."""
    stage = run.manifest["stage"]
    if knows == "train":
        return f"{BEFORE_VALID}/" if run.manifest["config"][stage]["fit_on"] == "train_valid" else ""
    return f"{LATE}/" if knows == "early" else ""

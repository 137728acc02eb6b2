"""Pair fields: what a user's history says of an item, by the tables of a recall run.

Legend: B users, C items of each, I items (index 0 is unknown), H history positions, P pair fields, V values
of an item, G values of an attribute.
"""

import pyarrow as pa
import torch
from torch import Tensor

from recsys_dist.config import LINEAR, DeepFM, Recall
from recsys_dist.deepfm.items import Items
from recsys_dist.errors import ConfigError
from recsys_dist.recall.related import RelatedItems, latest_of, recent_share
from recsys_dist.schema import BEFORE_VALID, UNKNOWN, FieldSpec
from recsys_dist.workspace import Run

ROOM = 1 << 22
"""Numbers of the array [B, I] that users' items are looked up in: a few users at a time where I is large."""


def pair_specs(settings: DeepFM) -> tuple[FieldSpec, ...]:
    """The fields of deepfm.pair."""
    return tuple(
        FieldSpec(
            name=pair.name, kind="pair", side="pair", type="value", cardinality=1, of=pair.measure,
            decay=pair.recency, attribute=pair.attribute, rank=pair.rank,
        )
        for pair in settings.pair
    )  # fmt: skip


class Pairs:
    """The pair fields of users and items.

    Args:
        fields: of side pair.
        items: of the features run.
        recall: the run with the tables.
        folder: which of its tables: those of its own, or a folder of them with a slash, such as `LATE`/.

    Raises:
        ConfigError: the recall run does not have them.
    """

    def __init__(self, fields: tuple[FieldSpec, ...], items: Items, recall: Run, folder: str = "") -> None:
        self.fields = fields
        history = items.spec.liked_history
        assert history is not None, "checked with the configuration"
        self.history = history.name
        self.settings = Recall.model_validate(recall.manifest["config"]["recall"])
        self.n = len(items)
        places = {"next_items": "next_items", "neighbors": f"neighbors/measure={self.settings.measures[0]}"}
        places |= {name: f"linear/model={name}" for name in LINEAR}
        wanted = {"next_items" if field.of == "since" else str(field.of) for field in fields} & set(places)
        self.tables = {name: _related(recall, f"{folder}{places[name]}", self.n) for name in sorted(wanted)}
        self.values_IV = {
            field.attribute: items.values(field.attribute) for field in fields if field.attribute
        }

    def of(self, history: pa.ChunkedArray, items_BC: Tensor) -> Tensor:
        """[B, C, P] float32 of some items of each user.

        Args:
            history: [B] the column `self.history`.
            items_BC: int64.
        """
        return self._found(history, items_BC)

    def of_all(self, history: pa.ChunkedArray) -> Tensor:
        """[B, I + 1, P] float32 of all items, the unknown one first."""
        return self._found(history, None)

    def _found(self, history: pa.ChunkedArray, items_BC: Tensor | None) -> Tensor:
        """[B, C, P] of these items of each user, or of all."""
        history_BH, age_BH = latest_of(history)
        number = self.n + 1 if items_BC is None else items_BC.shape[1]
        found = torch.zeros(len(history_BH), number, len(self.fields))
        size = max(1, ROOM // (self.n + 1))
        for start in range(0, len(history_BH), size):
            rows = slice(start, start + size)
            items = None if items_BC is None else items_BC[rows]
            of_all: dict[tuple[str, float], Tensor] = {}
            for column, field in enumerate(self.fields):
                values = self._values(field, history_BH[rows], age_BH[rows], items, of_all)
                found[rows, :, column] = values
        return found

    def _values(
        self,
        field: FieldSpec,
        history_BH: Tensor,
        age_BH: Tensor,
        items_BC: Tensor | None,
        of_all: dict[tuple[str, float], Tensor],
    ) -> Tensor:
        """[B, C] of a field, or [B, I + 1].

        Args:
            field: of side pair.
            history_BH: of `latest_of`.
            age_BH: likewise.
            items_BC: None: all.
            of_all: the scores [B, I + 1] that other fields have asked for, by table and recency.
        """
        if field.of == "share":
            assert field.attribute
            return self._shares(self.values_IV[field.attribute], history_BH, items_BC)
        assert field.of
        since = field.of == "since"
        table = self.tables["next_items" if since else field.of]
        recency = 0.0 if since else field.decay or getattr(self.settings, f"{field.of}_recency")
        values_BH = 1 / (1 + age_BH.clamp(min=0)) if since else recent_share(age_BH, recency)
        key = field.of, recency
        if items_BC is not None and not field.rank and key not in of_all and table.few(items_BC.shape[1]):
            scores_BC = (table.latest if since else table.of)(history_BH, values_BH, items_BC)
            scores_BC.masked_fill_(items_BC == UNKNOWN, 0)
        else:
            if key not in of_all:
                scores_BI = of_all[key] = torch.zeros(len(history_BH), self.n + 1)
                (table.put if since else table.add)(scores_BI, history_BH, values_BH)
                scores_BI[:, UNKNOWN] = 0
            scores_BI = of_all[key]
            scores_BC = scores_BI if items_BC is None else scores_BI.gather(1, items_BC)
            if field.rank:
                return _log_ranks(scores_BC, scores_BI[:, 1:]).masked_fill_(
                    (torch.arange(self.n + 1) if items_BC is None else items_BC) == UNKNOWN, 0
                )
        if since:
            return scores_BC
        scores_BC = scores_BC / table.mean_weight
        # Scores of linear models are below 0 too.
        return scores_BC if field.of in LINEAR else scores_BC.log1p_()

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


def before_valid(recall: Run) -> str:
    """Folder of the run's tables that know the train part alone."""
    return f"{BEFORE_VALID}/" if recall.manifest["config"]["recall"]["fit_on"] == "train_valid" else ""

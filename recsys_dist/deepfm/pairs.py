"""Pair fields: what a user's history says of an item, by the tables of a recall run.

Legend: B users, C items of each, I items (index 0 is unknown), H history positions, P pair fields, V values
of an item, G values of an attribute.
"""

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from recsys_dist.config import LINEAR, DeepFM, Recall
from recsys_dist.deepfm.items import Items
from recsys_dist.errors import ConfigError, DataError
from recsys_dist.recall.related import RelatedItems, latest_of, recent_share
from recsys_dist.schema import BEFORE_VALID, LATE, UNKNOWN, FieldSpec
from recsys_dist.workspace import Run

ROOM = 1 << 22
"""Numbers of the array [B, I] that users' items are looked up in: a few users at a time where I is large."""
NEVER = np.iinfo(np.int64).max


def pair_specs(settings: DeepFM) -> tuple[FieldSpec, ...]:
    """The fields of deepfm.pair."""
    return tuple(
        FieldSpec(
            name=pair.name, kind="pair", side="pair", type="value", cardinality=1, of=pair.measure,
            decay=pair.recency, attribute=pair.attribute,
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
        self._read = lambda name: _related(recall, f"{folder}{places[name]}", self.n)
        self.tables = {name: self._read(name) for name in sorted(wanted)}
        self.values_IV = {
            field.attribute: items.values(field.attribute) for field in fields if field.attribute
        }

    def next_items(self) -> tuple[RelatedItems, float]:
        """The table of next items, and how fast older items of a history count less."""
        return self.tables.get("next_items") or self._read("next_items"), self.settings.next_items_recency

    @property
    def width(self) -> int:
        """Numbers of a pair: 1, which says that the others are known, and one a field."""
        return 1 + len(self.fields)

    def of(self, history: pa.ChunkedArray, items_BC: Tensor) -> Tensor:
        """[B, C, 1 + P] float32 of some items of each user.

        Args:
            history: [B] the column `self.history`.
            items_BC: int64.
        """
        return self._found(history, items_BC)

    def of_all(self, history: pa.ChunkedArray) -> Tensor:
        """[B, I + 1, 1 + P] float32 of all items, the unknown one first."""
        return self._found(history, None)

    def _found(self, history: pa.ChunkedArray, items_BC: Tensor | None) -> Tensor:
        """[B, C, 1 + P] of these items of each user, or of all."""
        history_BH, age_BH = latest_of(history)
        number = self.n + 1 if items_BC is None else items_BC.shape[1]
        found = torch.ones(len(history_BH), number, self.width)
        size = max(1, ROOM // (self.n + 1))
        for start in range(0, len(history_BH), size):
            rows = slice(start, start + size)
            items = None if items_BC is None else items_BC[rows]
            for column, field in enumerate(self.fields, start=1):
                found[rows, :, column] = self._values(field, history_BH[rows], age_BH[rows], items)
        return found

    def _values(
        self, field: FieldSpec, history_BH: Tensor, age_BH: Tensor, items_BC: Tensor | None
    ) -> Tensor:
        """[B, C] of a field, or [B, I + 1]."""
        if field.of == "share":
            assert field.attribute
            return self._shares(self.values_IV[field.attribute], history_BH, items_BC)
        assert field.of
        since = field.of == "since"
        table = self.tables["next_items" if since else field.of]
        if since:
            values_BH = 1 / (1 + age_BH.clamp(min=0))
        else:
            recency = field.decay or getattr(self.settings, f"{field.of}_recency")
            values_BH = recent_share(age_BH, recency)
        if items_BC is not None and table.few(items_BC.shape[1]):
            scores_BC = (table.latest if since else table.of)(history_BH, values_BH, items_BC)
            scores_BC.masked_fill_(items_BC == UNKNOWN, 0)
        else:
            scores_BI = torch.zeros(len(history_BH), self.n + 1)
            (table.put if since else table.add)(scores_BI, history_BH, values_BH)
            scores_BI[:, UNKNOWN] = 0
            scores_BC = scores_BI if items_BC is None else scores_BI.gather(1, items_BC)
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


def _related(recall: Run, name: str, n: int) -> RelatedItems:
    try:
        return RelatedItems(recall.table(name), n)
    except FileNotFoundError:
        raise ConfigError(
            f"{recall.uri} has no {name}, which the model's pair fields need. Run jobs/recall.py with "
            f"recall.late above 0, for example 0.2, and with the models in recall.linear that they name."
        ) from None


class LearnedPairs:
    """The pair fields of train examples: of late ones by tables that know of nothing but what came before
    them; of the others nothing is known.

    A list is made once, for all that its user does until the next one. So the users of late events are as
    they were when these began, not as of the event.

    Args:
        fields: of side pair.
        items: of the features run.
        features: that run.
        recall: with the tables.
    """

    def __init__(self, fields: tuple[FieldSpec, ...], items: Items, features: Run, recall: Run) -> None:
        self.late = Pairs(fields, items, recall, f"{LATE}/")
        self.history = self.late.history
        moments = recall.table(f"{LATE}/late_from")
        self.from_U = np.full(items.spec.n_users + 1, NEVER)
        """[U] microseconds from which on a user's train events are late."""
        self.from_U[moments["user"].to_numpy()] = moments["late_from"].cast(pa.int64()).to_numpy()
        # What is read says, or not, that a column is never null.
        self.schema = features.spec().state_schema()
        self.states = recall.table(f"{LATE}/users", columns=self.schema.names).cast(self.schema)
        """Users as of when their late events began."""
        self.row_U = np.full(len(self.from_U), -1)
        self.row_U[self.states["user"].to_numpy()] = np.arange(len(self.states))
        self.events = self.late.settings.events
        self.counted = int(recall.manifest["figures"]["late"]["known"])
        self.where = recall.uri

    def earlier(self, table: pa.Table) -> int:
        """How many of these train events (user, timestamp, label) the tables of late events may know."""
        known = table["timestamp"].cast(pa.int64()).to_numpy() < self.from_U[table["user"].to_numpy()]
        if self.events == "positive":
            known &= table["label"].to_numpy() > 0
        return int(known.sum())

    def require_earlier(self, number: int) -> None:
        """Raise a DataError where the tables were counted from other events than those `earlier` ones."""
        if number != self.counted:
            raise DataError(
                f"{self.where}/{LATE} was counted from {self.counted} events, and {number} train events are "
                f"earlier than its users' late ones: what the ranking model learns of such tables would not "
                f"hold for new events. Run jobs/recall.py --force."
            )

    def as_of(self, examples: pa.Table) -> pa.Table:
        """Examples (user, timestamp and all fields of side user), the late ones with users as of when these
        began.
        """
        state_B = self.row_U[examples["user"].to_numpy()]
        own = examples.select(self.schema.names).cast(self.schema)
        row_B = np.where(self._late(examples), len(own) + state_B, np.arange(len(own)))
        columns = pa.concat_tables([own, self.states]).take(pa.array(row_B))
        for name in self.schema.names:
            examples = examples.set_column(examples.schema.get_field_index(name), name, columns[name])
        return examples

    def of(self, examples: pa.Table, items_BC: Tensor) -> Tensor:
        """[B, C, 1 + P] float32; 0 where nothing is known.

        Args:
            examples: of `as_of`.
            items_BC: the example's own and the drawn ones, int64.
        """
        found = torch.zeros(*items_BC.shape, self.late.width)
        chosen = np.flatnonzero(self._late(examples))
        if len(chosen):
            history = examples[self.history].take(pa.array(chosen))
            found[chosen] = self.late.of(history, items_BC[chosen])
        return found

    def _late(self, examples: pa.Table) -> np.ndarray:
        """[B] bool: is it a late event, of a user whose state is known?"""
        users_B, moments_B = examples["user"].to_numpy(), examples["timestamp"].cast(pa.int64()).to_numpy()
        return (moments_B >= self.from_U[users_B]) & (self.row_U[users_B] >= 0)


def before_valid(recall: Run) -> str:
    """Folder of the run's tables that know the train part alone."""
    return f"{BEFORE_VALID}/" if recall.manifest["config"]["recall"]["fit_on"] == "train_valid" else ""

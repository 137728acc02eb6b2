"""What the stages exchange: the FeatureSpec that featurize writes, and the Arrow schemas of the tables.

Index 0 of every vocabulary stands for "unknown": a missing value, a value that the train part does not
have, or padding. Items and users count from 1 and are all there, whichever part they occur in.
"""

import math
from collections.abc import Iterable
from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.fs
from pydantic import BaseModel, ConfigDict, ValidationError

from recsys_dist.errors import ConfigError, DataError

SeenFilter = Literal["all", "positives", "none"]
SEEN_COLUMN = {"all": "seen", "positives": "liked"}
"""score.filter_seen to the column of users/ whose items are left out of the lists."""
TIMESTAMP = pa.timestamp("us", tz="UTC")
DAY = 86_400_000_000
"""Microseconds, as TIMESTAMP counts."""
LATEST = 50
"""Greatest length of the column `latest` of users/: what is older says next to nothing of what comes next."""
UNKNOWN = 0


class FieldSpec(BaseModel):
    """One field as the model sees it, and the only description of it anywhere."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    name: str
    """Also the column's name in examples/, users/, items/ or item_days/."""
    kind: Literal["id", "categorical", "numeric", "time", "history", "aggregate", "pair"]
    """What it was made from; `id` for the user and item themselves."""
    side: Literal["user", "item", "context", "pair"]
    """user: as of the event (examples/, users/); item: in items/, or item_days/; context: of the event
    (examples/); pair: in no table, the model's own (deepfm.pair)."""
    daily: bool = False
    """Side item only: in item_days/, where it changes from day to day, and not in items/."""
    type: Literal["index", "indices", "value", "vector"]
    """index: int32; indices: list<int32>, possibly empty; value: float32; vector: list<float32> of exactly
    `cardinality` numbers."""
    cardinality: int
    """Rows of the embedding table, the unknown one included; 1 for a value; a vector's length."""
    vocab: str | None = None
    """The vocabulary (vocab/<name>) that the indices point into, or a vector's numbers stand for: those of
    the indices 1 to `cardinality`."""
    hashed: bool = False
    """No vocabulary: a value's index is 1 + its hash (Spark's xxhash64) modulo cardinality - 1."""
    pooling: Literal["mean", "sum", "recency", "attention", "encoder"] | None = None
    """How several embeddings become one. recency: the mean with weights exp(-age / decay), where age is the
    number of later ones; attention: that, and in the MLP also weighted by the candidate item; encoder:
    what a transformer makes of them. The features' run says mean or sum, the others are the model's."""
    decay: float | None = None
    """See pooling; pair: an item of the history counts exp(-age / decay)."""
    last: int | None = None
    """history: the greatest number of events; the most recent comes last."""
    when: str | None = None
    """history and aggregate: which events: positive, any, or an event type."""
    of: str | None = None
    """history: item, or the item field whose values are remembered; aggregate and pair: the measure."""
    attribute: str | None = None
    """pair: the item field that the measure `share` is of."""
    rank: bool = False
    """pair: the log of the item's rank by the measure, in place of the measure."""
    days: int | None = None
    """aggregate of the item: of the last so many days."""
    part: Literal["hour", "weekday", "recency"] | None = None
    """time: which part. As an index: 1 + hour (0 to 23); 1 + weekday (0, Monday, to 6); recency: 0 without an
    event before, else 1 + floor(log2(1 + hours since it)), at most 24."""
    wave: Literal["sin", "cos"] | None = None
    """time: of 2 pi hour / 24 or 2 pi weekday / 7."""
    indicator_of: str | None = None
    """numeric: 1 where this column's value is missing, else 0."""
    log: bool = False
    """x became sign(x) log(1 + |x|), before offset and scale."""
    fill: float | None = None
    """numeric: what a missing x became, before log, offset and scale."""
    offset: float | None = None
    """value: (x - offset) / scale is what is stored. Fitted on the train part."""
    scale: float | None = None
    """See offset."""
    edges: tuple[float, ...] | None = None
    """numeric as an index: 0 missing, else 1 + the number of edges that x is not below. Train quantiles."""

    @property
    def arrow_type(self) -> pa.DataType:
        """The column's type in Parquet."""
        return {
            "index": pa.int32(),
            "indices": pa.list_(pa.int32()),
            "value": pa.float32(),
            "vector": pa.list_(pa.float32()),
        }[self.type]

    def transformed(self, x: float) -> float:
        """What is stored for a raw number: a value's, after log, offset and scale."""
        x = math.copysign(math.log1p(abs(x)), x) if self.log else x
        return (x - (self.offset or 0.0)) / (self.scale or 1.0)


class VocabularySpec(BaseModel):
    """A vocabulary: what its indices mean, and what earlier indices mean in it."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    size: int
    """Tokens, with the indices 1 to size."""
    fingerprint: str
    """Of all (index, token) pairs: equal only for equal vocabularies."""
    ancestors: tuple[tuple[int, str], ...] = ()
    """Size and fingerprint of the vocabularies that this one continues, oldest first: their indices mean the
    same in it. Empty after a full rebuild."""
    gone: int = 0
    """Tokens that keep their index though this run's input no longer has them."""

    def continues(self, other: "VocabularySpec") -> bool:
        """Does every index of the other one mean the same here?"""
        own = (self.size, self.fingerprint)
        return (other.size, other.fingerprint) in (*self.ancestors, own)


class FeatureSpec(BaseModel):
    """features.json of a features run."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    fields: tuple[FieldSpec, ...]
    """The model's fields in order: user, item, then as declared in conf."""
    vocabularies: dict[str, VocabularySpec] = {}
    """By the name they have in vocab/."""
    n_users: int
    """Users in vocab/user; their indices are 1 to n_users."""
    n_items: int
    """Items in vocab/item; their indices are 1 to n_items."""
    rows: dict[str, int]
    """Examples by split."""
    positives: dict[str, int]
    """Positive examples by split."""
    date: str
    """The day that users/as_of=date stands for: every event before it is known."""
    hour: int
    """The train part's most frequent hour, UTC: the default context of published lists."""

    def side(self, *sides: str) -> tuple[FieldSpec, ...]:
        """The fields of these sides, in order."""
        return tuple(field for field in self.fields if field.side in sides)

    def field(self, name: str) -> FieldSpec:
        """The field of that name."""
        return next(field for field in self.fields if field.name == name)

    @property
    def daily(self) -> tuple[FieldSpec, ...]:
        """The fields of item_days/, in order."""
        return tuple(field for field in self.fields if field.daily)

    @property
    def liked_history(self) -> FieldSpec | None:
        """The longest history of items of positive events."""
        histories = [
            field
            for field in self.fields
            if field.kind == "history" and field.when == "positive" and field.of == "item"
        ]
        return max(histories, key=lambda field: field.last or 0, default=None)

    @property
    def shown_history(self) -> str:
        """The column of users/ that shows people what a user liked."""
        return self.liked_history.name if self.liked_history else "liked"

    def attributes(self, names: Iterable[str] | None, key: str) -> tuple[str, ...]:
        """The names of the items' categorical fields, all in order or the given ones.

        Args:
            names: None: all.
            key: of the configuration that names them.

        Raises:
            ConfigError: a name is no such field's.
        """
        known = [field.name for field in self.side("item") if field.kind == "categorical"]
        if names is None:
            return tuple(known)
        wrong = [name for name in names if name not in known]
        if wrong:
            raise ConfigError(
                f"{key}: {', '.join(wrong)} is no categorical field of the items; there are "
                f"{', '.join(known) or 'none'}"
            )
        return tuple(names)

    def context(self, weekday: np.ndarray) -> dict[str, pa.Array]:
        """The context columns of lists made ahead of time: the given weekdays, the log's most frequent hour.

        Args:
            weekday: [N] int, 0 (Monday) to 6, of the day that each row's list is for.

        Other context fields, such as the device, are not known the night before, and so unknown or missing.
        """
        moments = {"weekday": (weekday, 7), "hour": (np.full(len(weekday), self.hour), 24)}
        columns = {}
        for field in self.side("context"):
            moment, period = moments.get(field.part or "", (np.full(len(weekday), UNKNOWN - 1), 1))
            if field.type == "index":
                column = pa.array((moment + 1).astype(np.int32))
            elif field.type == "indices":
                column = pa.array([[]] * len(weekday), field.arrow_type)
            elif field.wave:
                wave = {"sin": np.sin, "cos": np.cos}[field.wave]
                column = pa.array(wave(2 * np.pi * moment / period).astype(np.float32))
            else:
                known = 1.0 if field.indicator_of else field.transformed(field.fill or 0.0)
                column = pa.array(np.full(len(weekday), known, np.float32))
            columns[field.name] = column
        return columns

    def require_continues(self, other: "FeatureSpec", here: str, there: str) -> None:
        """Raise a ConfigError where an index of `other` may mean something else here.

        Args:
            other: an earlier features run's.
            here: names this one in the message.
            there: names the other one.
        """
        for name, theirs in other.vocabularies.items():
            ours = self.vocabularies.get(name)
            if ours is not None and not ours.continues(theirs):
                raise ConfigError(
                    f"The vocabulary {name} of {here} does not continue that of {there}: their lineages "
                    f"differ, so indices do not mean the same in both. Use runs of one lineage or begin anew."
                )

    def examples_schema(self) -> pa.Schema:
        """examples/: an event, with its user's state before it. Partitioned by split (train, valid, test)."""
        base = [
            ("user", pa.int32()),
            ("item", pa.int32()),
            ("timestamp", TIMESTAMP),
            ("value", pa.float32()),
            ("label", pa.float32()),
        ]
        return pa.schema(base + _columns(self.side("user", "context"), "user"))

    def users_schema(self) -> pa.Schema:
        """users/: a user's state as of a cut, ascending by user. Partitioned by as_of (valid, test, date).

        `seen` holds the ascending indices of the user's items before the cut, `liked` those of the
        positive events, `latest` the items of the last LATEST positive events in order of time, the most
        recent last, an item as often as it occurs, and `latest_age` how many full hours before the cut's day
        (UTC) each of these was. Users without an event before the cut are there too, with empty lists.
        """
        base = [
            ("user", pa.int32()),
            ("user_id", pa.string()),
            ("seen", pa.list_(pa.int32())),
            ("liked", pa.list_(pa.int32())),
            ("latest", pa.list_(pa.int32())),
            ("latest_age", pa.list_(pa.int32())),
        ]
        return pa.schema(base + _columns(self.side("user"), "user"))

    def state_schema(self) -> pa.Schema:
        """recall/before=late/users/: a user's fields as of the first late event, and `latest_age` as in
        users/.
        """
        base = [("user", pa.int32()), ("latest_age", pa.list_(pa.int32()))]
        return pa.schema(base + _columns(self.side("user"), "user"))

    def items_schema(self) -> pa.Schema:
        """items/: an item, ascending by index; `count` is its number of positive train examples.

        `present`: in this run's log or items table; an item that only an earlier night knew keeps its place
        and is not listed. `active_from` and `active_to` (exclusive) may be null: no limit.
        """
        base = [
            ("item", pa.int32()),
            ("item_id", pa.string()),
            ("title", pa.string()),
            ("count", pa.int64()),
            ("present", pa.bool_()),
            ("active_from", TIMESTAMP),
            ("active_to", TIMESTAMP),
        ]
        static = tuple(field for field in self.side("item") if not field.daily)
        return pa.schema(base + _columns(static, "item"))

    def item_days_schema(self) -> pa.Schema:
        """item_days/: an item's daily fields from the start of a day (UTC), ascending by item and day.

        They hold until the item's next row; every item has a row for the first day of the log. There is no
        item_days/ where no field is daily.
        """
        return pa.schema([("item", pa.int32()), ("day", pa.date32()), *_columns(self.daily, "item")])


VOCAB = pa.schema(
    [
        ("index", pa.int32()),
        ("token", pa.string()),
        ("count", pa.int64()),
        ("positives", pa.int64()),
        ("present", pa.bool_()),
    ]
)
"""vocab/<name>/: ascending by index from 1; `count` is the token's number of train events (ids) or rows,
`positives` that of its positive train events (ids); `present`: in this run's input."""

QUARANTINE = pa.schema([("source", pa.string()), ("reason", pa.string()), ("raw", pa.string())])
"""quarantine/: a row of the log that was set aside, with the file it came from."""

FACTORS = pa.schema([("index", pa.int32()), ("vector", pa.list_(pa.float32()))])
"""als/user_factors/ and als/item_factors/."""
FACTORS_OF = ("user_factors", "item_factors")

RELATED = pa.schema([("item", pa.int32()), ("other", pa.int32()), ("weight", pa.float32())])
"""recall/next_items/ and recall/neighbors/measure=<name>/: of each item the others that it speaks for most,
ascending by item, then the greatest weight first, of equal ones the lesser other; all weights are above 0.
recall/linear/model=<name>/: the same with weights of either sign, the farthest from 0 first."""

PRODUCTS = pa.schema(
    [("item", pa.int32()), ("other", pa.int32()), ("target", pa.int64()), ("product", pa.int64())]
)
"""What the equations of a linear model of items are made of, while it is fitted; see recall/linear.py."""

DAILY = pa.schema([("item", pa.int32()), ("day", pa.date32()), ("count", pa.int64())])
"""recall/daily/: an item's number of counted events of each day (UTC) that has any, ascending by item and
day."""

LATE = "before=late"
"""Folder of a recall run with its tables of pairs, made from earlier events only, and late/; of an als run
with the factors of these events."""
BEFORE_VALID = "before=valid"
"""The same, made from the train part, where the run itself knows valid too."""

LATE_FROM = pa.schema([("user", pa.int32()), ("late_from", TIMESTAMP)])
"""recall/before=late/late_from/: of each user with train events the moment from which they are late."""

FUTURE = "future timestamp"
"""The reason of rows from score.date on, which a back-dated night has many of."""

REASON = pa.struct(
    [
        ("kind", pa.string()),
        ("item_ids", pa.list_(pa.string())),
        ("contributions", pa.list_(pa.float32())),
    ]
)
"""Why an item is in a list. kind `history`: because of these items of the user's history, each with its
contribution to the score; where none speaks for it `popular`, `new` or `suggested` (reasons.Standing);
`explore`: it was drawn, whatever speaks for it."""

TOPK = pa.schema(
    [
        ("date", pa.date32()),
        ("user_id", pa.string()),
        ("rank", pa.int32()),
        ("item_id", pa.string()),
        ("score", pa.float32()),
        ("sources", pa.list_(pa.string())),
        ("reason", REASON),
        ("run_id", pa.string()),
        ("source_scores", pa.list_(pa.float32())),
        ("propensity", pa.float32()),
    ]
)
"""The product: the Delta table <root>/topk, partitioned by date; ids are the raw log's, ranks from 1. Each of
`sources` proposed the item with the score at its place in `source_scores`, on a scale of its own.
`propensity` is the probability of this item at this rank given those above it: 1 but where it was drawn
(score.rules.explore). New columns are added at the end, and are null in rows that were published before."""

LISTS = pa.schema(
    [
        ("model", pa.string()),
        ("user", pa.int32()),
        ("rank", pa.int32()),
        ("item", pa.int32()),
        ("score", pa.float32()),
        ("sources", pa.list_(pa.string())),
    ]
)
"""evaluation/lists/: each model's top-K for each test user, as of the test cut; `sources`: those that
proposed the item, null for a model that has none."""

RELEVANT = pa.schema([("user", pa.int32()), ("item", pa.int32())])
"""evaluation/relevant/: what each test user's lists should have, every pair once."""


def pairs(column: pa.ChunkedArray) -> tuple[np.ndarray, np.ndarray]:
    """A list column as (row, value) pairs, two [E] int64 arrays in the column's order."""
    lists = column.combine_chunks()
    rows, values = pc.list_parent_indices(lists), pc.list_flatten(lists)
    return rows.to_numpy().astype(np.int64), values.to_numpy().astype(np.int64)


def padded(column: pa.ChunkedArray, width: int) -> np.ndarray:
    """A list column as [N, width] int64: each row's values in their order, and 0 after them.

    Args:
        column: N lists of at most `width` integers.
        width: of the result.
    """
    rows, values = pairs(column)
    found = np.zeros((len(column), width), np.int64)
    found[rows, np.arange(len(rows)) - np.searchsorted(rows, rows)] = values
    return found


def without_seen(events: pa.Table, users: pa.Table, filter_seen: SeenFilter) -> pa.Table:
    """The events whose items may be in their user's list: what a held-out part can be measured on.

    Args:
        events: with `user` and `item`.
        users: rows of users/ as of the part's start, with `seen` and `liked`.
        filter_seen: which items are left out of the lists.
    """
    if filter_seen == "none" or not events.num_rows:
        return events
    rows, items = pairs(users[SEEN_COLUMN[filter_seen]])
    owners = users["user"].to_numpy()[rows].astype(np.int64)
    width = max(int(items.max(initial=0)), pc.max(events["item"]).as_py()) + 1
    wanted = events["user"].to_numpy().astype(np.int64) * width + events["item"].to_numpy()
    return events.filter(pa.array(~np.isin(wanted, owners * width + items)))


def read_spec(filesystem: pyarrow.fs.FileSystem, path: str) -> FeatureSpec:
    """Read the features.json of the features run at `path`.

    Raises:
        DataError: another version of this package wrote it.
    """
    with filesystem.open_input_stream(f"{path}/features.json") as stream:
        text = stream.read()
    try:
        return FeatureSpec.model_validate_json(text)
    except ValidationError as error:
        raise DataError(
            f"{path}/features.json was written by another version of recsys_dist ({error.error_count()} of "
            f"its entries mean nothing here). Run jobs/featurize.py again."
        ) from None


def _columns(fields: tuple[FieldSpec, ...], but: str) -> list[tuple[str, pa.DataType]]:
    return [(field.name, field.arrow_type) for field in fields if field.name != but]

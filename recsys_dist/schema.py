"""What the stages exchange: the FeatureSpec that featurize writes, and the Arrow schemas of the tables.

Index 0 of every vocabulary stands for "unknown": a missing value, a value that the train part does not
have, or padding. Items and users count from 1 and are all there, whichever part they occur in.
"""

from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.fs
from pydantic import BaseModel, ConfigDict

SeenFilter = Literal["all", "positives", "none"]
SEEN_COLUMN = {"all": "seen", "positives": "liked"}
"""score.filter_seen to the column of users/ whose items are left out of the lists."""
TIMESTAMP = pa.timestamp("us", tz="UTC")
UNKNOWN = 0


class FieldSpec(BaseModel):
    """One field as the model sees it, and the only description of it anywhere."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    name: str
    """Also the column's name in examples/, users/ or items/."""
    kind: Literal["id", "categorical", "time", "history", "count"]
    """What it was made from; `id` for the user and item themselves."""
    side: Literal["user", "item", "context"]
    """user: as of the event (examples/, users/); item: in items/; context: of the event (examples/)."""
    type: Literal["index", "indices", "value"]
    """index: int32; indices: list<int32>, possibly empty; value: float32."""
    cardinality: int
    """Rows of the embedding table, the unknown one included; 1 for a value."""
    vocab: str | None = None
    """The vocabulary (vocab/<name>) that the indices point into."""
    pooling: Literal["mean", "sum"] | None = None
    """How several embeddings become one."""
    last: int | None = None
    """history: the greatest length; the most recent item comes last."""
    when: Literal["positive", "any"] | None = None
    """history and count: which events."""
    part: Literal["hour", "weekday"] | None = None
    """time: which part; the index is 1 + hour (0 to 23) or 1 + weekday (0, Monday, to 6)."""
    transform: Literal["log1p_standardise"] | None = None
    """What was done to the value: (log(1 + x) - mean) / stddev."""
    mean: float | None = None
    """Fitted on the train part."""
    stddev: float | None = None
    """Fitted on the train part."""

    @property
    def arrow_type(self) -> pa.DataType:
        """The column's type in Parquet."""
        return {"index": pa.int32(), "indices": pa.list_(pa.int32()), "value": pa.float32()}[self.type]


class FeatureSpec(BaseModel):
    """features.json of a features run."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    fields: tuple[FieldSpec, ...]
    """The model's fields in order: user, item, then as declared in conf."""
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
    """The log's most frequent hour, UTC: the default context of published lists."""

    def side(self, *sides: str) -> tuple[FieldSpec, ...]:
        """The fields of these sides, in order."""
        return tuple(field for field in self.fields if field.side in sides)

    def field(self, name: str) -> FieldSpec:
        """The field of that name."""
        return next(field for field in self.fields if field.name == name)

    @property
    def shown_history(self) -> str:
        """The column of users/ that shows people what a user liked: the longest history of positives."""
        histories = [field for field in self.fields if field.kind == "history" and field.when == "positive"]
        return max(histories, key=lambda field: field.last or 0).name if histories else "liked"

    def context(self, weekday: np.ndarray) -> dict[str, pa.Array]:
        """The context columns of lists made ahead of time: the given weekdays, the log's most frequent hour.

        Args:
            weekday: [N] int, 0 (Monday) to 6, of the day that each row's list is for.

        Other context fields, such as the device, are not known the night before, and so unknown.
        """
        columns = {}
        for field in self.side("context"):
            known = {"weekday": weekday + 1, "hour": np.full(len(weekday), self.hour + 1)}
            indices = known.get(field.part or "", np.full(len(weekday), UNKNOWN))
            columns[field.name] = pa.array(indices.astype(np.int32))
            if field.type == "indices":
                columns[field.name] = pa.array([[]] * len(weekday), field.arrow_type)
        return columns

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
        positive events; users without an event before the cut are there too, with empty lists.
        """
        base = [
            ("user", pa.int32()),
            ("user_id", pa.string()),
            ("seen", pa.list_(pa.int32())),
            ("liked", pa.list_(pa.int32())),
        ]
        return pa.schema(base + _columns(self.side("user"), "user"))

    def items_schema(self) -> pa.Schema:
        """items/: an item, ascending by index; `count` is its number of positive train examples."""
        base = [("item", pa.int32()), ("item_id", pa.string()), ("title", pa.string()), ("count", pa.int64())]
        return pa.schema(base + _columns(self.side("item"), "item"))


VOCAB = pa.schema([("index", pa.int32()), ("token", pa.string()), ("count", pa.int64())])
"""vocab/<name>/: ascending by index from 1; `count` is the token's number of train events (ids) or rows."""

QUARANTINE = pa.schema([("source", pa.string()), ("reason", pa.string()), ("raw", pa.string())])
"""quarantine/: a row of the log that was set aside, with the file it came from."""

FACTORS = pa.schema([("index", pa.int32()), ("vector", pa.list_(pa.float32()))])
"""als/user_factors/ and als/item_factors/."""

REASON = pa.struct(
    [
        ("kind", pa.string()),
        ("item_ids", pa.list_(pa.string())),
        ("contributions", pa.list_(pa.float32())),
    ]
)
"""Why an item is in a list. kind `history`: because of these items of the user's history, each with its
contribution to the score; `popular`: the user has no history that speaks for it."""

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
    ]
)
"""The product: the Delta table <root>/topk, partitioned by date; ids are the raw log's, ranks from 1."""

LISTS = pa.schema(
    [
        ("model", pa.string()),
        ("user", pa.int32()),
        ("rank", pa.int32()),
        ("item", pa.int32()),
        ("score", pa.float32()),
    ]
)
"""evaluation/lists/: each model's top-K for each test user, as of the test cut."""


def pairs(column: pa.ChunkedArray) -> tuple[np.ndarray, np.ndarray]:
    """A list column as (row, value) pairs, two [E] int64 arrays in the column's order."""
    lists = column.combine_chunks()
    rows, values = pc.list_parent_indices(lists), pc.list_flatten(lists)
    return rows.to_numpy().astype(np.int64), values.to_numpy().astype(np.int64)


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
    """Read the features.json of the features run at `path`."""
    with filesystem.open_input_stream(f"{path}/features.json") as stream:
        return FeatureSpec.model_validate_json(stream.read())


def _columns(fields: tuple[FieldSpec, ...], but: str) -> list[tuple[str, pa.DataType]]:
    return [(field.name, field.arrow_type) for field in fields if field.name != but]

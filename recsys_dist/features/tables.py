"""The tables of a features run, each written by one job of its own."""

import datetime as dt
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import pyarrow as pa
from pyspark.sql import Column, DataFrame
from pyspark.sql import functions as F

from recsys_dist.config import Categorical, Config, Time
from recsys_dist.features import ids
from recsys_dist.features.check import DUPLICATE, quarantine
from recsys_dist.features.encode import Vocabularies
from recsys_dist.features.item_days import daily_fields, item_days
from recsys_dist.features.log import Inputs, Look
from recsys_dist.features.numeric import Fitted
from recsys_dist.features.session import AT_ONCE, at_once, files, in_ranges, write
from recsys_dist.features.spec import share_width
from recsys_dist.features.split import duplicates, midnight
from recsys_dist.features.state import State, attributes, share_fields, state_fields
from recsys_dist.schema import QUARANTINE, FeatureSpec
from recsys_dist.workspace import OpenRun

SMALL_ROWS = 500_000
"""A table of so many rows is sent to every task in place of moving the log to the table."""
BYTES = 2
"""What an index or a number takes in a compressed file, about."""
ROW_BYTES = 100
"""What a row that was set aside takes with its text, about."""
MOST_REPEATED = 1 << 16
"""Indices of a field with more values than that are written without a dictionary."""


@dataclass(frozen=True)
class Tables:
    """What the tables are made of."""

    config: Config
    run: OpenRun
    spec: FeatureSpec
    vocabularies: Vocabularies
    fitted: dict[str, Fitted]
    events: DataFrame
    """All rows of the log, of `split.assign`."""
    usable: DataFrame
    """The events among them."""
    counts: DataFrame
    """Of `counts_at_cuts`."""
    people: DataFrame
    """Every user, encoded."""
    catalogue: DataFrame
    """Every item, encoded."""
    checked: dict[str, DataFrame]
    """The rows of the items and users tables."""
    reasons: dict[str, Counter[str]]
    """Of each source the rows by the reason for which they are set aside."""
    inputs: Inputs
    look: Look

    def write(self) -> None:
        """Write all of them."""
        own = self._own()
        state = self._state
        users = state.of_users(self._with_items(attributes(self.config.fields)), own).cache()
        kept = [name for name in own.columns if name != "user"]
        jobs: list[Callable[[], None]] = [
            lambda: self.examples(state, users, kept),
            lambda: self.users(state, users, kept),
            self.items,
            self.quarantine,
        ]
        jobs += [self.days] if daily_fields(self.config.fields) else []
        with ThreadPoolExecutor(AT_ONCE) as pool:
            for done in [pool.submit(job) for job in jobs]:
                done.result()
        users.unpersist()

    def examples(self, state: State, users: DataFrame, own: Sequence[str]) -> None:
        """examples/: an event a row."""
        shared = [field.attribute for field in share_fields(self.config.fields) if field.attribute]
        events = self._with_items(shared) if shared else self.usable
        events = events.withColumns(_times(self.config))
        events = ids.encode_fields(events, self.config.fields, "context", self.vocabularies, self.fitted)
        rows = state.before_events(events, users, own).drop("user").withColumnRenamed("user_index", "user")
        moment = {"timestamp": F.timestamp_micros("micros"), "label": F.col("positive").cast("int")}
        schema = self.spec.examples_schema()
        rows = rows.withColumns(moment).coalesce(self._files(self._events, len(schema)))
        self._save(rows, "examples", schema, "split")

    def users(self, state: State, users: DataFrame, own: Sequence[str]) -> None:
        """users/: a user a row and cut."""
        # What takes room is that every item is listed once as seen, and again where it is liked.
        rows = in_ranges(
            users.join(self.counts, "user"), "user_index", self.spec.n_users, self._files(self._events, 2)
        )
        # In order before a user's row becomes three: each goes to a folder of its own.
        rows = state.at_cuts(rows.sortWithinPartitions("user_index"), ["user", *own])
        rows = rows.withColumnsRenamed({"user": "user_id", "user_index": "user"})
        self._save(rows, "users", self.spec.users_schema(), "as_of")

    def items(self) -> None:
        """items/: an item a row."""
        rows = self.catalogue.drop("count").withColumnsRenamed(
            {"index": "item", "token": "item_id", "positives": "count"}
        )
        schema = self.spec.items_schema()
        parts = self._files(self.spec.n_items, len(schema))
        rows = in_ranges(rows, "item", self.spec.n_items, parts).sortWithinPartitions("item")
        self._save(rows, "items", schema)

    def days(self) -> None:
        """item_days/: an item a row and day on which something changed."""
        first, fields = self.look.first_micros, self.config.fields
        schema = self.spec.item_days_schema()
        # What is computed and sorted there is much more than what is written.
        parts = max(self._files(self._events, len(schema)), at_once(self.usable.sparkSession))
        rows = item_days(
            self.usable, self.catalogue, self.spec.n_items, fields, self.fitted, first, self._end, parts
        )
        self._save(rows.sortWithinPartitions("item", "day"), "item_days", schema)

    def quarantine(self) -> None:
        """quarantine/: a row that was set aside."""
        set_aside = {name: set(counted) - {""} for name, counted in self.reasons.items()}
        bad = [self.checked[name] for name in self.checked if set_aside[name]]
        if set_aside["events"] - {DUPLICATE}:
            bad.append(self.events.where(F.col("_reason") != DUPLICATE))
        if DUPLICATE in set_aside["events"]:
            bad.append(duplicates(self.events, self.inputs.events()))
        if not bad:
            self.run.write_table("quarantine", QUARANTINE.empty_table())
            return
        n = sum(counted.total() - counted[""] for counted in self.reasons.values())
        # Found by all tasks that read the log, and only then brought together.
        parts = files(self.usable.sparkSession, n * ROW_BYTES)
        rows = quarantine(*bad).repartition(parts, "raw").sortWithinPartitions("source", "reason", "raw")
        write(rows, f"{self.run.uri}/quarantine", QUARANTINE)

    def _save(self, rows: DataFrame, name: str, schema: pa.Schema, partition_by: str | None = None) -> None:
        """Write the columns of a schema: fields under their own names, whatever else the rows have."""
        names = [*schema.names, *([partition_by] if partition_by else [])]
        fields = {name for name in names if ids.stored(name) in rows.columns}
        columns = [F.col(f"`{ids.stored(name) if name in fields else name}`").alias(name) for name in names]
        varied = {field.name for field in self.spec.fields if field.cardinality > MOST_REPEATED}
        varied = (varied | {"seen", "liked", "latest"} if "item" in varied else varied) & set(schema.names)
        write(rows.select(*columns), f"{self.run.uri}/{name}", schema, partition_by, varied)

    def _files(self, rows: int, columns: int) -> int:
        return files(self.usable.sparkSession, rows * columns * BYTES)

    @property
    def _events(self) -> int:
        return sum(self.spec.rows.values())

    @property
    def _end(self) -> int:
        return midnight(dt.date.fromisoformat(self.spec.date))

    @property
    def _state(self) -> State:
        fields = {field.name: field for field in self.config.fields}
        named = {name: fields[name] for name in attributes(self.config.fields)}
        several = [name for name, field in named.items() if isinstance(field, Categorical) and field.several]
        sizes = {name: found.size for name, found in self.spec.vocabularies.items()}
        looking = state_fields(self.config.fields)
        widths = {field.name: share_width(field, sizes) for field in share_fields(looking)}
        return State(looking, self.fitted, frozenset(several), widths, self.config.split.in_time, self._end)

    def _own(self) -> DataFrame:
        """The users' index and the fields of their table."""
        looking = {field.name for field in state_fields(self.config.fields)}
        own = [f.name for f in self.spec.side("user") if f.name != "user" and f.name not in looking]
        columns = [F.col(f"`{ids.stored(name)}`") for name in own]
        rows = self.people.select(F.col("token").alias("user"), F.col("index").alias("user_index"), *columns)
        return _small(rows, self.spec.n_users)

    def _with_items(self, named: Iterable[str]) -> DataFrame:
        """The events with the item's `index`, and its fields as `attribute:<field>`."""
        fields = [F.col(f"`{ids.stored(name)}`").alias(f"attribute:{name}") for name in dict.fromkeys(named)]
        item = self.catalogue.select(F.col("token").alias("item"), "index", *fields)
        events = self.usable.join(_small(item, self.spec.n_items), "item")
        # A join that moved the events has left them in another place and order.
        return events if self.spec.n_items <= SMALL_ROWS else events.repartition("user")


def _small(frame: DataFrame, rows: int) -> DataFrame:
    return F.broadcast(frame) if rows <= SMALL_ROWS else frame


def _times(config: Config) -> dict[str, Column]:
    """The context fields that are parts of the event's time."""
    moment = F.timestamp_micros("micros")
    parts = {"hour": (F.hour(moment), 24), "weekday": (F.weekday(moment), 7)}
    columns = {}
    for field in config.fields:
        if isinstance(field, Time) and field.part != "recency":
            part, period = parts[field.part]
            if field.encoding == "index":
                columns[ids.stored(field.name)] = part + 1
            else:
                angle = part * (2 * F.pi() / period)
                columns[ids.stored(f"{field.name}_sin")] = F.sin(angle).cast("float")
                columns[ids.stored(f"{field.name}_cos")] = F.cos(angle).cast("float")
    return columns

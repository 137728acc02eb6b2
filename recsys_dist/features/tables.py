"""The tables of a features run, each written by one job of its own."""

import datetime as dt
from collections.abc import Callable
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
from recsys_dist.features.session import AT_ONCE, in_ranges, write
from recsys_dist.features.spec import share_width
from recsys_dist.features.split import duplicates, midnight
from recsys_dist.features.state import State, attributes, share_fields, state_fields
from recsys_dist.schema import QUARANTINE, FeatureSpec
from recsys_dist.workspace import OpenRun

SMALL_ROWS = 500_000
"""A table of so many rows is sent to every task in place of moving the log to the table."""


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
    people: DataFrame
    """Every user, encoded."""
    catalogue: DataFrame
    """Every item, encoded."""
    checked: dict[str, DataFrame]
    """The rows of the items and users tables."""
    inputs: Inputs
    look: Look

    def write(self) -> None:
        """Write all of them."""
        jobs: list[Callable[[], None]] = [self.examples, self.users, self.items, self.quarantine]
        jobs += [self.days] if daily_fields(self.config.fields) else []
        with ThreadPoolExecutor(AT_ONCE) as pool:
            for done in [pool.submit(job) for job in jobs]:
                done.result()

    def examples(self) -> None:
        """examples/: an event a row."""
        context = [ids.stored(field.name) for field in self.spec.side("context")]
        rows = self._state.before_events(self._indexed(), self._own(), context)
        rows = rows.drop("user").withColumnRenamed("user_index", "user")
        moment = {"timestamp": F.timestamp_micros("micros"), "label": F.col("positive").cast("int")}
        _save(rows.withColumns(moment), f"{self.run.uri}/examples", self.spec.examples_schema(), "split")

    def users(self) -> None:
        """users/: a user a row and cut."""
        rows = self._state.at_cuts(self._indexed(), self._own(), self._end)
        rows = rows.withColumnsRenamed({"user": "user_id", "user_index": "user"})
        rows = in_ranges(rows, "user", self.spec.n_users).sortWithinPartitions("as_of", "user")
        _save(rows, f"{self.run.uri}/users", self.spec.users_schema(), "as_of")

    def items(self) -> None:
        """items/: an item a row."""
        rows = self.catalogue.drop("count").withColumnsRenamed(
            {"index": "item", "token": "item_id", "positives": "count"}
        )
        rows = in_ranges(rows, "item", self.spec.n_items).sortWithinPartitions("item")
        _save(rows, f"{self.run.uri}/items", self.spec.items_schema())

    def days(self) -> None:
        """item_days/: an item a row and day on which something changed."""
        first, fields = self.look.first_micros, self.config.fields
        rows = item_days(self.usable, self.catalogue, fields, self.fitted, first, self._end)
        rows = in_ranges(rows, "item", self.spec.n_items).sortWithinPartitions("item", "day")
        _save(rows, f"{self.run.uri}/item_days", self.spec.item_days_schema())

    def quarantine(self) -> None:
        """quarantine/: a row that was set aside."""
        bad = [self.events.where(F.col("_reason") != DUPLICATE), *self.checked.values()]
        if self.look.reasons[DUPLICATE]:
            bad.append(duplicates(self.events, self.inputs.events()))
        write(quarantine(*bad).coalesce(1), f"{self.run.uri}/quarantine", QUARANTINE)

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
        return State(looking, self.fitted, frozenset(several), widths, self.config.split.kind != "column")

    def _own(self) -> DataFrame:
        """The users' index and the fields of their table."""
        looking = {field.name for field in state_fields(self.config.fields)}
        own = [f.name for f in self.spec.side("user") if f.name != "user" and f.name not in looking]
        columns = [F.col(f"`{ids.stored(name)}`") for name in own]
        rows = self.people.select(F.col("token").alias("user"), F.col("index").alias("user_index"), *columns)
        return _small(rows, self.spec.n_users)

    def _indexed(self) -> DataFrame:
        """The events with indices in place of item ids and words, and the context fields."""
        named = [
            F.col(f"`{ids.stored(name)}`").alias(f"attribute:{name}")
            for name in attributes(self.config.fields)
        ]
        item = self.catalogue.select(F.col("token").alias("item"), F.col("index").alias("_item"), *named)
        rows = (
            self.usable.withColumns(_times(self.config))
            .join(_small(item, self.spec.n_items), "item")
            .drop("item")
        )
        rows = rows.withColumnRenamed("_item", "item")
        return ids.encode_fields(rows, self.config.fields, "context", self.vocabularies, self.fitted)


def _save(rows: DataFrame, uri: str, schema: pa.Schema, partition_by: str | None = None) -> None:
    """Write the columns of a schema: fields under their own names, whatever else the rows have."""
    names = [*schema.names, *([partition_by] if partition_by else [])]
    fields = {name for name in names if ids.stored(name) in rows.columns}
    columns = [F.col(f"`{ids.stored(name) if name in fields else name}`").alias(name) for name in names]
    write(rows.select(*columns), uri, schema, partition_by)


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

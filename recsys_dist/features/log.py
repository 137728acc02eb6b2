"""The log and its tables, checked: what can be used, what is set aside, and what one look over it tells."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce

from pyspark.sql import Column, DataFrame, Row, SparkSession
from pyspark.sql import functions as F

from recsys_dist.config import AnyField, Config, KCore, absolute
from recsys_dist.errors import ConfigError, DataError
from recsys_dist.features import ids
from recsys_dist.features.check import SPLITS, check_events, check_table, require_pattern
from recsys_dist.features.numeric import LIMIT
from recsys_dist.features.read import read
from recsys_dist.features.session import spark_uri
from recsys_dist.features.source import Opened
from recsys_dist.features.split import midnight
from recsys_dist.schema import FUTURE
from recsys_dist.workspace import raw_files

HASH_BUCKETS = 1_000_000


class Inputs:
    """Reads the sources as often as is asked, always the same rows.

    Args:
        spark: the session.
        config: what to read.
        opened: the sources.
        scratch: URI of a folder for what is needed only while the run is made.
    """

    def __init__(self, spark: SparkSession, config: Config, opened: dict[str, Opened], scratch: str) -> None:
        self.spark, self.config, self.opened, self.scratch = spark, config, opened, scratch
        for name in ("events", "items"):
            if name in opened:
                require_pattern(spark, name, opened[name].source)
        self._forgotten = self._forget()

    def events(self) -> DataFrame:
        """The log's rows, of `check_events`, numeric context columns as numbers."""
        date = self.config.score.date
        rows = self._kept(read(self.spark, self.opened["events"], self.scratch))
        checked = check_events(rows, self.config, midnight(date) if date else None)
        if self.config.label.others == "drop":
            checked = checked.where(F.col("positive") | F.col("_reason").isNotNull())
        # What is stored is what everything is computed from.
        checked = checked.withColumn("value", F.col("value").cast("float").cast("double"))
        return ids.with_numbers(checked, self.config.fields, "context", self.opened["events"].source.decimal)

    def tables(self) -> dict[str, DataFrame]:
        """The rows of the items and users tables, of `check_table`, numeric columns as numbers."""
        tables = {}
        for name, key in (("items", "item"), ("users", "user")):
            if name in self.opened:
                rows = read(self.spark, self.opened[name], self.scratch, placed=True)
                rows = self._kept(rows) if name == "users" else rows
                source = self.opened[name].source
                checked = check_table(rows, key, source)
                tables[name] = ids.with_numbers(checked, self.config.fields, key, source.decimal)
        return tables

    def _kept(self, rows: DataFrame) -> DataFrame:
        """The rows of the users that are sampled, by a hash of the raw id, and not forgotten."""
        share = self.config.data.sample_users
        if share < 1:
            bucket = F.pmod(F.xxhash64(F.coalesce("user", "_raw")), F.lit(HASH_BUCKETS))
            rows = rows.where(bucket < share * HASH_BUCKETS)
        if self._forgotten is not None:
            rows = rows.join(F.broadcast(self._forgotten), "user", "left_anti")
        return rows

    def _forget(self) -> DataFrame | None:
        path = self.config.data.forget
        if path is None:
            return None
        if not raw_files(path):
            raise ConfigError(f"data.forget={path}: there is no such file. It has a user id a line.")
        names = self.spark.read.text(spark_uri(absolute(path))).select(F.trim("value").alias("user"))
        return names.where(F.col("user") != "").distinct()


@dataclass(frozen=True)
class Numbers:
    """How many values a numeric field's column has, in usable rows."""

    read: int
    unread: int
    """Texts that are no number."""


@dataclass(frozen=True)
class Look:
    """What one look over the split events tells."""

    reasons: Counter[str]
    """Rows by the reason for which they are set aside; usable rows under the empty reason."""
    rows: dict[str, int]
    """Examples by split."""
    positives: dict[str, int]
    """Positive examples by split."""
    hour: int
    """Most frequent hour of the train part; of equally frequent ones the earliest."""
    first_micros: int
    last_micros: int
    values: dict[str, tuple[float, float]]
    """Least and greatest value of the train part's events, by `when`: any and positive."""
    numbers: dict[str, Numbers]
    """Of each numeric field of side context, by name."""
    types: dict[str, int]
    """Train events of each event type that a field is about."""


def look_over(events: DataFrame, fields: Sequence[AnyField]) -> Look:
    """Count the events of `split.assign`."""
    flags = ids.number_flags(fields, "context")
    types = dict.fromkeys(
        sorted({getattr(field, "when", "any") for field in fields} - {"any", "positive"}), 0
    )
    of_types = {f"type:{name}": F.col("event") == name for name in types}
    hour = F.when(F.col("_reason").isNull(), F.hour(F.timestamp_micros("micros")))
    counted = (
        events.groupBy("_reason", "split", "positive", hour.alias("hour"))
        .agg(
            F.count("*").alias("rows"),
            F.min("micros").alias("first"),
            F.max("micros").alias("last"),
            F.min("value").alias("low"),
            F.max("value").alias("high"),
            *_true(flags | of_types),
        )
        .collect()
    )
    reasons: Counter[str] = Counter()
    rows, positives = dict.fromkeys(SPLITS, 0), dict.fromkeys(SPLITS, 0)
    hours: Counter[int] = Counter()
    values: dict[str, list[float]] = {"any": [], "positive": []}
    usable = [row for row in counted if row["_reason"] is None]
    for row in counted:
        reasons[row["_reason"] or ""] += row["rows"]
    for row in usable:
        rows[row["split"]] += row["rows"]
        positives[row["split"]] += row["rows"] * row["positive"]
        if row["split"] == "train":
            hours[row["hour"]] += row["rows"]
            for when in values if row["positive"] else ("any",):
                values[when] += [row["low"], row["high"]]
            for name in types:
                types[name] += row[f"type:{name}"]
    most = min(hours, key=lambda hour: (-hours[hour], hour), default=0)
    first = min((row["first"] for row in usable), default=0)
    last = max((row["last"] for row in usable), default=0)
    bounds = {when: (min(found), max(found)) for when, found in values.items() if found}
    return Look(reasons, rows, positives, most, first, last, bounds, _numbers(usable, flags), types)


def require_usable(config: Config, look: Look) -> None:
    """Raise a DataError where there is nothing to learn from, and warn of fields of which that is true."""
    assert config.data.events
    path = config.data.events.path
    if not sum(look.rows.values()):
        share = config.data.sample_users
        sampled = f" with data.sample_users={share}" if share < 1 else ""
        later = " before score.date" if look.reasons[FUTURE] else ""
        dropped = " left by data.k_core" if config.data.k_core != KCore() else ""
        raise DataError(f"data.events.path={path}: the input has no events{sampled}{later}{dropped}")
    if not look.positives["train"]:
        raise DataError(
            f"data.events.path={path}: none of the {look.rows['train']} train events is positive, so there "
            f"is nothing to learn. Check label.positive_when={config.label.positive_when!r} and split."
        )
    for when in (when for when, events in look.types.items() if not events):
        named = ", ".join(field.name for field in config.fields if getattr(field, "when", None) == when)
        print(
            f"  warning: no train event has the type {when!r}, so there is nothing in {named}. Is it what "
            f"the log calls it?",
            flush=True,
        )


def require_known(
    side: str, key: str, opened: dict[str, Opened], table: DataFrame, events: DataFrame
) -> None:
    """Raise a DataError where not one id of a table occurs in the log: the two are written differently."""
    # The first events that are looked at have one, as a rule.
    if not events.select(key).join(table.select(key), key, "left_semi").isEmpty():
        return
    examples = [frame.select(key).orderBy(key).first() for frame in (table, events)]
    found = [repr(row[0]) if row else "none" for row in examples]
    source = opened[side].source
    raise DataError(
        f"data.{side}.path={source.path}: no {key} of it occurs in the events. It has ids such as "
        f"{found[0]}, the events such as {found[1]}. Check data.{side}.columns.{key}={source.columns[key]!r}."
    )


def look_over_tables(
    tables: dict[str, DataFrame], fields: Sequence[AnyField]
) -> tuple[dict[str, Counter[str]], dict[str, Numbers]]:
    """Of each table the rows by the reason for which they are set aside (usable ones under the empty reason);
    of each numeric field of theirs, by name, what is read.
    """
    reasons: dict[str, Counter[str]] = {name: Counter() for name in tables}
    of_tables = {ids.SOURCES[side]: ids.number_flags(fields, side) for side in ("item", "user")}
    flags = {flag: column for of_table in of_tables.values() for flag, column in of_table.items()}
    each = []
    for name, frame in tables.items():
        own = [of_tables[name].get(flag, F.lit(False)).alias(flag) for flag in flags]
        each.append(frame.select(F.lit(name).alias("table"), "_reason", *own))
    if not each:
        return reasons, {}
    named = {flag: F.col(f"`{flag}`") for flag in flags}
    counted = reduce(DataFrame.union, each).groupBy("table", "_reason")
    rows = counted.agg(F.count("*").alias("rows"), *_true(named)).collect()
    for row in rows:
        reasons[row["table"]][row["_reason"] or ""] += row["rows"]
    return reasons, _numbers([row for row in rows if row["_reason"] is None], flags)


def require_numbers(
    config: Config, opened: dict[str, Opened], usable: dict[str, DataFrame], found: dict[str, Numbers]
) -> None:
    """Tell how many texts of numeric fields are no numbers.

    Args:
        config: its fields are used.
        opened: the sources.
        usable: their usable rows.
        found: of each numeric field, by name.

    Raises:
        DataError: a field has texts, and not one of them is a number.
    """
    wrong = []
    for side, source in ids.SOURCES.items():
        texts = {
            field: F.min(F.get(ids.UNREAD, F.lit(place))).alias(field.name)
            for place, field in enumerate(ids.numeric_fields(config.fields, side))
            if found[field.name].unread
        }
        # A second look at the rows, only where there is something to show.
        examples = usable[source].agg(*texts.values()).first() if texts else None
        for field in texts:
            assert examples is not None
            numbers, example = found[field.name], repr(examples[field.name][:200])
            where = f"the column {field.column!r} of data.{source} ({opened[source].source.path})"
            if numbers.read:
                texts_of = f"{numbers.unread:,} texts of {where} are no numbers below {LIMIT:g}"
                print(f"  {field.name}: {texts_of} and count as missing, such as {example}", flush=True)
            else:
                none = f"none of the {numbers.unread:,} texts of {where} is a number below {LIMIT:g}"
                wrong.append(f"field {field.name}: {none}, such as {example}")
    if wrong:
        todo = (
            "Name another column, make the field categorical, or set the source's decimal: ',' (csv and tsv)."
        )
        raise DataError("\n".join([*wrong, todo]))


def _true(flags: Mapping[str, Column]) -> list[Column]:
    """The number of rows of each flag."""
    return [F.count_if(flag).alias(name) for name, flag in flags.items()]


def _numbers(rows: Sequence[Row], flags: Iterable[str]) -> dict[str, Numbers]:
    """Of each numeric field what is read: the sums of `_true`."""
    names = dict.fromkeys(flag.partition(":")[2] for flag in flags)
    return {
        name: Numbers(*(sum(row[f"{kind}:{name}"] for row in rows) for kind in ("read", "unread")))
        for name in names
    }

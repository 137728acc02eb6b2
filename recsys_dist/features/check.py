"""Which rows of the raw log are set aside, and why. Nothing else drops a row."""

import re
from collections import Counter
from collections.abc import Callable, Sequence

from pyspark.errors import PySparkException
from pyspark.sql import Column, DataFrame, SparkSession, Window
from pyspark.sql import functions as F
from pyspark.sql.types import TimestampType

from recsys_dist.config import Config, Source
from recsys_dist.errors import ConfigError, DataError
from recsys_dist.features.numeric import LIMIT, parsed
from recsys_dist.features.read import readable
from recsys_dist.schema import FUTURE

DUPLICATE = "duplicate"
LISTED_AGAIN = "listed again later"
OUT_OF_RANGE = "value out of range"
SPLITS = ("train", "valid", "test")
YES, NO = ("1", "true", "1.0"), ("0", "false", "0.0")
# Seconds of 0001-01-01 and 10000-01-01: what a date of four digits can say.
FIRST_SECOND, END_SECOND = -62135596800, 253402300800


def check_events(rows: DataFrame, config: Config, date_micros: int | None) -> DataFrame:
    """Parse time and value, say which rows are unusable and which of the others are positive.

    Args:
        rows: of `read`, in a session with the settings of `session.start`.
        config: its sections `data.events` and `label` are used.
        date_micros: start of `score.date`, in microseconds since 1970: rows from then on are of the future.

    Returns:
        user and item (string), micros (bigint, since 1970), value (double: the event type's weight, the
        column, or 1), `event` and `split` (string) where the source has such a column, positive (boolean;
        false for an unusable row), the further columns, `_hash`, `_source`, `_raw` and `_reason` (null: a
        usable row).

    Raises:
        ConfigError: `label.positive_when` is not a condition on these columns.
    """
    source, label, has = config.data.events, config.label, set(rows.columns)
    assert source is not None
    rows = rows.withColumn("micros", _microseconds(rows, "timestamp", source))
    # A value must also be finite as float32, the type it is stored in.
    single = F.col("value").cast("float")
    unusable = F.col("value").isNull() | F.isnan(single) | (F.abs(single) == float("inf"))
    reasons = [
        F.col("_broken"),
        F.when(F.col("user").isNull(), "missing user"),
        F.when(F.col("item").isNull(), "missing item"),
        F.when(F.col("micros").isNull(), "unparseable timestamp"),
    ]
    if date_micros is not None:
        reasons.append(F.when(F.col("micros") >= date_micros, FUTURE))
    if label.weights:
        weights = [F.when(F.col("event") == event, float(weight)) for event, weight in label.weights.items()]
        rows = rows.withColumn("value", F.coalesce(*weights))
        reasons.append(F.when(F.col("value").isNull(), "unknown event type"))
    elif "value" in has:
        rows = rows.withColumn("value", parsed("value", source.decimal))
        reasons.append(F.when(unusable, "unparseable value"))
        low, high = source.value_range
        # Sums of such values would not be exact.
        reasons.append(F.when(F.abs("value") >= LIMIT, OUT_OF_RANGE))
        for limit, outside in ((low, F.col("value") < F.lit(low)), (high, F.col("value") > F.lit(high))):
            if limit is not None:
                reasons.append(F.when(outside, OUT_OF_RANGE))
    else:
        rows = rows.withColumn("value", F.lit(1.0))
    if label.kind == "column":
        text = F.lower("label")
        positive = F.coalesce(text.isin(*YES), F.lit(False))
        reasons.append(F.when(~F.coalesce(text.isin(*YES, *NO), F.lit(False)), "label is not 0 or 1"))
    else:
        positive = positive_condition(rows.sparkSession, label.positive_when, "event" in has)
    if "split" in has:
        reasons.append(F.when(~F.coalesce(F.col("split").isin(*SPLITS), F.lit(False)), "unknown split"))
    rows = rows.withColumn("_reason", F.coalesce(*reasons)).withColumn(
        "timestamp", F.timestamp_micros("micros")
    )
    usable = F.col("_reason").isNull()
    return rows.withColumn("positive", usable & positive).drop("_broken", "timestamp", "label")


def check_table(rows: DataFrame, key: str, source: Source) -> DataFrame:
    """Say which rows of a table with one row a user or item are unusable, and parse its times.

    Of several usable rows with one id the last one of the last file is used, files in order of their paths.

    Args:
        rows: of `read`, placed.
        key: `user` or `item`.
        source: says how times are written.

    Returns:
        the columns of `rows`, `active_from` and `active_to` as timestamps (null: no limit), and `_reason` in
        place of `_broken` and `_place`.
    """
    reasons = [F.col("_broken"), F.when(F.col(key).isNull(), f"missing {key}")]
    for column in ("active_from", "active_to"):
        if column in rows.columns:
            # Parsed under another name: the text says whether there is a time at all.
            rows = rows.withColumn(f"_{column}", F.timestamp_micros(_microseconds(rows, column, source)))
            wrong = F.col(column).isNotNull() & F.col(f"_{column}").isNull()
            reasons.append(F.when(wrong, f"unparseable {column}"))
    rows = rows.withColumn("_reason", F.coalesce(*reasons))
    for column in ("active_from", "active_to"):
        if column in rows.columns:
            rows = rows.withColumn(column, F.col(f"_{column}")).drop(f"_{column}")
    # Unusable rows each by their own text, so that those without an id are not all in one place.
    usable = F.col("_reason").isNull()
    same = Window.partitionBy(usable, F.when(usable, F.col(key)).otherwise(F.col("_raw")))
    last = F.row_number().over(same.orderBy(F.desc("_source"), F.desc("_place"))) == 1
    repeated = F.when(usable & ~last, f"{key} {LISTED_AGAIN}")
    return rows.withColumn("_reason", F.coalesce("_reason", repeated)).drop("_broken", "_place")


def quarantine(*checked: DataFrame) -> DataFrame:
    """The rows set aside: source, reason, raw."""
    bad = [
        frame.where(F.col("_reason").isNotNull()).select(
            F.col("_source").alias("source"), F.col("_reason").alias("reason"), readable("_raw").alias("raw")
        )
        for frame in checked
    ]
    whole = bad[0]
    for frame in bad[1:]:
        whole = whole.union(frame)
    return whole


def require_few(
    name: str,
    reasons: Counter[str],
    checked: DataFrame,
    limit: float,
    duplicates: Callable[[], DataFrame] | None = None,
) -> None:
    """Raise a DataError when more than `limit` of a source's rows are set aside, with examples.

    Rows of the future are neither rows nor unusable here: a night that is made later has many.

    Args:
        name: the source's key under `data`.
        reasons: rows by reason; usable ones under the empty reason.
        checked: the rows with `_reason`, `_source` and `_raw`.
        limit: `data.max_bad_rows`.
        duplicates: makes the duplicates' `_source` and `_raw`, where `checked` has lost them.
    """
    reasons = Counter({reason: count for reason, count in reasons.items() if reason != FUTURE})
    rows, bad = reasons.total(), reasons.total() - reasons[""]
    if bad <= limit * rows:
        return
    frequent = [(reason, count) for reason, count in reasons.most_common(4) if reason][:3]
    examples = []
    for reason, count in frequent:
        lost = duplicates if reason == DUPLICATE else None
        those = lost() if lost else checked.where(F.col("_reason") == reason)
        found = those.select("_source", "_raw").orderBy("_source", "_raw").first()
        assert found is not None
        examples.append(f"{count} x {reason}, for example in {found['_source']}: {found['_raw'][:200]!r}")
    raise DataError(
        f"data.{name}: {bad} of {rows} rows are unusable, more than data.max_bad_rows={limit}:\n  "
        + "\n  ".join(examples)
        + f"\nCheck data.{name}'s format, delimiter, columns and timestamp_format, or raise max_bad_rows."
    )


def positive_condition(spark: SparkSession, condition: str | None, has_event: bool) -> Column:
    """The label's condition on user, item, timestamp, value and event; an unknown answer is no.

    Args:
        spark: checks the condition.
        condition: `label.positive_when`; None: every event is positive.
        has_event: the events have an event type.

    Raises:
        ConfigError: it is not a condition on these columns.
    """
    if condition is None:
        return F.lit(True)
    names = ["user", "item", "timestamp", "value", *(["event"] if has_event else [])]
    types = {"timestamp": "timestamp", "value": "double"}
    probe = spark.range(1).select(
        *(F.lit(None).cast(types.get(name, "string")).alias(name) for name in names)
    )
    try:
        probed = probe.where(F.expr(condition))
        if not probed._jdf.queryExecution().analyzed().deterministic():
            raise ConfigError(
                f"label.positive_when={condition!r} gives another answer each time; labels must not change"
            )
    except PySparkException as error:
        raise ConfigError(
            f"label.positive_when={condition!r} is no Spark SQL condition on {', '.join(names)} "
            f"(these names, whatever the log's columns are called): "
            f"{_first_line(error)}"
        ) from None
    return F.coalesce(F.expr(condition), F.lit(False))


def require_pattern(spark: SparkSession, name: str, source: Source) -> None:
    """Raise a ConfigError where `timestamp_format` is no pattern that Spark knows."""
    pattern = source.timestamp_format
    if pattern in ("seconds", "milliseconds", "iso"):
        return
    try:
        spark.range(1).select(F.try_to_timestamp(F.lit("2024"), F.lit(pattern))).collect()
    except PySparkException as error:
        raise ConfigError(
            f"data.{name}.timestamp_format={pattern!r} is neither seconds, milliseconds, iso "
            f"nor a datetime pattern that Spark knows: {_first_line(error)}"
        ) from None
    if source.timezone != "UTC" and re.search(r"\[[^]]*[VzOXxZ]", _letters(pattern)):
        raise ConfigError(
            f"data.{name}.timestamp_format={pattern!r} has an optional zone, and timezone={source.timezone} "
            f"is for times that have none. Use iso, or a pattern of times that all have one."
        )


def _microseconds(rows: DataFrame, column: str, source: Source) -> Column:
    """Microseconds since 1970 of a column of times; null where it is none."""
    pattern, zone, text = source.timestamp_format, source.timezone, F.col(column)
    if isinstance(rows.schema[column].dataType, TimestampType):
        exact = F.unix_micros(column)
    elif pattern in ("seconds", "milliseconds"):
        scale = 6 if pattern == "seconds" else 3
        # Most are whole, and integers are parsed in a fraction of a decimal's time.
        whole = F.expr(f"try_cast({column} AS bigint)")
        number = F.expr(f"try_cast({column} AS decimal(18,{scale}))")
        is_day = whole.between(*(second * 10 ** (6 - scale) for second in (FIRST_SECOND, END_SECOND)))
        exact = F.when(is_day, whole * 10**scale).when(
            whole.isNull(), (number * F.lit(10**scale)).cast("bigint")
        )
    elif pattern == "iso":
        time = F.expr(f"try_cast({column} AS timestamp)")
        # The cast also takes a time alone, which it completes with today's date.
        exact = F.when(text.rlike(r"^\d{4}-\d{2}-\d{2}"), F.unix_micros(time))
        if zone != "UTC":
            has_zone = text.rlike(r"^.{11}.*[A-Za-z+-]")
            exact = F.when(has_zone, exact).otherwise(_of_zone(exact, zone))
    else:
        exact = F.unix_micros(F.try_to_timestamp(text, F.lit(pattern)))
        if zone != "UTC" and not re.search("[VzOXxZ]", _letters(pattern)):
            exact = _of_zone(exact, zone)
    return F.when((exact >= FIRST_SECOND * 10**6) & (exact < END_SECOND * 10**6), exact)


def _of_zone(micros: Column, zone: str) -> Column:
    """A time that was taken for one of UTC, as what it is in another zone."""
    return F.unix_micros(F.to_utc_timestamp(F.timestamp_micros(micros), zone))


def _letters(pattern: str) -> str:
    """A datetime pattern without its quoted text."""
    return re.sub("'[^']*'", "", pattern)


def _first_line(error: PySparkException) -> str:
    lines: Sequence[str] = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__

"""Which rows of the raw log are set aside, and why. Nothing else drops a row."""

from collections import Counter
from collections.abc import Sequence

from pyspark.errors import PySparkException
from pyspark.sql import Column, DataFrame, SparkSession, Window
from pyspark.sql import functions as F
from pyspark.sql.types import TimestampType

from recsys_dist.config import Source
from recsys_dist.errors import ConfigError, DataError

DUPLICATE = "duplicate"
# Seconds of 0001-01-01 and 10000-01-01: what a date of four digits can say.
FIRST_SECOND, END_SECOND = -62135596800, 253402300800


def check_events(events: DataFrame, source: Source, positive: Column) -> DataFrame:
    """Parse time and value, say which rows are unusable and which of the others are positive.

    Args:
        events: of `read`.
        source: says how times are written.
        positive: of `positive_condition`.

    Returns:
        user and item (string), micros (bigint, since 1970), value (double; 1 where the source has none),
        positive (boolean), the further columns, `_source`, `_raw` and `_reason` (null: a usable row).
    """
    has_value = "value" in events.columns
    value = F.col("value").try_cast("double") if has_value else F.lit(1.0)
    parsed = events.withColumns({"micros": _microseconds(events, source.timestamp_format), "value": value})
    parsed = parsed.withColumn("timestamp", F.timestamp_micros("micros"))
    # A value must also be finite as float32, the type it is stored in.
    single = F.col("value").cast("float")
    unusable = F.col("value").isNull() | F.isnan(single) | (F.abs(single) == float("inf"))
    reason = F.coalesce(
        F.col("_broken"),
        F.when(_missing("user"), "missing user"),
        F.when(_missing("item"), "missing item"),
        F.when(F.col("micros").isNull(), "unparseable timestamp"),
        F.when(unusable, "unparseable value"),
    )
    checked = parsed.withColumn("_reason", reason)
    return checked.withColumn("positive", F.col("_reason").isNull() & positive).drop("_broken", "timestamp")


def check_table(rows: DataFrame, key: str) -> DataFrame:
    """Say which rows of a table with one row a user or item are unusable.

    Of several rows with one id the first by text is used.
    """
    repeated = F.row_number().over(Window.partitionBy(key).orderBy("_raw", "_source")) > 1
    reason = F.coalesce(
        F.col("_broken"), F.when(_missing(key), f"missing {key}"), F.when(repeated, f"{key} listed before")
    )
    return rows.withColumn("_reason", reason).drop("_broken")


def quarantine(*checked: DataFrame) -> DataFrame:
    """The rows set aside: source, reason, raw."""
    bad = [
        frame.where(F.col("_reason").isNotNull()).select(
            F.col("_source").alias("source"), F.col("_reason").alias("reason"), F.col("_raw").alias("raw")
        )
        for frame in checked
    ]
    whole = bad[0]
    for frame in bad[1:]:
        whole = whole.union(frame)
    return whole


def require_few(name: str, reasons: Counter[str], checked: DataFrame, limit: float) -> None:
    """Raise a DataError when more than `limit` of a source's rows are set aside, with examples.

    Args:
        name: the source's key under `data`.
        reasons: rows by reason; usable ones under the empty reason.
        checked: the rows with `_reason`, `_source` and `_raw`.
        limit: `data.max_bad_rows`.
    """
    rows, bad = reasons.total(), reasons.total() - reasons[""]
    if bad <= limit * rows:
        return
    frequent = [(reason, count) for reason, count in reasons.most_common(4) if reason][:3]
    examples = []
    for reason, count in frequent:
        row = checked.where(F.col("_reason") == reason).select("_source", "_raw").orderBy("_source", "_raw")
        found = row.first()
        assert found is not None
        examples.append(f"{count} x {reason}, for example in {found['_source']}: {found['_raw'][:200]!r}")
    raise DataError(
        f"data.{name}: {bad} of {rows} rows are unusable, more than data.max_bad_rows={limit}:\n  "
        + "\n  ".join(examples)
        + f"\nCheck data.{name}'s format, delimiter, columns and timestamp_format, or raise max_bad_rows."
    )


def positive_condition(spark: SparkSession, condition: str | None) -> Column:
    """The label's condition on user, item, timestamp and value; an unknown answer is no.

    Raises:
        ConfigError: it is not a condition on these columns.
    """
    if condition is None:
        return F.lit(True)
    probe = spark.sql(
        "SELECT '' AS user, '' AS item, timestamp_micros(0) AS timestamp, CAST(0 AS DOUBLE) AS value"
    )
    try:
        probe.where(F.expr(condition)).schema  # noqa: B018 the analysis is what can fail
    except PySparkException as error:
        raise ConfigError(
            f"label.positive_when={condition!r} is no Spark SQL condition on user, item, timestamp and value "
            f"(these names, whatever the log's columns are called): "
            f"{_first_line(error)}"
        ) from None
    return F.coalesce(F.expr(condition), F.lit(False))


def require_pattern(spark: SparkSession, name: str, source: Source) -> None:
    """Raise a ConfigError where `timestamp_format` is no pattern that Spark knows."""
    if source.timestamp_format in ("seconds", "milliseconds", "iso"):
        return
    try:
        spark.range(1).select(F.try_to_timestamp(F.lit("2024"), F.lit(source.timestamp_format))).collect()
    except PySparkException as error:
        raise ConfigError(
            f"data.{name}.timestamp_format={source.timestamp_format!r} is neither seconds, milliseconds, iso "
            f"nor a datetime pattern that Spark knows: {_first_line(error)}"
        ) from None


def _microseconds(events: DataFrame, pattern: str) -> Column:
    text = F.trim("timestamp")
    if isinstance(events.schema["timestamp"].dataType, TimestampType):
        exact = F.unix_micros("timestamp")
    elif pattern in ("seconds", "milliseconds"):
        scale = 6 if pattern == "seconds" else 3
        number = text.try_cast(f"decimal(18,{scale})")
        exact = (number * F.lit(10**scale)).cast("bigint")
    elif pattern == "iso":
        # The cast also takes a time alone, which it completes with today's date.
        exact = F.unix_micros(F.when(text.rlike(r"^\d{4}-\d{2}-\d{2}"), text).try_cast("timestamp"))
    else:
        exact = F.unix_micros(F.try_to_timestamp(text, F.lit(pattern)))
    return F.when((exact >= FIRST_SECOND * 10**6) & (exact < END_SECOND * 10**6), exact)


def _missing(column: str) -> Column:
    return F.col(column).isNull() | (F.trim(column) == "")


def _first_line(error: PySparkException) -> str:
    lines: Sequence[str] = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__

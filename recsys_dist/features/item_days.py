"""What is known of an item before a day: popularity and mean value over windows, and age.

Events are counted by item and day first, so that an item in a third of all events costs no more than its
days. A row is written only for days on which something changes; it holds until the item's next row.
"""

from collections.abc import Mapping, Sequence

from pyspark.sql import Column, DataFrame, Window
from pyspark.sql import functions as F

from recsys_dist.config import Aggregate, AnyField
from recsys_dist.features.ids import stored
from recsys_dist.features.numeric import Fitted, Moments, Value, parts, total, whole
from recsys_dist.features.session import RANGE, in_ranges
from recsys_dist.features.split import matches
from recsys_dist.features.state import doubling
from recsys_dist.schema import DAY

KINDS = COUNT, WHOLE, REST = "n", "w", "p"
"""What is added up of a window's events: their number, and the two parts of their values."""
MOST_AGE = 15
"""Index of 2^14 days and more."""


def daily_fields(fields: Sequence[AnyField]) -> tuple[Aggregate, ...]:
    """The fields of item_days/, in order."""
    return tuple(field for field in fields if isinstance(field, Aggregate) and field.side == "item")


def day_values(fields: Sequence[AnyField], bounds: Mapping[str, tuple[float, float]]) -> dict[str, Value]:
    """What mean values are scaled by: the train events' own values, by field.

    Args:
        fields: of the configuration.
        bounds: of `log.Look.values`.
    """
    wanted = [field for field in daily_fields(fields) if field.measure == "mean_value"]
    return {
        field.name: Value(F.when(matches(field.when), F.col("value")), *bounds.get(field.when, ()))
        for field in wanted
    }


def fit_days(found: Mapping[str, Moments], fields: Sequence[AnyField]) -> dict[str, Fitted]:
    """The daily fields, of the moments of `day_values`. Counts enter as log(1 + n)."""
    fitted = {}
    for field in daily_fields(fields):
        if field.measure == "mean_value":
            fitted[field.name] = Fitted(0.0, False, found[field.name].mean, found[field.name].stddev)
        elif field.measure == "count":
            fitted[field.name] = Fitted(0.0, True)
    return fitted


def item_days(
    events: DataFrame,
    items: DataFrame,
    n_items: int,
    fields: Sequence[AnyField],
    fitted: dict[str, Fitted],
    first: int,
    end: int,
    partitions: int,
) -> DataFrame:
    """The rows of item_days/: item, day, and the daily fields, named by `stored`; each item's in one
    partition, items in ascending ranges.

    Args:
        events: usable events with `item` (raw id), micros, value, positive and, where there is one, event.
        items: `token`, `index` and `active_from` of every item.
        n_items: their number.
        fields: of the configuration.
        fitted: of `fit_days`.
        first: micros of the log's first event: every item has a row for its day.
        end: micros of the start of the day after which nothing is asked.
        partitions: of the result.
    """
    wanted = daily_fields(fields)
    whens = list(dict.fromkeys(["any", *(field.when for field in wanted)]))
    number = {when: i for i, when in enumerate(whens)}
    day = ((F.col("micros") - F.pmod("micros", F.lit(DAY))) / DAY).cast("int")
    sums = []
    for when, i in number.items():
        value = F.when(matches(when), F.col("value"))
        sums.append(F.count(value).alias(f"{COUNT}{i}"))
        sums += [F.sum(whole(value)).alias(f"{WHOLE}{i}"), F.sum(parts(value)).alias(f"{REST}{i}")]
    counted = events.groupBy("item", day.alias("day")).agg(*sums)
    indexed = counted.join(items.select(F.col("token").alias("item"), "index"), "item").drop("item")

    windows: list[tuple[str, int | None]] = [
        (field.when, field.days) for field in wanted if field.measure != "age"
    ]
    windows = list(dict.fromkeys(windows))
    enter = [_change(windows, number, None)]
    leave = [_change(windows, number, days) for days in sorted({days for _, days in windows if days})]
    changes = indexed.select("index", F.inline(F.array(*enter, *leave)))

    start = first // DAY
    none = _nothing(windows)
    base = items.select("index", F.lit(start).cast("int").alias("day"), *none)
    changes = changes.unionByName(base).withColumn("age", F.lit(0))
    if any(field.measure == "age" for field in wanted):
        changes = changes.unionByName(_ages(indexed, items, windows))
    changes = changes.withColumn("day", F.greatest("day", F.lit(start).cast("int")))
    changes = changes.where(F.col("day") <= end // DAY)
    totals = [F.sum(f"{kind}{i}").alias(f"{kind}{i}") for i in range(len(windows)) for kind in KINDS]
    changes = in_ranges(changes, "index", n_items, partitions)
    by_day = changes.groupBy(RANGE, "index", "day").agg(*totals, F.max("age").alias("age"))
    until_now = Window.partitionBy(RANGE, "index").orderBy("day").rowsBetween(Window.unboundedPreceding, 0)
    running = {
        f"{kind}{i}": F.sum(f"{kind}{i}").over(until_now) for i in range(len(windows)) for kind in KINDS
    }
    known = by_day.withColumns(running | {"age": F.max("age").over(until_now)})
    columns = []
    for field in wanted:
        if field.measure == "age":
            columns.append(F.col("age").alias(stored(field.name)))
            continue
        i = windows.index((field.when, field.days))
        n = F.col(f"{COUNT}{i}").cast("double")
        values = total(F.col(f"{WHOLE}{i}"), F.col(f"{REST}{i}"))
        raw = n if field.measure == "count" else F.when(n > 0, values / n)
        value = F.coalesce(fitted[field.name].scaled(raw), F.lit(0.0)).cast("float")
        columns.append(value.alias(stored(field.name)))
    return known.select(F.col("index").alias("item"), F.date_from_unix_date("day").alias("day"), *columns)


def _change(windows: Sequence[tuple[str, int | None]], number: dict[str, int], leaving: int | None) -> Column:
    """What a day's events change: they enter every window the day after, and leave it `days` days later."""
    sign = 1 if leaving is None else -1
    columns = []
    for i, (when, days) in enumerate(windows):
        moves = leaving is None or days == leaving
        for kind in KINDS:
            value = F.coalesce(F.col(f"{kind}{number[when]}"), F.lit(0)) * sign if moves else F.lit(0)
            columns.append(value.cast("bigint").alias(f"{kind}{i}"))
    return F.struct((F.col("day") + 1 + (leaving or 0)).cast("int").alias("day"), *columns)


def _nothing(windows: Sequence[tuple[str, int | None]]) -> list[Column]:
    none = F.lit(0).cast("bigint")
    return [none.alias(f"{kind}{i}") for i in range(len(windows)) for kind in KINDS]


def _ages(indexed: DataFrame, items: DataFrame, windows: Sequence[tuple[str, int | None]]) -> DataFrame:
    """A row for every day on which an item's age has doubled, counted from its birth.

    The first event shows that an item exists on the day after; active_from is known beforehand.
    """
    first = indexed.groupBy("index").agg(F.min("day").alias("seen"))
    declared = F.unix_date(F.to_date("active_from"))
    born = items.select("index", declared.alias("declared")).join(first, "index", "left")
    birth = F.least("declared", "seen")  # leaves out nulls
    born = born.where(birth.isNotNull()).withColumn("birth", birth)
    begins = F.when(F.col("birth") == F.col("declared"), F.lit(0)).otherwise(1)
    power = F.explode(F.sequence(begins, F.lit(MOST_AGE - 1))).alias("power")
    ages = born.select("index", "birth", power)
    days = (F.pow(F.lit(2), "power") - 1).cast("int")
    day = (F.col("birth") + days).cast("int").alias("day")
    return ages.select("index", day, *_nothing(windows), doubling(days).alias("age"))

"""Statistics that have the same last digit however the data is partitioned, and what is made with them."""

import bisect
import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction

from pyspark.sql import Column, DataFrame, Row, Window
from pyspark.sql import functions as F

from recsys_dist.config import Numeric
from recsys_dist.features.session import literal_rows

LIMIT = 1e12
"""Greater numbers are not believed: of smaller ones millions can be added up exactly."""
PARTS = 10**9
"""A number is added up as its whole part and its billionths, two bigints: exact in any order, as decimals
are, and many times as fast."""
BITS = 26
"""A number from 0 to 1 is added up as two times 26 bits."""
FEW_VALUES = 10_000
"""So many counted values may come to the driver."""
LEAST_VARIANCE = 2.0**-50
"""Of numbers from 0 to 1: what rounding leaves of equal ones is less."""
LOOSE_VARIANCE = 2.0**-20
"""Of numbers from 0 to 1: of a greater one rounding leaves 32 bits and more."""


@dataclass(frozen=True)
class Moments:
    """Of the values that are not missing."""

    count: int = 0
    low: float = 0.0
    high: float = 0.0
    mean: float = 0.0
    stddev: float = 1.0
    """Of the population; 1 where all values are equal."""


def parsed(column: str, decimal: str) -> Column:
    """The numbers of a column of texts, infinite ones too; null where a text is none, or NaN.

    Args:
        column: texts of `read`.
        decimal: `Source.decimal`.
    """
    # Swapped, so that a point, which then parts thousands, makes no other number of a text.
    text = f"`{column}`" if decimal == "." else f"translate(`{column}`, '.,', ',.')"
    # Java's numbers may end in the letter of their type.
    return F.when(F.expr(f"right({text}, 1) < 'A'"), F.expr(f"try_cast({text} AS double)"))


def number(column: str, decimal: str) -> Column:
    """The same, and null where the number is none that is believed."""
    found = parsed(column, decimal)
    return F.when(F.abs(found) < LIMIT, found)


def whole(x: Column) -> Column:
    """The whole part of a number, bigint; a sum of it and of `parts` is exact."""
    return F.floor(x).cast("bigint")


def parts(x: Column) -> Column:
    """The billionths that `whole` leaves, bigint."""
    # Not round(), which goes by the way of decimals.
    return F.floor((x - F.floor(x)) * PARTS + 0.5).cast("bigint")


def total(whole_sum: Column, parts_sum: Column) -> Column:
    """The sum, as a double, of numbers whose parts were added up."""
    return whole_sum.cast("double") + parts_sum.cast("double") / PARTS


def signed_log(x: Column) -> Column:
    """sign(x) log(1 + |x|)"""
    return F.signum(x) * F.log1p(F.abs(x))


@dataclass(frozen=True)
class Value:
    """What moments are asked of, and where it is known beforehand, what it is not below or above."""

    column: Column
    low: float | None = None
    high: float | None = None
    loose: bool = False
    """The values may fill so little of the room between the bounds that they lose digits: if they do, their
    own bounds are looked for."""


def moments(rows: DataFrame, values: Mapping[str, Value]) -> dict[str, Moments]:
    """Mean and standard deviation of several expressions, over the rows where each is not null.

    Values are mapped to [0, 1] between their bounds and added up as whole numbers. Bounds that are not given
    are looked for first, and only then are those of the result the values' own. No value may be beyond given
    ones.
    """
    if not values:
        return {}
    names = list(values)
    columns = rows.select(
        *(value.column.cast("double").alias(f"x{i}") for i, value in enumerate(values.values()))
    )
    bounds = {name: (value.low, value.high) for name, value in values.items()}
    asked = [i for i, name in enumerate(names) if None in bounds[name]]
    if asked:
        found = columns.agg(
            *(function(f"x{i}").alias(f"{label}{i}") for i in asked for label, function in EXTREMES)
        )
        extremes = found.first()
        assert extremes is not None
        bounds |= {names[i]: (extremes[f"low{i}"], extremes[f"high{i}"]) for i in asked}
    sums = []
    for i, name in enumerate(names):
        unit = (F.col(f"x{i}") - F.lit(bounds[name][0] or 0.0)) / F.lit(_width(*bounds[name]))
        sums.append(F.count(f"x{i}").alias(f"n{i}"))
        for label, value in ((f"sum{i}", unit), (f"squares{i}", unit * unit)):
            scaled = F.floor(value * (1 << 2 * BITS) + 0.5).cast("bigint")
            sums.append(F.sum(F.shiftright(scaled, BITS)).alias(f"{label}:high"))
            sums.append(F.sum(scaled.bitwiseAND((1 << BITS) - 1)).alias(f"{label}:low"))
    totals = columns.agg(*sums).first()
    assert totals is not None
    moments_of, crowded = {}, {}
    for i, name in enumerate(names):
        count, (low, high) = int(totals[f"n{i}"]), bounds[name]
        if not count or low is None or high is None:
            moments_of[name] = Moments()
            continue
        width = _width(low, high)
        mean, squares = (
            Fraction((totals[f"{label}:high"] << BITS) + totals[f"{label}:low"], count << 2 * BITS)
            for label in (f"sum{i}", f"squares{i}")
        )
        variance = float(squares - mean**2)
        if values[name].loose and variance < LOOSE_VARIANCE:
            crowded[name] = Value(values[name].column)
        stddev = math.sqrt(variance) * width if variance > LEAST_VARIANCE else 1.0
        moments_of[name] = Moments(count, float(low), float(high), low + float(mean) * width, stddev)
    return moments_of | moments(rows, crowded)


EXTREMES = (("low", F.min), ("high", F.max))


def _width(low: float | None, high: float | None) -> float:
    return (float(high) - float(low)) or 1.0 if low is not None and high is not None else 1.0


def quantiles(values: DataFrame, shares: Sequence[float]) -> dict[str, tuple[float, ...]]:
    """Exact quantiles: of n sorted values, number floor(share * n) from 0.

    How often each value occurs is counted. A few counted values are sorted here, by one job; more are sorted
    over all partitions, and nothing but one row a partition and the quantiles comes to the driver.

    Args:
        values: `name` and `x`, a number; null is left out.
        shares: from 0 to below 1.

    Returns:
        by name, a value a share; names without a value are left out.
    """
    counted = values.where(F.col("x").isNotNull()).groupBy("name", "x").agg(F.count("*").alias("n")).cache()
    few = counted.limit(FEW_VALUES + 1).collect()
    if len(few) <= FEW_VALUES:
        counted.unpersist()
        return _quantiles_here(few, shares)
    ordered = counted.orderBy("name", "x").withColumn("_partition", F.spark_partition_id()).cache()
    parts = ordered.groupBy("name", "_partition").agg(F.sum("n").alias("n")).collect()
    totals: dict[str, int] = {}
    starts = {}
    for part in sorted(parts, key=lambda part: (part["name"], part["_partition"])):
        starts[part["name"], part["_partition"]] = totals.get(part["name"], 0)
        totals[part["name"]] = totals.get(part["name"], 0) + part["n"]
    wanted = [
        {
            "name": name,
            "_partition": partition,
            "i": i,
            "place": min(int(share * totals[name]), totals[name] - 1) - start,
        }
        for (name, partition), start in starts.items()
        for i, share in enumerate(shares)
    ]
    within = Window.partitionBy("name", "_partition").orderBy("x")
    reached = F.sum("n").over(within.rowsBetween(Window.unboundedPreceding, Window.currentRow))
    columns = "name string, _partition int, i int, place bigint"
    targets = literal_rows(ordered.sparkSession, wanted, columns)
    found = (
        ordered.withColumn("reached", reached)
        .join(F.broadcast(targets), ["name", "_partition"])
        .where((F.col("place") < F.col("reached")) & (F.col("place") >= F.col("reached") - F.col("n")))
        .select("name", "i", "x")
        .collect()
    )
    ordered.unpersist()
    counted.unpersist()
    by_name: dict[str, dict[int, float]] = {}
    for row in found:
        by_name.setdefault(row["name"], {})[row["i"]] = row["x"]
    return {name: tuple(places[i] for i in range(len(shares))) for name, places in by_name.items()}


def _quantiles_here(counted: Sequence[Row], shares: Sequence[float]) -> dict[str, tuple[float, ...]]:
    """The quantiles of counted values: `name`, `x`, `n`."""
    found = {}
    for name in sorted({row["name"] for row in counted}):
        own = sorted((row["x"], row["n"]) for row in counted if row["name"] == name)
        ends = list(itertools.accumulate(n for _, n in own))
        places = [min(int(share * ends[-1]), ends[-1] - 1) for share in shares]
        found[name] = tuple(own[bisect.bisect_right(ends, place)][0] for place in places)
    return found


@dataclass(frozen=True)
class Fitted:
    """A numeric field's statistics, in the words of FieldSpec."""

    fill: float = 0.0
    log: bool = False
    offset: float = 0.0
    scale: float = 1.0
    edges: tuple[float, ...] | None = None

    def column(self, x: Column) -> Column:
        """What is stored for a number that may be missing: float, or the bucket's index as int."""
        if self.edges is not None:
            edges = F.array(*(F.lit(edge) for edge in self.edges)).cast("array<double>")
            above = F.size(F.filter(edges, lambda edge: edge <= x))
            return F.when(x.isNull(), F.lit(0)).otherwise(1 + above)
        filled = F.coalesce(x, F.lit(self.fill))
        return self.scaled(filled).cast("float")

    def scaled(self, x: Column) -> Column:
        """(x - offset) / scale, after the logarithm where there is one."""
        return ((signed_log(x) if self.log else x) - F.lit(self.offset)) / F.lit(self.scale)


def numeric_values(fields: Sequence[Numeric], column: Mapping[str, str]) -> dict[str, Value]:
    """What numeric fields are fitted on, by field, and by `<field>:log` where the logarithm is stored.

    Args:
        fields: what to fit.
        column: a field's name to its column, numbers or null.
    """
    plain = {field.name: F.col(f"`{column[field.name]}`") for field in fields if not field.buckets}
    logs = {f"{f.name}:log": signed_log(plain[f.name]) for f in fields if f.log and not f.buckets}
    return {name: Value(x) for name, x in (plain | logs).items()}


def fit(
    rows: DataFrame, fields: Sequence[Numeric], column: Mapping[str, str], found: Mapping[str, Moments]
) -> dict[str, Fitted]:
    """Fit numeric fields of one side.

    Args:
        rows: of the train part.
        fields: what to fit.
        column: a field's name to its column in `rows`, numbers or null.
        found: the moments of `numeric_values`.
    """
    shares: dict[str, tuple[float, ...]] = {}
    for field in fields:
        if field.buckets:
            shares[field.name] = tuple(i / field.buckets for i in range(1, field.buckets))
        elif field.impute == "median":
            shares[field.name] = (0.5,)
    wanted = tuple(sorted({share for several in shares.values() for share in several}))
    at: dict[str, tuple[float, ...]] = {}
    if wanted:
        pairs = [
            F.struct(F.lit(name).alias("name"), F.col(f"`{column[name]}`").alias("x")) for name in shares
        ]
        at = quantiles(rows.select(F.inline(F.array(*pairs))), wanted)
    fitted = {}
    for field in fields:
        of = dict(zip(wanted, at.get(field.name, ()), strict=False))
        if field.buckets:
            edges = tuple(sorted({float(of[share]) for share in shares[field.name] if of}))
            fitted[field.name] = Fitted(edges=edges)
            continue
        if field.impute == "mean":
            fill = found[field.name].mean
        else:
            fill = float(of.get(0.5, 0.0)) if field.impute == "median" else float(field.impute)
        about = found[f"{field.name}:log" if field.log else field.name]
        if field.scale == "standardise":
            fitted[field.name] = Fitted(fill, field.log, about.mean, about.stddev)
        elif field.scale == "min_max":
            fitted[field.name] = Fitted(fill, field.log, about.low, (about.high - about.low) or 1.0)
        else:
            fitted[field.name] = Fitted(fill, field.log)
    return fitted

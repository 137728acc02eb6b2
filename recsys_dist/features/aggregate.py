"""Numbers of the user's events before a moment: log(1 + n), standardised on the train part."""

import math
from dataclasses import dataclass

from pyspark.sql import Column, DataFrame
from pyspark.sql import functions as F

from recsys_dist.features.history import MATCHES


@dataclass(frozen=True)
class Standard:
    """Mean and standard deviation of log(1 + n) over the train examples."""

    mean: float
    stddev: float
    """Of the population; 1 where all values are equal."""

    def column(self, n: Column) -> Column:
        """The standardised value of a count."""
        return ((F.log1p(n) - self.mean) / self.stddev).cast("float")


def fit(events: DataFrame, column: str) -> Standard:
    """Fit on the train examples.

    How often each n occurs is counted exactly and added up here in the order of n, so that the result has
    the same last digit however the data is partitioned.
    """
    counts = events.where("split = 'train'").groupBy(column).count().collect()
    return standard({int(row[0]): int(row[1]) for row in counts})


def standard(counts: dict[int, int]) -> Standard:
    """Mean and standard deviation of log(1 + n), each n as often as `counts` says."""
    total = sum(counts.values())
    mean = math.fsum(math.log1p(n) * count for n, count in sorted(counts.items())) / total
    squares = math.fsum((math.log1p(n) - mean) ** 2 * count for n, count in sorted(counts.items()))
    return Standard(mean, math.sqrt(squares / total) or 1.0)


def before_cut(when: str, known: Column) -> Column:
    """Aggregate over a user's events: how many of those that are known at a cut match."""
    return F.count(F.when(known & F.expr(MATCHES[when]), 1))

"""The log in each user's order of time, cut into train, valid and test."""

from collections.abc import Sequence

from pyspark.sql import DataFrame, Window
from pyspark.sql import functions as F

from recsys_dist.features.check import DUPLICATE

SPLITS = ("train", "valid", "test")


def arrange(events: DataFrame, fractions: Sequence[float]) -> DataFrame:
    """Bring each user's events together, set duplicates aside and split the rest.

    This is the one shuffle of the log: all later steps work within a user.

    Args:
        events: of `check_events`.
        fractions: shares of train and valid; the rest is test.

    Returns:
        the rows of `events`, usable ones with `position` (from 0, in the order of micros, item and value),
        `split`, `earlier_any` and `earlier_positive` (numbers of the user's events with smaller micros).
        Unusable ones keep `_source`, `_raw` and `_reason`, usable ones lose them; the `user` of an
        unusable row is its text, which spreads such rows.
    """
    usable = F.col("_reason").isNull()
    gathered = events.withColumn("user", F.when(usable, F.col("user")).otherwise(F.col("_raw")))
    gathered = gathered.repartition("user")
    # All windows here need rows sorted by a prefix of this one's order, so that they are sorted once.
    same = Window.partitionBy("user", "micros", "item", "value").orderBy("_raw", "_source")
    repeated = F.when(F.row_number().over(same) > 1, DUPLICATE)
    marked = gathered.withColumn("_reason", F.coalesce("_reason", repeated))
    marked = marked.withColumn("positive", F.col("positive") & usable)
    for column in ("_source", "_raw"):
        marked = marked.withColumn(column, F.when(~usable, F.col(column)))

    in_order = Window.partitionBy("user").orderBy("micros", "item", "value")
    until_now = in_order.rowsBetween(Window.unboundedPreceding, Window.currentRow)
    before = Window.partitionBy("user").orderBy("micros").rangeBetween(Window.unboundedPreceding, -1)
    counted = marked.withColumns(
        {
            "position": F.count(F.when(usable, 1)).over(until_now) - 1,
            "earlier_any": F.count(F.when(usable, 1)).over(before),
            "earlier_positive": F.count(F.when(F.col("positive"), 1)).over(before),
            "_events": F.count(F.when(usable, 1)).over(Window.partitionBy("user")),
        }
    )
    share = (F.col("position") + 0.5) / F.col("_events")
    split = (
        F.when(share < fractions[0], "train")
        .when(share < fractions[0] + fractions[1], "valid")
        .otherwise("test")
    )
    return counted.withColumn("split", F.when(usable, split)).drop("_events")

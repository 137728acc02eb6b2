"""Which items follow an item: directed counts of what users liked within the next few events after it."""

from pyspark.sql import Column, DataFrame, Window
from pyspark.sql import functions as F

from recsys_dist.config import Recall

UNIT = 1 << 20
"""What a pair counts is a whole number of so small parts of 1."""


def following(events: DataFrame, settings: Recall) -> DataFrame:
    """How often each item follows each: `item`, `other` and `total`, the sum of gap^-gap_decay in UNITs.

    An item that a user has again follows itself.

    Args:
        events: of `known_events`.
        settings: of the configuration.
    """
    in_order = Window.partitionBy("user").orderBy(F.col("place").desc())
    gaps = range(1, settings.window + 1)
    later = {f"later_{gap}": F.lead("item", gap).over(in_order) for gap in gaps}
    counts = [max(1, round(UNIT * gap**-settings.gap_decay)) for gap in gaps]
    each = [
        F.struct(F.col(name).alias("other"), F.lit(count).cast("bigint").alias("count"))
        for name, count in zip(later, counts, strict=True)
    ]
    pairs = events.withColumns(later).select("item", F.inline(F.array(*each)))
    pairs = pairs.where(F.col("other").isNotNull())
    return pairs.groupBy("item", "other").agg(F.sum("count").alias("total"))


def weight(settings: Recall) -> Column:
    """total / (n_item^item_damping n_other^damping), of the columns of `following` and `with_counts`."""
    damped = F.pow("n_item", F.lit(settings.item_damping)) * F.pow("n_other", F.lit(settings.damping))
    return F.col("total") / F.lit(float(UNIT)) / damped

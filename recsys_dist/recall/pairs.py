"""What the recall runs count from, and how counted pairs of items become a table of the best ones.

Pairs are counted by both items, so that no task has all that a heavy item has, and each task adds up its own
before they are moved. All that is added up are whole numbers: the same in any order.
"""

from pyspark.sql import Column, DataFrame, Window
from pyspark.sql import functions as F

from recsys_dist.config import Recall
from recsys_dist.features.session import files, in_ranges, write
from recsys_dist.schema import RELATED

PAIR_BYTES = 16
"""Of a pair of items that is moved, about."""
FIT_ON = {"train": ("train",), "train_valid": ("train", "valid")}
"""recall.fit_on to the parts of examples/."""
SENT = 500_000
"""A number for each of so many items is sent to every task in place of moving the pairs to it."""


def known_events(examples: DataFrame, settings: Recall) -> DataFrame:
    """The last `max_events` events of every user that pairs are made of.

    Args:
        examples: of a features run.
        settings: of the configuration.

    Returns:
        `user`, `item` and `place`: from 1, the most recent first. Events of one moment are in order of their
        items.
    """
    counted = F.col("split").isin(*FIT_ON[settings.fit_on])
    if settings.events == "positive":
        counted &= F.col("label") > 0
    latest_first = Window.partitionBy("user").orderBy(F.col("timestamp").desc(), F.col("item").desc())
    numbered = examples.where(counted).select(
        "user", "item", F.row_number().over(latest_first).alias("place")
    )
    return numbered.where(F.col("place") <= settings.max_events)


def with_counts(pairs: DataFrame, counts: DataFrame, n_items: int) -> DataFrame:
    """Pairs with `n_item` and `n_other`, how often each of the two occurs.

    Args:
        pairs: with `item` and `other`.
        counts: `item` and `n`.
        n_items: items of the vocabulary.
    """
    for name in ("item", "other"):
        told = counts.select(F.col("item").alias(name), F.col("n").alias(f"n_{name}"))
        pairs = pairs.join(F.broadcast(told) if n_items <= SENT else told, name)
    return pairs


def save_best(pairs: DataFrame, weight: Column, n: int, n_items: int, uri: str) -> None:
    """Write the `n` others of the greatest weight of each item (schema RELATED), of equal ones the first.

    Args:
        pairs: `item`, `other`, each pair once, and what `weight` needs.
        weight: a double; pairs without one or with none above 0 are left out.
        n: of an item.
        n_items: items of the vocabulary.
        uri: of the new folder.
    """
    best_first = Window.partitionBy("item").orderBy(F.col("weight").desc(), "other")
    weighed = pairs.select("item", "other", weight.alias("weight")).where(F.col("weight") > 0)
    # Spark drops what is not among a task's own n before it moves an item's pairs to one place.
    best = weighed.withColumn("rank", F.row_number().over(best_first)).where(F.col("rank") <= n)
    parts = files(pairs.sparkSession, n_items * n * PAIR_BYTES // 2)
    write(in_ranges(best, "item", n_items, parts).sortWithinPartitions("item", "rank"), uri, RELATED)

"""What the recall runs count from, and how counted pairs of items become a table of the best ones.

Pairs are counted by both items, so that no task has all that a heavy item has, and each task adds up its own
before they are moved. All that is added up are whole numbers: the same in any order.
"""

from collections.abc import Sequence

import pyarrow as pa
from pyspark.sql import Column, DataFrame, Window
from pyspark.sql import functions as F

from recsys_dist.config import Recall
from recsys_dist.features.session import files, in_ranges, write
from recsys_dist.features.state import hours
from recsys_dist.schema import LATEST, RELATED
from recsys_dist.workspace import Run

PAIR_BYTES = 16
"""Of a pair of items that is moved, about."""
SENT = 500_000
"""A number for each of so many items is sent to every task in place of moving the pairs to it."""
SPREAD = 1 << 20
"""Pairs that need not be moved to a number are moved to one of so many places."""


def counted_events(examples: DataFrame, settings: Recall, parts: Sequence[str]) -> DataFrame:
    """The events of some parts of examples/ that tables are counted from: `user`, `item`, `timestamp`."""
    counted = F.col("split").isin(*parts)
    if settings.events == "positive":
        counted &= F.col("label") > 0
    return examples.where(counted).select("user", "item", "timestamp")


def daily_counts(events: DataFrame) -> DataFrame:
    """How many of the events of `counted_events` an item has on each day (UTC): `item`, `day`, `count`."""
    return events.groupBy("item", F.to_date("timestamp").alias("day")).agg(F.count(F.lit(1)).alias("count"))


def in_order(events: DataFrame) -> DataFrame:
    """`user`, `item` and `place`: from 1, the most recent of the user's first. Events of one moment are in
    order of their items; `first` is the greatest place among them.
    """
    by_moment = Window.partitionBy("user").orderBy(F.col("timestamp").desc())
    latest_first = Window.partitionBy("user").orderBy(F.col("timestamp").desc(), F.col("item").desc())
    place, first = F.row_number().over(latest_first), F.count(F.lit(1)).over(by_moment)
    return events.select("user", "item", place.alias("place"), first.cast("int").alias("first"))


def late_from(events: DataFrame, late: float, in_time: bool) -> DataFrame:
    """From when on a user's events are late (schema LATE_FROM).

    Event p of a user's n (from 0, in time order, ties by item) is late where (p + 0.5) / n is 1 - late or
    more; with `in_time` all of the last days, with about that share of all events, are.

    Args:
        events: of `counted_events`.
        late: the share.
        in_time: the same moment for all users.
    """
    if in_time:
        days = events.groupBy(F.to_date("timestamp").alias("day")).agg(F.count(F.lit(1)).alias("n"))
        counts = sorted((row.day, row.n) for row in days.collect())
        total, before = sum(n for _, n in counts), 0
        moment = None
        for day, n in counts:
            moment = day
            if before + n > (1 - late) * total and before:
                break
            before += n
        users = events.select("user").distinct()
        return users.select("user", F.lit(moment).cast("timestamp").alias("late_from"))
    of_user = Window.partitionBy("user")
    first_first = of_user.orderBy("timestamp", "item")
    placed = events.select(
        "user", "timestamp",
        ((F.row_number().over(first_first) - 0.5) / F.count(F.lit(1)).over(of_user)).alias("share"),
    )  # fmt: skip
    late_ones = placed.where(F.col("share") >= 1 - late)
    return late_ones.groupBy("user").agg(F.min("timestamp").alias("late_from"))


def late_moments(examples: DataFrame, features: Run, settings: Recall) -> DataFrame:
    """`late_from` of the train events that are counted; of a log split by time the same for all users.

    Args:
        examples: of the features run.
        features: that run.
        settings: say which are counted, and what share of them is late.
    """
    in_time = features.manifest["config"]["split"]["kind"] == "global_time"
    return late_from(counted_events(examples, settings, ("train",)), settings.late, in_time)


def earlier_events(events: DataFrame, moments: DataFrame) -> DataFrame:
    """The events before their users' late ones.

    Args:
        events: with `user` and `timestamp`.
        moments: of `late_from`.
    """
    joined = events.join(moments, "user", "left")
    early = F.col("late_from").isNull() | (F.col("timestamp") < F.col("late_from"))
    return joined.where(early).drop("late_from")


def state_before(examples: DataFrame, moments: DataFrame, schema: pa.Schema) -> DataFrame:
    """Each user's fields as of when his events become late: those of the first late event, which has the
    state before it; and `latest_age`, as in users/.

    Args:
        examples: of a features run.
        moments: of `late_from`.
        schema: `user`, and the fields of side user.
    """
    joined = examples.join(moments, "user")
    late = joined.where((F.col("split") == "train") & (F.col("timestamp") >= F.col("late_from")))
    names = [name for name in schema.names if name not in ("user", "latest_age")]
    first_first = F.struct("timestamp", "item")
    of_user = late.groupBy("user").agg(
        F.min_by(F.struct(*names), first_first).alias("state"), F.min("timestamp").alias("_until")
    )
    liked = joined.where((F.col("label") > 0) & (F.col("timestamp") < F.col("late_from")))
    latest_first = Window.partitionBy("user").orderBy(F.col("timestamp").desc())
    latest = liked.withColumn("place", F.row_number().over(latest_first)).where(F.col("place") <= LATEST)
    moments_of = latest.groupBy("user").agg(F.sort_array(F.collect_list("timestamp")).alias("_liked"))
    known = F.coalesce("_liked", F.array().cast("array<timestamp>"))
    until = F.unix_micros(F.date_trunc("day", "_until"))
    age = F.transform(known, lambda moment: hours(F.greatest(until - F.unix_micros(moment), F.lit(0))))
    return of_user.join(moments_of, "user", "left").select("user", "state.*", age.alias("latest_age"))


def with_counts(pairs: DataFrame, counts: DataFrame, n_items: int, events: int) -> DataFrame:
    """Pairs with `n_item` and `n_other`, how often each of the two occurs.

    Of more items than can be sent the most frequent ones' numbers are, and only the other items' pairs are
    moved to theirs: an item has so few of them then that no task has much more than its share.

    Args:
        pairs: with `item` and `other`.
        counts: `item` and `n`, from 1.
        n_items: items of the vocabulary.
        events: at least the sum of all `n`.
    """
    # No more than SENT items can have so many each.
    is_sent = F.lit(True) if n_items <= SENT else F.col("n") * SENT > events
    for name in ("item", "other"):
        sent = counts.where(is_sent).select(F.col("item").alias(name), F.col("n").alias(f"n_{name}"))
        pairs = pairs.join(F.broadcast(sent), name, "left")
        if n_items > SENT:
            moved = counts.where(~is_sent).select(F.col("item").alias("_to"), F.col("n").alias("_n"))
            nowhere = -1 - F.pmod(F.xxhash64("item", "other"), F.lit(SPREAD))
            to = F.when(F.col(f"n_{name}").isNull(), F.col(name)).otherwise(nowhere)
            pairs = pairs.withColumn("_to", to).join(moved, "_to", "left")
            pairs = pairs.withColumn(f"n_{name}", F.coalesce(f"n_{name}", "_n")).drop("_to", "_n")
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

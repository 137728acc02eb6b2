"""The log in each user's order of time: duplicates set aside, what came before counted, parts told apart."""

import datetime as dt
from collections.abc import Sequence

from pyspark.sql import Column, DataFrame, Window
from pyspark.sql import functions as F

from recsys_dist.config import Split
from recsys_dist.features.check import DUPLICATE
from recsys_dist.features.numeric import parts, quantiles, total, whole

TIEBREAK = "_hash"
"""Of rows that tell the same event, the one with the smallest hash of its text and file stays."""


def matches(when: str) -> Column:
    """Is a usable event one of those that `when` means: any, positive, or those of an event type?"""
    if when == "any":
        return F.lit(True)
    return F.col("positive") if when == "positive" else F.coalesce(F.col("event") == when, F.lit(False))


def named(when: str) -> str:
    """A `when` as part of a column's name: Spark takes `View` and `view` for one column."""
    return when if when in ("any", "positive") else f"event_{when.encode().hex()}"


def gather(events: DataFrame) -> DataFrame:
    """Bring each user's events together in order of time and set duplicates aside.

    This is the one shuffle of the log: all later steps work within a user.

    Args:
        events: of `check_events`.

    Returns:
        the rows of `events` with `position` (from 0, in the order of `order_of`; a duplicate has its
        original's). Usable ones lose `_source` and `_raw`; duplicates get their reason and keep only `_hash`,
        by which `duplicates` finds their text. The `user` of an unusable row means nothing: it spreads such
        rows.
    """
    usable = F.col("_reason").isNull()
    order = order_of(events)
    spread = F.concat(F.lit("\0"), F.col(TIEBREAK).cast("string"))
    gathered = events.withColumn("user", F.when(usable, F.col("user")).otherwise(spread)).withColumns(
        {column: F.when(~usable, F.col(column)) for column in ("_source", "_raw")}
    )
    gathered = gathered.repartition("user").sortWithinPartitions("user", *order, TIEBREAK)
    # One pass over a user's rows. Without the tie break: equal rows stay in the order above.
    in_order = Window.partitionBy("user").orderBy(*order)
    numbered = gathered.withColumns(
        {
            "position": (F.dense_rank().over(in_order) - 1).cast("int"),
            "_repeats": F.row_number().over(in_order) != F.rank().over(in_order),
        }
    )
    reason = F.coalesce("_reason", F.when(F.col("_repeats"), DUPLICATE))
    return numbered.withColumn("_reason", reason).drop("_repeats")


def order_of(events: DataFrame) -> list[str]:
    """The columns that order a user's events; rows equal in all of them tell the same event."""
    return ["micros", "item", "value", *(["event"] if "event" in events.columns else []), "positive"]


def look_back(events: DataFrame, sums: Sequence[str], counts: Sequence[str], split: Split) -> DataFrame:
    """Say of each usable event where it stands among its user's, and what is strictly earlier.

    Events of the same moment do not see each other.

    Args:
        events: of `gather`.
        sums: `when`s of which the values are added up and the last moment is kept.
        counts: `when`s of which the events are counted.
        split: which events it counts.

    Returns:
        the rows with `_counted`, the user's number of events that the split counts, and, where it does not
        count all, `_place`, how many of them come before in order; and of events with smaller micros
        `_n:<when>`, `_sum:<when>` (of their values) and `_last:<when>` (micros), each by the name that
        `named` gives. `_n:any` and `_last:any` are always there. `_bad` holds `_source`, `_raw` and `_hash`
        of rows set aside.
    """
    usable = F.col("_reason").isNull()
    by_time = Window.partitionBy("user").orderBy("micros")
    all_events = by_time.rangeBetween(Window.unboundedPreceding, Window.unboundedFollowing)
    before = by_time.rangeBetween(Window.unboundedPreceding, -1)
    # One column for all that few rows have: what is kept of every row takes room.
    told = ("_source", "_raw", TIEBREAK)
    placed = events.withColumn("_bad", F.when(~usable, F.struct(*told))).drop(*told)
    if split.events == "positive":
        counted = F.count(F.when(usable & matches("positive"), 1))
        in_order = Window.partitionBy("user").orderBy(*order_of(events))
        place = counted.over(in_order.rowsBetween(Window.unboundedPreceding, -1)).cast("int")
        earlier = {"_counted": counted.over(all_events), "_place": place}
    else:
        earlier = {"_counted": F.max(F.when(usable, F.col("position"))).over(all_events) + 1}
    for when in dict.fromkeys(["any", *counts, *sums]):
        earlier[f"_n:{named(when)}"] = F.count(F.when(usable & matches(when), 1)).over(before).cast("int")
    for when in dict.fromkeys(["any", *sums]):
        earlier[f"_last:{named(when)}"] = F.max(F.when(usable & matches(when), F.col("micros"))).over(before)
    for when in sums:
        value = F.when(usable & matches(when), F.col("value"))
        earlier[f"_sum:{named(when)}"] = total(
            F.sum(whole(value)).over(before), F.sum(parts(value)).over(before)
        )
    return placed.withColumns(earlier)


def assign(events: DataFrame, split: Split) -> DataFrame:
    """Add `split` (train, valid, test) to the usable events of `look_back`; null for the others."""
    if split.kind == "column":
        return events
    place = F.col("_place" if split.events == "positive" else "position")
    if split.kind == "leave_last":
        left = F.col("_counted") - place
        enough = F.col("_counted") > 2 * split.last
        part = F.when(enough & (left <= split.last), "test").when(enough & (left <= 2 * split.last), "valid")
    elif split.kind == "per_user_time":
        # One without any has no shares: all of his events are train.
        share = F.when(F.col("_counted") > 0, (place + 0.5) / F.col("_counted"))
        begin = (split.fractions[0], split.fractions[0] + split.fractions[1])
        part = F.when(share >= begin[1], "test").when(share >= begin[0], "valid")
    else:
        moments = [midnight(day) for day in split.dates] if split.dates else _moments(events, split)
        part = F.when(F.col("micros") >= moments[1], "test").when(F.col("micros") >= moments[0], "valid")
    return events.withColumn("split", F.when(F.col("_reason").isNull(), F.coalesce(part, F.lit("train"))))


def _moments(events: DataFrame, split: Split) -> list[int]:
    """Begin of valid and test: as many events are earlier as the fractions say, or fewer in case of ties."""
    usable = events.where(F.col("_reason").isNull() & matches(split.events))
    begin = (split.fractions[0], split.fractions[0] + split.fractions[1])
    found = quantiles(usable.select(F.lit("micros").alias("name"), F.col("micros").alias("x")), begin)
    return [int(moment) for moment in found.get("micros", (0, 0))]


def midnight(day: dt.date) -> int:
    """The start of a day, UTC, in microseconds since 1970."""
    return int(dt.datetime.combine(day, dt.time(), dt.UTC).timestamp()) * 10**6


def duplicates(events: DataFrame, again: DataFrame) -> DataFrame:
    """The texts of the duplicates: `_source`, `_reason`, `_raw`.

    Args:
        events: of `gather`.
        again: a second look at the checked log, with `_hash`, `_source`, `_raw` and `_reason`.
    """
    times = events.where(F.col("_reason") == DUPLICATE).groupBy(TIEBREAK).count()
    texts = again.where(F.col("_reason").isNull()).join(times, TIEBREAK, "left_semi")
    texts = texts.groupBy(TIEBREAK).agg(F.min("_source").alias("_source"), F.min("_raw").alias("_raw"))
    each = F.explode(F.sequence(F.lit(1), F.col("count").cast("int"))).alias("_time")
    return texts.join(times, TIEBREAK).select("_source", F.lit(DUPLICATE).alias("_reason"), "_raw", each)


def k_core(events: DataFrame, user: int, item: int, scratch: str) -> tuple[DataFrame, int, int]:
    """Drop the events of users and items with fewer events than asked for, until there are none.

    Args:
        events: of `gather`, cached; rows that are set aside neither count nor are dropped.
        user: least number of events of a user.
        item: least number of events of an item.
        scratch: URI of a folder that all executors see, for what a round leaves; it must stay there until the
            rows are no longer used.

    Returns:
        the rows that stay, the number of events dropped, and the number of rounds until nothing changed.
    """
    # On a disk that outlives an executor.
    events.sparkSession.sparkContext.setCheckpointDir(scratch)
    usable = F.col("_reason").isNull()
    kept = events.where(usable).select("user", "item")
    whole = left = kept.count()
    rounds = 0
    while True:
        before = left
        for key, least in (("item", item), ("user", user)):
            if least > 1:
                many = kept.groupBy(key).count().where(F.col("count") >= least).select(key)
                kept = kept.join(many, key, "left_semi").select("user", "item")
        # Each round reads the last one's result, or the plan would double with every round.
        kept = kept.checkpoint()
        left = kept.count()
        rounds += 1
        if left in (0, before):
            break
    pairs = kept.distinct()
    stay = events.where(usable).join(pairs, ["user", "item"], "left_semi")
    left_over = stay.unionByName(events.where(~usable))
    # A duplicate whose original is gone must not count as its place.
    in_order = Window.partitionBy("user", usable).orderBy(*order_of(events))
    position = (F.dense_rank().over(in_order) - 1).cast("int")
    return left_over.withColumn("position", position), whole - left, rounds

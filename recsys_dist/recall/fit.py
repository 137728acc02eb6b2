"""The stage recall: what items say of other items, counted by Spark from what users had one after another,
and how often each item was had, day by day.
"""

from typing import Any

import pyarrow.dataset
import pyspark
from pyspark.sql import Column, DataFrame
from pyspark.sql import functions as F

from recsys_dist.config import FIT_ON, Config, Recall
from recsys_dist.errors import DataError
from recsys_dist.features.session import (
    SCRATCH,
    Steps,
    files,
    in_ranges,
    read_table,
    remove_checksums,
    spark_uri,
    start,
    write,
)
from recsys_dist.recall import linear
from recsys_dist.recall.neighbors import baskets, mirrored, similarity, together
from recsys_dist.recall.next_items import following, weight
from recsys_dist.recall.pairs import (
    PAIR_BYTES,
    counted_events,
    daily_counts,
    earlier_events,
    in_order,
    late_moments,
    save_best,
    state_before,
    with_counts,
)
from recsys_dist.schema import BEFORE_VALID, DAILY, LATE, LATE_FROM, PRODUCTS
from recsys_dist.workspace import OpenRun


def fit_recall(config: Config, run: OpenRun) -> dict[str, Any]:
    """Count what is fitted on and write next_items/, neighbors/measure=<name>/ and daily/.

    With `recall.late` the pairs also of the events before the late ones, and of the train part where that is
    not what is fitted on, so that what learns from the tables never meets an event that they know.

    Returns:
        the run's figures: events and users that were counted, rows, seconds a step.

    Raises:
        DataError: there is nothing to count.
        ConfigError: there are too many items for `recall.linear`.
    """
    settings = config.recall
    features = run.inputs["features"]
    spec = features.spec()
    # The log is small beside the pairs of its events, which are what is moved.
    events = sum((spec.positives if settings.events == "positive" else spec.rows).values())
    linear.require_few(settings, spec.n_items)
    steps = Steps()
    with steps.measure("start"):
        session = start("recall", config, events * settings.window * PAIR_BYTES)
        spark = session.__enter__()
    try:
        tables = _Tables(settings, run, spec.n_items, steps)
        examples = spark.read.parquet(spark_uri(f"{features.uri}/examples"))
        parts = FIT_ON[settings.fit_on]
        counted = counted_events(examples, settings, parts)
        figures = tables.count(counted, "", " and ".join(parts))
        with steps.measure("daily"):
            # Of all parts: a list is made of the days before its own, which its morning knows.
            every = counted_events(examples, settings, ("train", "valid", "test"))
            figures["daily"] = tables.count_daily(every, events)
        if settings.late:
            train = counted_events(examples, settings, ("train",))
            uri = f"{run.uri}/{LATE}/late_from"
            with steps.measure("late"):
                write(late_moments(examples, features, settings), uri, LATE_FROM)
            moments = read_table(spark, uri, LATE_FROM)
            with steps.measure("state"):
                state = state_before(examples, moments, spec.state_schema())
                write(state, f"{run.uri}/{LATE}/users", spec.state_schema())
            early = earlier_events(train, moments)
            figures["late"] = tables.count(early, f"{LATE}/", f"the first {1 - settings.late:g} of train")
            if "valid" in parts:
                figures["before_valid"] = tables.count(train, f"{BEFORE_VALID}/", "train")
        remove_checksums(run.filesystem, run.path)
    finally:
        session.__exit__(None, None, None)
    return {**figures, "spark": pyspark.__version__, "seconds": steps.seconds}


class _Tables:
    """Counts tables and writes them into folders of the run."""

    def __init__(self, settings: Recall, run: OpenRun, n_items: int, steps: Steps) -> None:
        self.settings, self.run, self.n_items, self.steps = settings, run, n_items, steps

    def count(self, events: DataFrame, folder: str, what: str) -> dict[str, Any]:
        """Write both tables of some events (`counted_events`) and return the figures.

        Args:
            events: `user`, `item`, `timestamp`.
            folder: of the run, with a slash at its end where it is not the run's own.
            what: names the events in an error.
        """
        settings, run = self.settings, self.run
        with self.steps.measure(f"{folder}read"):
            placed = in_order(events).cache()
            known = placed.where(F.col("place") <= settings.max_events)
            counted = placed.agg(
                F.count(F.lit(1)).alias("known"),
                F.count_if(F.col("place") <= settings.max_events).alias("n"),
                F.countDistinct("user").alias("users"),
            ).first()
        assert counted is not None
        if not counted["n"]:
            raise DataError(
                f"{run.inputs['features'].uri}/examples: {what} has no event that "
                f"recall.events={settings.events} counts. Check label.positive_when, split and recall.late."
            )
        with self.steps.measure(f"{folder}next_items"):
            of_counts = known.groupBy("item").agg(F.count(F.lit(1)).alias("n"))
            pairs = with_counts(following(known, settings), of_counts, self.n_items, counted["n"])
            self._save(pairs, weight(settings), f"{folder}next_items")
        with self.steps.measure(f"{folder}neighbors"):
            of_users = baskets(known, settings.neighbors_max_events).cache()
            counts = (
                of_users.select(F.explode("items").alias("item"))
                .groupBy("item")
                .agg(F.count(F.lit(1)).alias("n"))
            )
            pairs = with_counts(
                together(of_users, settings.neighbors_max_events), counts, self.n_items, counted["n"]
            )
            # For training one is enough.
            measures = settings.measures[:1] if folder else settings.measures
            if len(measures) > 1 or "ease" in settings.linear:
                pairs = pairs.cache()
            for measure in measures:
                found = similarity(measure, settings.shrinkage, counted["users"])
                self._save(mirrored(pairs), found, f"{folder}neighbors/measure={measure}")
        if settings.linear:
            with self.steps.measure(f"{folder}linear"):
                self._save_linear(known, of_counts, pairs, counts, folder)
        for frame in (placed, of_users, pairs):
            frame.unpersist()
        return {
            "known": counted["known"],
            "events": counted["n"],
            "users": counted["users"],
            "next_items": self._rows(f"{folder}next_items"),
            "neighbors": {name: self._rows(f"{folder}neighbors/measure={name}") for name in measures},
        }

    def _save_linear(
        self, known: DataFrame, events: DataFrame, pairs: DataFrame, users: DataFrame, folder: str
    ) -> None:
        """Fit `recall.linear` and write linear/model=<name>/.

        Args:
            known: of `in_order`, the events that count.
            events: `item` and `n`, how many of them are its.
            pairs: of `neighbors.together`.
            users: `item` and `n`, how many users have it.
            folder: as in `count`.
        """
        settings = self.settings
        none = F.lit(0).alias("target")
        made = {
            "transitions": lambda: linear.sums_before(known, settings),
            "ease": lambda: pairs.select("item", "other", none, F.col("both").alias("product")),
        }
        for name in settings.linear:
            write(made[name](), f"{self.run.uri}/{SCRATCH}", PRODUCTS)
            found = pyarrow.dataset.dataset(
                f"{self.run.path}/{SCRATCH}", filesystem=self.run.filesystem, format="parquet"
            ).to_table()
            counts = linear.counts_of(events if name == "transitions" else users, self.n_items)
            weights = getattr(linear, name)(found, counts, settings)
            table = linear.farthest(weights, settings.linear_n)
            self.run.write_table(f"{folder}linear/model={name}", table)
            self.run.remove(SCRATCH)

    def count_daily(self, events: DataFrame, size: int) -> int:
        """Write daily/ of some events (`counted_events`), of which there are `size`; return its rows."""
        parts = files(events.sparkSession, size * PAIR_BYTES)
        counts = in_ranges(daily_counts(events), "item", self.n_items, parts)
        write(counts.sortWithinPartitions("item", "day"), f"{self.run.uri}/daily", DAILY)
        return self._rows("daily")

    def _save(self, pairs: DataFrame, weight: Column, name: str) -> None:
        save_best(pairs, weight, self.settings.n, self.n_items, f"{self.run.uri}/{name}")

    def _rows(self, name: str) -> int:
        folder = f"{self.run.path}/{name}"
        return int(
            pyarrow.dataset.dataset(folder, filesystem=self.run.filesystem, format="parquet").count_rows()
        )

"""The stage recall: what items say of other items, counted by Spark from what users had one after another."""

from typing import Any

import pyarrow.dataset
import pyspark
from pyspark.sql import functions as F

from recsys_dist.config import Config
from recsys_dist.errors import DataError
from recsys_dist.features.session import Steps, remove_checksums, spark_uri, start
from recsys_dist.recall.neighbors import baskets, mirrored, similarity, together
from recsys_dist.recall.next_items import following, weight
from recsys_dist.recall.pairs import FIT_ON, PAIR_BYTES, known_events, save_best, with_counts
from recsys_dist.workspace import OpenRun


def fit_recall(config: Config, run: OpenRun) -> dict[str, Any]:
    """Count what is fitted on and write next_items/ and neighbors/measure=<name>/.

    Returns:
        the run's figures: events and users that were counted, rows, seconds a step.

    Raises:
        DataError: there is nothing to count.
    """
    settings = config.recall
    features = run.inputs["features"]
    spec = features.spec()
    # The log is small beside the pairs of its events, which are what is moved.
    events = sum((spec.positives if settings.events == "positive" else spec.rows).values())
    steps = Steps()
    with steps.measure("start"):
        session = start("recall", config, events * settings.window * PAIR_BYTES)
        spark = session.__enter__()
    try:
        with steps.measure("read"):
            known = known_events(spark.read.parquet(spark_uri(f"{features.uri}/examples")), settings).cache()
            counted = known.agg(F.count(F.lit(1)).alias("n"), F.countDistinct("user").alias("users")).first()
        assert counted is not None
        if not counted["n"]:
            raise DataError(
                f"{features.uri}/examples: {' and '.join(FIT_ON[settings.fit_on])} have no event that "
                f"recall.events={settings.events} counts. Check label.positive_when and split."
            )
        with steps.measure("next_items"):
            counts = known.groupBy("item").agg(F.count(F.lit(1)).alias("n"))
            pairs = with_counts(following(known, settings), counts, spec.n_items)
            save_best(pairs, weight(settings), settings.n, spec.n_items, f"{run.uri}/next_items")
        with steps.measure("neighbors"):
            of_users = baskets(known, settings.neighbors_max_events).cache()
            counts = (
                of_users.select(F.explode("items").alias("item"))
                .groupBy("item")
                .agg(F.count(F.lit(1)).alias("n"))
            )
            pairs = with_counts(together(of_users, settings.neighbors_max_events), counts, spec.n_items)
            if len(settings.measures) > 1:
                pairs = pairs.cache()
            for measure in settings.measures:
                found = similarity(measure, settings.shrinkage, counted["users"])
                uri = f"{run.uri}/neighbors/measure={measure}"
                save_best(mirrored(pairs), found, settings.n, spec.n_items, uri)
        remove_checksums(run.filesystem, run.path)
        for frame in (known, of_users, pairs):
            frame.unpersist()
    finally:
        session.__exit__(None, None, None)
    return {
        "events": counted["n"],
        "users": counted["users"],
        "next_items": _rows(run, "next_items"),
        "neighbors": {measure: _rows(run, f"neighbors/measure={measure}") for measure in settings.measures},
        "spark": pyspark.__version__,
        "seconds": steps.seconds,
    }


def _rows(run: OpenRun, name: str) -> int:
    folder = f"{run.path}/{name}"
    return int(pyarrow.dataset.dataset(folder, filesystem=run.filesystem, format="parquet").count_rows())

"""Alternating least squares by Spark MLlib: the baseline, and a source of candidates.

Implicit feedback: Hu, Koren, Volinsky, "Collaborative Filtering for Implicit Feedback Datasets" (2008).
"""

import math
from typing import Any

import pyspark
from pyspark.ml.recommendation import ALS
from pyspark.sql import functions as F

from recsys_dist.config import Config
from recsys_dist.errors import DataError
from recsys_dist.features.session import MEBIBYTE, Steps, remove_checksums, spark_uri, start, write
from recsys_dist.schema import FACTORS
from recsys_dist.workspace import OpenRun

CHECKPOINT_EVERY = 10
"""Sweeps. Each makes Spark's plan longer, until planning it overflows the stack."""


def train_als(config: Config, run: OpenRun) -> dict[str, Any]:
    """Fit on the train part and write user_factors/ and item_factors/, ascending by index.

    A user or item without an event that is fitted on has no factors.

    Returns:
        the run's figures: ratings, factors, seconds a step.

    Raises:
        DataError: the train part has nothing to fit on.
    """
    settings = config.als
    features = run.inputs["features"]
    size = sum(file["bytes"] for file in features.manifest["files"] if file["path"].startswith("examples/"))
    steps = Steps()
    with steps.measure("start"):
        session = start("train_als", config, size)
        spark = session.__enter__()
    try:
        examples = spark.read.parquet(spark_uri(f"{features.uri}/examples/split=train"))
        if settings.implicit:
            events = examples.where("label > 0").select(
                "user", "item", F.lit(1.0).cast("float").alias("rating")
            )
        else:
            events = examples.select("user", "item", F.col("value").alias("rating"))
        with steps.measure("read"):
            # In one order, because the result depends on it in the last digits.
            events = events.repartition("user").sortWithinPartitions("user", "item", "rating").cache()
            ratings = events.count()
        if not ratings:
            raise DataError(f"{features.uri}/examples: the train part has no events to fit ALS on")
        checkpoints = f"{run.path}/checkpoints"
        blocks = max(spark.sparkContext.defaultParallelism, math.ceil(size / (32 * MEBIBYTE)))
        spark.sparkContext.setCheckpointDir(spark_uri(f"{run.uri}/checkpoints"))
        als = ALS(
            rank=settings.rank,
            maxIter=settings.iterations,
            regParam=settings.reg,
            alpha=settings.alpha,
            implicitPrefs=settings.implicit,
            numUserBlocks=blocks,
            numItemBlocks=blocks,
            checkpointInterval=CHECKPOINT_EVERY,
            seed=config.seed,
            userCol="user",
            itemCol="item",
            ratingCol="rating",
        )
        with steps.measure("fit"):
            model = als.fit(events)
        with steps.measure("write"):
            figures: dict[str, Any] = {"ratings": ratings}
            for name, factors in (("user_factors", model.userFactors), ("item_factors", model.itemFactors)):
                rows = factors.select(F.col("id").alias("index"), F.col("features").alias("vector"))
                rows = rows.repartitionByRange("index").sortWithinPartitions("index")
                write(rows, f"{run.uri}/{name}", FACTORS)
                figures[name] = factors.count()
            run.filesystem.delete_dir(checkpoints)
            remove_checksums(run.filesystem, run.path)
    finally:
        session.__exit__(None, None, None)
    return {**figures, "rank": settings.rank, "spark": pyspark.__version__, "seconds": steps.seconds}

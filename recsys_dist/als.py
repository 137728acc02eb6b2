"""Alternating least squares by Spark MLlib: the baseline, and a source of candidates.

Implicit feedback: Hu, Koren, Volinsky, "Collaborative Filtering for Implicit Feedback Datasets" (2008).
"""

import json
import math
from collections.abc import Sequence
from typing import Any

import pyarrow.fs
import pyspark
from pyspark.ml.recommendation import ALS, ALSModel
from pyspark.sql import DataFrame, SparkSession
from pyspark.sql import functions as F

from recsys_dist.config import FIT_ON, OF_FACTORS, Als, Config
from recsys_dist.errors import DataError, RetryableError
from recsys_dist.features.session import MEBIBYTE, Steps, remove_checksums, spark_uri, start, write
from recsys_dist.job import run_module
from recsys_dist.recall.pairs import earlier_events, late_moments
from recsys_dist.schema import BEFORE_VALID, FACTORS, FACTORS_OF, LATE
from recsys_dist.workspace import OpenRun, Run

CHECKPOINT_EVERY = 10
"""Sweeps. Each makes Spark's plan longer, until planning it overflows the stack."""
CHECKPOINTS, TRIED = "checkpoints", "tried"
"""Folders of the run that are needed only while it is made."""


def train_als(config: Config, run: OpenRun) -> dict[str, Any]:
    """Fit on the parts of `als.fit_on` and write user_factors/ and item_factors/, ascending by index.

    A user or item without an event that is fitted on has no factors. With `als.grid` every combination is
    fitted on train first, and the settings with the best NDCG@10 on valid are taken. With `als.earlier` also
    what is fitted to earlier events, in before=valid/ or before=late/.

    Returns:
        the run's figures: ratings, factors, settings, what was tried, seconds a step.

    Raises:
        DataError: there is nothing to fit on, or with `als.grid` nothing to measure by.
    """
    settings = config.als
    features = run.inputs["features"]
    size = sum(file["bytes"] for file in features.manifest["files"] if file["path"].startswith("examples/"))
    steps = Steps()
    with steps.measure("start"):
        session = start("train_als", config, size)
        spark = session.__enter__()
    try:
        blocks = max(spark.sparkContext.defaultParallelism, math.ceil(size / (32 * MEBIBYTE)))
        spark.sparkContext.setCheckpointDir(spark_uri(f"{run.uri}/{CHECKPOINTS}"))
        tried: list[dict[str, Any]] = []
        best = None
        if settings.grid:
            with steps.measure("try"):
                best, tried = _best(config, run, spark, blocks)
            settings = settings.points()[best]
        with steps.measure("read"):
            events = _events(spark, features, settings, FIT_ON[settings.fit_on]).cache()
            ratings = events.count()
        if not ratings:
            parts = " and ".join(FIT_ON[settings.fit_on])
            raise DataError(f"{features.uri}/examples: no events of {parts} to fit ALS on")
        with steps.measure("fit"):
            model = _als(settings, config.seed, blocks).fit(events)
            events.unpersist()
        with steps.measure("write"):
            written: dict[str, Any] = {**_write(model, run, "")}
        if settings.earlier:
            with steps.measure("earlier"):
                written["earlier"] = _write_earlier(config, settings, run, spark, blocks, best)
        with steps.measure("tidy"):
            for folder in (CHECKPOINTS, TRIED):
                run.remove(folder)
            remove_checksums(run.filesystem, run.path)
    finally:
        session.__exit__(None, None, None)
    chosen = settings.model_dump(include=set(OF_FACTORS))
    told = {"ratings": ratings, **written, **chosen, "tried": tried}
    return {**told, "spark": pyspark.__version__, "seconds": steps.seconds}


def _write_earlier(
    config: Config, settings: Als, run: OpenRun, spark: SparkSession, blocks: int, best: int | None
) -> dict[str, int]:
    """Fit on train, where valid is fitted on too, else on what is before the late events of train, and write
    both tables into a folder; return the number of ratings. What was tried was fitted on train: `best` is the
    number of these settings there.
    """
    features, folder, moments = run.inputs["features"], BEFORE_VALID, None
    if settings.fit_on == "train":
        folder = LATE
        # As the stage recall has them: its late events are what is learned on.
        moments = late_moments(_examples(spark, features), features, config.recall)
    events = _events(spark, features, settings, ("train",), moments).cache()
    ratings = events.count()
    if not ratings:
        what = "no events of train" if moments is None else "no event of train is before the late ones"
        raise DataError(
            f"{features.uri}/examples: {what}, and als.earlier asks for ALS fitted on them. Lower "
            f"recall.late, or leave als.earlier and pair fields of measure als out."
        )
    if best is not None and moments is None:
        tried, filesystem = f"{run.path}/{TRIED}/{best}", run.filesystem
        filesystem.create_dir(f"{run.path}/{folder}")
        pyarrow.fs.copy_files(tried, f"{run.path}/{folder}", filesystem, filesystem)
    else:
        _write(_als(settings, config.seed, blocks).fit(events), run, f"{folder}/")
    return {"ratings": ratings}


def _best(config: Config, run: OpenRun, spark: SparkSession, blocks: int) -> tuple[int, list[dict[str, Any]]]:
    """The number of the grid's combination that ranks best on valid, and what was found of each."""
    features, points = run.inputs["features"], config.als.points()
    events: dict[bool, DataFrame] = {}
    for number, point in enumerate(points):
        if point.implicit not in events:
            events[point.implicit] = _events(spark, features, point, ("train",)).cache()
        _write(_als(point, config.seed, blocks).fit(events[point.implicit]), run, f"{TRIED}/{number}/")
        print(f"  {number + 1} of {len(points)} tried: {_told(config, point)}", flush=True)
    found = _measured(config, run, len(points))
    tried: list[dict[str, Any]] = []
    for point, ndcg in zip(points, found, strict=True):
        tried.append({**{key: getattr(point, key) for key in config.als.grid}, "ndcg@10": ndcg})
        print(f"  valid NDCG@10 {ndcg:.4f}  {_told(config, point)}", flush=True)
    return found.index(max(found)), tried


def _told(config: Config, point: Als) -> str:
    return ", ".join(f"{key} {getattr(point, key)}" for key in config.als.grid)


def _measured(config: Config, run: OpenRun, number: int) -> list[float]:
    """NDCG@10 on valid of all that was tried, by `evaluation.tried` in a process of its own."""
    task = {
        "config": config.model_dump(mode="json"),
        "features": run.inputs["features"].run_id,
        "folders": [f"{run.path}/{TRIED}/{n}" for n in range(number)],
    }
    done = run_module("recsys_dist.evaluation.tried", json.dumps(task))
    if done.returncode:
        raise RetryableError(
            f"measuring what was tried ended with exit code {done.returncode}; what it said is above"
        )
    found: list[float] = json.loads(done.stdout)
    return found


def _examples(spark: SparkSession, features: Run) -> DataFrame:
    return spark.read.parquet(spark_uri(f"{features.uri}/examples"))


def _events(
    spark: SparkSession,
    features: Run,
    settings: Als,
    parts: Sequence[str],
    moments: DataFrame | None = None,
) -> DataFrame:
    """user, item, rating of what is fitted on: of some parts, before the moments of `late_from`."""
    examples = _examples(spark, features).where(F.col("split").isin(*parts))
    if moments is not None:
        examples = earlier_events(examples, moments)
    if settings.implicit:
        rating = F.col("value") if settings.sample_weight else F.lit(1.0).cast("float")
        examples = examples.where("label > 0")
    else:
        rating = F.col("value")
    events = examples.select("user", "item", rating.alias("rating"))
    # In one order, because the result depends on it in the last digits.
    return events.repartition("user").sortWithinPartitions("user", "item", "rating")


def _als(settings: Als, seed: int, blocks: int) -> ALS:
    return ALS(
        rank=settings.rank,
        maxIter=settings.iterations,
        regParam=settings.reg,
        alpha=settings.alpha,
        implicitPrefs=settings.implicit,
        numUserBlocks=blocks,
        numItemBlocks=blocks,
        checkpointInterval=CHECKPOINT_EVERY,
        seed=seed,
        userCol="user",
        itemCol="item",
        ratingCol="rating",
    )


def _write(model: ALSModel, run: OpenRun, folder: str) -> dict[str, int]:
    """Write both tables into a folder of the run, and return their numbers of rows."""
    found = {}
    for name, factors in zip(FACTORS_OF, (model.userFactors, model.itemFactors), strict=True):
        rows = factors.select(F.col("id").alias("index"), F.col("features").alias("vector"))
        rows = rows.repartitionByRange("index").sortWithinPartitions("index")
        write(rows, f"{run.uri}/{folder}{name}", FACTORS)
        found[name] = factors.count()
    return found

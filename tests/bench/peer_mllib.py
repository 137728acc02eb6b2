"""Spark MLlib's recommendForAllUsers on factors of a quick fit.

    python -m tests.bench.peer_mllib USERS ITEMS RANK K

Prints JSON: the seconds of the second run, when what it needs is compiled.
"""

import json
import sys
import time

from pyspark.ml.recommendation import ALS
from pyspark.sql import functions as F

from recsys_dist.config import load
from recsys_dist.features.session import start

ALL_CORES = 1 << 30
"""Bytes, of which every core gets a part."""


def main(users: int, items: int, rank: int, k: int) -> float:
    """The seconds of one run over all users."""
    with start("bench", load(None, []), ALL_CORES) as spark:
        each = spark.range(max(users, items)).select(
            (F.col("id") % users).cast("int").alias("user"), (F.col("id") % items).cast("int").alias("item")
        )
        rated = each.withColumn("rating", F.lit(1.0).cast("float"))
        als = ALS(rank=rank, maxIter=1, userCol="user", itemCol="item", ratingCol="rating", seed=1)
        model = als.fit(rated)
        seconds = 0.0
        for _ in range(2):
            begin = time.perf_counter()
            model.recommendForAllUsers(k).write.format("noop").mode("overwrite").save()
            seconds = time.perf_counter() - begin
        return seconds


if __name__ == "__main__":
    print(json.dumps({"seconds": main(*(int(word) for word in sys.argv[1:]))}))

"""Lists measured by Spark, where there are many: the figures are those of `measured.measure`, bit for bit.

Run by `large.measured_by_spark` as a process of its own: no module reaches both pyspark and torch.

Every number of a user is one quotient of whole numbers, or a sum in the order of the ranks, so that neither
partitions nor the order of rows matter.
"""

import sys
from collections.abc import Callable, Sequence

from pydantic import BaseModel
from pyspark.sql import Column, DataFrame
from pyspark.sql import functions as F

from recsys_dist.config import Config
from recsys_dist.evaluation.metrics import discounts
from recsys_dist.features.session import spark_uri, start

ROW_BYTES = 24
"""Of a place in a list."""


class Task(BaseModel):
    """What is to be measured; JSON on the standard input."""

    config: Config
    lists: str
    """URI of lists/ with schema LISTS."""
    relevant: str
    """URI of relevant/ with schema RELEVANT."""
    folder: str
    """URI of the folder with items/ (`item`, `train` events, `place` by popularity, `head`) and, where items
    have attributes, vectors/ (`item`, `value`, `weight`: ItemVectors.entries). Spark writes users/ and
    listed/ there, by model."""
    models: list[str]
    rows: int
    """Of lists/."""
    whole: int | None
    """What the vectors' weights are parts of; None where items have no attributes."""


def precision(hits: Column, relevant: Column, k: int) -> Column:
    """See metrics.py, as of all others here. `hits`: ascending ranks, at most k; `relevant`: at least 1."""
    return F.size(hits) / F.lit(k)


def recall(hits: Column, relevant: Column, k: int) -> Column:
    """hits / relevant."""
    return F.size(hits) / relevant


def hit_rate(hits: Column, relevant: Column, k: int) -> Column:
    """1 where at least one item is hit."""
    return (F.size(hits) > 0).cast("double")


def mrr(hits: Column, relevant: Column, k: int) -> Column:
    """1 / rank of the first hit, 0 without one."""
    return F.coalesce(F.lit(1) / F.get(hits, F.lit(0)), F.lit(0.0))


def average_precision(hits: Column, relevant: Column, k: int) -> Column:
    """Sum of precision@rank over the hits, divided by min(k, relevant)."""
    precisions = F.transform(hits, lambda rank, place: (place + 1) / rank)
    return _summed(precisions) / F.least(relevant, F.lit(k))


def ndcg(hits: Column, relevant: Column, k: int) -> Column:
    """DCG / ideal DCG. The discounts are numpy's, whose logarithm differs from Java's in the last digit."""
    discount = discounts(k)
    gains = F.transform(hits, lambda rank: F.get(F.lit(discount.tolist()), rank - 1))
    ideal = F.lit(discount.cumsum().tolist())
    return _summed(gains) / F.get(ideal, (F.least(relevant, F.lit(k)) - 1).cast("int"))


def _summed(values: Column) -> Column:
    return F.aggregate(values, F.lit(0.0), lambda total, value: total + value)


METRICS: dict[str, Callable[[Column, Column, int], Column]] = {
    "ndcg": ndcg,
    "recall": recall,
    "precision": precision,
    "map": average_precision,
    "mrr": mrr,
    "hit_rate": hit_rate,
}
"""The same names as in metrics.py."""


def of_users(
    lists: DataFrame,
    relevant: DataFrame,
    items: DataFrame,
    vectors: tuple[DataFrame, int] | None,
    models: Sequence[str],
    lengths: Sequence[int],
) -> DataFrame:
    """Every metric of single lists, a row a model and user with a relevant item.

    Args:
        lists: of schema LISTS.
        relevant: of schema RELEVANT.
        items: see Task.
        vectors: see Task, with `whole`; None where items have no attributes.
        models: names, also of one without any list.
        lengths: list lengths.

    Returns:
        `model`, `user` and, by the names that Measured has, doubles: <metric>@<k> and, where only items of
        the segment are relevant, <segment>:<metric>@<k>.
    """
    inside = {"": F.lit(True), "head:": F.col("head"), "tail:": ~F.col("head")}
    rank, hit = F.col("rank"), F.col("hit").isNotNull()
    rows = lists.join(items, "item").join(relevant.withColumn("hit", F.lit(True)), ["user", "item"], "left")
    within = {k: rank <= k for k in lengths}
    found = rows.groupBy("model", "user").agg(
        *(F.sort_array(F.collect_list(F.when(hit & of, rank))).alias(f"{s}hits") for s, of in inside.items()),
        *(F.count_if(within[k]).alias(f"length@{k}") for k in lengths),
        *(F.sum(F.when(within[k], F.col("train"))).alias(f"train@{k}") for k in lengths),
        *(F.count_if(within[k] & hit & (F.col("place") > k)).alias(f"surprises@{k}") for k in lengths),
    )
    wanted = (
        relevant.join(items, "item")
        .groupBy("user")
        .agg(*(F.greatest(F.count_if(of), F.lit(1)).alias(f"{s}relevant") for s, of in inside.items()))
        .withColumn("model", F.explode(F.lit(list(models))))
    )
    found = wanted.join(found, ["model", "user"], "left")
    if vectors is not None:
        found = found.join(_alike(lists, vectors[0], lengths), ["model", "user"], "left")
    # In the order that Measured has them: an interval's last digit depends on it.
    columns = {}
    for segment in inside:
        hits = F.coalesce(F.col(f"{segment}hits"), F.array().cast("array<int>"))
        for name, metric in METRICS.items():
            for k in lengths:
                columns[f"{segment}{name}@{k}"] = metric(_first(hits, k), F.col(f"{segment}relevant"), k)
    for k in lengths:
        length = _or_0(f"length@{k}")
        columns[f"serendipity@{k}"] = _or_0(f"surprises@{k}") / F.lit(k)
        columns[f"popularity@{k}"] = _or_0(f"train@{k}") / F.greatest(length, F.lit(1))
        if vectors is not None:
            pairs = length * (length - 1) * F.lit(vectors[1] ** 2)
            alike = _or_0(f"alike@{k}") / F.nullif(pairs, F.lit(0))
            columns[f"diversity@{k}"] = F.coalesce(1 - alike, F.lit(0.0))
    return found.select("model", "user", *(column.alias(name) for name, column in columns.items()))


def _first(hits: Column, k: int) -> Column:
    return F.filter(hits, lambda rank: rank <= k)


def _or_0(name: str) -> Column:
    return F.coalesce(F.col(name), F.lit(0).cast("bigint"))


def _alike(lists: DataFrame, vectors: DataFrame, lengths: Sequence[int]) -> DataFrame:
    """Of each list the sum of the inner products of all ordered pairs of its items: `alike@<k>`, bigint.

    It is |sum of vectors|^2 - sum of |vectors|^2, as in ItemVectors.likeness.
    """
    weight = F.col("weight")
    sums = [
        F.sum(F.when(F.col("rank") <= k, of)).alias(f"{name}@{k}")
        for k in lengths
        for name, of in (("sum", weight), ("squares", weight * weight))
    ]
    values = lists.join(vectors, "item").groupBy("model", "user", "value").agg(*sums)
    alike = [
        F.sum(_or_0(f"sum@{k}") * _or_0(f"sum@{k}") - _or_0(f"squares@{k}")).alias(f"alike@{k}")
        for k in lengths
    ]
    return values.groupBy("model", "user").agg(*alike)


def of_items(lists: DataFrame, lengths: Sequence[int]) -> DataFrame:
    """`model`, `item` and listed@<k>, the number of the model's lists that have the item, bigint."""
    counts = [F.count_if(F.col("rank") <= k).alias(f"listed@{k}") for k in lengths]
    return lists.groupBy("model", "item").agg(*counts)


def main() -> None:
    """Measure what the standard input says."""
    task = Task.model_validate_json(sys.stdin.read())
    lengths = list(dict.fromkeys(task.config.evaluation.k))
    with start("evaluate", task.config, task.rows * ROW_BYTES) as spark:

        def read(uri: str) -> DataFrame:
            return spark.read.parquet(spark_uri(uri))

        lists = read(task.lists)
        vectors = (read(f"{task.folder}/vectors"), task.whole) if task.whole else None
        items = read(f"{task.folder}/items")
        users = of_users(lists, read(task.relevant), items, vectors, task.models, lengths)
        for name, frame in (("users", users), ("listed", of_items(lists, lengths))):
            frame.write.partitionBy("model").parquet(spark_uri(f"{task.folder}/{name}"))


if __name__ == "__main__":
    main()

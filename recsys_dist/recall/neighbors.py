"""Which items are liked by the same users: similarities of 0/1 columns of the user-item matrix.

c users have both items, n_item and n_other each of them, N any:

    cosine   c / sqrt(n_item n_other)
    jaccard  c / (n_item + n_other - c)
    pearson  (N c - n_item n_other) / sqrt(n_item (N - n_item) n_other (N - n_other))

Each is multiplied by c / (c + shrinkage): what few users say counts less (Bell, Koren, "Scalable
Collaborative Filtering with Jointly Derived Neighborhood Interpolation Weights", 2007).
"""

from pyspark.sql import Column, DataFrame
from pyspark.sql import functions as F


def baskets(events: DataFrame, last: int) -> DataFrame:
    """A row a user of `known_events`: `items`, the distinct ones of the last so many events, ascending."""
    return (
        events.where(F.col("place") <= last)
        .groupBy("user")
        .agg(F.sort_array(F.collect_set("item")).alias("items"))
    )


def together(baskets: DataFrame, most: int) -> DataFrame:
    """How many users have both items: `item`, `other`, the greater of the two, and `both`.

    Args:
        baskets: of the function of that name.
        most: no basket has more items.
    """
    each = baskets.select("items", F.posexplode("items").alias("place", "item"))
    others = F.slice("items", F.col("place") + 2, F.lit(most))
    pairs = each.select("item", F.explode(others).alias("other"))
    return pairs.groupBy("item", "other").agg(F.count(F.lit(1)).alias("both"))


def mirrored(pairs: DataFrame) -> DataFrame:
    """Each pair both ways round: `item`, `other`, `both`, `n_item`, `n_other`."""
    names = ("item", "other", "n_item", "n_other")
    ways = [names, ("other", "item", "n_other", "n_item")]
    each = [F.struct(*(F.col(a).alias(b) for a, b in zip(way, names, strict=True))) for way in ways]
    return pairs.select("both", F.inline(F.array(*each)))


def similarity(measure: str, shrinkage: float, users: int) -> Column:
    """The weight of a pair of `mirrored`; null where it is not defined.

    Args:
        measure: cosine, jaccard or pearson.
        shrinkage: number of users.
        users: N.
    """
    both, n_item, n_other = (F.col(name).cast("double") for name in ("both", "n_item", "n_other"))
    everyone = F.lit(float(users))
    if measure == "jaccard":
        found = both / (n_item + n_other - both)
    elif measure == "cosine":
        found = both / F.sqrt(n_item * n_other)
    else:
        # An item that everyone has says nothing.
        spread = F.sqrt((n_item * (everyone - n_item)) * (n_other * (everyone - n_other)))
        found = (everyone * both - n_item * n_other) / F.nullif(spread, F.lit(0.0))
    return found * (both / (both + F.lit(shrinkage)))

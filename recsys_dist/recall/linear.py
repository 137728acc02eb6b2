"""Linear models of items: what the items of a history say of every other one, each knowing of the rest.

Counts of pairs do not know that two items of a history say the same; the least squares do. Spark adds up the
equations, in whole numbers; of a catalogue that is not too large they are solved here, in numpy.

    ease          X [users, items], 1 where a user has an item: X is explained by X W, W without a diagonal
                  (Steck, "Embarrassingly Shallow Autoencoders for Sparse Data", 2019)
    transitions   X [events, items], what came before an event, older items less; Y [events, items], the item
                  that came: Y is explained by X W (Choi et al., "Session-aware Linear Item-Item Models for
                  Session-based Recommendation", 2021)

In both the squares of the weights W [items, items] are penalised. Legend: I items (index 0 is unknown).
"""

import math
from itertools import accumulate

import numpy as np
import pyarrow as pa
from pyspark.sql import Column, DataFrame, Window
from pyspark.sql import functions as F

from recsys_dist.config import Recall
from recsys_dist.errors import ConfigError
from recsys_dist.recall.next_items import UNIT
from recsys_dist.schema import RELATED


def require_few(settings: Recall, n_items: int) -> None:
    """Raise a ConfigError where there are too many items for `recall.linear`."""
    if settings.linear and n_items > settings.linear_items:
        raise ConfigError(
            f"recall.linear={list(settings.linear)} is for catalogues of up to recall.linear_items="
            f"{settings.linear_items} items, and there are {n_items}, whose equations take about "
            f"{40 * n_items**2 / 2**30:.1f} GiB of the driver's memory. Raise linear_items, or leave linear "
            f"out."
        )


def sums_before(events: DataFrame, settings: Recall) -> DataFrame:
    """What the equations of `transitions` are made of (schema PRODUCTS), in UNITs.

    Before an event are those of earlier moments among the `window` ones that precede it: events of one moment
    do not see each other. An item counts w = exp(-g / transitions_decay) there, with g others in between.

    Args:
        events: of `in_order`.
        settings: of the configuration.

    Returns:
        `item` and `other`: the sum over the events of w of the one by w of the other, of which `other` came
        later or, where it is `item`, is the same (`product`); and, in `target`, of w of `item` where `other`
        is the event's own.
    """
    in_order = Window.partitionBy("user").orderBy(F.col("place").desc())
    decay, window = settings.transitions_decay, settings.window
    gaps = range(1, window + 1)
    later = {f"item_{gap}": F.lead("item", gap).over(in_order) for gap in gaps}
    later |= {f"first_{gap}": F.lead("first", gap).over(in_order) for gap in gaps}
    rows = events.withColumns(later)
    # What the item counts at the gap-th event after it; nothing where that is of the same moment.
    between = {gap: F.col("place") - F.col(f"first_{gap}") - 1 for gap in gaps}
    own = {
        f"own_{gap}": F.when(of >= 0, F.exp(-of / F.lit(decay))).otherwise(0.0) for gap, of in between.items()
    }
    rows = rows.withColumns(own)
    # The sums of its squares over the first so many events after it.
    sums = accumulate((F.col(name) ** 2 for name in own), initial=F.lit(0.0))
    rows = rows.withColumns({f"squares_{number}": of for number, of in enumerate(sums)})
    met = {f"met_{gap}": F.lead(f"squares_{window - gap}", gap).over(in_order) for gap in gaps}
    rows = rows.withColumns(met)
    each = [_struct(F.col("item"), F.lit(0.0), F.col(f"squares_{window}"))]
    for gap in gaps:
        # Before an event after both, the earlier one counts exp(-gap / decay) times as much. An item that a
        # user has again is twice a pair with itself.
        ways = F.when(F.col(f"item_{gap}") == F.col("item"), 2).otherwise(1)
        product = F.col(f"met_{gap}") * math.exp(-gap / decay) * ways
        each.append(_struct(F.col(f"item_{gap}"), F.col(f"own_{gap}"), product))
    pairs = rows.select("item", F.inline(F.array(*each))).where(F.col("other").isNotNull())
    return pairs.groupBy("item", "other").agg(
        F.sum("target").alias("target"), F.sum("product").alias("product")
    )


def _struct(other: Column, target: Column, product: Column) -> Column:
    whole = {"target": target, "product": product}
    numbers = (F.round(of * UNIT).cast("bigint").alias(name) for name, of in whole.items())
    return F.struct(other.alias("other"), *numbers)


def transitions(sums: pa.Table, counts_I: np.ndarray, settings: Recall) -> np.ndarray:
    """[I, I] weights of `sums_before`.

    Args:
        sums: schema PRODUCTS.
        counts_I: events of each item.
        settings: of the configuration.
    """
    products_II, targets_II = (_square(sums, name, len(counts_I)) / UNIT for name in ("product", "target"))
    equations_II = _equations(products_II, np.diag(products_II).copy(), settings.transitions_penalty)
    weights_II = np.linalg.solve(equations_II, targets_II)
    return weights_II / np.maximum(counts_I, 1.0) ** settings.transitions_damping


def ease(together: pa.Table, counts_I: np.ndarray, settings: Recall) -> np.ndarray:
    """[I, I] weights of the pairs that `neighbors.together` counts.

    Args:
        together: schema PRODUCTS, `product` is how many users have both, `other` the greater of the two.
        counts_I: how many users have each item.
        settings: of the configuration.
    """
    both_II = _square(together, "product", len(counts_I))
    inverse_II = np.linalg.inv(_equations(both_II, counts_I, settings.ease_penalty))
    weights_II = -inverse_II / np.diag(inverse_II)
    np.fill_diagonal(weights_II, 0.0)
    return weights_II


def farthest(weights_II: np.ndarray, n: int) -> pa.Table:
    """The `n` others of each item with weights farthest from 0 (schema RELATED), of equal ones the first."""
    size = len(weights_II)
    size_II = np.abs(weights_II.astype(np.float32))
    size_II[0], size_II[:, 0] = 0.0, 0.0
    n = min(n, size - 1)
    order_IN = np.argsort(-size_II, axis=1, kind="stable")[:, :n]
    items = np.repeat(np.arange(size), n)
    others = order_IN.ravel()
    kept = size_II[items, others] > 0
    columns = (items[kept], others[kept], weights_II[items, others][kept])
    return pa.table([pa.array(of, f.type) for of, f in zip(columns, RELATED, strict=True)], schema=RELATED)


def _square(table: pa.Table, name: str, size: int) -> np.ndarray:
    found_II = np.zeros((size, size))
    found_II[table["item"].to_numpy(), table["other"].to_numpy()] = table[name].to_numpy()
    return found_II


def _equations(products_II: np.ndarray, own_I: np.ndarray, penalty: float) -> np.ndarray:
    """The normal equations' left side, of products that are known of each pair one way round or the other,
    and of each item by itself.
    """
    found_II = products_II + products_II.T
    np.fill_diagonal(found_II, own_I + penalty)
    return found_II


def counts_of(counts: DataFrame, n_items: int) -> np.ndarray:
    """[I] of `item` and `n`; 0 of items that are not there."""
    counts_I = np.zeros(n_items + 1)
    for row in counts.select("item", "n").collect():
        counts_I[row["item"]] = row["n"]
    return counts_I

"""The user's last items strictly before an event, without comparing events pair by pair."""

from pyspark.sql import Column, DataFrame, Window
from pyspark.sql import functions as F

MATCHES = {"positive": "positive", "any": "true"}
"""`when` of a history or count field to the condition on an event."""


def with_state(events: DataFrame, when: str, last: int) -> DataFrame:
    """Add `_state_<when>` to each matching event: how many it makes with it, and the last items with it.

    Args:
        events: of one user in one partition: user, position, item_index, positive.
        when: key of MATCHES.
        last: greatest length.

    Returns:
        `_state_<when>`: struct of n (bigint) and items (array<int>, most recent last); null elsewhere.
    """
    matches = F.expr(MATCHES[when])
    in_order = Window.partitionBy("user", matches).orderBy("position")
    n = F.row_number().over(in_order).cast("bigint")
    items = F.collect_list("item_index").over(in_order.rowsBetween(1 - last, Window.currentRow))
    return events.withColumn(f"_state_{when}", F.when(matches, F.struct(n.alias("n"), items.alias("items"))))


def before_event(when: str, last: int) -> Column:
    """The last items of the events with smaller micros: array<int>.

    Events of the same moment do not see each other.
    """
    before = Window.partitionBy("user").orderBy("micros").rangeBetween(Window.unboundedPreceding, -1)
    # n grows along the user's events, so the greatest state is the latest.
    return _last(F.max(f"_state_{when}").over(before), last)


def before_cut(when: str, last: int, known: Column) -> Column:
    """Aggregate over a user's events: the last items of those that are known at a cut: array<int>."""
    return _last(F.max(F.when(known, F.col(f"_state_{when}"))), last)


def _last(state: Column, last: int) -> Column:
    items = F.coalesce(state["items"], F.array().cast("array<int>"))
    return F.slice(items, F.greatest(F.size(items) - last + 1, F.lit(1)), last)

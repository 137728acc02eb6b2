"""What is known of a user: before each event, and at the cuts that lists are made for.

A user's events become one array in order of time, from which every event takes the slice that is earlier:
nothing compares events pair by pair, and nothing is computed for an event but its slice.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from pyspark.sql import Column, DataFrame, Window
from pyspark.sql import functions as F

from recsys_dist.config import Aggregate, AnyField, History, Time
from recsys_dist.features.check import END_SECOND, FIRST_SECOND, SPLITS
from recsys_dist.features.encode import COUNTS
from recsys_dist.features.ids import stored
from recsys_dist.features.numeric import Fitted, Moments, Value, parts, signed_log, total, whole
from recsys_dist.features.split import matches, named, order_of
from recsys_dist.schema import DAY, LATEST

HOUR = DAY // 24
MOMENT = ""
"""What is told of an event in place of its item or one of its attributes: its time. No field is called so."""
PARTS = {"valid": SPLITS[:1], "test": SPLITS[:2], "date": SPLITS}
"""Each cut, and the parts of which the events are known there."""
CUTS = tuple(PARTS)
MOST_RECENCY = 24
LOGS = ("count", "days_since")
"""Measures that enter as log(1 + x)."""
Before = tuple[History | Aggregate | Time, ...]


def state_fields(fields: Sequence[AnyField]) -> Before:
    """The fields that look back on the user's events, in order."""
    return tuple(
        field
        for field in fields
        if isinstance(field, History)
        or (isinstance(field, Aggregate) and field.side == "user")
        or (isinstance(field, Time) and field.part == "recency")
    )


def counted_whens(fields: Sequence[AnyField]) -> list[str]:
    """The `when`s whose earlier events have to be counted, `any` first."""
    whens = [field.when for field in state_fields(fields) if isinstance(field, History | Aggregate)]
    return list(dict.fromkeys(["any", *whens]))


def told_whens(fields: Sequence[AnyField]) -> list[str]:
    """The `when`s of which something is told at a cut, `any` first."""
    return list(dict.fromkeys([*counted_whens(fields), "positive"]))


def summed_whens(fields: Sequence[AnyField]) -> list[str]:
    """The `when`s whose earlier values or last moment are asked for."""
    measures = ("mean_value", "days_since")
    found = [f.when for f in state_fields(fields) if isinstance(f, Aggregate) and f.measure in measures]
    return list(dict.fromkeys(found))


def counts_at_cuts(events: DataFrame, fields: Sequence[AnyField]) -> DataFrame:
    """A row a user: of the events known at each cut, number, last moment and sum by `when`, for `at_cuts`.

    Args:
        events: the usable ones.
        fields: of the configuration.

    Returns:
        `user`, and with cut C and place I of a `when` in `told_whens` `n:I:C`, `last:I:C` (micros), where it
        is asked for `whole:I:C` and `parts:I:C`; `later:C`, the first moment that is not known.
    """
    summed = summed_whens(fields)
    # Of each part first: a user has three at most, so that what follows is short.
    measures = {"later": (F.min, F.col("micros"))}
    for number, when in enumerate(told_whens(fields)):
        value = F.when(matches(when), F.col("value"))
        measures[f"n:{number}"] = (F.sum, F.when(matches(when), 1).otherwise(0))
        measures[f"last:{number}"] = (F.max, F.when(matches(when), F.col("micros")))
        if when in summed:
            measures[f"whole:{number}"] = (F.sum, whole(value))
            measures[f"parts:{number}"] = (F.sum, parts(value))
    found = [function(column).alias(name) for name, (function, column) in measures.items()]
    by_part = events.groupBy("user", "split").agg(*found)
    at_cuts = []
    for cut, known in PARTS.items():
        for name, (function, _) in measures.items():
            counts = F.col("split").isin(*known) != (name == "later")
            at_cuts.append(function(F.when(counts, F.col(f"`{name}`"))).alias(f"{name}:{cut}"))
    return by_part.groupBy("user").agg(*at_cuts)


def user_tokens(counts: DataFrame, fields: Sequence[AnyField]) -> DataFrame:
    """The users as `encode.tokens_of` has them, of `counts_at_cuts`."""
    positive = told_whens(fields).index("positive")
    counted = {
        "count": _number(0, "valid"),
        "positives": _number(positive, "valid"),
        "tested": _number(0, "date") - _number(0, "test"),
    }
    return counts.select(
        F.lit("user").alias("field"),
        F.col("user").alias("token"),
        *(counted[name].alias(name) for name in COUNTS),
    )


def _number(when: int, cut: str) -> Column:
    return F.coalesce(f"`n:{when}:{cut}`", F.lit(0)).cast("bigint")


def aggregate_values(
    fields: Sequence[AnyField], bounds: Mapping[str, tuple[float, float]]
) -> dict[str, Value]:
    """What the user's aggregates are fitted on, of the train events of `look_back`, by field.

    Args:
        fields: of the configuration.
        bounds: of `log.Look.values`, where only train events come before a train event: a mean of values
            lies between theirs.
    """
    # Bounds that no later event moves, or what is fitted would change with it in its last digit.
    most = {
        "count": (0.0, math.log1p(2**31)),
        "days_since": (0.0, math.log1p((END_SECOND - FIRST_SECOND) * 10**6 / DAY)),
    }
    found = {}
    for field in state_fields(fields):
        if isinstance(field, Aggregate) and field.measure != "share":
            raw = _earlier(field)
            if field.measure == "mean_value":
                low, high = bounds.get(field.when, (None, None))
                found[field.name] = Value(raw, low, high, loose=True)
            else:
                found[field.name] = Value(signed_log(raw), *most[field.measure])
    return found


def fit_aggregates(found: Mapping[str, Moments], fields: Sequence[AnyField]) -> dict[str, Fitted]:
    """The user's aggregates, of the moments of `aggregate_values`; a user without earlier events gets 0."""
    return {
        field.name: Fitted(0.0, field.measure in LOGS, found[field.name].mean, found[field.name].stddev)
        for field in state_fields(fields)
        if isinstance(field, Aggregate) and field.measure != "share"
    }


@dataclass(frozen=True)
class State:
    """Computes the fields that look back, the same way before an event and at a cut."""

    fields: Before
    fitted: Mapping[str, Fitted]
    several: frozenset[str]
    """Attributes with several values an item."""
    widths: Mapping[str, int]
    """Share field to its number of values."""
    in_time: bool
    """The parts follow one another in each user's time, so that what is known at a cut comes first."""
    end: int
    """Micros of the start of the day that the cut `date` stands for."""

    def of_users(self, indexed: DataFrame, own: DataFrame) -> DataFrame:
        """A row a user, for `before_events` and `at_cuts`: arrays of what its events tell, in order of time.

        Args:
            indexed: the usable events of `look_back`, in each user's order, with the item's `index` and the
                attributes that histories and shares need in `attribute:<field>` (int or array<int>).
            own: `user`, and columns to carry along.
        """
        told = {}
        for when, of in self._told():
            column = {"item": "index", MOMENT: "micros"}.get(of, f"`attribute:{of}`")
            value = F.when(matches(when), F.col(column))
            told[_array(when, of)] = value
            if not self.in_time:
                told |= {
                    _array(when, of, cut): F.when(F.col("split").isin(*PARTS[cut]), value) for cut in CUTS
                }
        # Where the rows are in this order already, the sort does nothing, but keeps these columns from being
        # computed one by one while the lists are collected.
        rows = indexed.withColumns(told).sortWithinPartitions("user", *order_of(indexed))
        found = [F.collect_list(F.col(f"`{name}`")).alias(name) for name in told]
        return rows.groupBy("user").agg(*found).join(own, "user")

    def before_events(self, events: DataFrame, users: DataFrame, own: Sequence[str]) -> DataFrame:
        """The events with `item` (its index), the users' columns, and the fields that look back (named by
        `stored`).

        Args:
            events: as `of_users`; attributes only of share fields.
            users: of `of_users`.
            own: the columns of `users` that every event gets.
        """
        columns = {stored(field.name): self._shares_before(field) for field in share_fields(self.fields)}
        for field in self.fields:
            if isinstance(field, Time):
                columns[stored(field.name)] = _recency(F.col("micros") - F.col("`_last:any`"))
            elif isinstance(field, Aggregate) and field.measure != "share":
                columns[stored(field.name)] = self._scaled(field, _earlier(field))
        histories = [field for field in self.fields if isinstance(field, History)]
        arrays = dict.fromkeys([_array("any", "item"), *(_array(f.when, f.of) for f in histories)])
        told = users.select("user", *own, *(F.col(f"`{name}`") for name in arrays))
        # Both sides are in order of users. A merge reads a user's arrays once, however many events it has.
        rows = events.drop("item").withColumns(columns).join(told.hint("merge"), "user")
        slices = {"item": F.element_at(f"`{_array('any', 'item')}`", F.col("position") + 1)}
        for field in histories:
            n = F.col(f"`_n:{named(field.when)}`")
            slices[stored(field.name)] = self._flat(
                field, _latest(field.last, F.col(f"`{_array(field.when, field.of)}`"), n)
            )
        return rows.withColumns(slices)

    def at_cuts(self, users: DataFrame, own: Sequence[str]) -> DataFrame:
        """A row a user and cut: the columns `own`, `as_of`, `seen`, `liked`, `latest` and the fields.

        valid: what the user's events of the train part tell; test: those of train and valid; date: those
        before `end`. Where a split by order goes between events of one moment, those before it are told
        (the event after it, in examples/, does not see them). Times since an event count up to the start of
        that day (UTC).

        Args:
            users: of `of_users`, with the columns of `counts_at_cuts`.
            own: columns of `users`.
        """
        whens, summed = told_whens(self.fields), summed_whens(self.fields)
        cuts = []
        for cut in CUTS:
            later = F.col(f"`later:{cut}`")
            now = F.coalesce(later - F.pmod(later, F.lit(DAY)), F.lit(self.end))
            columns = [F.lit(cut).alias("as_of"), now.alias("now")]
            for number, when in enumerate(whens):
                columns.append(_number(number, cut).alias(f"n_{number}"))
                for name in ("last", *(("whole", "parts") if when in summed else ())):
                    columns.append(F.col(f"`{name}:{number}:{cut}`").alias(f"{name}_{number}"))
            for place, (when, of) in enumerate(self._told()):
                if self.in_time:
                    n = _number(whens.index(when), cut).cast("int")
                    told = F.slice(F.col(f"`{_array(when, of)}`"), F.lit(1), n)
                else:
                    told = F.col(f"`{_array(when, of, cut)}`")
                columns.append(told.alias(f"told_{place}"))
            cuts.append(F.struct(*columns))
        each = users.select(*own, F.inline(F.array(*cuts)))
        liked, n_liked = self._known("positive", "item"), F.col(f"n_{whens.index('positive')}")
        columns = [
            F.sort_array(F.array_distinct(self._known("any", "item"))).alias("seen"),
            F.sort_array(F.array_distinct(liked)).alias("liked"),
            _latest(LATEST, liked, n_liked).alias("latest"),
            F.transform(
                _latest(LATEST, self._known("positive", MOMENT), n_liked),
                lambda moment: hours(_since(moment)),
            ).alias("latest_age"),
        ]
        for field in self.fields:
            if isinstance(field, History):
                n = F.col(f"n_{whens.index(field.when)}")
                value = self._flat(field, _latest(field.last, self._known(field.when, field.of), n))
            elif isinstance(field, Time):
                value = _recency(_since(F.col("last_0")))
            elif field.measure == "share":
                value = self._shares_known(field)
            else:
                value = self._scaled(field, self._measured(field))
            columns.append(value.alias(stored(field.name)))
        return each.select(*own, "as_of", *columns)

    def _told(self) -> list[tuple[str, str]]:
        """Of which events what is told, in order of time: `when`, and the item, one of its attributes or the
        event's MOMENT.
        """
        told = [("any", "item"), ("positive", "item"), ("positive", MOMENT)]
        for field in self.fields:
            if isinstance(field, History):
                told.append((field.when, field.of))
            elif isinstance(field, Aggregate) and field.attribute:
                told.append((field.when, field.attribute))
        return list(dict.fromkeys(told))

    def _known(self, when: str, of: str) -> Column:
        return F.col(f"told_{self._told().index((when, of))}")

    def _measured(self, field: Aggregate) -> Column:
        number = told_whens(self.fields).index(field.when)
        n = F.col(f"n_{number}")
        if field.measure == "count":
            return n
        if field.measure == "days_since":
            return _since(F.col(f"last_{number}")) / DAY
        return F.when(n > 0, total(F.col(f"whole_{number}"), F.col(f"parts_{number}")) / n)

    def _scaled(self, field: Aggregate, raw: Column) -> Column:
        return F.coalesce(self.fitted[field.name].scaled(raw), F.lit(0.0)).cast("float")

    def _shares_before(self, field: Aggregate) -> Column:
        assert field.attribute
        before = Window.partitionBy("user").orderBy("micros").rangeBetween(Window.unboundedPreceding, -1)
        codes = F.col(f"`attribute:{field.attribute}`")
        has = (
            (lambda i: F.array_contains(codes, i))
            if field.attribute in self.several
            else (lambda i: codes == i)
        )
        counts = [
            F.count(F.when(matches(field.when) & has(i), 1)).over(before)
            for i in range(1, self.widths[field.name] + 1)
        ]
        n = F.col(f"`_n:{named(field.when)}`")
        return F.array(*(F.when(n > 0, count / n).otherwise(0.0).cast("float") for count in counts))

    def _shares_known(self, field: Aggregate) -> Column:
        assert field.attribute
        codes = self._known(field.when, field.attribute)
        n = F.size(codes)
        if field.attribute in self.several:
            codes = F.flatten(F.transform(codes, F.array_distinct))
        places = F.sequence(F.lit(1), F.lit(self.widths[field.name]))

        def share(i: Column) -> Column:
            count = F.size(F.filter(codes, lambda code: code == i))
            return F.when(n > 0, count / n).otherwise(0.0).cast("float")

        return F.transform(places, share)

    def _flat(self, field: History, values: Column) -> Column:
        if field.of == "item":
            return values
        flat = F.flatten(values) if field.of in self.several else values
        return F.array_remove(flat, 0)


def _array(when: str, of: str, cut: str = "") -> str:
    """Name of the array of what a user's events tell; of those known at a cut."""
    return f"told:{named(when)}:{of}:{cut}"


def _latest(last: int, values: Column, n: Column) -> Column:
    """The last so many values of the first `n`."""
    start = F.greatest(n - last + 1, F.lit(1)).cast("int")
    return F.slice(values, start, F.least(n, F.lit(last)).cast("int"))


def share_fields(fields: Sequence[AnyField]) -> list[Aggregate]:
    """The fields that tell the share of each value of an attribute."""
    return [field for field in fields if isinstance(field, Aggregate) and field.measure == "share"]


def attributes(fields: Sequence[AnyField]) -> list[str]:
    """The item fields whose values are remembered or counted."""
    found = [f.of for f in fields if isinstance(f, History) and f.of != "item"]
    found += [f.attribute for f in fields if isinstance(f, Aggregate) and f.attribute]
    return list(dict.fromkeys(found))


def _earlier(field: Aggregate) -> Column:
    n = F.col(f"`_n:{named(field.when)}`")
    if field.measure == "count":
        return n
    if field.measure == "mean_value":
        return F.when(n > 0, F.col(f"`_sum:{named(field.when)}`") / n)
    return (F.col("micros") - F.col(f"`_last:{named(field.when)}`")) / DAY


def doubling(count: Column) -> Column:
    """1 + floor(log2(1 + count)) of a whole number from 0, exactly: its number of binary digits."""
    return F.length(F.bin(count + 1))


def _since(moment: Column) -> Column:
    """Micros up to `now`, 0 for a moment after it; null for none."""
    return F.when(moment.isNotNull(), F.greatest(F.col("now") - moment, F.lit(0)))


def hours(micros: Column) -> Column:
    """Full ones, as an int."""
    return ((micros - F.pmod(micros, F.lit(HOUR))) / HOUR).cast("int")


def _recency(micros: Column) -> Column:
    known = F.least(doubling(hours(micros).cast("bigint")), F.lit(MOST_RECENCY))
    return F.when(micros.isNotNull(), known).otherwise(0)

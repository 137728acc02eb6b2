"""What is known of a user: before each event, and at the cuts that lists are made for.

A user's events become one array in order of time, from which every event takes the slice that is earlier:
nothing compares events pair by pair, and nothing is computed for an event but its slice.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from pyspark.sql import Column, DataFrame, Window
from pyspark.sql import functions as F

from recsys_dist.config import Aggregate, AnyField, History, Time
from recsys_dist.features.numeric import EXACT, Fitted, Moments, moments, signed_log
from recsys_dist.features.split import matches

DAY = 86_400_000_000
"""Microseconds."""
HOUR = DAY // 24
CUTS = ("valid", "test", "date")
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


def summed_whens(fields: Sequence[AnyField]) -> list[str]:
    """The `when`s whose earlier values or last moment are asked for."""
    measures = ("mean_value", "days_since")
    found = [f.when for f in state_fields(fields) if isinstance(f, Aggregate) and f.measure in measures]
    return list(dict.fromkeys(found))


def fit_aggregates(train: DataFrame, fields: Sequence[AnyField]) -> dict[str, Fitted]:
    """Fit the user's aggregates on the train events of `look_back`; a user without earlier events gets 0."""
    found: dict[str, Column] = {}
    for field in state_fields(fields):
        if isinstance(field, Aggregate) and field.measure != "share":
            raw = _earlier(field)
            found[field.name] = signed_log(raw) if field.measure in LOGS else raw
    names = {field.name: field for field in fields if isinstance(field, Aggregate)}

    def fitted(name: str, about: Moments) -> Fitted:
        return Fitted(0.0, names[name].measure in LOGS, about.mean, about.stddev)

    return {name: fitted(name, about) for name, about in moments(train, found).items()}


@dataclass(frozen=True)
class State:
    """Computes the fields that look back, the same way before an event and at a cut.

    Args of both methods: events of `look_back` with item indices in `item`, the item's attributes that
    histories and shares need in `attribute:<field>` (int or array<int>), and further columns to carry along.
    """

    fields: Before
    fitted: Mapping[str, Fitted]
    several: frozenset[str]
    """Attributes with several values an item."""
    widths: Mapping[str, int]
    """Share field to its number of values."""

    def events(self, indexed: DataFrame, carried: Sequence[str]) -> DataFrame:
        """One row a user: `user` and `e`, the array of the user's events in order.

        Args:
            indexed: the usable events.
            carried: columns that every example has, besides those that look back.
        """
        columns = [
            F.col("position"),
            F.col("micros"),
            F.col("item"),
            F.col("value").cast("float").alias("value"),
        ]
        columns += [F.col("positive"), F.col("split")]
        columns += [F.col(f"`{name}`") for name in carried]
        columns += [F.col(f"`attribute:{name}`").alias(f"attribute_{name}") for name in self._attributes()]
        for number, when in enumerate(self._whens()):
            columns.append(F.col(f"`_n:{when}`").cast("int").alias(f"n_{number}"))
            columns.append(matches(when).alias(f"match_{number}"))
        shares = [field for field in self.fields if isinstance(field, Aggregate) and field.measure == "share"]
        if shares:
            indexed = indexed.withColumns({f"share:{f.name}": self._shares_before(f) for f in shares})
        for field in self.fields:
            if isinstance(field, Aggregate):
                value = F.col(f"`share:{field.name}`")
                if field.measure != "share":
                    value = self._scaled(field, _earlier(field))
                columns.append(value.alias(field.name))
            elif isinstance(field, Time):
                columns.append(_recency(F.col("micros") - F.col("`_last:any`")).alias(field.name))
        # The order is the array's own business, whatever order the rows arrive in.
        return indexed.groupBy("user").agg(F.sort_array(F.collect_list(F.struct(*columns))).alias("e"))

    def before_events(self, users: DataFrame) -> DataFrame:
        """One row an event: the columns of `users` but `e`, the event's own, the fields that look back."""
        kept = [name for name in users.columns if name != "e"]
        arrays = {}
        for field in self.fields:
            if isinstance(field, History):
                arrays[self._array(field)] = self._remembered(field, F.col("e"))
        # In a step of its own: functions on arrays interrupt the compiled code, and an event's slice is
        # taken without a copy of the whole array only within it.
        whole = users.select(*kept, "e", *(array.alias(name) for name, array in arrays.items()))
        rows = whole.select(*kept, *arrays, F.inline("e"))
        for field in self.fields:
            if isinstance(field, History):
                n = F.col(f"n_{self._whens().index(field.when)}")
                start, length = F.greatest(n - field.last + 1, F.lit(1)), F.least(n, F.lit(field.last))
                rows = rows.withColumn(
                    field.name, self._flat(field, F.slice(F.col(self._array(field)), start, length))
                )
        return rows

    def at_cuts(self, users: DataFrame, end: int) -> DataFrame:
        """A row a user and cut: the columns of `users` but `e`, `as_of`, `seen`, `liked` and the fields.

        valid: what is known before the user's first event that is not of the train part; test: before the
        first test event; date: before `end`. Times since an event count up to the start of that day (UTC).

        Args:
            users: of `events`.
            end: micros of the start of the day that `date` stands for.
        """
        kept = [name for name in users.columns if name != "e"]
        cuts = []
        for cut in CUTS:
            known, unknown = _known(cut, end), _unknown(cut, end)
            later = F.array_min(F.transform(F.filter("e", unknown), lambda x: x["micros"]))
            now = F.coalesce(later - F.pmod(later, F.lit(DAY)), F.lit(end))
            k = F.filter("e", known)
            cuts.append(F.struct(F.lit(cut).alias("as_of"), now.alias("now"), k.alias("k")))
        rows = users.select(*kept, F.inline(F.array(*cuts)))
        columns = [
            F.array_sort(F.array_distinct(F.col("k.item"))).alias("seen"),
            F.array_sort(
                F.array_distinct(F.transform(F.filter("k", lambda x: x["positive"]), lambda x: x["item"]))
            ).alias("liked"),
        ]
        for field in self.fields:
            if isinstance(field, History):
                whole = self._remembered(field, F.col("k"))
                start = F.greatest(F.size(whole) - field.last + 1, F.lit(1))
                columns.append(self._flat(field, F.slice(whole, start, F.lit(field.last))).alias(field.name))
            elif isinstance(field, Time):
                last = F.array_max(F.col("k.micros"))
                columns.append(_recency(_since(last)).alias(field.name))
            elif field.measure == "share":
                columns.append(self._shares_known(field).alias(field.name))
            else:
                columns.append(self._scaled(field, self._known(field)).alias(field.name))
        return rows.select(*kept, "as_of", *columns)

    def _known(self, field: Aggregate) -> Column:
        matching = self._matching(field.when, F.col("k"))
        if field.measure == "count":
            return F.size(matching)
        if field.measure == "days_since":
            last = F.array_max(F.transform(matching, lambda x: x["micros"]))
            return _since(last) / DAY
        exact = "decimal(34,9)"
        total = F.aggregate(
            matching,
            F.lit(0).cast(exact),
            lambda total, x: (total + x["value"].cast("double").cast(EXACT)).cast(exact),
        )
        return F.when(F.size(matching) > 0, total.cast("double") / F.size(matching))

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
        n = F.col(f"`_n:{field.when}`")
        return F.array(*(F.when(n > 0, count / n).otherwise(0.0).cast("float") for count in counts))

    def _shares_known(self, field: Aggregate) -> Column:
        matching = self._matching(field.when, F.col("k"))
        codes = F.transform(matching, lambda x: x[f"attribute_{field.attribute}"])
        if field.attribute in self.several:
            codes = F.flatten(F.transform(codes, F.array_distinct))
        n = F.size(matching)
        places = F.sequence(F.lit(1), F.lit(self.widths[field.name]))

        def share(i: Column) -> Column:
            count = F.size(F.filter(codes, lambda code: code == i))
            return F.when(n > 0, count / n).otherwise(0.0).cast("float")

        return F.transform(places, share)

    def _remembered(self, field: History, events: Column) -> Column:
        matching = self._matching(field.when, events)
        name = "item" if field.of == "item" else f"attribute_{field.of}"
        return matching[name] if field.when == "any" else F.transform(matching, lambda x: x[name])

    def _flat(self, field: History, values: Column) -> Column:
        if field.of == "item":
            return values
        flat = F.flatten(values) if field.of in self.several else values
        return F.array_remove(flat, 0)

    def _matching(self, when: str, events: Column) -> Column:
        if when == "any":
            return events
        name = f"match_{self._whens().index(when)}"
        return F.filter(events, lambda x: x[name])

    def _whens(self) -> list[str]:
        return counted_whens(self.fields)

    def _attributes(self) -> list[str]:
        return attributes(self.fields)

    @staticmethod
    def _array(field: History) -> str:
        return f"all:{field.when}:{field.of}"


def attributes(fields: Sequence[AnyField]) -> list[str]:
    """The item fields whose values are remembered or counted."""
    named = [f.of for f in fields if isinstance(f, History) and f.of != "item"]
    named += [f.attribute for f in fields if isinstance(f, Aggregate) and f.attribute]
    return list(dict.fromkeys(named))


def _known(cut: str, end: int) -> Callable[[Column], Column]:
    """Is an event known at a cut?"""
    if cut == "date":
        return lambda event: event["micros"] < end
    if cut == "valid":
        return lambda event: event["split"] == "train"
    return lambda event: event["split"] != "test"


def _unknown(cut: str, end: int) -> Callable[[Column], Column]:
    known = _known(cut, end)
    return lambda event: ~known(event)


def _earlier(field: Aggregate) -> Column:
    n = F.col(f"`_n:{field.when}`")
    if field.measure == "count":
        return n
    if field.measure == "mean_value":
        return F.when(n > 0, F.col(f"`_sum:{field.when}`").cast("double") / n)
    return (F.col("micros") - F.col(f"`_last:{field.when}`")) / DAY


def doubling(count: Column) -> Column:
    """1 + floor(log2(1 + count)) of a whole number from 0, exactly: its number of binary digits."""
    return F.length(F.bin(count + 1))


def _since(moment: Column) -> Column:
    """Micros up to `now`, 0 for a moment after it; null for none."""
    return F.when(moment.isNotNull(), F.greatest(F.col("now") - moment, F.lit(0)))


def _recency(micros: Column) -> Column:
    hours = (micros - F.pmod(micros, F.lit(HOUR))) / HOUR
    known = F.least(doubling(hours.cast("bigint")), F.lit(MOST_RECENCY))
    return F.when(micros.isNotNull(), known).otherwise(0)

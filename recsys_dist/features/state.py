"""What is known of a user: before each event, and at the cuts that lists are made for.

A user's events become one array in order of time, from which every event takes the slice that is earlier:
nothing compares events pair by pair, and nothing is computed for an event but its slice.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce

from pyspark.sql import Column, DataFrame, Window
from pyspark.sql import functions as F

from recsys_dist.config import Aggregate, AnyField, History, Time
from recsys_dist.features.ids import stored
from recsys_dist.features.numeric import Fitted, moments, parts, signed_log, total, whole
from recsys_dist.features.split import matches
from recsys_dist.schema import DAY

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
    wanted: dict[str, Aggregate] = {
        field.name: field
        for field in state_fields(fields)
        if isinstance(field, Aggregate) and field.measure != "share"
    }
    raw = {name: _earlier(field) for name, field in wanted.items()}
    logs = {name: signed_log(raw[name]) for name, field in wanted.items() if field.measure in LOGS}
    return {
        name: Fitted(0.0, name in logs, about.mean, about.stddev)
        for name, about in moments(train, raw | logs).items()
    }


@dataclass(frozen=True)
class State:
    """Computes the fields that look back, the same way before an event and at a cut.

    Both methods take the usable events of `look_back`, with item indices in `item` and the item's attributes
    that histories and shares need in `attribute:<field>` (int or array<int>).
    """

    fields: Before
    fitted: Mapping[str, Fitted]
    several: frozenset[str]
    """Attributes with several values an item."""
    widths: Mapping[str, int]
    """Share field to its number of values."""
    in_time: bool
    """The parts follow one another in each user's time, so that what is known at a cut comes first."""

    def before_events(self, indexed: DataFrame, own: DataFrame, carried: Sequence[str]) -> DataFrame:
        """A row an event: the event's and the carried columns, those of `own`, the fields that look back
        (named by `stored`).

        Args:
            indexed: the usable events.
            own: `user`, and columns to carry along.
            carried: columns of `indexed` that every example has.
        """
        whens = counted_whens(self.fields)
        flags = _flags([matches(when) for when in whens], len(CUTS))
        event = [F.col(name) for name in ("position", "micros", "item", "value", "positive", "split")]
        event += [flags.alias("flags"), *(F.col(f"`{name}`") for name in carried)]
        event += [F.col(f"`attribute:{name}`").alias(f"attribute_{name}") for name in attributes(self.fields)]
        event += [F.col(f"`_n:{when}`").alias(f"n_{number}") for number, when in enumerate(whens)]
        shares = {f"share:{field.name}": self._shares_before(field) for field in share_fields(self.fields)}
        indexed = indexed.withColumns(shares) if shares else indexed
        for field in self.fields:
            if isinstance(field, Aggregate):
                value = F.col(f"`share:{field.name}`")
                if field.measure != "share":
                    value = self._scaled(field, _earlier(field))
                event.append(value.alias(stored(field.name)))
            elif isinstance(field, Time):
                event.append(_recency(F.col("micros") - F.col("`_last:any`")).alias(stored(field.name)))
        # A sort that has nothing to do, as the rows are in order: it keeps the event's columns from being
        # computed, one by one and not in compiled code, while the list is collected.
        rows = indexed.select("user", F.struct(*event).alias("_event")).sortWithinPartitions("user")
        # The order is the array's own business, whatever order the rows arrive in.
        users = rows.groupBy("user").agg(F.sort_array(F.collect_list("_event")).alias("e")).join(own, "user")
        histories = [field for field in self.fields if isinstance(field, History)]
        arrays = {self._array(field): self._remembered(field, F.col("e")) for field in histories}
        # In a step of its own: functions on arrays interrupt the compiled code, and an event's slice is
        # taken without a copy of the whole array only within it.
        arranged = users.select(*own.columns, "e", *(array.alias(name) for name, array in arrays.items()))
        examples = arranged.select(*own.columns, *arrays, F.inline("e"))
        slices = {}
        for field in histories:
            n = F.col(f"n_{whens.index(field.when)}")
            start, length = F.greatest(n - field.last + 1, F.lit(1)), F.least(n, F.lit(field.last))
            slices[stored(field.name)] = self._flat(field, F.slice(F.col(self._array(field)), start, length))
        return examples.withColumns(slices)

    def at_cuts(self, indexed: DataFrame, own: DataFrame, end: int) -> DataFrame:
        """A row a user and cut: the columns of `own`, `as_of`, `seen`, `liked` and the fields.

        valid: what is known before the user's first event that is not of the train part; test: before the
        first test event; date: before `end`. Times since an event count up to the start of that day (UTC).

        Args:
            indexed: the usable events.
            own: `user`, and columns to carry along.
            end: micros of the start of the day that `date` stands for.
        """
        whens, summed = counted_whens(self.fields), summed_whens(self.fields)
        names = {when: ("n", "last", *(("whole", "parts") if when in summed else ())) for when in whens}
        known_at = [_known(cut, end) for cut in CUTS]
        flags = _flags([*known_at, *(matches(when) for when in [*whens, "positive"])])
        event = [F.col("position"), F.col("item"), flags.alias("flags")]
        event += [F.col(f"`attribute:{name}`").alias(f"attribute_{name}") for name in attributes(self.fields)]
        measured = [F.sort_array(F.collect_list("_event")).alias("e")]
        for cut in CUTS:
            measured.append(F.min(F.when(~_known(cut, end), F.col("micros"))).alias(f"later:{cut}"))
            for number, when in enumerate(whens):
                known = _known(cut, end) & matches(when)
                value = F.when(known, F.col("value"))
                found = {
                    "n": F.count(F.when(known, 1)),
                    "last": F.max(F.when(known, F.col("micros"))),
                    "whole": F.sum(whole(value)),
                    "parts": F.sum(parts(value)),
                }
                measured += [found[name].alias(f"{name}:{number}:{cut}") for name in names[when]]
        rows = indexed.withColumn("_event", F.struct(*event)).sortWithinPartitions("user")
        users = rows.groupBy("user").agg(*measured).join(own, "user")
        cuts = []
        for place, cut in enumerate(CUTS):
            later = F.col(f"`later:{cut}`")
            now = F.coalesce(later - F.pmod(later, F.lit(DAY)), F.lit(end))
            first = F.slice("e", F.lit(1), F.col(f"`n:0:{cut}`").cast("int"))
            known = first if self.in_time else F.filter("e", _has(1 << place))
            cuts.append(
                F.struct(
                    F.lit(cut).alias("as_of"),
                    now.alias("now"),
                    known.alias("k"),
                    *(
                        F.col(f"`{name}:{number}:{cut}`").alias(f"{name}_{number}")
                        for number, when in enumerate(whens)
                        for name in names[when]
                    ),
                )
            )
        each = users.select(*own.columns, F.inline(F.array(*cuts)))
        columns = [
            F.sort_array(F.array_distinct(F.col("k.item"))).alias("seen"),
            F.sort_array(F.array_distinct(self._matching("positive", F.col("k"))["item"])).alias("liked"),
        ]
        for field in self.fields:
            if isinstance(field, History):
                remembered = self._remembered(field, F.col("k"))
                start = F.greatest(F.size(remembered) - field.last + 1, F.lit(1))
                columns.append(
                    self._flat(field, F.slice(remembered, start, F.lit(field.last))).alias(stored(field.name))
                )
            elif isinstance(field, Time):
                columns.append(_recency(_since(F.col("last_0"))).alias(stored(field.name)))
            elif field.measure == "share":
                columns.append(self._shares_known(field).alias(stored(field.name)))
            else:
                columns.append(self._scaled(field, self._known(field)).alias(stored(field.name)))
        return each.select(*own.columns, "as_of", *columns)

    def _known(self, field: Aggregate) -> Column:
        number = counted_whens(self.fields).index(field.when)
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
        return self._matching(field.when, events)["item" if field.of == "item" else f"attribute_{field.of}"]

    def _flat(self, field: History, values: Column) -> Column:
        if field.of == "item":
            return values
        flat = F.flatten(values) if field.of in self.several else values
        return F.array_remove(flat, 0)

    def _matching(self, when: str, events: Column) -> Column:
        if when == "any":
            return events
        return F.filter(events, _has(1 << len(CUTS) + [*counted_whens(self.fields), "positive"].index(when)))

    @staticmethod
    def _array(field: History) -> str:
        return f"all:{field.when}:{field.of}"


def share_fields(fields: Sequence[AnyField]) -> list[Aggregate]:
    """The fields that tell the share of each value of an attribute."""
    return [field for field in fields if isinstance(field, Aggregate) and field.measure == "share"]


def attributes(fields: Sequence[AnyField]) -> list[str]:
    """The item fields whose values are remembered or counted."""
    named = [f.of for f in fields if isinstance(f, History) and f.of != "item"]
    named += [f.attribute for f in fields if isinstance(f, Aggregate) and f.attribute]
    return list(dict.fromkeys(named))


def _known(cut: str, end: int) -> Column:
    """Is an event known at a cut?"""
    if cut == "date":
        return F.col("micros") < end
    return F.col("split") == "train" if cut == "valid" else F.col("split") != "test"


def _flags(conditions: Sequence[Column], first: int = 0) -> Column:
    """Conditions as the bits of one number, from bit `first` on."""
    bits = (F.when(condition, 1 << place).otherwise(0) for place, condition in enumerate(conditions, first))
    return reduce(Column.bitwiseOR, bits)


def _has(flag: int) -> Callable[[Column], Column]:
    return lambda event: event["flags"].bitwiseAND(flag) != 0


def _earlier(field: Aggregate) -> Column:
    n = F.col(f"`_n:{field.when}`")
    if field.measure == "count":
        return n
    if field.measure == "mean_value":
        known = total(F.col(f"`_whole:{field.when}`"), F.col(f"`_parts:{field.when}`"))
        return F.when(n > 0, known / n)
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

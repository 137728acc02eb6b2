"""What was asked: frozen, typed settings, read from conf/default.yaml, a conf file and --set overrides."""

import codecs
import copy
import datetime as dt
import difflib
import itertools
import math
import types
import typing
import zoneinfo
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import pyarrow.fs
import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    model_validator,
)

from recsys_dist.errors import ConfigError

PACKAGE = Path(__file__).resolve().parent
CHECKOUT = (PACKAGE.parent / "pyproject.toml").is_file()
# conf/ and jobs/ stand beside the package in a checkout, inside it in an installed wheel.
REPOSITORY = PACKAGE.parent if CHECKOUT else PACKAGE
DEFAULT_CONF = REPOSITORY / "conf" / "default.yaml"


class _Several(ValueError):
    """Several things that a validator found wrong."""

    def __init__(self, texts: Sequence[str]) -> None:
        super().__init__("; ".join(texts))
        self.texts = texts


class Section(BaseModel):
    """A part of the configuration: immutable, unknown keys refused."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        use_attribute_docstrings=True,
        allow_inf_nan=False,
        coerce_numbers_to_str=True,  # an id or a column name of digits needs no quotes in YAML
    )


class Storage(Section):
    """Where runs and the published table live."""

    root: str = "runs"
    """URI or path of the root. A relative path is relative to the repository."""

    pin: dict[Literal["features", "als", "recall", "deepfm", "evaluation", "score"], str] = {}
    """Stage to run id: use this run in place of the latest one."""


class Source(Section):
    """One raw input: files of one format, and which of their columns mean what."""

    path: str
    """File, folder or glob (`*`, `?`, `[ab]`, `{a,b}`, `**`). A relative path is relative to the repository.
    Folders named `key=value` give a column `key`. `.gz`, `.bz2` and `.zst` are decompressed."""

    format: Literal["csv", "tsv", "jsonl", "parquet"] = "csv"
    """csv and tsv: text with a delimiter; jsonl: one JSON object a line."""

    columns: dict[str, str]
    """Role to column name. Events: `user`, `item`, `timestamp`, and where there are any `value`, `event` (its
    type), `label` and `split`. Items: `item`, `title`, `active_from`, `active_to`. Users: `user`. Fields name
    further columns themselves. `user_id` also finds a typed header's `user_id:token`."""

    delimiter: str | None = Field(None, min_length=1)
    """csv and tsv only, one character or several, such as `::`; default: comma and tab."""

    header: bool | Annotated[tuple[str, ...], Field(min_length=1)] = True
    """csv and tsv only. true: each file's first line names its columns; a list: the files have no such line,
    and these are their columns."""

    quote: str | None = Field(None, max_length=1)
    """csv and tsv only: the quote character; default: the double quote for csv, none for tsv."""

    encoding: str = "utf-8"
    """Of the text, by a name that Java and Python know, such as `latin-1`, `cp1252` or `utf-16-le`."""

    decimal: Literal[".", ","] = "."
    """csv and tsv only: the decimal sign of numbers, which are `value` and the columns of numeric fields."""

    timestamp_format: str = "seconds"
    """`seconds` or `milliseconds` since 1970, `iso` (2024-05-01T12:30:00Z, with or without a zone), or a
    Spark datetime pattern such as `dd/MM/yyyy HH:mm:ss`."""

    timezone: str = "UTC"
    """The zone of times that name none, such as `Europe/Berlin`. Everything is stored in UTC."""

    value_range: tuple[float | None, float | None] = (None, None)
    """Smallest and greatest value that is believed; null: no limit."""

    @model_validator(mode="after")
    def _known(self) -> "Source":
        wrong = []
        try:
            zoneinfo.ZoneInfo(self.timezone)
        except (zoneinfo.ZoneInfoNotFoundError, ValueError, OSError):
            wrong.append(f"timezone {self.timezone!r} is none, expected a name such as Europe/Berlin")
        try:
            codecs.lookup(self.encoding)
        except LookupError:
            wrong.append(f"encoding {self.encoding!r} is unknown, expected a name such as latin-1")
        if self.decimal != "." and self.format not in ("csv", "tsv"):
            wrong.append(f"decimal {self.decimal!r} is for csv and tsv, found format {self.format}")
        low, high = self.value_range
        if low is not None and high is not None and low > high:
            wrong.append(f"value_range {list(self.value_range)} is empty: the first is above the second")
        if wrong:
            raise _Several(wrong)
        return self


ROLES = {
    "events": ({"user", "item", "timestamp"}, {"value", "event", "label", "split"}),
    "items": ({"item"}, {"title", "active_from", "active_to"}),
    "users": ({"user"}, set[str]()),
}


class KCore(Section):
    """Events of users and items with fewer events are dropped, again and again until none is left."""

    user: int = Field(1, ge=1)
    """Least number of events of a user."""

    item: int = Field(1, ge=1)
    """Least number of events of an item."""


class Data(Section):
    """The raw logs."""

    events: Source | None = None
    """The interaction log, a row an event."""

    items: Source | None = None
    """Optional: a row an item."""

    users: Source | None = None
    """Optional: a row a user."""

    sample_users: float = Field(1.0, gt=0, le=1)
    """Share of the users to keep, chosen by a hash of the raw id: 0.1 tries everything on a tenth."""

    max_bad_rows: float = Field(0.01, ge=0, le=1)
    """featurize fails when more than this share of a source's rows is set aside. Rows of the future, which a
    back-dated night has, do not count."""

    k_core: KCore = KCore()
    """Default: nothing is dropped."""

    forget: str | None = None
    """Path or URI of a text file with a user id a line: their events are left out, and at the next full
    rebuild (featurize.py --rebuild) their ids too."""

    @model_validator(mode="after")
    def _roles(self) -> "Data":
        wrong = []
        for name, (needed, optional) in ROLES.items():
            source = getattr(self, name)
            if source is None:
                continue
            wrong += [f"{name}.columns has no {role!r}" for role in sorted(needed - set(source.columns))]
            for role in sorted(set(source.columns) - needed - optional):
                wrong.append(f"{name}.columns.{role}: unknown role{nearest(role, needed | optional)}")
        if wrong:
            raise _Several(wrong)
        return self


class Label(Section):
    """Which events count as positive."""

    kind: Literal["implicit", "rating", "column"] = "implicit"
    """`implicit`: positives from the log, negatives sampled by the trainer; `rating`: the value is what is
    predicted; `column`: the events' `label` column, 0 or 1 (true, false), such as a click."""

    positive_when: str | None = None
    """Spark SQL condition on `value`, `event`, `user`, `item` and `timestamp`; default: every event is
    positive. Not with `column`."""

    others: Literal["keep", "drop"] = "keep"
    """drop: events that are not positive are left out, as if they had not happened: no field and no split
    counts them, and no list leaves out their items."""

    weights: dict[str, Annotated[float, Field(ge=0)]] = {}
    """Event type to the value of such an event: {view: 1, cart: 3, purchase: 5}. Other types are set aside.
    Empty: the value is the `value` column, or 1."""


class Split(Section):
    """How the log is cut into train, valid and test."""

    kind: Literal["per_user_time", "global_time", "leave_last", "column"] = "per_user_time"
    """`per_user_time`: event p of a user's n (from 0, in time order, ties by item id) goes by (p + 0.5)/n.
    `global_time`: everything before a moment is train, before a second one valid, the rest test.
    `leave_last`: a user's last events are test, those before them valid.
    `column`: the events' `split` column says train, valid or test."""

    fractions: tuple[float, float, float] = (0.8, 0.1, 0.1)
    """per_user_time and global_time: shares of train, valid and test."""

    dates: tuple[dt.date, dt.date] | None = None
    """global_time: the first day of valid and of test, in place of fractions."""

    last: int = Field(1, ge=1)
    """leave_last: number of a user's events in test and in valid."""

    events: Literal["any", "positive"] = "any"
    """Which events fractions and `last` count. positive: the parts are those of a log of positive events
    alone, and every other event is in the part of the positive one that comes next, or in test."""

    @property
    def in_time(self) -> bool:
        """The parts follow one another in each user's time: only train events come before a train event."""
        return self.kind != "column"

    @model_validator(mode="after")
    def _fractions(self) -> "Split":
        if min(self.fractions) <= 0 or abs(sum(self.fractions) - 1) > 1e-9:
            raise ValueError(f"fractions must be positive and add up to 1, found {list(self.fractions)}")
        if self.events == "positive" and (self.kind == "column" or self.dates):
            by = "dates" if self.dates else "a column"
            raise ValueError(f"events=positive belongs to fractions and last; this split goes by {by}")
        if self.dates and self.kind != "global_time":
            raise ValueError(f"dates belong to kind global_time, found {self.kind}")
        if self.dates and self.dates[0] >= self.dates[1]:
            raise ValueError(
                f"dates: valid must begin before test, found {self.dates[0]} and {self.dates[1]}"
            )
        return self


Name = Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]*$")]


class Categorical(Section):
    """A column of ids or words, one or several a row."""

    kind: Literal["categorical"]
    name: Name
    side: Literal["user", "item", "context"]
    """The source it comes from: users, items, or the event itself."""
    column: str
    """Column of the source."""
    delimiter: str | None = Field(None, min_length=1)
    """Splits the column into several values."""
    list: bool = False
    """The column holds lists of values (jsonl and parquet)."""
    min_count: int = Field(1, ge=1)
    """Values that occur less often, in the train events or the table's rows, count as unknown."""
    hash_buckets: int | None = Field(None, ge=2)
    """For very many values: no vocabulary; a value's index is a hash of it."""
    pooling: Literal["mean", "sum"] = "mean"
    """How the embeddings of several values become one."""

    @model_validator(mode="after")
    def _one_way(self) -> "Categorical":
        if self.delimiter is not None and self.list:
            raise ValueError("a column has several values by its delimiter or as a list, not both")
        if self.hash_buckets and self.min_count > 1:
            raise ValueError("min_count needs a vocabulary, which hash_buckets does without")
        return self

    @property
    def several(self) -> bool:
        """More than one value a row."""
        return self.list or self.delimiter is not None


class Numeric(Section):
    """A column of numbers. Its statistics are fitted on the train part."""

    kind: Literal["numeric"]
    name: Name
    side: Literal["user", "item", "context"]
    """The source it comes from: users, items, or the event itself."""
    column: str
    """Column of the source."""
    impute: Literal["mean", "median"] | float = "mean"
    """What a missing value becomes, before `log` and `scale`."""
    indicator: bool = True
    """Adds the field `<name>_missing`: 1 where the value is missing, else 0."""
    log: bool = False
    """sign(x) log(1 + |x|) in place of x."""
    scale: Literal["none", "standardise", "min_max"] = "standardise"
    """To mean 0 and standard deviation 1, or from the least value (0) to the greatest (1)."""
    buckets: int | None = Field(None, ge=2, le=256)
    """In place of all that: an index by quantiles, into so many buckets; a missing value is unknown."""


class Time(Section):
    """A part of the event's time, in UTC, or the time since the user's event before."""

    kind: Literal["time"]
    name: Name
    side: Literal["context", "user"] | None = None
    """user for recency, else context; need not be given."""
    part: Literal["hour", "weekday", "recency"]
    """hour: 0 to 23; weekday: 0 (Monday) to 6; recency: time since the user's event before, as an index that
    grows by one as the hours double."""
    encoding: Literal["index", "cyclic"] = "index"
    """cyclic: two values, sine and cosine, in the fields `<name>_sin` and `<name>_cos`."""

    @model_validator(mode="after")
    def _side(self) -> "Time":
        right = "user" if self.part == "recency" else "context"
        if self.side not in (None, right):
            raise ValueError(f"time field {self.name}: {self.part} has side {right}, found {self.side}")
        if self.part == "recency" and self.encoding == "cyclic":
            raise ValueError(f"time field {self.name}: recency is not cyclic")
        return self


class History(Section):
    """The user's last items, or an attribute of them, strictly before the event."""

    kind: Literal["history"]
    name: Name
    side: Literal["user"] = "user"
    of: str = "item"
    """What is remembered of an event: its item, or a categorical field of the item, by name."""
    when: str = "positive"
    """Which events enter: `positive`, `any`, or an event type, such as `purchase`."""
    last: int = Field(20, ge=1, le=1000)
    """Number of events."""
    pooling: Literal["mean", "sum"] = "mean"
    """How the embeddings of several values become one."""


class Aggregate(Section):
    """A number that sums up earlier events: of the user before the event, or of the item before the day."""

    kind: Literal["aggregate"]
    name: Name
    side: Literal["user", "item"] = "user"
    """user: events strictly before the event; item: events of earlier days (UTC)."""
    measure: Literal["count", "mean_value", "days_since", "share", "age"]
    """count: number of events; mean_value: mean of their values; user only: days_since, days since the last
    one, and share, for each value of `attribute` its share of the events; item only: age, in days since the
    first event or active_from, as an index that grows by one as the days double."""
    when: str = "any"
    """Which events count: `positive`, `any`, or an event type."""
    days: int | None = Field(None, ge=1)
    """item only: of the last so many days; null: of all."""
    attribute: str | None = None
    """share only: a categorical field of the item, by name."""
    top: int = Field(32, ge=1, le=256)
    """share only: the most frequent values of the attribute, in the order of its vocabulary."""

    @model_validator(mode="after")
    def _fits(self) -> "Aggregate":
        other = {"user": {"age"}, "item": {"days_since", "share"}}[self.side]
        if self.measure in other:
            raise ValueError(f"aggregate {self.name}: measure {self.measure} is none of side {self.side}")
        if (self.measure == "share") != (self.attribute is not None):
            raise ValueError(f"aggregate {self.name}: measure share, and no other, needs an attribute")
        if self.days and (self.side == "user" or self.measure == "age"):
            raise ValueError(f"aggregate {self.name}: days are for count and mean_value of side item")
        return self


AnyField = Annotated[Categorical | Numeric | Time | History | Aggregate, Field(discriminator="kind")]


OF_FACTORS = ("implicit", "rank", "reg", "alpha", "iterations", "sample_weight")
"""Settings of ALS that decide what its inner products are like."""


class Als(Section):
    """Spark MLlib's ALS. Its names are MLlib's (spelled with underscores)."""

    implicit: bool = True
    """Implicit feedback (Hu, Koren, Volinsky 2008) on positives, or explicit values of all events."""
    rank: int = Field(64, ge=1)
    """Number of factors."""
    reg: float = Field(0.1, ge=0)
    """Regularisation; MLlib multiplies it by the number of the row's events (ALS-WR)."""
    alpha: float = Field(1.0, gt=0)
    """Confidence of an implicit event: 1 + alpha, with `sample_weight` 1 + alpha * its value."""
    sample_weight: Literal["value"] | None = None
    """value: an implicit event counts by its value, such as the weight of its type (label.weights); explicit
    ones always do."""
    iterations: int = Field(15, ge=1)
    """Alternating sweeps."""
    fit_on: Literal["train", "train_valid"] = "train"
    """The parts whose events the factors are fitted on. train_valid: figures on valid then mean nothing."""
    earlier: bool = False
    """Are factors fitted a second time that know nothing of the events on which the ranking model learns what
    pair fields of measure als (deepfm.pair) are worth? With fit_on train these are its late ones
    (recall.late), with train_valid those of valid."""
    grid: dict[
        Literal["implicit", "rank", "reg", "alpha", "iterations"],
        Annotated[tuple[bool | int | float, ...], Field(min_length=1)],
    ] = {}
    """Values to try by key, such as {rank: [64, 128], reg: [0.05, 0.2]}. Every combination is fitted on
    train, and the one with the best NDCG@10 on valid is taken."""

    @model_validator(mode="after")
    def _each_is_valid(self) -> "Als":
        self.points()
        return self

    def points(self) -> list["Als"]:
        """These settings with every combination of the grid's values, in order."""
        given = self.model_dump(exclude={"grid"})
        combined = itertools.product(*self.grid.values()) if self.grid else ()
        return [Als(**given | dict(zip(self.grid, values, strict=True))) for values in combined]


LinearModel = Literal["ease", "transitions"]
LINEAR: tuple[LinearModel, ...] = typing.get_args(LinearModel)
"""Linear models of items, see `Recall.linear`."""


class Recall(Section):
    """What items say of other items: how often one follows another in users' histories (`next_items`), and
    how alike their users are (`neighbors`), both made of each user's last events; how alike they are
    themselves (`content`); and how often they were had lately (`recent`)."""

    fit_on: Literal["train", "train_valid"] = "train"
    """The parts whose events are counted. train_valid: figures on valid then mean nothing."""
    events: Literal["positive", "any"] = "positive"
    """Which events are counted. The lists go by the user's positive ones."""
    max_events: int = Field(500, ge=2)
    """So many of a user's last events are counted at most."""
    window: int = Field(20, ge=1, le=200)
    """next_items: one item follows another where it is among the next so many events."""
    gap_decay: float = Field(0.3, ge=0, le=10)
    """next_items: the g-th event after an item counts g^-gap_decay."""
    damping: float = Field(0.2, ge=0, le=2)
    """next_items: a count is divided by (the following item's number of events)^damping."""
    item_damping: float = Field(0.7, ge=0, le=2)
    """next_items: and by (the number of events of the item that is followed)^item_damping."""
    next_items_recency: float = Field(4.0, gt=0)
    """next_items: an item of the user's history counts exp(-age / next_items_recency), where age is the
    number of later ones."""
    measures: Annotated[tuple[Literal["cosine", "jaccard", "pearson"], ...], Field(min_length=1)] = (
        "pearson",
    )
    """neighbors: the similarities that are stored; the source `neighbors` goes by the first."""
    neighbors_max_events: int = Field(100, ge=2)
    """neighbors: and so many here. The pairs of a user are their square, and a few users with very many
    events would outweigh the others."""
    shrinkage: float = Field(10.0, ge=0)
    """neighbors: a similarity that c users speak for is multiplied by c / (c + shrinkage)."""
    neighbors_recency: float = Field(3.0, gt=0)
    """neighbors: as next_items_recency."""
    recent_days: int = Field(30, ge=1)
    """recent: items are ranked by their number of events, of all parts, in the so many days before the
    list's."""
    content: Annotated[tuple[str, ...], Field(min_length=1)] | None = None
    """content: the categorical fields of side item that items are compared by; null: all there are."""
    content_recency: float = Field(10.0, gt=0)
    """content: as next_items_recency."""
    n: int = Field(200, ge=1)
    """So many others are stored of each item, those with the greatest weight."""
    linear: tuple[LinearModel, ...] = ()
    """Linear models of items that are fitted too, each of them a source and a measure of pair fields. ease:
    which items a user has, by the others that he has (of the events that neighbors counts); transitions:
    which item comes next, by those before it (of the last `window`)."""
    linear_items: int = Field(10_000, ge=2)
    """linear: the equations are solved on the driver, in some 40 bytes times the square of the number of
    items. A catalogue of more than so many is refused."""
    linear_n: int = Field(400, ge=1)
    """linear: so many others are stored of each item, those whose weight, which may be below 0, is farthest
    from 0."""
    ease_penalty: float = Field(300.0, gt=0)
    """ease: of the weights' squares."""
    ease_recency: float = Field(10.0, gt=0)
    """ease: as next_items_recency."""
    transitions_penalty: float = Field(500.0, gt=0)
    """transitions: of the weights' squares."""
    transitions_decay: float = Field(5.0, gt=0)
    """transitions: of the items of earlier moments before an event the one with g others in between counts
    exp(-g / transitions_decay)."""
    transitions_damping: float = Field(0.1, ge=0, le=2)
    """transitions: a weight is divided by (the following item's number of events)^transitions_damping."""
    transitions_recency: float = Field(5.0, gt=0)
    """transitions: as next_items_recency."""
    late: float = Field(0.0, ge=0, lt=1)
    """The last share of a user's train events (split.kind=global_time: of all train events) of which second
    tables know nothing; with fit_on train_valid there are also some that know nothing of valid. Beside these
    the ranking model learns what its pair fields (deepfm.pair) are worth. 0: there are none."""

    @model_validator(mode="after")
    def _measures(self) -> "Recall":
        for key, named in (("measures", self.measures), ("linear", self.linear)):
            if len(set(named)) < len(named):
                raise ValueError(f"{key} names one twice: {', '.join(named)}")
        return self


def _numbers(value: float | tuple[float, ...], below: float) -> float | tuple[float, ...]:
    numbers = value if isinstance(value, tuple) else (value,)
    if not numbers or not all(0 <= number < below for number in numbers):
        limit = "" if below == math.inf else f" and less than {below:g}"
        found = list(value) if isinstance(value, tuple) else f"{value:g}"
        raise ValueError(f"must be a number of 0 or more{limit}, or a list of one an epoch, found {found}")
    return value


Scheduled = Annotated[float | tuple[float, ...], AfterValidator(lambda value: _numbers(value, math.inf))]
"""A number, or one an epoch, of which the last holds on."""
ScheduledShare = Annotated[float | tuple[float, ...], AfterValidator(lambda value: _numbers(value, 1))]
"""The same, each below 1."""


def in_epoch(setting: Scheduled, epoch: int) -> float:
    """The number of an epoch, from 0."""
    return setting[min(epoch, len(setting) - 1)] if isinstance(setting, tuple) else setting


SINCE = ("since", "days_since")
"""Measures of pair fields that tell how long ago something was."""


class Pair(Section):
    """What a user's history says of an item: a number for each candidate, computed where it is needed."""

    name: Name
    """Of the model's field."""
    measure: Literal[
        "next_items", "neighbors", "ease", "transitions", "als", "content", "since", "days_since", "share"
    ]
    """next_items, neighbors: log(1 + the source's score / the mean weight of its table). ease, transitions
    (where recall.linear has them): the source's score / the mean size of a weight. als (with als.earlier):
    the inner product of the user's and the item's factors, 0 where one has none. content: the source's
    score, by the items' fields of recall.content. since: how recent the last item is that next_items has
    the item after, 1 / (1 + number of later ones), 0 where there is none; days_since: the same in time,
    1 / (1 + days from it to the start of the list's day). share: the share of the history's items that have
    the item's value of `attribute`, of several values the mean."""
    recency: float | None = Field(None, gt=0)
    """Not of als, since, days_since and share: an item of the history counts exp(-age / recency). Default:
    as in recall."""
    rank: bool = False
    """Not of since, days_since and share: in place of the score the log of the item's rank by it among all
    items, from 1; of equal scores that of the first."""
    attribute: str | None = None
    """share only: a categorical field of the items, by name."""

    @model_validator(mode="after")
    def _fits(self) -> "Pair":
        if (self.measure == "share") != (self.attribute is not None):
            raise ValueError(f"pair {self.name}: measure share, and no other, needs an attribute")
        for key, none in (("recency", ("als", *SINCE, "share")), ("rank", (*SINCE, "share"))):
            if getattr(self, key) and self.measure in none:
                raise ValueError(f"pair {self.name}: measure {self.measure} has no {key}")
        return self


BY_COLUMNS = ("column_wise", "table_column_wise", "grid_shard")
"""Values of `deepfm.sharding` that cut a table's columns."""
FIT_ON = {"train": ("train",), "train_valid": ("train", "valid")}
"""Values of `fit_on` to parts of the examples."""


class DeepFM(Section):
    """The ranking model and its training. A number that may change from epoch to epoch is one, or a list of
    one for each, of which the last holds on."""

    model: Literal["lr", "fm", "mf", "dnn", "deepfm"] = "deepfm"
    """What the logit is a sum of. `lr`: the fields' weights; `fm`: those and the products of all pairs of
    embeddings; `mf`: the same of the fields user and item alone; `dnn`: an MLP over the embeddings;
    `deepfm`: `fm` and `dnn` over the same embeddings."""
    start_from: str | None = None
    """Run id of an earlier deepfm run, or `latest`, to start from: a trained `fm`, or last night's model.
    What means the same is taken over, rows of a vocabulary that has grown since are new."""
    leave_out: tuple[str, ...] = ()
    """Fields that the model does without. Without `user` it goes by what it knows of a user, and is the same
    for a new one."""
    embedding_dim: int = Field(16, ge=4, multiple_of=4)
    """Factors of a field; a multiple of 4, which the fused kernels need."""
    hidden: tuple[Annotated[int, Field(ge=1)], ...] = Field((256, 128), min_length=1)
    """Widths of the MLP's layers."""
    dropout: ScheduledShare = 0.0
    """After every hidden layer: the share that is left out. May change from epoch to epoch."""
    batch_norm: bool = False
    """Batch normalisation in every hidden layer, before its ReLU, over the rows of all workers."""
    convolution: tuple[Annotated[int, Field(ge=1)], ...] = ()
    """Channels of the convolutions over each side's stacked field embeddings, whose result the MLP reads
    beside these. Each is followed by tanh and by pooling to half of the fields."""
    convolution_reach: int = Field(3, ge=1)
    """Neighbouring fields that a convolution sees; odd."""
    recency: dict[str, Annotated[float, Field(gt=0)]] = {}
    """History field to a number of items: in the field's mean, an item that so many came after counts 1/e. Of
    a history of an attribute with several values, the values take the items' place."""
    attention: dict[str, Annotated[float, Field(gt=0)]] = {}
    """The same of histories of items, which the MLP also reads weighted by the candidate item."""
    encoder: dict[str, Annotated[int, Field(ge=1)]] = {}
    """History of items to the number of blocks of a transformer that reads it, in its order, in place of its
    mean. A block sees of each item the latest before it, together no more than the history has."""
    encoder_heads: int = Field(2, ge=1)
    """Heads of a block's attention; a divisor of embedding_dim."""
    encoder_dropout: float = Field(0.2, ge=0, lt=1)
    """The share of inputs and of a block's results that is left out in training."""
    encoder_run: int = Field(32, ge=1)
    """With an encoder so many examples, one after the other in their file, stay together when the others are
    shuffled: what their histories have in common is encoded once."""
    pair: tuple[Pair, ...] = ()
    """What the user's longest history of liked items says of the item, by the tables of a recall run
    (`recall.late` above 0), or ALS' factors of both (`als.earlier`), beside a model that ranks (`negatives`
    of 1 or more). An MLP of them and of the logit is added to the logit. It is learned on lists of events
    that tables and model do not know: with `fit_on` train_valid those of valid, else the late ones of train.
    With `start_from` it is taken over."""
    pair_hidden: tuple[Annotated[int, Field(ge=1)], ...] = Field((64, 32), min_length=1)
    """Widths of that MLP's layers."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """bfloat16: MLP and encoder are computed in it where the processor or GPU has it, else in float32;
    weights, tables and the factorisation machine stay float32."""
    batch_size: int = Field(4096, ge=1)
    """Examples a step at most, over all workers together; positives, where items are drawn. Rounded down to a
    multiple of `streams`, because a step takes equally many of each; below `streams` there are fewer streams.
    An epoch's steps are of equal size, and so may have fewer."""
    streams: int = Field(12, ge=1)
    """Parts of an epoch that are read side by side, each shuffled on its own; a step takes the next rows of
    all. The workers share them, so there are at least as many, and what a step consists of does not depend on
    the number of workers."""
    cache_megabytes: int = Field(1024, ge=0)
    """Examples that each worker keeps in memory from one epoch to the next."""
    sample_weight: Literal["value"] | None = None
    """value: an example's loss counts by its value (the weight of its event type, a play count), divided by
    the mean value."""
    negatives: int = Field(16, ge=0)
    """Items drawn for each positive. 0: nothing is drawn, and every example, positive or not, is learned with
    its own label (objective logistic) or value (squared)."""
    negatives_power: float = Field(0.0, ge=0, le=1)
    """Items are drawn with probability proportional to (1 + train positives)^power; 0 is uniform."""
    negatives_from: Literal["catalogue", "batch"] = "catalogue"
    """batch: the items drawn for a positive are other positives of its stream in the same step, whatever
    `negatives_power` says."""
    negatives_shared: bool = False
    """The items are drawn once a step for all its examples, which costs little, so that they may be hundreds
    or, in small catalogues, all: with `negatives` of at least the number of items the softmax is exact. For
    objective softmax, and item fields that do not change from day to day (see `leave_out`)."""
    negatives_outside_history: bool = False
    """No item is drawn for an example that is in its longest history of items."""
    objective: Literal["logistic", "softmax", "bpr", "squared"] = "softmax"
    """`logistic`: each positive and each drawn item on its own, or each example's label; `softmax`: the
    positive against the drawn items, corrected for how often each is drawn (logQ); `bpr`: the positive above
    each drawn item; `squared`: the distance to each example's value."""
    label_smoothing: float = Field(0.0, ge=0, lt=1)
    """logistic: labels are moved towards one half by so much."""
    fit_on: Literal["train", "train_valid"] = "train"
    """train_valid: fitted anew on both parts, for as many epochs as were best on valid when fitted on train;
    that model is published."""
    epochs: int = Field(20, ge=1)
    """At most so many passes over the examples."""
    patience: int = Field(3, ge=1)
    """Stop after so many evaluations on the valid part without a better metric: NDCG@10; without drawn items
    AUC, or RMSE of values."""
    valid_users: int = Field(2000, ge=1)
    """Size of the fixed sample of users that validation ranks all items for."""
    learning_rate: float = Field(1e-3, gt=0)
    """Of the dense part."""
    embedding_learning_rate: float = Field(0.05, gt=0)
    """Of the tables."""
    dense_optimizer: Literal["adamw", "adam", "adagrad"] = "adamw"
    """Of all that is not in a table."""
    table_optimizer: Literal["rowwise_adagrad", "adagrad", "sgd"] = "rowwise_adagrad"
    """Of the tables, within the backward pass. rowwise_adagrad keeps a number a row, adagrad one a weight."""
    warmup_steps: int = Field(0, ge=0)
    """Over the first so many steps both learning rates grow from 0 to their values."""
    schedule: Literal["constant", "cosine", "plateau"] = "constant"
    """Of both learning rates. cosine: falls to 0 at the end of the last epoch; plateau: is multiplied by
    `plateau_factor` after every evaluation that is not better than all before."""
    plateau_factor: float = Field(0.5, gt=0, lt=1)
    """See schedule."""
    clip_norm: float | None = Field(None, gt=0)
    """Greatest norm of the dense part's gradient: a longer one is scaled down to it."""
    init_scale: float = Field(0.01, gt=0)
    """Standard deviation of the initial embeddings."""
    weight_decay: Scheduled = 0.0
    """L2 of the dense part: decoupled with adamw, else in the gradient. May change from epoch to epoch."""
    l1: Scheduled = 0.0
    """L1 of the dense part, in the gradient: l1 * sign(w). May change from epoch to epoch."""
    embedding_weight_decay: Scheduled = 0.0
    """Of the tables, decoupled: before every step each weight is multiplied by 1 - embedding learning rate *
    this, those that are not looked up as well. May change from epoch to epoch."""
    sharding: dict[
        str,
        Literal[
            "row_wise",
            "table_wise",
            "data_parallel",
            "column_wise",
            "table_column_wise",
            "table_row_wise",
            "grid_shard",
        ],
    ] = {}
    """Field to how its table is split, where TorchRec's planner is not to decide: by rows over all workers,
    whole on one, whole on every one; by columns over all workers, or over those of one node, which
    table_optimizer rowwise_adagrad cannot; with GPUs also by rows over those of one node, and by both. Parts
    of the columns are of equal width, a multiple of 4; there are embedding_dim + 4."""
    num_workers: int | tuple[int, int] = 2
    """Ray Train workers: processes on CPU; where there are GPUs one each, and no more than there are. A pair
    [least, most]: as many as the cluster has room for, fewer after it has lost a node, more after it has got
    one."""
    resize_seconds: float = Field(60.0, ge=0)
    """Between two looks for room for more workers, where num_workers is a pair; to take them up costs the
    steps since the last checkpoint."""
    checkpoint_every_steps: int = Field(1000, ge=1)
    """Whatever dies, at most so many steps are lost: a checkpoint is begun after every half of them, and
    written while the next half is trained."""
    checkpoint_every_minutes: float | None = Field(None, gt=0)
    """A checkpoint also where the last one was begun so many minutes ago; with embedding_weight_decay at the
    next multiple of 500 steps."""
    checkpoints_kept: int = Field(2, ge=1)
    """The newest so many checkpoints are kept, beside the best."""
    max_failures: int = Field(3, ge=0)
    """How often the training is restarted from its last checkpoint."""

    @model_validator(mode="after")
    def _objective(self) -> "DeepFM":
        drawn = self.negatives > 0
        if self.objective in ("softmax", "bpr") and not drawn:
            raise ValueError(f"objective {self.objective} needs drawn items: negatives of 1 or more")
        if self.objective == "squared" and drawn:
            raise ValueError(f"objective squared learns values: negatives must be 0, found {self.negatives}")
        if self.negatives_shared and (self.objective != "softmax" or self.negatives_from != "catalogue"):
            raise ValueError(
                f"negatives_shared is for objective softmax and negatives_from catalogue, found "
                f"{self.objective} and {self.negatives_from}"
            )
        if self.label_smoothing and self.objective != "logistic":
            raise ValueError(f"label_smoothing belongs to objective logistic, found {self.objective}")
        if self.pair and not drawn:
            raise ValueError("pair is for models that rank: negatives of 1 or more")
        if self.schedule == "plateau" and (self.fit_on == "train_valid" or self.pair):
            raise ValueError(
                "schedule plateau goes by valid, which the second fit that fit_on train_valid or pair fields "
                "ask for does not have"
            )
        return self

    @model_validator(mode="after")
    def _strategies(self) -> "DeepFM":
        decay = self.embedding_weight_decay
        greatest = max(decay if isinstance(decay, tuple) else (decay,))
        if self.embedding_learning_rate * greatest >= 1:
            raise ValueError(
                f"embedding_learning_rate * embedding_weight_decay must be below 1, found "
                f"{self.embedding_learning_rate} * {greatest}"
            )
        cut = [name for name, kind in self.sharding.items() if kind in BY_COLUMNS]
        if cut and self.table_optimizer == "rowwise_adagrad":
            raise ValueError(
                f"sharding: {', '.join(cut)} by columns needs table_optimizer adagrad or sgd: of the number "
                f"a row that rowwise_adagrad keeps, each part of the columns would have another"
            )
        if self.convolution_reach % 2 == 0:
            raise ValueError(f"convolution_reach must be odd, found {self.convolution_reach}")
        for name in ("batch_norm", "convolution", "attention"):
            if getattr(self, name) and self.model not in ("dnn", "deepfm"):
                raise ValueError(f"{name} belongs to the MLP, which model {self.model} does not have")
        if self.encoder and self.model in ("lr", "mf"):
            raise ValueError(
                f"encoder belongs to embeddings of histories, which model {self.model} does not have"
            )
        if self.encoder and self.embedding_dim % self.encoder_heads:
            raise ValueError(
                f"encoder_heads must be a divisor of embedding_dim, which is {self.embedding_dim}, found "
                f"{self.encoder_heads}"
            )
        read = [*self.recency, *self.attention, *self.encoder]
        strange = sorted({name for name in read if read.count(name) > 1})
        if strange:
            raise ValueError(
                f"a history has one of recency, attention, encoder: {', '.join(strange)} has two"
            )
        return self

    @model_validator(mode="after")
    def _workers(self) -> "DeepFM":
        least, most = self.workers
        if not 1 <= least <= most:
            raise ValueError(
                f"num_workers must be [least, most], 1 <= least <= most, found [{least}, {most}]"
            )
        if most > self.streams:
            raise ValueError(
                f"num_workers {most} needs as many streams of examples: set streams, which is "
                f"{self.streams}, to a multiple of it"
            )
        return self

    @property
    def workers(self) -> tuple[int, int]:
        """The least and the greatest number of workers."""
        return (self.num_workers, self.num_workers) if isinstance(self.num_workers, int) else self.num_workers

    @property
    def metric(self) -> str:
        """The figure of the valid part that decides when training stops and which model is best."""
        if self.negatives:
            return "ndcg@10"
        return "rmse" if self.objective == "squared" else "auc"


class Distribution(Section):
    """Which values of a setting are tried: exactly one of these. The names are Ray Tune's."""

    choice: tuple[Any, ...] | None = Field(None, min_length=1)
    """One of these values."""
    uniform: tuple[float, float] | None = None
    """A number between these two."""
    loguniform: tuple[Annotated[float, Field(gt=0)], float] | None = None
    """A number between these two, every order of magnitude as likely as another."""
    randint: tuple[int, int] | None = None
    """A whole number from the first to before the second."""

    @property
    def kind(self) -> str:
        """The name of the one that is given."""
        return next(iter(self.model_dump(exclude_none=True)))

    @model_validator(mode="after")
    def _one(self) -> "Distribution":
        given = self.model_dump(exclude_none=True)
        if len(given) != 1:
            names = ", ".join(type(self).model_fields)
            raise ValueError(f"expected one of {names}, found {' and '.join(given) or 'none'}")
        values = given[self.kind]
        if self.kind != "choice" and values[0] >= values[1]:
            raise ValueError(f"{self.kind} {list(values)} is empty: the first must be below the second")
        return self


Compared = Literal[
    "popularity",
    "cosine",
    "jaccard",
    "pearson",
    "next_items",
    "ease",
    "transitions",
    "als_explicit",
    "als",
    "mf",
    "fm",
    "dnn",
    "deepfm",
    "two_stage",
]


class Compare(Section):
    """Which models `jobs/compare.py` holds against each other."""

    models: Annotated[tuple[Compared, ...], Field(min_length=1)] = typing.get_args(Compared)
    """In the order of the table. cosine, jaccard, pearson: item neighbours by these; mf to deepfm rank all
    items; two_stage: DeepFM with pair fields on the candidates of score.candidates."""
    settings: dict[Compared, tuple[str, ...]] = {}
    """By model: overrides that only it is trained with, such as [deepfm.embedding_dim=32]."""
    root: str | None = None
    """URI or path under which the runs live; default: `storage.root` followed by `-comparison`."""


class Tune(Section):
    """The search for better settings of the ranking model, by Ray Tune with ASHA (Li et al. 2020)."""

    space: dict[str, Distribution] = {}
    """Key of deepfm to the values that are tried. A conf file's or --set's own mapping replaces this."""
    trials: int = Field(20, ge=1)
    """Trainings, each with other settings; fewer where the space has no more."""
    concurrent: int = Field(2, ge=1)
    """Trials at the same time, each a process on its share of the cores, or on a GPU where there are GPUs."""
    grace_epochs: int = Field(2, ge=1)
    """No trial is stopped for being worse than others before so many epochs."""
    reduction_factor: int = Field(3, ge=2)
    """A trial goes on after `grace_epochs`, and again after each time as many epochs as before times this
    number, only while it is in the best 1/`reduction_factor` of those that have come so far."""
    root: str | None = None
    """URI or path under which the searches' runs live; default: `storage.root` followed by `-experiments`."""

    @model_validator(mode="after")
    def _space(self) -> "Tune":
        fixed = {
            "pair",
            "fit_on",
            "valid_users",
            "sharding",
            "num_workers",
            "max_failures",
            "streams",
            "resize_seconds",
        }
        fixed |= {"checkpoint_every_steps", "checkpoint_every_minutes", "checkpoints_kept", "cache_megabytes"}
        searched = set(DeepFM.model_fields) - fixed
        wrong = []
        for key, distribution in self.space.items():
            if key not in searched:
                what = "is not to be searched" if key in fixed else "is no key of deepfm"
                wrong.append(f"space.{key} {what}{nearest(key, searched)}")
                continue
            values = getattr(distribution, distribution.kind)
            if distribution.kind == "randint":
                values = (values[0], values[1] - 1)
            for value in values:
                try:
                    DeepFM.model_validate({key: value})
                except ValidationError as error:
                    # What only another key makes wrong has no place.
                    found = [dict(of) for of in error.errors() if of["loc"]]
                    wrong += [f"space.{line}" for of in found for line in _describe(of)]
        if wrong:
            raise ValueError("; ".join(wrong))
        return self


class Rules(Section):
    """What a published list must obey besides its scores. Evaluations measure the models without these."""

    allow: str | None = None
    """A file of raw item ids, one a line: no other item is listed."""
    deny: str | None = None
    """A file of raw item ids, one a line, that are never listed."""
    at_most: dict[str, Annotated[int, Field(ge=1)]] = {}
    """A categorical field of the items to how many of a list's items may share a value of it: `{genres: 3}`.
    Items without a value are not counted."""
    diversity: float = Field(0.0, ge=0, lt=1)
    """How much of a place's worth is being unlike the items above it, by the cosine of the model's item
    vectors; 0: the scores alone."""
    least_score: float | None = None
    """A floor: what scores less is not listed, and lists may end early."""
    explore: int = Field(0, ge=0)
    """The last so many places of a list are drawn from the other candidates. The published column
    `propensity` holds the probability of what was drawn."""
    temperature: float | None = Field(None, gt=0)
    """What is drawn has a probability proportional to exp(score / temperature); null: all are equal."""


class Gates(Section):
    """What lists must be like to be published; where they are not, the table keeps what it has."""

    served: float = Field(0.95, ge=0, le=1)
    """Least share of the active users, those with an event, who have a list; of all where nobody has one."""
    full: float = Field(0.99, ge=0, le=1)
    """Least share of the lists that have `k` entries, or all that the user may get where those are fewer. A
    floor for the score (score.rules.least_score) and score.rules.at_most make lists shorter: set it lower."""
    coverage: float = Field(0.0, ge=0, le=1)
    """Least share of the items that may be listed on the date that are in a list; not of score.users."""


class Proposals(Section):
    """What a recall source proposes."""

    quota: int = Field(ge=1)
    """Number of items a user."""
    weight: float = Field(1.0, gt=0)
    """How much the source counts where `score.most` has to leave some out."""


class Score(Section):
    """The published lists."""

    k: int = Field(10, ge=1)
    """Length of a list."""
    date: dt.date | None = None
    """The day the lists are for: all events before it are known. Default: the day after the last event."""
    filter_seen: Literal["all", "positives", "none"] = "all"
    """Which of the user's items are left out."""
    mode: Literal["two_stage", "exhaustive"] = "two_stage"
    """two_stage: the model ranks `candidates`; exhaustive: all items, which is not for a model with pair
    fields (deepfm.pair). `rules` then choose from its best ones, as many as `candidates` may propose in
    all."""
    candidates: Annotated[
        dict[
            Literal[
                "als",
                "next_items",
                "neighbors",
                "ease",
                "transitions",
                "fm",
                "popularity",
                "recent",
                "content",
            ],
            Annotated[Proposals, BeforeValidator(lambda v: {"quota": v} if isinstance(v, int) else v)],
        ],
        Field(min_length=1),
    ] = {
        "als": Proposals(quota=200),
        "next_items": Proposals(quota=200),
        "fm": Proposals(quota=200),
        "popularity": Proposals(quota=50),
    }
    """Recall source to the number of items it proposes a user, or to `{quota: 200, weight: 2}`; the weight is
    1 if not given. A conf file's own mapping replaces this."""
    most: int | None = Field(None, ge=1)
    """Only so many candidates of a user are ranked: those with the greatest sum of weight / (60 + rank) over
    the sources that propose them. null: all."""
    partition_users: int = Field(2000, ge=1)
    """Users a task scores at a time."""
    users_megabytes: int = Field(1024, ge=0)
    """A table of all users, factors or embeddings, is held by every worker up to this size. Of a larger one
    the rows are read that a task's users have."""
    users: str | None = None
    """Path or URI of a text file with a user id a line: only their lists are made, and take the place of
    those that they have for the date; everybody else's stay. Default: all users."""
    gates: Gates = Gates()
    """Checked before the lists are published."""
    rules: Rules = Rules()
    """What a list must obey besides its scores."""

    @property
    def published(self) -> Literal["two_stage", "deepfm"]:
        """The model whose lists are published, by its name in metrics.json."""
        return "deepfm" if self.mode == "exhaustive" else "two_stage"

    @model_validator(mode="after")
    def _explore(self) -> "Score":
        if self.rules.explore > self.k:
            raise ValueError(
                f"rules.explore={self.rules.explore} is more than the k={self.k} places of a list"
            )
        return self


class Evaluation(Section):
    """How models are compared."""

    k: tuple[Annotated[int, Field(ge=1, le=1000)], ...] = (10, 20)
    """List lengths."""
    spark_rows: int = Field(100_000_000, ge=1)
    """From so many places in lists on (models x users x the greatest length) Spark measures the lists, with
    the same results to the last digit."""
    bootstrap: int = Field(1000, ge=100)
    """Resamplings of the users for the 95% intervals."""
    head_share: float = Field(0.5, gt=0, lt=1)
    """Models are also measured on the head of the items, which are the fewest most popular ones that have
    this share of the positive train events, and on the tail, which are all others."""
    metric: str = "ndcg@10"
    """The metric that decides whether a model may be published."""
    must_beat: Literal["popularity", "als"] | None = "popularity"
    """The lists (of `score.mode`) are published only when they are better than this model's on that metric;
    null: always."""
    may_fall: dict[str, Annotated[float, Field(ge=0)]] = {}
    """By how much metrics of the lists may be less than in the evaluation of the lists that were published
    last, beyond what may be chance, such as {ndcg@10: 0.005}: where one fell by more, the night ends (exit
    code 65)."""

    @model_validator(mode="after")
    def _metric(self) -> "Evaluation":
        name, _, k = self.metric.rpartition("@")
        if not name or k not in {str(length) for length in self.k}:
            lengths = ", ".join(f"{name or 'ndcg'}@{length}" for length in self.k)
            raise ValueError(f"metric {self.metric!r} is not computed: k={list(self.k)} allows {lengths}")
        return self


BATCH_JVM = (
    # A batch has no use for short pauses of the garbage collector.
    "-XX:+UseParallelGC",
    # All memory that Spark is given from the start: to grow takes full collections of what is cached.
    "-XX:InitialRAMPercentage=100",
    # As much room as Spark's classes take; to grow step by step takes a full collection each.
    "-XX:MetaspaceSize=256m",
    # Most of a small night's time is Spark's code being compiled. What is compiled for the second time, with
    # all optimisations, has to be used four times as often as Java's defaults ask: a third of the
    # processor's time is saved, and what runs for long is compiled all the same.
    "-XX:Tier4InvocationThreshold=20000",
    "-XX:Tier4MinInvocationThreshold=2400",
    "-XX:Tier4CompileThreshold=60000",
    "-XX:Tier4BackEdgeThreshold=160000",
    # Nor is it worth that for what compiles, parses and ships the queries: all that a night has of them.
    "-XX:CompileCommand=quiet",
    *(
        f"-XX:CompileCommand=CompileThresholdScaling,{classes}.*,20.0"
        for classes in (
            "org/codehaus/*",
            "org/antlr/*",
            "org/apache/spark/sql/catalyst/trees/*",
            "org/apache/spark/sql/catalyst/parser/*",
            "java/io/Object*",
        )
    ),
)
"""Java options of Spark's driver, which is also where tasks run on one machine."""


class Spark(Section):
    """How nightly starts the Spark stages."""

    submit: tuple[str, ...] = ("--master", "local[*]", "--driver-memory", "2g")
    """Arguments of spark-submit. Those given here win over `BATCH_JVM`."""
    conf: dict[str, str] = {}
    """Spark properties, set by the jobs themselves."""

    @property
    def arguments(self) -> tuple[str, ...]:
        """What spark-submit is started with."""
        return ("--driver-java-options", " ".join(BATCH_JVM), *self.submit)


class MLflow(Section):
    """Where a training is told of besides its run. Needs the packages of `recsys_dist[mlflow]`."""

    tracking_uri: str | None = None
    """Of an MLflow server (`http://host:5000`), or a file (`sqlite:////shared/mlflow.db`); null: nowhere."""
    experiment: str = "recsys_dist"
    """The experiment that a training becomes a run of."""


class Config(Section):
    """All settings of all stages."""

    seed: int = Field(42, ge=0)
    """Seed of everything that draws numbers."""
    storage: Storage = Storage()
    data: Data = Data()
    label: Label = Label()
    split: Split = Split()
    fields: tuple[AnyField, ...] = ()
    """The model's fields besides the ids of user and item, which are always there."""
    als: Als = Als()
    recall: Recall = Recall()
    deepfm: DeepFM = DeepFM()
    mlflow: MLflow = MLflow()
    tune: Tune = Tune()
    compare: Compare = Compare()
    score: Score = Score()
    evaluation: Evaluation = Evaluation()
    spark: Spark = Spark()

    @model_validator(mode="after")
    def _consistent(self, info: ValidationInfo) -> "Config":
        broken = info.context or set()
        wrong = [text for places, text in (*self._names(), *self._references()) if not broken & set(places)]
        if wrong:
            raise _Several(wrong)
        return self

    def _names(self) -> Iterator[tuple[tuple[str, ...], str]]:
        """As `_references`, of the fields' names."""
        taken = ["user", "item", "timestamp", "value", "label", "event", "split", "as_of", "day"]
        taken += [
            "user_id",
            "item_id",
            "title",
            "count",
            "seen",
            "liked",
            "latest",
            "latest_age",
            "present",
            "active_from",
            "active_to",
        ]
        names = list(taken)
        for field in self.fields:
            names.append(field.name)
            if isinstance(field, Numeric) and field.indicator and not field.buckets:
                names.append(f"{field.name}_missing")
            if isinstance(field, Time) and field.encoding == "cyclic":
                names += [f"{field.name}_sin", f"{field.name}_cos"]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            yield (), f"fields: names used twice or reserved: {', '.join(twice)}"

    def _references(self) -> Iterator[tuple[tuple[str, ...], str]]:
        """What does not go together; before it the other places, sections or `fields.<name>`, that have to be
        right for this to be known.
        """
        attributes = {f.name for f in self.fields if isinstance(f, Categorical) and f.side == "item"}
        hashes = {f.name for f in self.fields if isinstance(f, Categorical) and f.hash_buckets}
        for field in self.fields:
            named = getattr(field, "attribute", None)
            if isinstance(field, History) and field.of != "item":
                named = field.of
            if isinstance(field, Aggregate) and named in hashes:
                yield (), f"fields {field.name}: {named!r} is hashed, and a share needs a vocabulary"
            if named is not None and named not in attributes:
                near = nearest(named, attributes) if attributes else ""
                text = f"fields {field.name}: {named!r} is no categorical field of side item{near}"
                yield (f"fields.{named}",), text
        columns = self.data.events.columns if self.data.events else None
        if columns is not None:
            for field in self.fields:
                when = getattr(field, "when", "any")
                if when in ("positive", "any"):
                    continue
                if "event" not in columns:
                    yield ("data",), f"fields {field.name}: when {when!r} needs data.events.columns.event"
                elif self.label.weights and when not in self.label.weights:
                    near = nearest(when, [*self.label.weights, "positive", "any"])
                    text = f"fields {field.name}: when {when!r} is no event type of label.weights{near}"
                    yield ("data", "label"), text
            if self.label.weights and ("event" not in columns or "value" in columns):
                text = "label.weights needs data.events.columns.event, and no column value"
                yield ("data", "label"), text
            if self.label.kind == "rating" and "value" not in columns:
                yield ("data", "label"), "label.kind=rating needs data.events.columns.value"
            if (self.label.kind == "column") != ("label" in columns):
                text = "label.kind=column, and no other, needs data.events.columns.label"
                yield ("data", "label"), text
            if (self.split.kind == "column") != ("split" in columns):
                text = "split.kind=column, and no other, needs data.events.columns.split"
                yield ("data", "split"), text
        if self.als.earlier and self.als.fit_on == "train" and not self.recall.late:
            yield ("als", "recall"), "als.earlier needs late events, for example recall.late=0.2"
        for text in self._pairs(attributes):
            yield ("deepfm", "als", "recall", "fields", "score"), text
        if self.deepfm.model == "dnn" and "fm" in self.score.candidates:
            text = (
                "deepfm.model=dnn has no FM part to recall with: leave fm out of score.candidates, "
                "for example candidates: {als: 200, next_items: 200, popularity: 50}"
            )
            yield ("deepfm", "score"), text
        for name in self.recall.content or ():
            if name not in attributes:
                near = nearest(name, attributes) if attributes else ""
                text = f"recall.content: {name!r} is no categorical field of side item{near}"
                yield ("recall", "fields"), text
        unfitted = [
            name for name in LINEAR if name in self.score.candidates and name not in self.recall.linear
        ]
        if unfitted:
            text = f"score.candidates: {', '.join(unfitted)} needs recall.linear={unfitted}"
            yield ("score", "recall"), text.replace("'", "")
        if "content" in self.score.candidates and not attributes:
            text = "score.candidates: content goes by categorical fields of side item, and fields has none"
            yield ("score", "fields"), text
        if self.label.kind == "column" and self.label.positive_when:
            text = "label.kind=column: the column says what is positive, leave positive_when out"
            yield ("label",), text

    def _pairs(self, attributes: set[str]) -> list[str]:
        """What is wrong with deepfm.pair."""
        wrong = []
        pairs = self.deepfm.pair
        names = [field.name for field in (*self.fields, *pairs)]
        twice = sorted(
            {pair.name for pair in pairs if names.count(pair.name) > 1 or pair.name in ("user", "item")}
        )
        if twice:
            wrong.append(f"deepfm.pair: names used twice: {', '.join(twice)}")
        wrong += [
            f"deepfm.pair {pair.name}: {pair.attribute!r} is no categorical field of side item"
            f"{nearest(pair.attribute, attributes) if attributes else ''}"
            for pair in pairs
            if pair.attribute is not None and pair.attribute not in attributes
        ]
        if pairs and self.score.mode == "exhaustive":
            wrong.append(
                "score.mode=exhaustive is for models without pair fields: leave deepfm.pair out, or set "
                "score.mode to two_stage"
            )
        if pairs and self.deepfm.model == "mf":
            wrong.append("deepfm.pair: model mf has no histories that the pairs could be of")
        wrong += [
            f"deepfm.pair {pair.name}: measure {pair.measure} needs recall.linear=[{pair.measure}]"
            for pair in pairs
            if pair.measure in LINEAR and pair.measure not in self.recall.linear
        ]
        of_als = [pair.name for pair in pairs if pair.measure == "als"]
        if of_als and not (self.als.earlier and self.als.fit_on == self.deepfm.fit_on):
            wrong.append(
                f"deepfm.pair {of_als[0]}: measure als needs als.earlier=true, and als.fit_on="
                f"{self.deepfm.fit_on} as deepfm.fit_on is, found {str(self.als.earlier).lower()} and "
                f"{self.als.fit_on}"
            )
        wrong += [
            f"deepfm.pair {pair.name}: measure content needs a categorical field of side item"
            for pair in pairs
            if pair.measure == "content" and not attributes
        ]
        if pairs and not self.recall.late:
            wrong.append("deepfm.pair needs events that the tables do not know, for example recall.late=0.2")
        liked = [f for f in self.fields if isinstance(f, History) and f.of == "item" and f.when == "positive"]
        if pairs and not liked:
            wrong.append(
                "deepfm.pair needs a history of liked items: add "
                "{name: recent, kind: history, of: item, when: positive, last: 20} to fields"
            )
        return wrong

    def section(self, path: str) -> Any:
        """The resolved value at a dotted path, as JSON types."""
        value: Any = self.model_dump(mode="json")
        for key in path.split("."):
            value = value[key]
        return value

    def with_deepfm(self, settings: dict[str, Any]) -> "Config":
        """The same with other values of these keys of deepfm, whole ones where they are mappings.

        Raises:
            ConfigError: they do not go together.
        """
        try:
            told = self.model_dump()
            return Config.model_validate(told | {"deepfm": told["deepfm"] | settings})
        except ValidationError as error:
            raise ConfigError("; ".join(_described(error))) from None


def load(conf: str | Path | None = None, overrides: Sequence[str] = ()) -> Config:
    """Read the configuration: default.yaml, then `conf`, then `overrides`, later ones winning.

    Mappings are merged, lists, `score.candidates` and `tune.space` replaced.

    Args:
        conf: path or URI of a YAML file; a relative path is looked up from the working directory, then
            from the repository. None: the defaults alone.
        overrides: `section.key=value`, the value in YAML.

    Raises:
        ConfigError: names every wrong key or value at once, with the nearest valid key.
    """
    config, lines = _validated(merge(_read(DEFAULT_CONF), asked(conf, overrides)))
    if config is None or lines:
        also = f" with {' '.join('--set ' + o for o in overrides)}" if overrides else ""
        where = DEFAULT_CONF if conf is None else conf
        raise ConfigError(f"{len(lines)} wrong in {where}{also}:\n  " + "\n  ".join(lines))
    return config


def _validated(settings: dict[str, Any]) -> tuple[Config | None, list[str]]:
    """The configuration, and everything that is wrong.

    pydantic looks for what does not go together only where everything else is right. So unknown keys are left
    out and the rest is validated again, then sections and fields with wrong values.
    """
    lines: list[str] = []
    broken: set[str] = set()
    settings = copy.deepcopy(settings)
    while True:
        try:
            return Config.model_validate(settings, context=broken), lines
        except ValidationError as error:
            found = error.errors()
        unknown = [
            one for one in found if one["type"] == "extra_forbidden" and _removed(settings, one["loc"])
        ]
        lines += [line for one in unknown or found for line in _describe(dict(one)) if line not in lines]
        if unknown:
            continue
        places = [one["loc"] for one in found]
        if () in places:
            return None, lines
        elements = {place[1] for place in places if place[0] == "fields" and len(place) > 1}
        sections = {str(place[0]) for place in places if place[0] != "fields" or len(place) == 1}
        broken |= sections
        for element in sorted(elements, reverse=True):
            field = settings["fields"].pop(element)
            broken.add(f"fields.{field.get('name') if isinstance(field, dict) else field}")
        settings = {key: value for key, value in settings.items() if str(key) not in sections}


def _removed(settings: Any, place: Sequence[Any]) -> bool:
    """Remove a key of nested settings; False where there is none."""
    if place[0] == "fields":
        place = (*place[:2], *place[3:])  # without the kind, which is no key
    for part in place[:-1]:
        if isinstance(settings, list) or (isinstance(settings, dict) and part in settings):
            settings = settings[part]
    return isinstance(settings, dict) and settings.pop(place[-1], settings) is not settings


def asked(conf: str | Path | None, overrides: Sequence[str]) -> dict[str, Any]:
    """What `conf` and `overrides` say, without the defaults. See `load`."""
    settings = {} if conf is None else _read(conf)
    for override in overrides:
        path, equals, text = override.partition("=")
        if not equals or not path:
            raise ConfigError(f"--set {override}: expected section.key=value, for example deepfm.epochs=5")
        try:
            # A lone | is YAML for an empty block of text, and here a separator.
            value = text if text in ("|", ">") else yaml.safe_load(text)
        except (yaml.YAMLError, ValueError) as error:  # a date that is none is a ValueError
            raise ConfigError(f"--set {override}: the value is not YAML: {error}") from None
        nested: Any = value
        for key in reversed(path.split(".")):
            nested = {key: nested}
        settings = merge(settings, nested)
    return settings


def absolute(path: str) -> str:
    """A URI as it is; a path made absolute: from the repository, or the working directory for a wheel."""
    if "://" in path or path.startswith("file:"):
        return path
    return str(((REPOSITORY if CHECKOUT else Path.cwd()) / Path(path).expanduser()).absolute())


def nearest(word: str, words: typing.Iterable[str]) -> str:
    """`; nearest valid key: ...`, or the list of keys where none is near."""
    words = sorted(words)
    close = difflib.get_close_matches(word, words, n=1, cutoff=0.5)
    return f"; nearest valid key: {close[0]}" if close else f"; valid keys: {', '.join(words)}"


def _read(conf: str | Path) -> dict[str, Any]:
    text = str(conf)
    try:
        if "://" in text:
            system, path = pyarrow.fs.FileSystem.from_uri(text)
            with system.open_input_stream(path) as stream:
                raw = stream.read().decode()
        else:
            candidates = [Path(text), REPOSITORY / text]
            raw = next((path for path in candidates if path.exists()), candidates[0]).read_text()
    except (OSError, UnicodeDecodeError, pyarrow.ArrowInvalid) as error:
        raise ConfigError(f"The conf file {text} cannot be read: {error}. Give an existing --conf.") from None
    try:
        settings = yaml.safe_load(raw)
    except (yaml.YAMLError, ValueError) as error:
        raise ConfigError(f"{text} is not YAML: {error}") from None
    if settings is None:
        return {}
    if not isinstance(settings, dict):
        raise ConfigError(f"{text} holds a {type(settings).__name__}, expected sections such as `data:`")
    return settings


def merge(base: Any, over: Any) -> Any:
    """`base` with `over` over it: mappings are merged, all else replaced. See `load`."""
    if isinstance(base, dict) and isinstance(over, dict):
        # Merged ones could not be switched off.
        merged = {k: v if k in ("candidates", "space") else merge(base.get(k), v) for k, v in over.items()}
        return {**base, **merged}
    return over


def _described(error: ValidationError) -> list[str]:
    return [line for found in error.errors() for line in _describe(dict(found))]


def _describe(error: dict[str, Any]) -> list[str]:
    location = [part for part in error["loc"] if part not in ("[key]",)]
    path = ".".join(str(part) for part in location)
    if error["type"] == "extra_forbidden":
        return [f"{path}: unknown key{nearest(str(location[-1]), _keys(location[:-1]))}"]
    if error["type"] in ("union_tag_invalid", "union_tag_not_found"):
        name, kind = (error["input"].get(key) for key in ("name", "kind"))
        kinds = ", ".join(_tag(model) for model in _models(AnyField))
        which = f"{path} ({name})" if name else path
        return [
            f"{which}: kind {kind!r} is none, expected {kinds}"
            if kind
            else f"{which}: no kind, expected {kinds}"
        ]
    problem = error.get("ctx", {}).get("error")
    texts = problem.texts if isinstance(problem, _Several) else [error["msg"].removeprefix("Value error, ")]
    found = "" if error["type"] in ("missing", "value_error") else f", found {error['input']!r}"
    return [f"{path}: {text}{found}" if path else f"{text}{found}" for text in texts]


def _keys(location: Sequence[Any]) -> set[str]:
    """The valid keys of the model at a place in the configuration."""
    models: list[Any] = [Config]
    for part in location:
        if isinstance(part, int) or any(part == _tag(model) for model in models):
            models = [model for model in models if isinstance(part, int) or part == _tag(model)]
            continue
        if not any(part in model.model_fields for model in models):
            continue  # a key of a mapping, as in tune.space
        models = [
            inner
            for model in models
            if part in model.model_fields
            for inner in _models(model.model_fields[part].annotation)
        ]
    return {key for model in models for key in model.model_fields}


def _tag(model: type[BaseModel]) -> Any:
    kind = model.model_fields.get("kind")
    options = typing.get_args(kind.annotation) if kind else ()
    return options[0] if len(options) == 1 else None


def _models(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and not isinstance(annotation, types.GenericAlias):
        return [annotation] if issubclass(annotation, BaseModel) else []
    return [model for inner in typing.get_args(annotation) for model in _models(inner)]

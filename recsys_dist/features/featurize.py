"""Raw logs to a features run: read, check, split, encode, look back, write."""

import datetime as dt
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import reduce
from typing import Any

import pyspark
from pyspark.errors import AnalysisException, ArithmeticException, NumberFormatException, PySparkException
from pyspark.sql import Column, DataFrame, SparkSession
from pyspark.sql import functions as F

from recsys_dist.config import Categorical, Config, Count, History, Time
from recsys_dist.errors import ConfigError, DataError
from recsys_dist.features import aggregate, history
from recsys_dist.features.check import (
    check_events,
    check_table,
    positive_condition,
    quarantine,
    require_few,
    require_pattern,
)
from recsys_dist.features.encode import Vocabularies, encode, tokens_of
from recsys_dist.features.read import Opened, open_source, read
from recsys_dist.features.session import Steps, remove_checksums, start, write
from recsys_dist.features.split import SPLITS, arrange
from recsys_dist.schema import QUARANTINE, VOCAB, FeatureSpec, FieldSpec
from recsys_dist.workspace import OpenRun

SOURCES = {"context": "events", "item": "items", "user": "users"}
"""Side of a categorical field to the source that has its column."""
CUTS = ("valid", "test", "date")
HASH_BUCKETS = 1_000_000


def featurize(config: Config, run: OpenRun) -> dict[str, Any]:
    """Write all tables of a features run and its features.json.

    Returns:
        the run's figures: rows, rows set aside by reason, users, items, examples, seconds a step.

    Raises:
        ConfigError: a condition, format or field that Spark refuses; no Java.
        DataError: a missing or empty input or column, too many unusable rows, nothing to learn from.
    """
    steps = Steps()
    opened = _open(config)
    with steps.measure("start"):
        session = start("featurize", config, opened["events"].size)
        spark = session.__enter__()
    try:
        return _featurize(config, run, spark, opened, steps)
    except (ArithmeticException, NumberFormatException) as error:
        # No expression of ours can raise these.
        raise ConfigError(
            f"label.positive_when={config.label.positive_when!r} fails on a row: {error}"
        ) from None
    except PySparkException as error:
        if isinstance(error, AnalysisException) or "FAILED_READ_FILE" in (error.getCondition() or ""):
            raise DataError(f"An input file cannot be read: {str(error).splitlines()[0]}") from error
        raise
    finally:
        session.__exit__(None, None, None)


@dataclass(frozen=True)
class Log:
    """What one look over the arranged events tells."""

    rows: dict[str, int]
    """Examples by split."""
    positives: dict[str, int]
    """Positive examples by split."""
    hour: int
    """Most frequent hour of the train part; of equally frequent ones the earliest."""
    last_micros: int
    """Time of the last event."""


def _open(config: Config) -> dict[str, Opened]:
    opened = {}
    for side, name in SOURCES.items():
        source = getattr(config.data, name)
        fields = {
            _raw(field.name): field.column
            for field in config.fields
            if isinstance(field, Categorical) and field.side == side
        }
        if source is None:
            if fields:
                named = ", ".join(sorted(fields)).replace("raw:", "")
                raise ConfigError(f"fields {named} have side {side}, but data.{name} is not set")
            continue
        opened[name] = open_source(name, source, source.columns | fields)
    return opened


def _featurize(
    config: Config, run: OpenRun, spark: SparkSession, opened: dict[str, Opened], steps: Steps
) -> dict[str, Any]:
    fields = [field for field in config.fields if isinstance(field, Categorical)]
    for name, source in opened.items():
        if name == "events":
            require_pattern(spark, name, source.source)
    condition = positive_condition(spark, config.label.positive_when)

    with steps.measure("read, check, split"):
        raw = _sampled(read(spark, opened["events"]), config.data.sample_users)
        checked = check_events(raw, opened["events"].source, condition)
        checked, later = _before(checked, config.score.date)
        arranged = arrange(checked, config.split.fractions).cache()
        tables = {}
        for side, key in (("items", "item"), ("users", "user")):
            if side in opened:
                rows = read(spark, opened[side])
                rows = _sampled(rows, config.data.sample_users) if side == "users" else rows
                tables[side] = check_table(rows, key).cache()
        reasons = _reasons({"events": arranged, **tables})
        for name, frame in {"events": arranged, **tables}.items():
            require_few(name, reasons[name], frame, config.data.max_bad_rows)
        log = _look(arranged)
        _require_usable(config, opened["events"], log)
        events = arranged.where(F.col("_reason").isNull())
        usable = {name: frame.where(F.col("_reason").isNull()) for name, frame in tables.items()}
        for side, key in (("items", "item"), ("users", "user")):
            if side in usable:
                _require_known(side, key, opened, usable[side], events)

    with steps.measure("vocabularies"):
        vocabularies = Vocabularies(
            _tokens(events, usable, fields), ["user", "item", *(field.name for field in fields)]
        )
        ids = {
            "user": _encoded_ids("user", vocabularies, usable.get("users"), fields).cache(),
            "item": _encoded_ids("item", vocabularies, usable.get("items"), fields).cache(),
        }
    with steps.measure("statistics"):
        standards = {
            field.name: aggregate.fit(events, f"earlier_{field.when}")
            for field in config.fields
            if isinstance(field, Count)
        }
    date = config.score.date or dt.datetime.fromtimestamp(
        log.last_micros // 10**6, dt.UTC
    ).date() + dt.timedelta(1)
    spec = _spec(config, vocabularies, standards, log, date)
    indexed = _indexed(config, events, vocabularies, ids, fields)

    def examples() -> None:
        columns = _state(config, standards, "examples", None)
        frame = indexed.select(
            F.col("user_index").alias("user"),
            F.col("item_index").alias("item"),
            F.timestamp_micros("micros").alias("timestamp"),
            "value",
            F.col("positive").cast("int").alias("label"),
            "split",
            *_context(config),
            *columns,
        )
        write(frame, f"{run.uri}/examples", spec.examples_schema(), "split")

    def users() -> None:
        frame = _users(config, indexed, ids["user"], standards, date)
        frame = frame.repartitionByRange("user").sortWithinPartitions("as_of", "user")
        write(frame, f"{run.uri}/users", spec.users_schema(), "as_of")

    def items() -> None:
        frame = ids["item"].select(
            F.col("index").alias("item"),
            F.col("token").alias("item_id"),
            "title",
            F.col("positives").alias("count"),
            *(F.col(_raw(field.name)).alias(field.name) for field in fields if field.side == "item"),
        )
        frame = frame.repartitionByRange("item").sortWithinPartitions("item")
        write(frame, f"{run.uri}/items", spec.items_schema())

    def vocabulary(field: str) -> Callable[[], None]:
        return lambda: write(vocabularies.of(field), f"{run.uri}/vocab/{field}", VOCAB)

    def aside() -> None:
        frame = quarantine(arranged, *tables.values())
        write(frame.coalesce(1), f"{run.uri}/quarantine", QUARANTINE)

    with steps.measure("write"):
        jobs = [examples, users, items, *map(vocabulary, vocabularies.sizes), aside]
        with ThreadPoolExecutor(4) as pool:
            for done in [pool.submit(job) for job in jobs]:
                done.result()
        run.write_json("features.json", spec.model_dump(mode="json"))
        remove_checksums(run.filesystem, run.path)

    for frame in (arranged, *tables.values(), *ids.values()):
        frame.unpersist()
    vocabularies.unpersist()
    return {
        "rows": {name: sum(found.values()) for name, found in reasons.items()},
        "quarantined": {
            name: {reason: n for reason, n in sorted(found.items()) if reason}
            for name, found in reasons.items()
        },
        "events_after_score_date": later,
        "users": spec.n_users,
        "items": spec.n_items,
        "examples": spec.rows,
        "positives": spec.positives,
        "cold_in_test": {"users": vocabularies.cold["user"], "items": vocabularies.cold["item"]},
        "spark": pyspark.__version__,
        "seconds": steps.seconds,
    }


def _raw(field: str) -> str:
    """A field's column before it is written, distinct from all columns of our own."""
    return f"raw:{field}"


def _before(events: DataFrame, date: dt.date | None) -> tuple[DataFrame, int]:
    """The events before a day, if one is given, and the number of those that are left out."""
    if date is None:
        return events, 0
    begin = dt.datetime.combine(date, dt.time(), dt.UTC)
    later = F.coalesce(
        F.col("_reason").isNull() & (F.col("micros") >= int(begin.timestamp()) * 10**6), F.lit(False)
    )
    return events.where(~later), events.where(later).count()


def _require_known(
    side: str, key: str, opened: dict[str, Opened], table: DataFrame, events: DataFrame
) -> None:
    """Raise a DataError where not one id of a table occurs in the log: the two are written differently."""
    if not table.join(events.select(key).distinct(), key, "left_semi").isEmpty():
        return
    examples = [frame.select(key).orderBy(key).first() for frame in (table, events)]
    found = [repr(row[0]) if row else "none" for row in examples]
    source = opened[side].source
    raise DataError(
        f"data.{side}.path={source.path}: no {key} of it occurs in the events. It has ids such as "
        f"{found[0]}, the events such as {found[1]}. Check data.{side}.columns.{key}={source.columns[key]!r}."
    )


def _sampled(rows: DataFrame, share: float) -> DataFrame:
    """Keep a share of the users by a hash of the raw id; of rows without one by their text."""
    if share == 1:
        return rows
    bucket = F.pmod(F.xxhash64(F.coalesce("user", "_raw")), F.lit(HASH_BUCKETS))
    return rows.where(bucket < share * HASH_BUCKETS)


def _reasons(checked: dict[str, DataFrame]) -> dict[str, Counter[str]]:
    """Rows of each source by the reason for which they are set aside; usable rows under the empty reason."""
    frames = [
        frame.select(F.lit(name).alias("name"), F.coalesce("_reason", F.lit("")).alias("reason"))
        for name, frame in checked.items()
    ]
    counted = reduce(DataFrame.union, frames).groupBy("name", "reason").count().collect()
    found: dict[str, Counter[str]] = {name: Counter() for name in checked}
    for row in counted:
        found[row["name"]][row["reason"]] += row["count"]
    return found


def _look(events: DataFrame) -> Log:
    counted = (
        events.where(F.col("_reason").isNull())
        .groupBy("split", "positive", F.hour(F.timestamp_micros("micros")).alias("hour"))
        .agg(F.count("*").alias("rows"), F.max("micros").alias("last"))
        .collect()
    )
    rows, positives = dict.fromkeys(SPLITS, 0), dict.fromkeys(SPLITS, 0)
    hours: Counter[int] = Counter()
    for row in counted:
        rows[row["split"]] += row["rows"]
        positives[row["split"]] += row["rows"] * row["positive"]
        if row["split"] == "train":
            hours[row["hour"]] += row["rows"]
    hour = min(hours, key=lambda hour: (-hours[hour], hour), default=0)
    return Log(rows, positives, hour, max((row["last"] for row in counted), default=0))


def _require_usable(config: Config, opened: Opened, log: Log) -> None:
    path = opened.source.path
    if not sum(log.rows.values()):
        sampled = (
            f" with data.sample_users={config.data.sample_users}" if config.data.sample_users < 1 else ""
        )
        raise DataError(f"data.events.path={path}: the input has no events{sampled}, only header lines")
    if not log.positives["train"]:
        raise DataError(
            f"data.events.path={path}: none of the {log.rows['train']} train events is positive, so there is "
            f"nothing to learn. Check label.positive_when={config.label.positive_when!r}."
        )


def _tokens(events: DataFrame, tables: dict[str, DataFrame], fields: list[Categorical]) -> DataFrame:
    """The tokens of all vocabularies."""
    is_train = F.col("split") == "train"
    of_events = {
        "count": is_train,
        "positives": is_train & F.col("positive"),
        "tested": F.col("split") == "test",
    }
    frames = list(tokens_of(events, [("user", "user", None), ("item", "item", None)], of_events))
    of_side = {
        side: [(field.name, _raw(field.name), field.delimiter) for field in fields if field.side == side]
        for side in SOURCES
    }
    each_row = {"count": F.lit(1)}
    frames += tokens_of(events.where(is_train), of_side["context"], each_row)
    if "items" in tables:
        frames += tokens_of(tables["items"], [("item", "item", None)], {})
        frames += tokens_of(tables["items"], of_side["item"], each_row)
    if "users" in tables:
        frames += tokens_of(tables["users"], of_side["user"], each_row)
    return reduce(DataFrame.union, frames)


def _encoded_ids(
    key: str, vocabularies: Vocabularies, table: DataFrame | None, fields: list[Categorical]
) -> DataFrame:
    """All users or items: token, index, count, positives, title (items), and their encoded fields."""
    rows = vocabularies.of(key)
    if table is not None:
        rows = rows.join(table.drop("_source", "_raw", "_reason"), rows["token"] == table[key], "left")
    for field in fields:
        if field.side == key:
            rows = encode(rows, _raw(field.name), vocabularies.of(field.name), field.delimiter)
    if key == "item":
        title = F.coalesce("title", "token") if "title" in rows.columns else F.col("token")
        rows = rows.withColumn("title", title)
    return rows.drop(key)


def _indexed(
    config: Config,
    events: DataFrame,
    vocabularies: Vocabularies,
    ids: dict[str, DataFrame],
    fields: list[Categorical],
) -> DataFrame:
    """The events with indices in place of ids and words, and the states that histories are read from."""
    of_user = [_raw(field.name) for field in fields if field.side == "user"]
    user = ids["user"].select(F.col("token").alias("user"), F.col("index").alias("user_index"), *of_user)
    item = ids["item"].select(F.col("token").alias("item"), F.col("index").alias("item_index"))
    indexed = events.drop("_source", "_raw", "_reason").join(item, "item").join(user, "user")
    for field in fields:
        if field.side == "context":
            indexed = encode(indexed, _raw(field.name), vocabularies.of(field.name), field.delimiter)
    for when, last in _histories(config).items():
        indexed = history.with_state(indexed, when, last)
    return indexed


def _histories(config: Config) -> dict[str, int]:
    """`when` of the history fields to the greatest length asked for."""
    found: dict[str, int] = {}
    for field in config.fields:
        if isinstance(field, History):
            found[field.when] = max(field.last, found.get(field.when, 0))
    return found


def _context(config: Config) -> list[Column]:
    columns = []
    moment = F.timestamp_micros("micros")
    parts = {"hour": F.hour(moment) + 1, "weekday": F.weekday(moment) + 1}
    for field in config.fields:
        if isinstance(field, Time):
            columns.append(parts[field.part].alias(field.name))
        elif isinstance(field, Categorical) and field.side in ("context", "user"):
            columns.append(F.col(_raw(field.name)).alias(field.name))
    return columns


def _state(
    config: Config, standards: dict[str, aggregate.Standard], of: str, known: Column | None
) -> list[Column]:
    """History and count columns: before each event, or, as aggregates, of the events known at a cut."""
    columns = []
    for field in config.fields:
        if isinstance(field, History):
            items = (
                history.before_event(field.when, field.last)
                if known is None
                else history.before_cut(field.when, field.last, known)
            )
            columns.append(items.alias(field.name))
        elif isinstance(field, Count):
            n = F.col(f"earlier_{field.when}") if known is None else aggregate.before_cut(field.when, known)
            columns.append(standards[field.name].column(n).alias(field.name))
    return columns


def _users(
    config: Config,
    indexed: DataFrame,
    ids: DataFrame,
    standards: dict[str, aggregate.Standard],
    date: dt.date,
) -> DataFrame:
    """Every user as of every cut."""
    end = int(dt.datetime.combine(date, dt.time(), dt.UTC).timestamp()) * 10**6
    known = {
        "valid": F.col("split") == "train",
        "test": F.col("split") != "test",
        "date": F.col("micros") < end,
    }
    states = [
        F.struct(
            F.lit(cut).alias("as_of"),
            F.array_sort(F.collect_set(F.when(known[cut], F.col("item_index")))).alias("seen"),
            F.array_sort(F.collect_set(F.when(known[cut] & F.col("positive"), F.col("item_index")))).alias(
                "liked"
            ),
            *_state(config, standards, "users", known[cut]),
        ).alias(cut)
        for cut in CUTS
    ]
    by_cut = indexed.groupBy("user").agg(*states)
    rows = by_cut.select(F.col("user").alias("token"), F.inline(F.array(*CUTS)))
    fields = [
        field.name for field in config.fields if isinstance(field, Categorical) and field.side == "user"
    ]
    named = ids.select(
        "token", F.col("index").alias("user"), *(F.col(_raw(name)).alias(name) for name in fields)
    )
    return rows.join(named, "token").withColumnRenamed("token", "user_id")


def _spec(
    config: Config,
    vocabularies: Vocabularies,
    standards: dict[str, aggregate.Standard],
    log: Log,
    date: dt.date,
) -> FeatureSpec:
    sizes = vocabularies.sizes
    fields = [
        FieldSpec(name=name, kind="id", side=name, type="index", cardinality=sizes[name] + 1, vocab=name)
        for name in ("user", "item")
    ]
    for field in config.fields:
        about: dict[str, Any] = {"name": field.name, "kind": field.kind, "side": field.side}
        if isinstance(field, Categorical):
            several = field.delimiter is not None
            about |= {"type": "indices", "pooling": field.pooling} if several else {"type": "index"}
            about |= {"cardinality": sizes[field.name] + 1, "vocab": field.name}
        elif isinstance(field, Time):
            about |= {
                "type": "index",
                "cardinality": {"hour": 25, "weekday": 8}[field.part],
                "part": field.part,
            }
        elif isinstance(field, History):
            about |= {"type": "indices", "pooling": field.pooling, "last": field.last, "when": field.when}
            about |= {"cardinality": sizes["item"] + 1, "vocab": "item"}
        else:
            found = standards[field.name]
            about |= {"type": "value", "cardinality": 1, "transform": "log1p_standardise"}
            about["when"] = field.when
            about |= {"mean": found.mean, "stddev": found.stddev}
        fields.append(FieldSpec.model_validate(about))
    return FeatureSpec(
        fields=tuple(fields),
        n_users=sizes["user"],
        n_items=sizes["item"],
        rows=log.rows,
        positives=log.positives,
        date=date.isoformat(),
        hour=log.hour,
    )

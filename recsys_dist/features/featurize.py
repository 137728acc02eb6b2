"""Raw logs to a features run: read, check, gather by user, split, encode, look back, write."""

import datetime as dt
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from functools import reduce
from typing import Any

import pyspark
from py4j.protocol import Py4JError, Py4JNetworkError  # type: ignore[import-untyped]
from pyspark.errors import (
    ArithmeticException,
    ArrayIndexOutOfBoundsException,
    DateTimeException,
    NumberFormatException,
    PySparkException,
    SparkRuntimeException,
)
from pyspark.sql import DataFrame, SparkSession
from pyspark.sql import functions as F

from recsys_dist.config import Config, KCore, Source
from recsys_dist.errors import ConfigError, DataError, RetryableError
from recsys_dist.features import ids
from recsys_dist.features.check import require_few
from recsys_dist.features.drift import columns_of
from recsys_dist.features.encode import Vocabularies, tokens_of
from recsys_dist.features.item_days import day_values, fit_days
from recsys_dist.features.lineage import new_columns, parents, run_before
from recsys_dist.features.log import (
    Inputs,
    Look,
    look_over,
    look_over_tables,
    require_known,
    require_numbers,
    require_usable,
)
from recsys_dist.features.numeric import Fitted, moments
from recsys_dist.features.read import unreadable
from recsys_dist.features.session import (
    AT_ONCE,
    SCRATCH,
    Steps,
    exit_code,
    remove_checksums,
    spark_uri,
    start,
)
from recsys_dist.features.source import Opened, open_source
from recsys_dist.features.spec import field_specs
from recsys_dist.features.split import assign, duplicates, gather, k_core, look_back
from recsys_dist.features.state import (
    aggregate_values,
    counted_whens,
    counts_at_cuts,
    fit_aggregates,
    summed_whens,
    user_tokens,
)
from recsys_dist.features.tables import Tables
from recsys_dist.schema import FeatureSpec
from recsys_dist.workspace import OpenRun, Run

OF_A_ROW = (
    ArithmeticException,
    ArrayIndexOutOfBoundsException,
    DateTimeException,
    NumberFormatException,
    SparkRuntimeException,
)
"""What an expression raises that fails on a row."""
NO_ANSWER = (Py4JNetworkError, ConnectionError)
"""What is raised when Spark's Java process is gone."""
GOING = ("SparkContext was shut down", "stopped SparkContext", "Shutting down")
"""What is told while it is going."""
OUT_OF_MEMORY = 52
"""The exit code with which Spark's Java process then ends."""
EARLY = dt.date(1990, 1, 1)
"""No log is older: milliseconds that are read as seconds would be of 1970."""
READING = "read, check, gather"
"""The step in which label.positive_when is evaluated."""


def featurize(config: Config, run: OpenRun, rebuild: bool = False) -> dict[str, Any]:
    """Write all tables of a features run and its features.json.

    Args:
        config: what to read and which fields to make.
        run: the open run.
        rebuild: begin the vocabularies anew in place of continuing those of the run before.

    Returns:
        the run's figures: rows, rows set aside by reason, texts that are no number by
        field, users, items, examples, seconds a step.

    Raises:
        ConfigError: a condition, format or field that Spark refuses; no Java.
        DataError: a missing or empty input or column, too many unusable rows, nothing to learn from.
        RetryableError: Spark died.
    """
    steps = Steps()
    opened = _open(config)
    before = None if rebuild else run_before(config, run)
    news = new_columns(opened, before)
    with steps.measure("start"):
        session = start("featurize", config, opened["events"].size)
        spark = session.__enter__()
    try:
        figures = _featurize(config, run, spark, opened, steps, before)
        return figures | {"new_columns": news, "spark": pyspark.__version__, "seconds": steps.seconds}
    except (PySparkException, Py4JError, ConnectionError) as error:
        text = _text(error)
        if text is None:
            died = exit_code(spark)
            ended = f"its Java process ended with exit code {died}"
            if died == OUT_OF_MEMORY:
                raise _too_little_memory(config, ended) from None
            raise RetryableError(
                f"Spark died: {ended if died is not None else 'it does not answer'}"
            ) from None
        cause, file = _cause(text), unreadable(text, opened.values())
        if file:
            raise DataError(f"{file} cannot be read: {cause}. Restore the file.") from error
        if "OutOfMemoryError" in text:
            raise _too_little_memory(config, cause) from None
        if config.label.positive_when and READING not in steps.seconds and isinstance(error, OF_A_ROW):
            # No expression of ours that reads and checks can raise these.
            raise ConfigError(
                f"label.positive_when={config.label.positive_when!r} fails on a row: {cause}"
            ) from None
        raise
    finally:
        session.__exit__(None, None, None)


def _open(config: Config) -> dict[str, Opened]:
    """Open every source; what is wrong is told of all of them at once."""
    opened: dict[str, Opened] = {}
    wrong: list[ConfigError | DataError] = []
    for side, name in ids.SOURCES.items():
        source: Source | None = getattr(config.data, name)
        columns = ids.asked_columns(config.fields, side)
        if source is None:
            if columns:
                named = ", ".join(sorted(column.removeprefix("raw:") for column in columns))
                wrong.append(ConfigError(f"fields {named} have side {side}, but data.{name} is not set"))
            continue
        lists = ids.list_columns(config.fields, side)
        try:
            opened[name] = open_source(name, source, source.columns | columns, lists)
        except (ConfigError, DataError) as error:
            wrong.append(error)
    if wrong:
        raise type(wrong[0])("\n".join(map(str, wrong)))
    return opened


def _featurize(
    config: Config,
    run: OpenRun,
    spark: SparkSession,
    opened: dict[str, Opened],
    steps: Steps,
    before: Run | None,
) -> dict[str, Any]:
    figures: dict[str, Any] = {}
    with steps.measure(READING), ThreadPoolExecutor(1) as beside:
        inputs = Inputs(spark, config, opened, f"{run.uri}/{SCRATCH}")
        tables = {name: rows.cache() for name, rows in inputs.tables().items()}
        cached = list(tables.values())
        gathered = gather(inputs.events())
        if config.data.k_core != KCore():
            cached.append(gathered.cache())
            core = config.data.k_core
            scratch = spark_uri(f"{run.uri}/{SCRATCH}")
            gathered, dropped, rounds = k_core(gathered, core.user, core.item, scratch)
            figures["k_core"] = {"events_dropped": dropped, "rounds": rounds}
        placed = look_back(
            gathered, summed_whens(config.fields), counted_whens(config.fields), config.split
        ).cache()
        events = assign(placed, config.split).select("*", "_bad.*").drop("_bad")
        looking = beside.submit(look_over, events, config.fields)
        # What comes next is planned while Spark reads.
        read = events.where(F.col("_reason").isNull())
        usable = read.drop("_reason", "_raw", "_source", "_hash", ids.UNREAD)
        train = usable.where(F.col("split") == "train")
        known = {name: frame.where(F.col("_reason").isNull()) for name, frame in tables.items()}
        counts = counts_at_cuts(usable, config.fields).cache()
        tokens = _tokens(config, usable, counts, known)
        reasons, numbers = look_over_tables(tables, config.fields)
        look = looking.result()
        numbers |= look.numbers
        reasons["events"] = look.reasons
        most = config.data.max_bad_rows
        require_few("events", reasons["events"], events, most, lambda: duplicates(events, inputs.events()))
        for name, frame in tables.items():
            require_few(name, reasons[name], frame, most)
        for name, counted in reasons.items():
            _tell(name, counted)
        require_usable(config, look)
        require_numbers(config, opened, known | {"events": read}, numbers)
        for side, key in (("items", "item"), ("users", "user")):
            if side in known:
                require_known(side, key, opened, known[side], usable)

    with steps.measure("vocabularies, statistics"), ThreadPoolExecutor(AT_ONCE) as beside:
        of_train = beside.submit(_fit_events, train, config, look)
        continued = parents(config, before, usable)
        least = {field.name: field.min_count for field in ids.vocabulary_fields(config.fields)}
        vocabularies = Vocabularies(tokens, {"user": 0, "item": 0} | least, continued, run)
        people = ids.table_of("user", vocabularies, known.get("users"))
        catalogue = ids.table_of("item", vocabularies, known.get("items"))
        of_sides = [
            beside.submit(_fit_side, rows.where(F.col("count") > 0), config, side)
            for side, rows in (("user", people), ("item", catalogue))
        ]
        fitted = of_train.result()
        for of_side in of_sides:
            fitted |= of_side.result()
    first, last = (
        dt.datetime.fromtimestamp(micros // 10**6, dt.UTC).date()
        for micros in (look.first_micros, look.last_micros)
    )
    today = dt.datetime.now(dt.UTC).date()
    if config.score.date is None and last > today:
        print(
            f"  warning: the last event is of {last}, and today is {today} (UTC): fields that count days are "
            f"as of then, and so are the lists. Give score.date, from which on events are set aside.",
            flush=True,
        )
    if last < EARLY:
        print(
            f"  warning: the last event is of {last}. Is data.events.timestamp_format="
            f"{config.data.events.timestamp_format if config.data.events else None} what the log has?",
            flush=True,
        )
    spec = FeatureSpec(
        fields=field_specs(config, vocabularies.specs, fitted),
        vocabularies=vocabularies.specs,
        n_users=vocabularies.specs["user"].size,
        n_items=vocabularies.specs["item"].size,
        rows=look.rows,
        positives=look.positives,
        date=(config.score.date or last + dt.timedelta(1)).isoformat(),
        hour=look.hour,
    )
    with steps.measure("write"):
        people = ids.encode_fields(people, config.fields, "user", vocabularies, fitted).cache()
        catalogue = ids.encode_fields(catalogue, config.fields, "item", vocabularies, fitted).cache()
        Tables(
            config=config, run=run, spec=spec, vocabularies=vocabularies, fitted=fitted, events=events,
            usable=usable, counts=counts, people=people, catalogue=catalogue, checked=tables, reasons=reasons,
            inputs=inputs, look=look,
        ).write()  # fmt: skip
        run.write_json("features.json", spec.model_dump(mode="json"))
        run.remove(SCRATCH)
        remove_checksums(run.filesystem, run.path)
    if any(counted.total() > counted[""] for counted in reasons.values()):
        print(f"  what is set aside: {run.uri}/quarantine", flush=True)
    for frame in (*cached, placed, counts, people, catalogue):
        frame.unpersist()
    return {
        "rows": {name: counted.total() for name, counted in reasons.items()},
        "quarantined": {
            name: {reason: n for reason, n in sorted(counted.items()) if reason}
            for name, counted in reasons.items()
        },
        "unreadable_numbers": {name: found.unread for name, found in sorted(numbers.items())},
        **figures,
        "users": spec.n_users,
        "items": spec.n_items,
        "examples": spec.rows,
        "positives": spec.positives,
        "first_day": first.isoformat(),
        "last_day": last.isoformat(),
        "cold_in_test": {"users": vocabularies.cold["user"], "items": vocabularies.cold["item"]},
        "parent": before.run_id if continued and before else None,
        "columns": {name: columns_of(found) for name, found in opened.items()},
    }


def _tell(name: str, reasons: Counter[str]) -> None:
    """Print how many rows of a source are set aside, and why."""
    aside = reasons.total() - reasons[""]
    if aside:
        why = ", ".join(f"{count:,} {reason}" for reason, count in reasons.most_common() if reason)
        print(f"  {aside:,} of {reasons.total():,} {name} are set aside: {why}", flush=True)


def _fit_events(train: DataFrame, config: Config, look: Look) -> dict[str, Fitted]:
    """What is fitted on the train events."""
    fields = config.fields
    values = aggregate_values(fields, look.values if config.split.in_time else {})
    values |= day_values(fields, look.values) | ids.side_values(fields, "context")
    found = moments(train, values)
    fitted = fit_aggregates(found, fields) | fit_days(found, fields)
    return fitted | ids.fit_numeric(train, fields, "context", found)


def _fit_side(rows: DataFrame, config: Config, side: str) -> dict[str, Fitted]:
    """What is fitted on the users or items of the train part."""
    return ids.fit_numeric(rows, config.fields, side, moments(rows, ids.side_values(config.fields, side)))


def _tokens(config: Config, events: DataFrame, counts: DataFrame, tables: dict[str, DataFrame]) -> DataFrame:
    """The tokens of all vocabularies."""
    is_train = F.col("split") == "train"
    of_events = {
        "count": is_train,
        "positives": is_train & F.col("positive"),
        "tested": F.col("split") == "test",
    }
    each_row = {"count": F.lit(1)}
    frames = [user_tokens(counts, config.fields), tokens_of(events, "item", "item", None, of_events)]
    if "items" in tables:
        frames.append(tokens_of(tables["items"], "item", "item", None, {}))
    for side, name in ids.SOURCES.items():
        rows = events.where(is_train) if side == "context" else tables.get(name)
        for field in ids.vocabulary_fields(config.fields):
            if field.side == side and rows is not None:
                frames.append(tokens_of(rows, field.name, ids.raw(field.name), field.delimiter, each_row))
    return reduce(DataFrame.union, frames)


def _text(error: Exception) -> str | None:
    """What an exception says; None where Spark's Java process, which is asked for it, is gone or going."""
    try:
        text = str(error)
    except NO_ANSWER:
        return None
    return None if isinstance(error, NO_ANSWER) or any(sign in text for sign in GOING) else text


def _too_little_memory(config: Config, cause: str) -> ConfigError:
    return ConfigError(
        f"Spark has too little memory: {cause}. Raise --driver-memory in "
        f"spark.submit={list(config.spark.submit)}, on a cluster the executors' memory."
    )


def _cause(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    causes = [line for line in lines if line.startswith("Caused by:")]
    return (causes[-1].removeprefix("Caused by:") if causes else lines[0]).strip()[:300]

"""Raw inputs as string columns by role, each row with the file it came from and its own text.

A row is a line: csv and tsv are read line by line, so a quoted value cannot hold a line break.
"""

import difflib
import json
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.fs
import pyarrow.parquet as pq
from pyspark.sql import Column, DataFrame, SparkSession
from pyspark.sql import functions as F
from pyspark.sql.types import (
    DoubleType,
    FloatType,
    StringType,
    StructField,
    StructType,
    TimestampNTZType,
    TimestampType,
)

from recsys_dist.config import Source, absolute
from recsys_dist.errors import DataError
from recsys_dist.features.session import spark_uri
from recsys_dist.workspace import raw_files

HEAD_BYTES = 1 << 20
HEAD_LINES = 100
WRONG_COLUMNS = "wrong number of columns"
NOT_JSON = "not JSON"


@dataclass(frozen=True)
class Opened:
    """A source whose files are there and have the columns that are asked for."""

    name: str
    """`events`, `items` or `users`: its key under `data`."""
    source: Source
    uris: tuple[str, ...]
    """The files, as Spark names them."""
    size: int
    """Bytes of all files."""
    header: tuple[str, ...]
    """csv and tsv: all columns in order."""
    header_lines: tuple[str, ...]
    """csv and tsv: the texts of the header lines, which are no rows."""
    columns: dict[str, str]
    """Our name of a column to the source's."""
    nanoseconds: frozenset[str]
    """parquet: the columns that hold nanoseconds."""


def open_source(name: str, source: Source, columns: dict[str, str]) -> Opened:
    """List a source's files and check their columns, before Spark is started.

    Args:
        name: the source's key under `data`, for error messages.
        source: what to read.
        columns: our name of a column to the source's.

    Raises:
        DataError: there is no file, all are empty, or a column is missing; names file and columns found.
    """
    found = raw_files(source.path)
    if not found:
        raise DataError(
            f"data.{name}.path={source.path}: there is no such file, folder or match (looked for "
            f"{absolute(source.path)}). A relative path is relative to the repository."
        )
    full = [info for info in found if info.size]
    if not full:
        raise DataError(
            f"data.{name}.path={source.path}: all {len(found)} files are empty, first {found[0].path}"
        )
    filesystem, _ = pyarrow.fs.FileSystem.from_uri(
        absolute(full[0].path) if "://" not in source.path else source.path.partition("*")[0]
    )
    with ThreadPoolExecutor(16) as pool:
        heads = list(pool.map(lambda info: _head(filesystem, info.path, source), full))
    first = heads[0].columns
    for info, head in zip(full, heads, strict=True):
        _require(name, source, info.path, head.columns, columns)
        if source.format in ("csv", "tsv") and head.columns != first:
            raise DataError(
                f"data.{name}: {info.path} has the columns {', '.join(head.columns)}, but {full[0].path} has "
                f"{', '.join(first)}. Files of one source need the same header line."
            )
    if not any(head.has_rows for head in heads):
        raise DataError(
            f"data.{name}.path={source.path}: no rows, only header lines, first in {full[0].path}"
        )
    return Opened(
        name=name,
        source=source,
        uris=tuple(_uri(source.path, info.path) for info in full),
        size=sum(info.size for info in full),
        header=first,
        header_lines=tuple(sorted({head.line for head in heads})),
        columns=columns,
        nanoseconds=frozenset().union(*(head.nanoseconds for head in heads)),
    )


def read(spark: SparkSession, opened: Opened) -> DataFrame:
    """Read a source, lazily.

    Returns:
        the asked columns as strings (`timestamp` as a timestamp where Parquet has one), `_source` (path of
        the file), `_raw` (the row's text) and `_broken` (why the row has no columns, else null).
    """
    if opened.source.format == "parquet":
        return _read_parquet(spark, opened)
    lines = spark.read.text(list(opened.uris)).select(_path().alias("_source"), F.col("value").alias("_raw"))
    lines = lines.where(F.trim("_raw") != "")
    if opened.source.format == "jsonl":
        names = list(dict.fromkeys(opened.columns.values()))
        parsed = F.from_json("_raw", _schema(len(names), names), {"columnNameOfCorruptRecord": "_corrupt"})
        reason = NOT_JSON
    else:
        names = list(opened.header)
        lines = lines.where(~F.col("_raw").isin(list(opened.header_lines)))
        parsed = F.from_csv("_raw", F.lit(_schema(len(names)).simpleString()), _csv_options(opened.source))
        reason = WRONG_COLUMNS
    # A generator is evaluated once a row; several columns of one struct might each parse the line anew.
    rows = lines.select("_source", "_raw", F.inline(F.array(parsed)))
    return rows.select(
        *(
            F.col(f"`{rows.columns[2 + names.index(column)]}`").alias(ours)
            for ours, column in opened.columns.items()
        ),
        "_source",
        "_raw",
        F.when(F.col("_corrupt").isNotNull(), reason).alias("_broken"),
    )


def _read_parquet(spark: SparkSession, opened: Opened) -> DataFrame:
    rows = spark.read.parquet(*(opened.uris))
    columns = []
    for ours, column in opened.columns.items():
        kind, values = rows.schema[column].dataType, rows[f"`{column}`"]
        if column in opened.nanoseconds:
            values = F.timestamp_micros(F.expr(f"`{column}` div 1000"))
        elif isinstance(kind, DoubleType | FloatType) and ours in ("user", "item"):
            # Integers that pandas made floats of, for one missing value: 7.0 is the id 7.
            whole = values.cast("decimal(38,0)")
            values = F.when(whole == values, whole.cast("string")).otherwise(values.cast("string"))
        elif not isinstance(kind, TimestampType | TimestampNTZType):
            values = values.cast("string")
        else:
            values = values.cast("timestamp")
        columns.append(values.alias(ours))
    raw = F.to_json(F.struct(*(rows[f"`{column}`"] for column in rows.columns)))
    return rows.select(
        *columns, _path().alias("_source"), raw.alias("_raw"), F.lit(None).cast("string").alias("_broken")
    )


def _path() -> Column:
    return F.regexp_replace(F.col("_metadata.file_path"), "^file:/+", "/")


def _schema(columns: int, names: list[str] | None = None) -> StructType:
    fields = names or [f"_{position}" for position in range(columns)]
    return StructType([StructField(name, StringType()) for name in [*fields, "_corrupt"]])


def _csv_options(source: Source) -> dict[str, str]:
    quote = _quote(source)
    return {
        "sep": _delimiter(source),
        "quote": quote,
        "escape": quote,  # RFC 4180: a quote in a quoted value is doubled
        "columnNameOfCorruptRecord": "_corrupt",
        "mode": "PERMISSIVE",
    }


def _delimiter(source: Source) -> str:
    return source.delimiter or {"csv": ",", "tsv": "\t"}[source.format]


def _quote(source: Source) -> str:
    return ({"csv": '"', "tsv": ""}[source.format]) if source.quote is None else source.quote


@dataclass(frozen=True)
class _Head:
    """The beginning of a file."""

    columns: tuple[str, ...]
    has_rows: bool
    line: str = ""
    """csv and tsv: the header line, without a byte order mark, as Spark reads it."""
    nanoseconds: frozenset[str] = frozenset()


def _head(filesystem: pyarrow.fs.FileSystem, path: str, source: Source) -> _Head:
    try:
        if source.format == "parquet":
            with filesystem.open_input_file(path) as file:
                parquet = pq.ParquetFile(file)
                schema, rows = parquet.schema_arrow, parquet.metadata.num_rows
                nanoseconds = {
                    column.name
                    for column in schema
                    if pa.types.is_timestamp(column.type) and column.type.unit == "ns"
                }
                return _Head(tuple(schema.names), rows > 0, nanoseconds=frozenset(nanoseconds))
        with filesystem.open_input_stream(path) as stream:
            lines = stream.read(HEAD_BYTES).decode(errors="replace").splitlines()
    except (OSError, pa.ArrowInvalid) as error:
        raise DataError(f"{path} cannot be read as {source.format}: {error}") from None
    full = [line for line in lines if line.strip()]
    if source.format == "jsonl":
        keys = dict.fromkeys(key for line in full[:HEAD_LINES] for key in _keys(line))
        return _Head(tuple(keys), bool(full))
    line = lines[0].removeprefix("\ufeff") if lines else ""
    columns = _split(line, _delimiter(source), _quote(source))
    return _Head(tuple(columns), len(full) > 1, line)


def _keys(line: str) -> Iterable[str]:
    try:
        row = json.loads(line)
    except ValueError:
        return ()
    return row if isinstance(row, dict) else ()


def _split(line: str, delimiter: str, quote: str) -> list[str]:
    """The values of a header line; Python's csv module knows no delimiter of several characters."""
    names = line.split(delimiter)
    if quote:
        names = [name[1:-1] if len(name) > 1 and name[0] == name[-1] == quote else name for name in names]
    return names


def _require(name: str, source: Source, path: str, header: tuple[str, ...], columns: dict[str, str]) -> None:
    for ours, column in columns.items():
        if header.count(column) == 1:
            continue
        key = (
            f"data.{name}.columns.{ours}"
            if ours in source.columns
            else f"fields: {ours.removeprefix('raw:')}.column"
        )
        if column in header:
            raise DataError(f"{path}: the column {column!r} ({key}) is there {header.count(column)} times")
        close = difflib.get_close_matches(column, header, n=1, cutoff=0.5)
        near = f"; nearest: {close[0]!r}" if close else ""
        raise DataError(
            f"{path} has no column {column!r} ({key}){near}. Columns found: {', '.join(header)} "
            f"(read as {source.format}). Name another column, or check data.{name}.format"
            + (" and .delimiter." if source.format in ("csv", "tsv") else ".")
        )


def _uri(given: str, path: str) -> str:
    """The URI of a file: pyarrow's paths have no scheme, and on HDFS no host either."""
    if "://" not in given:
        return spark_uri(path)
    scheme, _, rest = given.partition("://")
    if path.startswith("/"):
        return f"{scheme}://{rest.partition('/')[0]}{path}"
    return spark_uri(f"{scheme}://{path}")

"""The files of a raw input: found, opened at their beginning, and grouped by how they are read.

All that can be said about the columns is said here, before Spark is started.
"""

import difflib
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import pyarrow.fs

from recsys_dist.config import Source, absolute
from recsys_dist.errors import ConfigError, DataError
from recsys_dist.features.heads import TEXT, Head, kind, read_head, with_rare_keys
from recsys_dist.features.session import spark_uri
from recsys_dist.workspace import raw_input


@dataclass(frozen=True)
class Group:
    """Files of a source that are read in one way: their columns are the same, in the same order."""

    paths: tuple[str, ...]
    """The files within their filesystem."""
    uris: tuple[str, ...]
    """The files, as Spark names them."""
    head: Head
    """Of the first file."""
    lines: tuple[str, ...]
    """csv and tsv: the texts of the header lines, which are no rows."""
    columns: dict[str, str]
    """Our name of a column to the name in these files, or to the folders' key."""


@dataclass(frozen=True)
class Opened:
    """A source whose files are there and have the columns that are asked for."""

    name: str
    """`events`, `items` or `users`: its key under `data`."""
    source: Source
    columns: dict[str, str]
    """Our name of a column to the source's, as configured."""
    several: frozenset[str]
    """Our names of the columns that hold lists."""
    filesystem: pyarrow.fs.FileSystem
    """Where the files are."""
    size: int
    """Bytes of all files."""
    heads: tuple[Head, ...]
    """Of all files that are not empty."""
    groups: tuple[Group, ...]


def open_source(
    name: str, source: Source, columns: dict[str, str], several: Iterable[str] = frozenset()
) -> Opened:
    """List a source's files and check their columns, before Spark is started.

    Files may differ in the order of their columns and in columns that are not asked for.

    Args:
        name: the source's key under `data`, for error messages.
        source: what to read.
        columns: our name of a column to the source's; fields are called `raw:<field>`.
        several: our names of the columns that hold lists (jsonl and parquet).

    Raises:
        ConfigError: a setting does not fit the format.
        DataError: there is no file, all are empty, one cannot be read, or columns are missing, ambiguous or
            of different types in two files; names file and columns found.
    """
    several = frozenset(several)
    is_delimited = source.format in ("csv", "tsv")
    if is_delimited and source.header is False:
        raise ConfigError(f"data.{name}.header=false: list the names of the columns in its place")
    if is_delimited and several:
        raise ConfigError(
            f"fields {_fields(several)}: list: true is for jsonl and parquet, and data.{name} is "
            f"{source.format}. Give a delimiter."
        )
    filesystem, found = raw_input(source.path)
    if not found:
        raise DataError(
            f"data.{name}.path={source.path}: there is no such file, folder or match (looked for "
            f"{absolute(source.path)}). A relative path is relative to the repository."
        )
    full = [info for info in found if info.size]
    with ThreadPoolExecutor(16) as pool:
        all_heads = list(pool.map(lambda info: read_head(filesystem, info.path, source), full))
    heads = [head for head in all_heads if head.has_rows or head.columns]
    if not heads:
        raise DataError(
            f"data.{name}.path={source.path}: all {len(found)} files are empty, first {found[0].path}"
        )
    if not any(head.has_rows for head in heads):
        raise DataError(
            f"data.{name}.path={source.path}: no rows, only header lines, first in {heads[0].path}"
        )
    if source.format == "jsonl":
        heads = with_rare_keys(filesystem, heads, columns.values())
    groups: dict[tuple[object, ...], list[Head]] = {}
    _require(name, source, heads, columns)
    for head in heads:
        ours = tuple(head.find(column)[0] for column in columns.values())
        of_folders = tuple((column, head.keys[column]) for column in ours if head.of_folder(column))
        layout: tuple[object, ...] = head.columns if source.format != "jsonl" else ()
        if source.format == "parquet":
            layout = tuple(head.types.items())
        groups.setdefault((layout, ours, of_folders, head.encoding, head.path.endswith(".zst")), []).append(
            head
        )
    _require_types(name, source, heads, columns, several)
    return Opened(
        name=name,
        source=source,
        columns=columns,
        several=several,
        filesystem=filesystem,
        size=sum(info.size for info in full),
        heads=tuple(heads),
        groups=tuple(_group(source, columns, files) for files in groups.values()),
    )


def _group(source: Source, columns: dict[str, str], heads: Sequence[Head]) -> Group:
    return Group(
        paths=tuple(head.path for head in heads),
        uris=tuple(_uri(source.path, head.path) for head in heads),
        head=heads[0],
        lines=tuple(sorted({head.line for head in heads if head.line is not None})),
        columns={ours: heads[0].find(column)[0] for ours, column in columns.items()},
    )


def _require(name: str, source: Source, heads: Sequence[Head], columns: dict[str, str]) -> None:
    """Raise a DataError for all columns that are missing or ambiguous, each told of the first such file."""
    lines, told = [], set[str]()
    for head in heads:
        wrong = []
        for ours, column in columns.items():
            found = head.find(column)
            if len(found) == 1 or ours in told:
                continue
            told.add(ours)
            key, present = _key(name, source, ours), [*head.columns, *head.keys]
            if found:
                twice = f"{len(found)} times" if found[0] == found[1] else f"as {' or '.join(found)}"
                wrong.append(f"{head.path} has the column {column!r} ({key}) {twice}")
            else:
                close = difflib.get_close_matches(column, present, n=1, cutoff=0.5)
                near = f"; nearest: {close[0]!r}" if close else ""
                wrong.append(f"{head.path} has no column {column!r} ({key}){near}")
        if wrong:
            wrong[-1] += f". Columns found: {', '.join(present)} (read as {source.format})"
        lines += wrong
    if lines:
        also = " and .delimiter" if source.format in ("csv", "tsv") else ""
        todo = f"Name another column, or check data.{name}.format{also}."
        raise DataError("\n".join(lines) + f". {todo}")


def _require_types(
    name: str, source: Source, heads: Sequence[Head], columns: dict[str, str], several: frozenset[str]
) -> None:
    """Raise a DataError for all columns with another type in another file, or that are lists unasked."""
    wrong: dict[str, str] = {}
    for ours, column in columns.items():
        known: tuple[str, str] | None = None
        for head in heads:
            type_ = head.types.get(head.find(column)[0], TEXT)
            of_type = f"the column {column!r} ({_key(name, source, ours)}) is of type"
            if source.format == "parquet" and kind(type_) and (kind(type_) == "list") != (ours in several):
                lists = (
                    "list: true is for lists." if ours in several else "Lists need a field with list: true."
                )
                wrong.setdefault(ours, f"{head.path}: {of_type} {type_}. {lists}")
            elif source.format != "jsonl" and kind(type_) and known and kind(known[1]) != kind(type_):
                text = f"data.{name}: {of_type} {known[1]} in {known[0]}, but {type_} in {head.path}. "
                wrong.setdefault(ours, f"{text}Files of one source need the same types.")
            known = (head.path, type_) if kind(type_) else known
    if wrong:
        raise DataError("\n".join(wrong.values()))


def _key(name: str, source: Source, ours: str) -> str:
    """The key of the configuration that names a column."""
    return f"data.{name}.columns.{ours}" if ours in source.columns else f"fields: {_fields([ours])}.column"


def _fields(ours: Iterable[str]) -> str:
    return ", ".join(sorted(name.removeprefix("raw:") for name in ours))


def _uri(given: str, path: str) -> str:
    """The URI of a file: pyarrow's paths have no scheme, and on HDFS no host either."""
    if "://" not in given:
        return spark_uri(path)
    scheme, _, rest = given.partition("://")
    if path.startswith("/"):
        return f"{scheme}://{rest.partition('/')[0]}{path}"
    return spark_uri(f"{scheme}://{path}")

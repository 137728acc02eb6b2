"""The beginning of a raw file, read without Spark: its columns, their types, and how to read it."""

import codecs
import csv
import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any
from urllib.parse import unquote

import pyarrow as pa
import pyarrow.fs
import pyarrow.parquet as pq

from recsys_dist.config import Source
from recsys_dist.errors import ConfigError, DataError

HEAD_BYTES = 1 << 20
HEAD_LINES = 100
RARE_BYTES = 256 << 20
"""Of all files of a source, decompressed, in which a key is looked for that no file begins with."""
TEXT = "text"
"""Type of a column of a text file that says nothing about its types."""
MIXED = "mixed"
"""Type of a JSON key with values of several types."""
BYTE_ORDER_MARKS = {
    "utf-16": {codecs.BOM_UTF16_LE: "utf-16-le", codecs.BOM_UTF16_BE: "utf-16-be"},
    "utf-32": {codecs.BOM_UTF32_LE: "utf-32-le", codecs.BOM_UTF32_BE: "utf-32-be"},
}
JSON_TYPES: dict[type, str] = {bool: "bool", int: "number", float: "number", str: "string", list: "list"}


@dataclass(frozen=True)
class Head:
    """What the beginning of one file says."""

    path: str
    """Within its filesystem."""
    columns: tuple[str, ...]
    """csv and tsv: all columns in order, as the header names them; others: the names."""
    types: dict[str, str]
    """Column to type. parquet: as Arrow writes it; jsonl: number, string, bool, list, object, null or mixed;
    others: what follows the colon in a typed header, else text."""
    has_rows: bool
    line: str | None = None
    """csv and tsv: the decoded header line, without a byte order mark; None: the file has none."""
    encoding: str = "utf-8"
    """Python's name of the encoding, with its byte order: utf-16-le rather than utf-16."""
    nanoseconds: frozenset[str] = frozenset()
    """parquet: columns of timestamps in nanoseconds."""
    local: frozenset[str] = frozenset()
    """parquet: columns of timestamps without a zone."""
    keys: dict[str, str] = field(default_factory=dict)
    """Column to the name, as written, of the folders `name=value` that the file is in."""

    def find(self, column: str) -> list[str]:
        """The columns that a name in the configuration means: one, unless it is missing or ambiguous.

        An exact match wins over a typed header's `name:type`, that over a folder's key.
        """
        exact = [name for name in self.columns if name == column]
        typed = [name for name in self.columns if _untyped(name) == column]
        return exact or typed or [key for key in self.keys if key == column]

    def untyped(self, column: str) -> str:
        """A column's name without the type of a typed header, unless several would be called so."""
        name = _untyped(column)
        return (
            name
            if name
            and self.types.get(column, TEXT) == column.rpartition(":")[2]
            and len(self.find(name)) == 1
            else column
        )

    def of_folder(self, column: str) -> bool:
        """Is this a column that the file itself lacks and its folders have?"""
        return column in self.keys and column not in self.columns


def read_head(filesystem: pyarrow.fs.FileSystem, path: str, source: Source) -> Head:
    """Read the beginning of a file, decompressed.

    Raises:
        ConfigError: the encoding is none of text.
        DataError: it cannot be read in this format; names the file.
    """
    folders = [part.partition("=") for part in path.split("/")[:-1]]
    keys = {unquote(name): name for name, equals, _ in folders if equals and name}
    try:
        if source.format == "parquet":
            return _parquet_head(filesystem, path, keys)
        with filesystem.open_input_stream(path) as stream:
            raw = stream.read(HEAD_BYTES)
    except (OSError, pa.ArrowInvalid) as error:
        raise DataError(
            f"{path} cannot be read as {source.format}: {error}. Is it complete? Write it anew, or remove it."
        ) from None
    encoding = _encoding(source, path, raw)
    # Spark ends a line at the same characters; str.splitlines knows more.
    ends = "\n" if is_wide(encoding) else "\r\n|\r|\n"
    try:
        text = raw.decode(encoding, errors="replace").removeprefix("\ufeff")
    except LookupError as error:
        raise ConfigError(f"encoding {source.encoding!r}: {error}. Give one such as latin-1.") from None
    lines = re.split(ends, text)
    full = [stripped for line in lines if (stripped := line.strip("\r")).strip()]
    if source.format == "jsonl":
        types = _json_types(full[:HEAD_LINES])
        return Head(path, tuple(types), types, bool(full), encoding=encoding, keys=keys)
    if source.header is True:
        line = full[0] if full else None
        columns = split(line, source) if line is not None else []
        has_rows = len(full) > 1
    else:
        columns = list(source.header) if isinstance(source.header, tuple) else []
        line, has_rows = None, bool(full)
    types = {name: name.rpartition(":")[2] if _untyped(name) else TEXT for name in columns}
    return Head(path, tuple(columns), types, has_rows, line, encoding, keys=keys)


def with_rare_keys(
    filesystem: pyarrow.fs.FileSystem, heads: Sequence[Head], wanted: Iterable[str]
) -> list[Head]:
    """The heads of jsonl files, with keys that are wanted and that their first lines leave out, as writers do
    with what is null: a key that another file begins with, or that comes later.

    Args:
        filesystem: of the files.
        heads: of all of them.
        wanted: names of keys.
    """
    names = [name for name in dict.fromkeys(wanted) if any(not head.find(name) for head in heads)]
    there = {name for name in names if any(head.find(name) for head in heads)}
    left, room = set(names) - there, RARE_BYTES
    for head in heads:
        if not left or room <= 0:
            break
        with filesystem.open_input_stream(head.path) as stream:
            reader, rest = codecs.getreader(head.encoding)(stream, "replace"), ""
            while left and room > 0 and (text := reader.read(HEAD_BYTES)):
                room -= len(text)
                *lines, rest = (rest + text).split("\n")
                # Most lines have none of them, and need not be parsed.
                asked = [line for line in lines if any(f'"{name}"' in line for name in left)]
                left -= set(_json_types(asked))
            left -= set(_json_types([rest]))
    there |= set(names) - left
    found = []
    for head in heads:
        new = [name for name in names if name in there and not head.find(name)]
        types = head.types | dict.fromkeys(new, "null")
        found.append(replace(head, columns=(*head.columns, *new), types=types))
    return found


def delimiter(source: Source) -> str:
    """What stands between the values of a csv or tsv source."""
    return source.delimiter or {"csv": ",", "tsv": "\t"}[source.format]


def quote(source: Source) -> str:
    """The quote character of a csv or tsv source; empty: none."""
    return {"csv": '"', "tsv": ""}[source.format] if source.quote is None else source.quote


def split(line: str, source: Source) -> list[str]:
    """The values of one line of a csv or tsv source."""
    between, mark = delimiter(source), quote(source)
    if mark and len(between) == 1:
        return next(csv.reader([line], delimiter=between, quotechar=mark))
    # Python's csv module knows no delimiter of several characters.
    values = line.split(between)
    quoted = [mark and len(value) > 1 and value[0] == value[-1] == mark for value in values]
    return [value[1:-1] if is_quoted else value for value, is_quoted in zip(values, quoted, strict=True)]


def is_wide(encoding: str) -> bool:
    """Are a line's end and other ASCII characters more than one byte?"""
    return encoding.startswith(("utf-16", "utf-32"))


def kind(type_: str) -> str | None:
    """What a type of `Head.types` is compared by: the width of a number does not matter. None: anything."""
    if type_.startswith("dictionary"):
        return kind(type_.partition("values=")[2].partition(",")[0])
    for pattern, found in {
        "null|text|mixed": None,
        "u?int.*|float.*|half.*|double|decimal.*|number": "number",
        "(large_)?string.*|(large_)?binary.*|fixed_size_binary.*|string": "string",
        "timestamp.*": "timestamp",
        "(large_|fixed_size_)?list.*": "list",
        "(struct|object).*": "object",
    }.items():
        if re.fullmatch(pattern, type_):
            return found
    return type_


def _untyped(name: str) -> str | None:
    """`user_id` of a typed header's `user_id:token`."""
    typed = re.fullmatch(r"(.+):\w+", name)
    return typed[1] if typed else None


def _encoding(source: Source, path: str, raw: bytes) -> str:
    name = codecs.lookup(source.encoding).name.removesuffix("-sig")
    marks = BYTE_ORDER_MARKS.get(name)
    if not marks:
        return name
    for mark, exact in marks.items():
        if raw.startswith(mark):
            return exact
    raise DataError(
        f"{path} has no byte order mark, so that encoding {source.encoding} does not say how to read it. "
        f"Set encoding to {name}-le (most common) or {name}-be."
    )


def _parquet_head(filesystem: pyarrow.fs.FileSystem, path: str, keys: dict[str, str]) -> Head:
    with filesystem.open_input_file(path) as file:
        parquet = pq.ParquetFile(file)
        schema, rows = parquet.schema_arrow, parquet.metadata.num_rows
    times = [column for column in schema if pa.types.is_timestamp(column.type)]
    return Head(
        path,
        tuple(schema.names),
        {column.name: str(column.type) for column in schema},
        rows > 0,
        nanoseconds=frozenset(column.name for column in times if column.type.unit == "ns"),
        local=frozenset(column.name for column in times if column.type.tz is None),
        keys=keys,
    )


def _json_types(lines: Iterable[str]) -> dict[str, str]:
    """The keys of some lines with their types."""
    types: dict[str, str] = {}
    for line in lines:
        try:
            row: Any = json.loads(line)
        except ValueError:
            continue
        for key, value in row.items() if isinstance(row, dict) else ():
            found = "null" if value is None else JSON_TYPES.get(type(value), "object")
            known = types.setdefault(key, found)
            if known == "null":
                types[key] = found
            elif found not in ("null", known):
                types[key] = MIXED
    return types

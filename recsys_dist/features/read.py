"""Raw inputs as columns by role, each row with a hash, the file it came from and its own text.

A row of text is a line: a quoted value of a csv file cannot hold a line break. The two halves of a row with
one have the wrong number of columns.
"""

import re
import shutil
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import reduce
from urllib.parse import unquote

import pyarrow as pa
import pyarrow.fs
from py4j.protocol import Py4JJavaError  # type: ignore[import-untyped]
from pyspark.errors import PySparkException
from pyspark.sql import Column, DataFrame, SparkSession
from pyspark.sql import functions as F
from pyspark.sql.types import (
    ArrayType,
    DateType,
    DoubleType,
    FloatType,
    LongType,
    StringType,
    StructField,
    StructType,
    TimestampNTZType,
    TimestampType,
)

from recsys_dist.config import Source, absolute
from recsys_dist.errors import ConfigError, DataError
from recsys_dist.features.heads import Head, delimiter, is_wide, quote
from recsys_dist.features.session import spark_uri
from recsys_dist.features.source import Group, Opened

WRONG_COLUMNS = "wrong number of columns"
NOT_JSON = "not JSON"
TIMES = ("timestamp", "active_from", "active_to")
"""Our names of columns that stay times where they are."""
LITERAL_PATHS = {"__globPaths__": "false"}
"""Spark's own option; without it a path is a glob."""
PACKED = (".gz", ".bz2", ".zst")
UNPACKED = "/unpacked-zstd/"
"""Folder of the scratch place that decompressed files are in, under the path they had."""
END, CORRUPT = "_recsys_dist_end", "_recsys_dist_corrupt"
"""Names that no JSON object has as a key."""


def read(spark: SparkSession, opened: Opened, scratch: str, placed: bool = False) -> DataFrame:
    """Read the rows of a source.

    Args:
        spark: with the settings of `session.start`.
        opened: of `open_source`.
        scratch: path or URI of a folder for decompressed copies, where Spark cannot read the files itself.
            They must stay there until the rows are no longer used.
        placed: add `_place`, by which the rows of a file are in order.

    Returns:
        the columns by our names, as strings without the spaces around them, or as array<string> where they
        hold lists; null for an empty or blank value. Times of Parquet files are timestamps. Further columns:
        `_hash` (bigint, of the row and its file: equal for equal texts in one file), `_source` (path of the
        file), `_raw` (the row's text; may hold bytes that are not UTF-8: see `readable`) and `_broken` (why
        the row has no columns, else null). `_source` and `_raw` take time only where they are used.

    Raises:
        ConfigError: Java does not know the encoding.
        DataError: a file cannot be decompressed.
    """
    one = _read_parquet if opened.source.format == "parquet" else _read_text
    groups = [one(spark, opened, group, scratch, placed) for group in opened.groups]
    return reduce(DataFrame.unionByName, groups)


def unreadable(error: Exception | str, opened: Iterable[Opened] = ()) -> str | None:
    """The path of the raw file for which a Spark job failed; None: it failed for another reason.

    Args:
        error: what the job raised, or its text.
        opened: the sources that it read. Spark 3.5 does not always name the file: then the packed ones of
            these are read, once, to find the one that cannot be.
    """
    for pattern in (
        r"while reading file (\S+?)\.?\s",
        r"footer for file:? (\S+?)\.?\s",
        r"File (\S+) does not",
    ):
        found = re.search(pattern, f"{error} ")
        if found:
            return re.sub("^file:/+", "/", unquote(found[1]))
    if "FileScanRDD" in str(error):
        for source in opened:
            for path in (path for group in source.groups for path in group.paths if path.endswith(PACKED)):
                try:
                    with source.filesystem.open_input_stream(path) as stream:
                        while stream.read(1 << 24):
                            pass
                except (OSError, pa.ArrowInvalid):
                    return path
    return None


def trimmed(text: Column) -> Column:
    """A text without the spaces around it; null where nothing is left."""
    # Most begin with a visible character: they are not blank, whatever follows.
    return F.when((text >= "!") | (F.trim(text) != ""), F.trim(text))


def readable(column: str) -> Column:
    """A text as Java reads it: with U+FFFD for what is not UTF-8."""
    return F.regexp_extract(column, "(?s).*", 0)


def reads_zstd(spark: SparkSession) -> bool:
    """Spark reads zstd text since 4.3; before, only where Hadoop has its native library."""
    return tuple(map(int, spark.version.split(".")[:2])) >= (4, 3)


def unpack(filesystem: pyarrow.fs.FileSystem, paths: Iterable[str], scratch: str) -> list[str]:
    """Decompress files into a folder of `scratch`, under the paths they have without their last suffix.

    Returns:
        the copies, as Spark names them.

    Raises:
        DataError: a file cannot be decompressed; names it.
    """
    to, folder = pyarrow.fs.FileSystem.from_uri(absolute(scratch))

    def copy(path: str) -> str:
        name = UNPACKED + path.lstrip("/").rpartition(".")[0]
        if not to.get_file_info(folder + name).is_file:
            to.create_dir((folder + name).rpartition("/")[0], recursive=True)
            try:
                with (
                    filesystem.open_input_stream(path) as packed,
                    to.open_output_stream(f"{folder}{name}.tmp") as plain,
                ):
                    shutil.copyfileobj(packed, plain, 1 << 24)
            except (OSError, pa.ArrowInvalid) as error:
                raise DataError(f"{path} cannot be decompressed: {error}. Is it complete?") from None
            to.move(f"{folder}{name}.tmp", folder + name)
        return spark_uri(absolute(scratch).rstrip("/") + name)

    with ThreadPoolExecutor(4) as pool:
        return list(pool.map(copy, paths))


def _read_text(spark: SparkSession, opened: Opened, group: Group, scratch: str, placed: bool) -> DataFrame:
    source, encoding = opened.source, group.head.encoding
    charset = _charset(spark, opened.name, source, encoding)
    uris, path = list(group.uris), F.col("_metadata.file_path")
    if group.paths[0].endswith(".zst") and not reads_zstd(spark):
        uris = unpack(opened.filesystem, group.paths, scratch)
        origin = group.uris[0].removesuffix(group.paths[0].lstrip("/"))
        path = F.concat(F.lit(origin), F.substring_index(path, UNPACKED, -1), F.lit(".zst"))
    wide = {"encoding": charset, "lineSep": "\n"} if is_wide(encoding) else {}
    # Spark decodes no text: to it all bytes are UTF-8.
    binary = F.col("value").cast("binary")
    line = F.col("value") if encoding == "utf-8" else F.decode(binary, charset)
    lines = spark.read.options(**LITERAL_PATHS, **wide).text(uris)
    # However a file is cut into blocks, one task reads a block from beginning to end, and its ids ascend.
    place = F.struct("_metadata.file_block_start", F.monotonically_increasing_id())
    told = {"_path": path, "_bytes": binary, "_line": line} | ({"_place": place} if placed else {})
    lines = lines.select(*(column.alias(name) for name, column in told.items()))
    if wide:
        lines = lines.withColumn("_line", F.expr("trim(BOTH '\\r\ufeff' FROM _line)"))
    # Most lines begin with a visible character: they are not blank, whatever follows.
    lines = lines.where((F.col("_line") >= "!") | (F.trim("_line") != ""))
    if group.lines:
        lines = lines.where(~F.col("_line").isin(list(group.lines)))

    if source.format == "jsonl":
        names = [name for name in dict.fromkeys(group.columns.values()) if not group.head.of_folder(name)]
        parsed, reason = _from_json(names), NOT_JSON
    else:
        names = list(group.head.columns)
        parts, mark = F.split("_line", literal(delimiter(source))), quote(source)
        # Splitting takes half as long as parsing, and means the same where there is no quote.
        has_quote = F.col("_line").contains(mark) if mark else F.lit(False)
        lines = lines.withColumn("_parts", F.when(~has_quote, parts))
        parsed, reason = _from_delimited(len(names), source), WRONG_COLUMNS
    # A generator is evaluated once a row; several columns of one struct might each parse the line anew.
    places = [f"_{place}" for place in range(len(names))]
    rows = lines.select(*told, F.inline(F.array(parsed)).alias(*places, "_end", "_corrupt"))

    if encoding == "utf-8":
        invalid = readable("_line") != F.col("_line")
    else:
        invalid = F.encode(F.decode("_bytes", charset), charset) != F.col("_bytes")
    corrupt = F.col("_corrupt").isNotNull()
    columns, suspect = [], corrupt
    for ours, name in group.columns.items():
        if group.head.of_folder(name):
            value = _of_folder(group.head.keys[name])
        else:
            value = trimmed(F.col(places[names.index(name)]))
            suspect = suspect | F.coalesce(value.contains("\ufffd"), F.lit(False))
        columns.append((_values(value) if ours in opened.several else value).alias(ours))
    return rows.select(
        *columns,
        F.xxhash64("_line", "_path").alias("_hash"),
        _source().alias("_source"),
        F.col("_line").alias("_raw"),
        F.when(suspect & invalid, f"not {source.encoding}").when(corrupt, reason).alias("_broken"),
        *(["_place"] if placed else []),
    )


def _from_delimited(columns: int, source: Source) -> Column:
    """Struct of a line's values, of what follows them, and of a text: null where all is well."""
    parts, mark = F.col("_parts"), quote(source)
    names = [f"_{place}" for place in range(columns)]
    fits = F.size(parts) == columns
    nothing = F.lit(None).cast("string")
    split = F.struct(
        *(F.get(parts, F.lit(place)).alias(name) for place, name in enumerate(names)),
        nothing.alias("_end"),
        F.when(~fits, "").alias("_corrupt"),
    )
    if not mark:
        return split
    options = {
        "sep": delimiter(source).replace("\\", "\\\\"),  # a backslash begins an escape
        "quote": mark,
        "escape": mark,  # RFC 4180: a quote in a quoted value is doubled
        "columnNameOfCorruptRecord": "_corrupt",
        "mode": "PERMISSIVE",
    }
    # One more delimiter: a quote that is not closed swallows it, and the number of columns is wrong.
    closed = F.concat("_line", F.lit(delimiter(source)))
    parsed = F.from_csv(closed, F.lit(_strings(*names, "_end", "_corrupt").simpleString()), options)
    return F.when(parts.isNotNull(), split).otherwise(parsed)


def _from_json(keys: list[str]) -> Column:
    """As `_from_delimited`, of a line with a JSON object; the key of nothing is null."""
    options = {"columnNameOfCorruptRecord": CORRUPT, "mode": "PERMISSIVE"}
    nothing = [F.lit(None).cast("string").alias(key) for key in [*keys, END]]
    is_object = F.ltrim("_line").startswith("{") & F.rtrim("_line").endswith("}")
    return F.when(is_object, F.from_json("_line", _strings(*keys, END, CORRUPT), options)).otherwise(
        F.struct(*nothing, F.lit("").alias(CORRUPT))
    )


def _values(text: Column) -> Column:
    """The values of a JSON list; of another value itself."""
    return F.coalesce(F.from_json(text, ArrayType(StringType())), F.when(text.isNotNull(), F.array(text)))


def _strings(*names: str) -> StructType:
    return StructType([StructField(name, StringType()) for name in names])


def literal(text: str) -> str:
    """A regular expression that matches the text itself."""
    return re.sub(r"(\W)", r"\\\1", text)


def _charset(spark: SparkSession, name: str, source: Source, encoding: str) -> str:
    """Java's name of an encoding of Python's; sets how Spark 4 decodes, as Spark 3 does."""
    if encoding == "utf-8":
        return encoding
    for key in ("javaCharsets", "codingErrorAction"):
        spark.conf.set(f"spark.sql.legacy.{key}", "true")
    charset = re.sub(r"^utf-(16|32)-(le|be)$", r"UTF-\1\2", encoding)
    try:
        spark.range(1).select(F.encode(F.lit(""), charset)).collect()
    except (PySparkException, Py4JJavaError):
        raise ConfigError(
            f"data.{name}.encoding={source.encoding!r} is not known to Java. Give another name of it, "
            f"such as windows-1252 in place of cp1252."
        ) from None
    return charset


def _path() -> Column:
    """Spark's name of a row's file, decoded; a plus sign is not encoded in it."""
    return F.url_decode(F.replace("_path", F.lit("+"), F.lit("%2B")))


def _source() -> Column:
    return F.regexp_replace(_path(), "^file:/+", "/")


def _of_folder(key: str) -> Column:
    """The value of the last folder `key=value` of a row's path, which writers encode as in a URI."""
    value = F.regexp_extract(_path(), f".*/{literal(key)}=([^/]*)/", 1)
    encoded = value.contains("%") & value.rlike("^([^%]|%[0-9A-Fa-f]{2})*$")
    value = F.when(encoded, F.url_decode(F.replace(value, F.lit("+"), F.lit("%2B")))).otherwise(value)
    return F.when(value != "__HIVE_DEFAULT_PARTITION__", trimmed(value))


def _read_parquet(spark: SparkSession, opened: Opened, group: Group, scratch: str, placed: bool) -> DataFrame:
    rows = spark.read.options(**LITERAL_PATHS).parquet(*group.uris)
    everything = F.struct(*(F.col(_quoted(column)) for column in rows.columns))
    columns = []
    for ours, column in group.columns.items():
        if group.head.of_folder(column):
            value = _of_folder(group.head.keys[column])
        elif ours in opened.several:
            value = F.col(_quoted(column)).cast("array<string>")
        elif ours in TIMES:
            value = _time(rows, column, group.head, opened.source.timezone)
        else:
            value = _text(rows, column, ours)
        columns.append(value.alias(ours))
    return rows.withColumn("_path", F.col("_metadata.file_path")).select(
        *columns,
        # A row's place in its file, unlike all its columns, costs nothing to read.
        F.xxhash64("_path", "_metadata.row_index").alias("_hash"),
        _source().alias("_source"),
        F.to_json(everything).alias("_raw"),
        F.lit(None).cast("string").alias("_broken"),
        *([F.col("_metadata.row_index").alias("_place")] if placed else []),
    )


def _text(rows: DataFrame, column: str, ours: str) -> Column:
    text = trimmed(F.col(_quoted(column)).cast("string"))
    if ours != "value" and isinstance(rows.schema[column].dataType, DoubleType | FloatType):
        # Integers that pandas made floats of, for one missing value: 7.0 is the id 7.
        whole = F.expr(f"try_cast({_quoted(column)} AS decimal(38,0))")
        return F.when(whole == F.col(_quoted(column)), whole.cast("string")).otherwise(text)
    return text


def _time(rows: DataFrame, column: str, head: Head, timezone: str) -> Column:
    """A timestamp where the column holds times or days, else its text."""
    value, type_ = F.col(_quoted(column)), rows.schema[column].dataType
    local = isinstance(type_, TimestampNTZType | DateType)
    if isinstance(type_, LongType) and column in head.nanoseconds:
        value, local = F.timestamp_micros(F.expr(f"{_quoted(column)} div 1000")), column in head.local
    elif not local and not isinstance(type_, TimestampType):
        return _text(rows, column, "timestamp")
    value = value.cast("timestamp")
    return F.to_utc_timestamp(value, timezone) if local and timezone != "UTC" else value


def _quoted(column: str) -> str:
    return "`" + column.replace("`", "``") + "`"

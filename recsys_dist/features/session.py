"""The Spark session that the stages run in: quiet, in UTC, sized for the data."""

import json
import logging
import math
import os
import shlex
import subprocess
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from itertools import count
from typing import Any

import pyarrow as pa
import pyarrow.fs
from py4j.protocol import Py4JError  # type: ignore[import-untyped]
from pyspark.sql import DataFrame, SparkSession
from pyspark.sql import functions as F

from recsys_dist.config import Config
from recsys_dist.job import require_java
from recsys_dist.spark import NOWHERE, arguments, is_own, own_environment

SCRATCH = "scratch"
"""Folder in the run for what is needed only while it is made."""
MEBIBYTE = 1 << 20
AT_ONCE = 3
"""Jobs that run side by side, so that the end of one does not leave cores idle."""
SMALL, LARGE = 8 * MEBIBYTE, 128 * MEBIBYTE
"""Bytes of a task: the least that is worth one, and the most that is sorted in memory."""
ADAPTIVE_FROM = 1024 * MEBIBYTE
"""Input from which on Spark plans anew after every stage. Of less, nothing that it could join or split is
worth the planning, which is a tenth of the whole time for MovieLens 1M."""
DYING = 60
"""Seconds that a Java process that no longer answers may take to end."""
FILE = 256 * MEBIBYTE
"""Size of a file, where a table is so large."""

try:
    from pyspark.logger import PySparkLogger
except ImportError:
    pass  # PySpark 3.5, which does not log what it raises
else:
    # Spark's Python side logs every failed query with its Java stack; our errors say what was wrong.
    PySparkLogger.getLogger("SQLQueryContextLogger").setLevel(logging.CRITICAL)

# Where Java dies, py4j writes to the root log where it stood. What Java died of is told by us.
logging.getLogger().addFilter(lambda record: record.getMessage() != "Exception while sending command.")

RUNTIME = {
    "spark.sql.session.timeZone": "UTC",
    # What is no number or date is found by try_cast and set aside; anything else must not become null.
    "spark.sql.ansi.enabled": "true",
    # Spark 3 raises on a time that Spark 2 would have read in another way.
    "spark.sql.legacy.timeParserPolicy": "CORRECTED",
    # Aggregates over rows in order, as a user's events are, read them one after the other.
    "spark.sql.execution.useObjectHashAggregateExec": "false",
    "spark.sql.execution.replaceHashWithSortAgg": "true",
    # Parts of a partitioned table are written side by side, without sorting all rows by the part's name.
    "spark.sql.optimizer.plannedWrite.enabled": "false",
    "spark.sql.maxConcurrentOutputFileWriters": "8",
    # What is cached is read a few times and thrown away: compressing it takes longer.
    "spark.sql.inMemoryColumnarStorage.compressed": "false",
    # Vocabularies of a million tokens are joined without a shuffle of the log.
    "spark.sql.autoBroadcastJoinThreshold": "64m",
    # The example's columns are taken from the user's array in compiled code, however many there are.
    "spark.sql.codegen.maxFields": "1000",
    "spark.sql.parquet.compression.codec": "zstd",
    # What Arrow calls timestamp[us, UTC]; Spark's own default is INT96.
    "spark.sql.parquet.outputTimestampType": "TIMESTAMP_MICROS",
    # pandas writes nanoseconds, which Spark reads as numbers or not at all.
    "spark.sql.legacy.parquet.nanosAsLong": "true",
    # A row of a csv file counts as broken by its number of columns, whichever of them are used.
    "spark.sql.csv.parser.columnPruning.enabled": "false",
    # Zero-byte _SUCCESS files would break readers that take every file of a folder.
    "mapreduce.fileoutputcommitter.marksuccessfuljobs": "false",
}

_TYPES = {
    pa.int32(): "int",
    pa.int64(): "bigint",
    pa.float32(): "float",
    pa.string(): "string",
    pa.timestamp("us", tz="UTC"): "timestamp",
    pa.list_(pa.int32()): "array<int>",
    pa.list_(pa.float32()): "array<float>",
    pa.bool_(): "boolean",
    pa.date32(): "date",
}


class Steps:
    """Seconds a step, in the order they ended."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def measure(self, name: str) -> Iterator[None]:
        """Time the block."""
        begin = time.perf_counter()
        yield
        self.seconds[name] = round(time.perf_counter() - begin, 2)


@contextmanager
def start(name: str, config: Config, input_bytes: int) -> Iterator[SparkSession]:
    """Yield a session, the running one where there is one; a session started here is stopped at the end.

    In a plain Python process Spark starts with `spark.submit` of the configuration, as if by spark-submit.
    `spark.conf` is applied last.

    Args:
        name: shown in Spark's UI.
        config: its section `spark` is used.
        input_bytes: size of the input, which decides the number of shuffle partitions.

    Raises:
        ConfigError: Spark would not start, because of Java.
    """
    require_java()
    running = SparkSession.getActiveSession()
    spark = running or _new(name, config)
    try:
        if "spark.sql.shuffle.partitions" not in config.spark.conf:
            partitions = shuffle_partitions(input_bytes, spark.sparkContext.defaultParallelism)
            spark.conf.set("spark.sql.shuffle.partitions", str(partitions))
        adaptive = {"spark.sql.adaptive.enabled": str(input_bytes >= ADAPTIVE_FROM).lower()}
        for key, value in (RUNTIME | adaptive).items():
            if key not in config.spark.conf:
                spark.conf.set(key, value)
        yield spark
    finally:
        if running is None:
            # After its death there is nothing to stop, and what it died of is to be told: by us, not by the
            # log of what connects to it.
            logging.disable(logging.CRITICAL)
            with suppress(Py4JError, ConnectionError):
                spark.stop()
            logging.disable(logging.NOTSET)


def exit_code(spark: SparkSession) -> int | None:
    """How Spark's Java process ended, where it was started from here and has ended or does so at once."""
    process = getattr(spark.sparkContext._gateway, "proc", None)
    try:
        return None if process is None else int(process.wait(timeout=DYING))
    except subprocess.TimeoutExpired:
        return None


def shuffle_partitions(input_bytes: int, cores: int) -> int:
    """A task for every 128 MiB; of less input one for every 8 MiB while there are cores; never a last round
    with idle ones.
    """
    tasks = max(math.ceil(input_bytes / LARGE), min(cores, math.ceil(input_bytes / SMALL)), 1)
    return tasks if tasks < cores else math.ceil(tasks / cores) * cores


def _new(name: str, config: Config) -> SparkSession:
    if "PYSPARK_GATEWAY_PORT" not in os.environ:  # spark-submit sets it
        os.environ["PYSPARK_SUBMIT_ARGS"] = shlex.join([*arguments(config), "pyspark-shell"])
        if is_own():
            os.environ.update(own_environment() | os.environ)
    properties = {"spark.ui.showConsoleProgress": "false", **config.spark.conf}
    if os.environ.get("SPARK_CONF_DIR") != str(NOWHERE):
        properties.setdefault("spark.log.level", "ERROR")
    builder = SparkSession.builder.appName(f"recsys_dist {name}")
    for key, value in properties.items():
        builder = builder.config(key, value)
    return builder.getOrCreate()


def spark_uri(uri: str) -> str:
    """The name that Spark has for a path or URI: `s3://` is `s3a://` there, a plain path a local file."""
    if "://" not in uri:
        return f"file://{uri}"
    return f"s3a://{uri.removeprefix('s3://')}" if uri.startswith("s3://") else uri


def write(
    frame: DataFrame,
    uri: str,
    schema: pa.Schema,
    partition_by: str | None = None,
    varied: Collection[str] = (),
) -> None:
    """Write a new Parquet folder with exactly the columns and types of `schema`.

    Args:
        frame: has at least these columns.
        uri: of the folder.
        schema: of the files.
        partition_by: a further column, with a folder a value.
        varied: columns with so many different values that a dictionary of them takes time and saves no room.

    Raises:
        pyspark.errors.AnalysisException: the folder exists already.
    """
    columns = [frame[column.name].cast(_TYPES[column.type]).alias(column.name) for column in schema]
    if partition_by:
        columns.append(frame[partition_by])
    leaf = {name: ".list.element" if pa.types.is_list(schema.field(name).type) else "" for name in varied}
    plain = {f"parquet.enable.dictionary#{name}{leaf[name]}": "false" for name in varied}
    writer = frame.select(*columns).write.options(**plain)
    (writer.partitionBy(partition_by) if partition_by else writer).parquet(spark_uri(uri))


def read_table(spark: SparkSession, uri: str, schema: pa.Schema) -> DataFrame:
    """Read a Parquet folder that `write` wrote."""
    columns = ", ".join(f"`{column.name}` {_TYPES[column.type]}" for column in schema)
    return spark.read.schema(columns).parquet(spark_uri(uri))


def at_once(spark: SparkSession) -> int:
    """Number of tasks that keep all cores busy, where there is enough to do."""
    return min(_tasks(spark), spark.sparkContext.defaultParallelism)


def _tasks(spark: SparkSession) -> int:
    return int(spark.conf.get("spark.sql.shuffle.partitions") or 1)


def files(spark: SparkSession, size: int) -> int:
    """Number of files, and of tasks that write them, of a table of about `size` bytes.

    One for every 256 MiB; of less as many as there are cores, unless they would be very small. Never more
    than there are tasks anyway.
    """
    cores = spark.sparkContext.defaultParallelism
    return max(1, min(_tasks(spark), max(math.ceil(size / FILE), min(cores, math.ceil(size / SMALL)))))


def in_ranges(frame: DataFrame, key: str, size: int, partitions: int) -> DataFrame:
    """One partition for each range of an index from 1 to `size`, ascending.

    Unlike repartitionByRange it does not compute the frame twice, to sample it: the ranges are known. What is
    then grouped by RANGE, which is added, and any other columns stays where it is.
    """
    spark = frame.sparkSession
    if partitions == 1:
        return frame.withColumn(RANGE, F.lit(0)).repartition(1)
    names = _names(spark, partitions)
    place = F.floor((F.col(key) - 1) * partitions / max(size, 1)).cast("int")
    name = F.element_at(F.array(*(F.lit(names[i]).cast("int") for i in range(partitions))), place + 1)
    return frame.withColumn(RANGE, name).repartition(partitions, RANGE)


RANGE = "_range"
HASH_SEED = 42
"""Of F.hash and of what places a row in a partition."""


def _names(spark: SparkSession, partitions: int) -> dict[int, int]:
    """For each partition a number that Spark, which hashes what it partitions by, puts there."""
    # Not F.hash, which is this hash of an int: its job would wait for those that run.
    murmur = spark.sparkContext._jvm.org.apache.spark.unsafe.hash.Murmur3_x86_32(HASH_SEED)
    names: dict[int, int] = {}
    for number in count():
        names.setdefault(murmur.hashInt(number) % partitions, number)
        if len(names) == partitions:
            break
    return names


def literal_rows(spark: SparkSession, rows: Sequence[Mapping[str, Any]], columns: str) -> DataFrame:
    """A few rows of the driver's as a frame; unlike createDataFrame it needs no Python where the tasks run.

    Args:
        spark: the session.
        rows: a mapping a row, of JSON types.
        columns: names and Spark types, such as `name string, n bigint`.
    """
    return spark.range(1).select(
        F.inline(F.from_json(F.lit(json.dumps(rows)), f"array<struct<{_struct(columns)}>>"))
    )


def _struct(columns: str) -> str:
    return ",".join(":".join(column.split()) for column in columns.split(","))


def remove_checksums(filesystem: pyarrow.fs.FileSystem, path: str) -> None:
    """Remove the hidden .crc files that Hadoop writes beside every file of a local folder."""
    if not isinstance(filesystem, pyarrow.fs.LocalFileSystem):
        return
    for info in filesystem.get_file_info(pyarrow.fs.FileSelector(path, recursive=True)):
        if info.base_name.startswith(".") and info.base_name.endswith(".crc"):
            filesystem.delete_file(info.path)

"""Vocabularies: raw ids and words to indices from 1, which never move from night to night.

A new vocabulary begins with the most frequent tokens of the train part; the next night's continues it: known
tokens keep their index, new ones come after. Indices are assigned from sorted partitions and their offsets:
no step sees a whole vocabulary at once.
"""

import json
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import reduce

import pyarrow as pa
import pyarrow.compute as pc
from pyspark.sql import Column, DataFrame
from pyspark.sql import functions as F

from recsys_dist.errors import DataError
from recsys_dist.features.read import literal
from recsys_dist.features.session import AT_ONCE, read_table, write
from recsys_dist.schema import VOCAB, VocabularySpec
from recsys_dist.workspace import OpenRun

COUNTS = ("count", "positives", "tested")
"""Of a token: train events (ids) or rows; positive train events; test events."""
ROW_BITS = 33
"""monotonically_increasing_id holds a row's place in its partition in its lower 33 bits."""
FEW_TOKENS = 10_000
"""The vocabularies that are not larger are collected by one job: one each would take longer."""
FOLDER = "vocab"
ANCESTORS_KEPT = 400
"""More than a year of nights."""


@dataclass(frozen=True)
class Parent:
    """An earlier night's vocabulary."""

    rows: DataFrame
    """index and token."""
    spec: VocabularySpec
    where: str
    """Its folder, for error messages."""


class Vocabularies:
    """The vocabularies of all fields, in the run's vocab/.

    Args:
        tokens: `field`, `token`, COUNTS; a token any number of times; one whose count is 0 enters too.
        least: field to the count below which a new token gets no index.
        parents: field to the vocabulary that it continues.
        run: whose folder vocab/ is written here: whoever reads an index reads it from there, and not by
            the long way from the log.

    Raises:
        DataError: a parent is not what its description says.
    """

    def __init__(
        self, tokens: DataFrame, least: Mapping[str, int], parents: Mapping[str, Parent], run: OpenRun
    ) -> None:
        self._session, self._uri = tokens.sparkSession, f"{run.uri}/{FOLDER}"
        fields = sorted(least)
        counted = tokens.groupBy("field", "token").agg(*(F.sum(name).alias(name) for name in COUNTS))
        known = None
        if parents:
            known = reduce(
                DataFrame.unionByName,
                [parent.rows.withColumn("field", F.lit(name)) for name, parent in parents.items()],
            )
            counted = counted.join(known, ["field", "token"], "full_outer")
        else:
            counted = counted.withColumn("index", F.lit(None).cast("int"))
        rare = [
            (F.col("field") == name) & F.col("index").isNull() & (F.col("count") < n)
            for name, n in least.items()
            if n > 1
        ]
        if rare:
            counted = counted.where(~reduce(Column.__or__, rare))
        # Known tokens first, so that the place of a new one among the field's rows is its place after them.
        ordered = counted.orderBy("field", F.asc_nulls_last("index"), F.desc("count"), "token").select(
            "*",
            F.spark_partition_id().alias("_partition"),
            F.monotonically_increasing_id().bitwiseAND((1 << ROW_BITS) - 1).alias("_row"),
        )
        # Cached, so that the partitions that are counted are those that are numbered.
        cached = ordered.cache()
        found = cached.groupBy("field", "_partition").agg(F.count("*").alias("rows")).collect()
        counts = {(str(row["field"]), int(row["_partition"])): int(row["rows"]) for row in found}
        # Where a field's rows begin among those of a partition: fields are in order there.
        before = {name: [0] * (1 + max((part for _, part in counts), default=0)) for name in fields}
        for name in fields:
            earlier = 0
            for partition in sorted(part for field, part in counts if field == name):
                within = sum(counts.get((other, partition), 0) for other in fields if other < name)
                before[name][partition] = earlier - within
                earlier += counts[name, partition]
        begins = F.element_at(
            F.from_json(F.lit(json.dumps(before)), "map<string,array<bigint>>"), F.col("field")
        )
        place = (F.get(begins, F.col("_partition")) + F.col("_row") + 1).cast("int")
        rows = cached.select(
            "field",
            place.alias("index"),
            "token",
            *(F.coalesce(name, F.lit(0)).alias(name) for name in COUNTS),
            F.col("count").isNotNull().alias("present"),
            F.col("index").alias("_known"),
        )
        self.specs, self.cold = self._describe(rows, fields, parents)

        small = [name for name in fields if self.specs[name].size <= FEW_TOKENS]

        def save(name: str) -> None:
            write(rows.where(F.col("field") == name), f"{self._uri}/{name}", VOCAB)

        def save_small() -> None:
            found = rows.where(F.col("field").isin(small)).select("field", *VOCAB.names).collect()
            schema = VOCAB.append(pa.field("field", pa.string()))
            table = pa.Table.from_pylist([row.asDict() for row in found], schema=schema)
            for name in small:
                own = table.filter(pc.field("field") == name).sort_by("index")
                run.write_table(f"{FOLDER}/{name}", own.drop_columns("field"))

        with ThreadPoolExecutor(AT_ONCE) as pool:
            jobs = [pool.submit(save, name) for name in fields if name not in small]
            jobs += [pool.submit(save_small)] if small else []
            for job in jobs:
                job.result()
        cached.unpersist()

    def _describe(
        self, rows: DataFrame, fields: Sequence[str], parents: Mapping[str, Parent]
    ) -> tuple[dict[str, VocabularySpec], dict[str, int]]:
        token = F.xxhash64("index", "token")
        known = F.col("_known").isNotNull()
        found = {
            row["field"]: row
            for row in rows.groupBy("field")
            .agg(
                F.count("*").alias("size"),
                F.bit_xor(token).alias("fingerprint"),
                F.count_if(~F.col("present")).alias("gone"),
                F.count_if((F.col("count") == 0) & (F.col("tested") > 0)).alias("cold"),
                F.count_if(known).alias("known"),
                F.count_if(known & (F.col("_known") != F.col("index"))).alias("moved"),
                F.bit_xor(F.when(known, token)).alias("inherited"),
            )
            .collect()
        }
        specs = {}
        for name in fields:
            row = found.get(name)
            if row is None:
                specs[name] = VocabularySpec(size=0, fingerprint=_hex(None))
                continue
            ancestors: tuple[tuple[int, str], ...] = ()
            if name in parents:
                parent = parents[name]
                inherited = (int(row["known"]), _hex(row["inherited"]))
                if row["moved"] or inherited != (parent.spec.size, parent.spec.fingerprint):
                    raise DataError(
                        f"{parent.where} holds {inherited[0]} tokens with fingerprint {inherited[1]}, its "
                        f"features.json says {parent.spec.size} and {parent.spec.fingerprint}: they are of "
                        f"different lineages. Restore them, pin another run (storage.pin.features), or begin "
                        f"anew: featurize.py --rebuild."
                    )
                own = (parent.spec.size, parent.spec.fingerprint)
                ancestors = parent.spec.ancestors
                if int(row["size"]) != parent.spec.size:
                    ancestors = (*ancestors, own)[-ANCESTORS_KEPT:]
            specs[name] = VocabularySpec(
                size=int(row["size"]),
                fingerprint=_hex(row["fingerprint"]),
                ancestors=ancestors,
                gone=int(row["gone"]),
            )
        return specs, {name: int(found[name]["cold"]) if name in found else 0 for name in fields}

    def of(self, field: str) -> DataFrame:
        """One field's vocabulary, ascending: index (int, from 1), token, count, positives, present."""
        return read_table(self._session, f"{self._uri}/{field}", VOCAB)


def _hex(fingerprint: int | None) -> str:
    return f"{(fingerprint or 0) & ((1 << 64) - 1):016x}"


def values(rows: DataFrame, column: str, delimiter: str | None) -> Column:
    """A column's values as an array without empty ones; the column is text of `read` or an array of texts.

    The parts of a text and the elements of an array are taken without the spaces around them.
    """
    if dict(rows.dtypes)[column].startswith("array"):
        parts = F.col(f"`{column}`")
    elif delimiter is None:
        return F.filter(F.array(F.col(f"`{column}`")), lambda part: part.isNotNull())
    else:
        parts = F.split(F.col(f"`{column}`"), literal(delimiter))
    return F.filter(F.transform(parts, lambda part: F.trim(part)), lambda part: part != "")


def bucket(token: Column, buckets: int) -> Column:
    """The index of a hashed value: 1 + hash modulo buckets."""
    return (F.pmod(F.xxhash64(token), F.lit(buckets)) + 1).cast("int")


def hashed(rows: DataFrame, column: str, delimiter: str | None, several: bool, buckets: int) -> DataFrame:
    """Replace a column by the hash of its value, or the hashes of its values; 0: missing."""
    found = F.transform(values(rows, column, delimiter), lambda token: bucket(token, buckets))
    if several:
        return rows.withColumn(column, F.coalesce(found, F.array().cast("array<int>")))
    return rows.withColumn(column, F.when(F.size(found) > 0, F.get(found, F.lit(0))).otherwise(0))


def encode(
    rows: DataFrame, column: str, vocabulary: DataFrame, delimiter: str | None, several: bool
) -> DataFrame:
    """Replace a column by the index of its value, or the indices of its values.

    Args:
        rows: any frame with the column.
        column: text, an array of texts, or null.
        vocabulary: token and index.
        delimiter: splits a text into several values.
        several: the result is array<int>, else int (0: missing or not in the vocabulary).
    """
    if not several:
        codes = vocabulary.select(F.col("token").alias("_text"), F.col("index").alias("_code"))
        unknown = F.lit(0)
    else:
        # Each distinct text is split and looked up once, however many rows have it.
        parts = rows.select(F.col(f"`{column}`").alias("_text")).distinct()
        split = values(parts, "_text", delimiter)
        parts = parts.select("_text", F.posexplode(split).alias("_place", "token"))
        found = parts.join(vocabulary.select("token", "index"), "token", "left")
        code = F.struct("_place", F.coalesce("index", F.lit(0)).alias("index"))
        codes = found.groupBy("_text").agg(F.array_sort(F.collect_list(code))["index"].alias("_code"))
        unknown = F.array().cast("array<int>")
    joined = rows.join(codes, rows[f"`{column}`"] == codes["_text"], "left")
    return joined.withColumn(column, F.coalesce("_code", unknown)).drop("_text", "_code")


def tokens_of(
    rows: DataFrame, field: str, column: str, delimiter: str | None, counts: Mapping[str, Column]
) -> DataFrame:
    """The tokens of one column: field, token and COUNTS, of every row.

    Args:
        rows: any frame.
        field: the vocabulary's name.
        column: text or array of texts.
        delimiter: splits a text into several values.
        counts: name in COUNTS to what a row adds to it; others get nothing.
    """
    numbers = [counts.get(name, F.lit(0)).cast("bigint").alias(name) for name in COUNTS]
    if delimiter is None and not dict(rows.dtypes)[column].startswith("array"):
        token = F.col(f"`{column}`")
        rows = rows.where(token.isNotNull())
    else:
        token = F.explode(values(rows, column, delimiter))
    return rows.select(F.lit(field).alias("field"), token.alias("token"), *numbers)

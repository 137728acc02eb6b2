"""Vocabularies: raw ids and words to indices from 1, the most frequent of the train part first.

Indices are assigned from sorted partitions and their offsets: no step sees a whole vocabulary at once.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import accumulate

from pyspark.sql import Column, DataFrame
from pyspark.sql import functions as F

COUNTS = ("count", "positives", "tested")
"""Of a token: train events (ids) or rows; positive train events; test events."""
ROW_BITS = 33
"""monotonically_increasing_id holds a row's place in its partition in its lower 33 bits."""


class Vocabularies:
    """The vocabularies of all fields in one cached frame.

    Args:
        tokens: of `tokens_of`, a token any number of times; a token whose count is 0 enters too.
        fields: names of the fields.
    """

    def __init__(self, tokens: DataFrame, fields: Sequence[str]) -> None:
        counted = tokens.groupBy("field", "token").agg(*(F.sum(name).alias(name) for name in COUNTS))
        ordered = counted.orderBy("field", F.desc("count"), "token").select(
            "*",
            F.spark_partition_id().alias("_partition"),
            F.monotonically_increasing_id().bitwiseAND((1 << ROW_BITS) - 1).alias("_row"),
        )
        # Cached, so that the partitions that are counted are those that are numbered.
        self._ordered = ordered.cache()
        is_cold = (F.col("count") == 0) & (F.col("tested") > 0)
        found = (
            self._ordered.groupBy("field", "_partition")
            .agg(F.count("*").alias("rows"), F.count_if(is_cold).alias("cold"))
            .collect()
        )
        rows = {(str(row["field"]), int(row["_partition"])): int(row["rows"]) for row in found}
        self.sizes = {name: sum(n for (field, _), n in rows.items() if field == name) for name in fields}
        """Number of tokens of each field."""
        self.cold = {name: sum(row["cold"] for row in found if row["field"] == name) for name in fields}
        """Number of tokens of each field that the test part has and the train part has not."""
        last = max((partition for _, partition in rows), default=0)
        of_partition = [
            sum(n for (_, p), n in rows.items() if p == partition) for partition in range(last + 1)
        ]
        self._before_partition = [0, *accumulate(of_partition)]
        in_order = sorted(name for name in fields)
        self._before_field = dict(
            zip(in_order, [0, *accumulate(self.sizes[name] for name in in_order)], strict=False)
        )

    def of(self, field: str) -> DataFrame:
        """One field's vocabulary: index (int, from 1), token, count, positives."""
        offsets = F.array(*(F.lit(before) for before in self._before_partition))
        place = F.element_at(offsets, F.col("_partition") + 1) + F.col("_row")
        index = (place - self._before_field[field] + 1).cast("int")
        rows = self._ordered.where(F.col("field") == field)
        return rows.select(index.alias("index"), "token", "count", "positives")

    def unpersist(self) -> None:
        """Give the memory back."""
        self._ordered.unpersist()


def values(column: str, delimiter: str | None) -> Column:
    """A column's values as an array without empty ones."""
    parts = F.array(column) if delimiter is None else F.split(column, _literal(delimiter))
    return F.filter(parts, lambda part: part.isNotNull() & (F.trim(part) != ""))


def encode(rows: DataFrame, column: str, vocabulary: DataFrame, delimiter: str | None) -> DataFrame:
    """Replace a string column by the index of its value, or the indices of its values.

    Args:
        rows: any frame with the column.
        column: a string, or null.
        vocabulary: token and index.
        delimiter: splits the column into several values; None: one value.

    Returns:
        `rows` with the column as int (0: missing or not in the vocabulary), or as array<int>.
    """
    if delimiter is None:
        codes = vocabulary.select(F.col("token").alias("_text"), F.col("index").alias("_code"))
        unknown = F.lit(0)
    else:
        # Each distinct text is split and looked up once, however many rows have it.
        parts = rows.select(F.col(column).alias("_text")).distinct()
        parts = parts.select("_text", F.posexplode(values("_text", delimiter)).alias("_place", "token"))
        found = parts.join(vocabulary.select("token", "index"), "token", "left")
        code = F.struct("_place", F.coalesce("index", F.lit(0)).alias("index"))
        codes = found.groupBy("_text").agg(F.array_sort(F.collect_list(code))["index"].alias("_code"))
        unknown = F.array().cast("array<int>")
    joined = rows.join(codes, rows[column] == codes["_text"], "left")
    return joined.withColumn(column, F.coalesce("_code", unknown)).drop("_text", "_code")


def tokens_of(
    rows: DataFrame, fields: Sequence[tuple[str, str, str | None]], counts: Mapping[str, Column]
) -> Iterator[DataFrame]:
    """The tokens of several columns, read in one pass.

    Args:
        rows: any frame.
        fields: (field, column, delimiter).
        counts: name in COUNTS to what a row adds to it; others get nothing.

    Yields:
        at most one frame of field, token and COUNTS.
    """
    if fields:
        arrays = [
            F.transform(values(column, delimiter), _named(field)) for field, column, delimiter in fields
        ]
        numbers = [counts.get(name, F.lit(0)).cast("bigint").alias(name) for name in COUNTS]
        exploded = rows.select(F.explode(F.concat(*arrays)).alias("_value"), *numbers)
        yield exploded.select("_value.field", "_value.token", *COUNTS)


def _named(field: str) -> Callable[[Column], Column]:
    return lambda token: F.struct(F.lit(field).alias("field"), token.alias("token"))


def _literal(text: str) -> str:
    """A regular expression that matches the text itself."""
    return "\\Q" + text.replace("\\E", "\\E\\\\E\\Q") + "\\E"

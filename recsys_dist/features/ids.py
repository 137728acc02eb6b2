"""Every user and item with its index, and the fields of their tables."""

from collections.abc import Mapping, Sequence

from pyspark.sql import Column, DataFrame
from pyspark.sql import functions as F

from recsys_dist.config import AnyField, Categorical, Numeric
from recsys_dist.features.encode import Vocabularies, encode, hashed
from recsys_dist.features.numeric import Fitted, Moments, Value, fit, number, numeric_values

SOURCES = {"context": "events", "item": "items", "user": "users"}
"""Side of a field to the source that has its column."""
ColumnField = Categorical | Numeric
"""The fields that are read from a column of a source."""
UNREAD = "_unread"
"""The column with a row's texts that are no number, by numeric field in order; null where all can be read."""


def raw(field: str) -> str:
    """A field's column before it is written, distinct from all columns of our own."""
    return f"raw:{field}"


def stored(field: str) -> str:
    """A field's column as it is written, until then distinct from all columns of our own."""
    return f"field:{field}"


def column_fields(fields: Sequence[AnyField], side: str) -> list[ColumnField]:
    """The fields of a side that are read from a column of its source."""
    return [field for field in fields if isinstance(field, ColumnField) and field.side == side]


def vocabulary_fields(fields: Sequence[AnyField]) -> list[Categorical]:
    """The fields that have a vocabulary of their own."""
    return [field for field in fields if isinstance(field, Categorical) and not field.hash_buckets]


def asked_columns(fields: Sequence[AnyField], side: str) -> dict[str, str]:
    """Our name of a field's column to the source's."""
    return {raw(field.name): field.column for field in column_fields(fields, side)}


def list_columns(fields: Sequence[AnyField], side: str) -> set[str]:
    """Our names of the columns that hold lists."""
    return {raw(f.name) for f in column_fields(fields, side) if isinstance(f, Categorical) and f.list}


def numeric_fields(fields: Sequence[AnyField], side: str) -> list[Numeric]:
    """The numeric fields of a side."""
    return [field for field in column_fields(fields, side) if isinstance(field, Numeric)]


def with_numbers(rows: DataFrame, fields: Sequence[AnyField], side: str, decimal: str) -> DataFrame:
    """Numeric fields' columns as numbers, null where the text is none; adds UNREAD if there are such fields.

    Args:
        rows: of `read`, checked.
        fields: of the configuration.
        side: whose source the rows are of.
        decimal: `Source.decimal`.
    """
    columns = [raw(field.name) for field in numeric_fields(fields, side)]
    if not columns:
        return rows
    # Under another name first, so that a text is parsed once.
    rows = rows.withColumns({f"number:{column}": number(column, decimal) for column in columns})
    unread = []
    for column in columns:
        text = F.col(f"`{column}`")
        # How many tools write that there is no value.
        told = text.isNotNull() & (F.lower(text) != "nan")
        unread.append(F.when(F.col(f"`number:{column}`").isNull() & told, text))
    rows = rows.withColumn(UNREAD, F.when(F.coalesce(*unread).isNotNull(), F.array(*unread)))
    return rows.drop(*columns).withColumnsRenamed({f"number:{column}": column for column in columns})


def number_flags(fields: Sequence[AnyField], side: str) -> dict[str, Column]:
    """`read:<field>`, `unread:<field>`: has a row of `with_numbers` a number, has it a text that is none?"""
    flags = {}
    for place, field in enumerate(numeric_fields(fields, side)):
        flags[f"read:{field.name}"] = F.col(f"`{raw(field.name)}`").isNotNull()
        flags[f"unread:{field.name}"] = F.get(UNREAD, F.lit(place)).isNotNull()
    return flags


def side_values(fields: Sequence[AnyField], side: str) -> dict[str, Value]:
    """What the numeric fields of a side are fitted on."""
    numeric = numeric_fields(fields, side)
    return numeric_values(numeric, {field.name: raw(field.name) for field in numeric})


def fit_numeric(
    train: DataFrame, fields: Sequence[AnyField], side: str, found: Mapping[str, Moments]
) -> dict[str, Fitted]:
    """Fit the numeric fields of a side on rows of the train part and the moments of their `side_values`."""
    numeric = numeric_fields(fields, side)
    return fit(train, numeric, {field.name: raw(field.name) for field in numeric}, found)


def encode_fields(
    rows: DataFrame,
    fields: Sequence[AnyField],
    side: str,
    vocabularies: Vocabularies,
    fitted: Mapping[str, Fitted],
) -> DataFrame:
    """The fields' columns as they are written, named by `stored`."""
    for field in column_fields(fields, side):
        column = raw(field.name)
        if isinstance(field, Numeric):
            x = F.col(f"`{column}`")
            if field.indicator and not field.buckets:
                rows = rows.withColumn(stored(f"{field.name}_missing"), x.isNull().cast("float"))
            rows = rows.withColumn(column, fitted[field.name].column(x))
        elif field.hash_buckets:
            rows = hashed(rows, column, field.delimiter, field.several, field.hash_buckets)
        else:
            vocabulary = vocabularies.of(field.name)
            rows = encode(rows, column, vocabulary, field.delimiter, field.several)
        rows = rows.withColumnRenamed(column, stored(field.name))
    return rows


def table_of(key: str, vocabularies: Vocabularies, table: DataFrame | None) -> DataFrame:
    """All users or items with their table's columns, not yet encoded.

    Returns:
        token, index, count, positives, present, and of items title, active_from and active_to.
    """
    rows = vocabularies.of(key)
    if table is not None:
        table = table.drop("_source", "_raw", "_reason", "_hash", UNREAD).withColumnRenamed(key, "token")
        rows = rows.join(table, "token", "left")
    if key == "item":
        title = F.coalesce("title", "token") if "title" in rows.columns else F.col("token")
        rows = rows.withColumn("title", title)
        for column in ("active_from", "active_to"):
            if column not in rows.columns:
                rows = rows.withColumn(column, F.lit(None).cast("timestamp"))
    return rows

"""How a source's columns differ from those of the night before."""

from recsys_dist.errors import DataError
from recsys_dist.features.heads import MIXED, TEXT, kind
from recsys_dist.features.source import Opened


def columns_of(opened: Opened) -> dict[str, str]:
    """Every column of a source with its type, in the order of first appearance.

    Types are Arrow's for parquet; `number`, `string`, `bool`, `list`, `object`, `null` or `mixed` for the
    first lines of jsonl; for csv and tsv what follows the colon in a typed header, and then the name goes
    without it, else `text`. Folders `key=value` give a column `key`, a text.
    """
    types: dict[str, str] = {}
    for head in opened.heads:
        for column, type_ in (*head.types.items(), *dict.fromkeys(head.keys, TEXT).items()):
            name = head.untyped(column)
            known = types.setdefault(name, type_)
            if kind(known) is None:
                types[name] = type_
            elif kind(type_) not in (None, kind(known)):
                types[name] = MIXED
    return types


def require_same(name: str, opened: Opened, previous: dict[str, str]) -> list[str]:
    """Compare a source's columns with those of an earlier run.

    Another width of a number, or another Arrow type of text, is no difference. A column that is asked for and
    missing has failed in `open_source`.

    Args:
        name: the source's key under `data`, for error messages.
        opened: of `open_source`.
        previous: `columns_of` the earlier run's source.

    Returns:
        the columns that the earlier run's source did not have.

    Raises:
        DataError: a column that is asked for has another type now.
    """
    found = columns_of(opened)
    asked = {
        head.untyped(head.find(column)[0]) for head in opened.heads for column in opened.columns.values()
    }
    wrong = [
        f"the column {column!r} is of type {found[column]}, in the run before it was {previous[column]}"
        for column in found
        if column in asked and column in previous and _differ(found[column], previous[column])
    ]
    if wrong:
        raise DataError(
            f"data.{name}.path={opened.source.path}: {'; '.join(wrong)}. An index would not mean the same as "
            f"before. Restore the type, or start anew with featurize.py --rebuild."
        )
    return [column for column in found if column not in previous]


def _differ(found: str, previous: str) -> bool:
    kinds = {kind(found), kind(previous)}
    # What had one type and now has several has changed; what always had is nothing new.
    return (None not in kinds and len(kinds) == 2) or (found == MIXED and kind(previous) is not None)

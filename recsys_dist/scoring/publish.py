"""The product: the Delta table <root>/topk. One commit replaces one date, whole or not at all."""

import datetime as dt
from collections.abc import Iterable, Iterator
from itertools import chain
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset
import pyarrow.fs
from deltalake import CommitProperties, DeltaTable, write_deltalake
from deltalake.exceptions import (
    CommitFailedError,
    DeltaError,
    DeltaProtocolError,
    SchemaMismatchError,
    TableNotFoundError,
)

from recsys_dist.errors import DataError, RetryableError
from recsys_dist.schema import TOPK
from recsys_dist.scoring.chosen import unchanged
from recsys_dist.workspace import Run


def version(table: str) -> int:
    """The table's newest version; 0, which is the empty table, where there is none yet."""
    try:
        return int(DeltaTable(table).version())
    except TableNotFoundError:
        return 0


def publish(
    table: str,
    lists: pa.dataset.Dataset,
    date: dt.date,
    run_id: str,
    since: int | None = None,
    users: pa.ChunkedArray | None = None,
) -> int:
    """Replace one date of the table, or some users' lists of it, in one commit. Returns the new version.

    Args:
        table: URI of the Delta table; made where there is none.
        lists: the rows, schema TOPK.
        date: every row's date.
        run_id: the score run, kept in the commit's metadata.
        since: the version that the lists take the place of; default: the newest one.
        users: ids; the lists that all others have for the date stay.

    Raises:
        RetryableError: somebody changed the date after that version, or the table cannot be written; nothing
            of this run is visible.
    """
    rows = lists.count_rows()
    metadata = {"run_id": run_id, "date": date.isoformat(), "rows": str(rows)}
    if users is not None:
        metadata["users"] = str(len(users))
    try:
        # Made empty first, so that two first writers of different dates do not replace each other.
        DeltaTable.create(table, schema=TOPK, mode="ignore", partition_by=["date"])
        before = DeltaTable(table, version=since)
        stay = _others(table, before, date, users).to_batches() if users is not None else ()
        write_deltalake(
            before,
            pa.RecordBatchReader.from_batches(TOPK, chain(as_topk(stay), lists.to_batches())),
            mode="overwrite",
            predicate=f"date = '{date.isoformat()}'",
            schema_mode="merge",  # the table may be older than a column
            commit_properties=CommitProperties(custom_metadata=metadata),
        )
    except CommitFailedError as error:
        raise RetryableError(
            f"{table}: another run published {date} first, or the table was rolled back in the meantime; "
            f"nothing of this run is visible. Run again to replace those lists. ({error})"
        ) from None
    except (SchemaMismatchError, DeltaProtocolError):
        raise
    except (OSError, DeltaError) as error:  # a full disk, for one, is a DeltaError
        raise RetryableError(f"{table} cannot be written, and still has what it had: {error}") from error
    return int(before.version())


def is_published(run: Run) -> bool:
    """Are a score run's lists what the table has for their date? Not after another run or a rollback.

    Those of a run for chosen users must all be there, and files with ids of users or items be the same.
    """
    figures = run.manifest["figures"]
    chosen = figures.get("chosen")
    if not all(unchanged(file) for file in [*figures.get("files", []), *([chosen] if chosen else [])]):
        return False
    found = published_rows(figures["table"], dt.date.fromisoformat(figures["date"]), run.run_id)
    return found == figures["rows"] if chosen else found > 0


def is_whole_night(run: Run) -> bool:
    """Does the table have a score run's lists, of all users? Not after a rollback, nor of a run for chosen
    users, whose lists stand among another night's.
    """
    figures = run.manifest["figures"]
    if figures.get("chosen"):
        return False
    return published_rows(figures["table"], dt.date.fromisoformat(figures["date"]), run.run_id) > 0


def published_rows(table: str, date: dt.date, run_id: str) -> int:
    """How many rows of a date are a score run's."""
    try:
        dataset = DeltaTable(table).to_pyarrow_dataset()
    except TableNotFoundError:
        return 0
    return int(dataset.count_rows(filter=of_date(date) & (pc.field("run_id") == run_id)))


def version_of(table: str, date: dt.date, run_id: str, rows: int) -> int | None:
    """The version that a run published all of its rows in; None where the table does not have them."""
    if published_rows(table, date, run_id) != rows:
        return None
    commits = DeltaTable(table).history()
    return next((int(found["version"]) for found in commits if found.get("run_id") == run_id), None)


def of_date(date: dt.date) -> pc.Expression:
    """The filter for the rows of a date."""
    return pc.field("date") == pa.scalar(date, pa.date32())


def _others(table: str, before: DeltaTable, date: dt.date, users: pa.ChunkedArray) -> pa.dataset.Scanner:
    """The rows of a date that stay when these users' lists are replaced."""
    # Not deltalake's own filesystem: deltalake, which asks for these rows while it writes, would wait for
    # itself.
    filesystem, path = pyarrow.fs.FileSystem.from_uri(table)
    files = pyarrow.fs.SubTreeFileSystem(path, filesystem)
    dataset = before.to_pyarrow_dataset(filesystem=files)
    return dataset.scanner(filter=of_date(date) & ~pc.field("user_id").isin(users))


def as_topk(batches: Iterable[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
    """Batches of the table with exactly the schema TOPK."""
    for batch in batches:
        yield from whole(pa.Table.from_batches([batch])).to_batches()


def whole(rows: pa.Table) -> pa.Table:
    """Rows of the table with exactly the schema TOPK: the table may be older than a column."""
    told = {column.name: rows[column.name] for column in TOPK if column.name in rows.column_names}
    empty = {column.name: pa.nulls(len(rows), column.type) for column in TOPK if column.name not in told}
    return pa.table(told | empty).select(TOPK.names).cast(TOPK)


def read_user(table: str, user_id: str, date: dt.date | None = None) -> list[dict[str, Any]]:
    """One user's published rows in rank order: of a date, or of the latest date in the table.

    Raises:
        DataError: there is no table, or no list for this user.
    """
    try:
        dataset = DeltaTable(table).to_pyarrow_dataset()
    except TableNotFoundError:
        raise DataError(f"{table}: no lists are published there yet. Run jobs/score.py first.") from None
    wanted = pc.field("user_id") == user_id
    if date is not None:
        wanted &= of_date(date)
    rows = whole(dataset.to_table(filter=wanted))
    found = rows.sort_by([("date", "descending"), ("rank", "ascending")]).to_pylist()
    if not found:
        raise DataError(f"{table}: no list for user {user_id!r}. Ids are those of the raw log.")
    return [row for row in found if row["date"] == found[0]["date"]]

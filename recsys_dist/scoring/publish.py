"""The product: the Delta table <root>/topk. One commit replaces one date, whole or not at all."""

import datetime as dt
from typing import Any

import pyarrow as pa
from deltalake import CommitProperties, DeltaTable, write_deltalake
from deltalake.exceptions import CommitFailedError, TableNotFoundError

from recsys_dist.errors import DataError, RetryableError
from recsys_dist.schema import TOPK
from recsys_dist.workspace import Run


def publish(table: str, rows: pa.RecordBatchReader, date: dt.date, run_id: str) -> int:
    """Replace one date of the table in one commit and return the table's new version.

    Args:
        table: URI of the Delta table; made where there is none.
        rows: the date's rows, schema TOPK.
        date: every row's date.
        run_id: the score run, kept in the commit's metadata.

    Raises:
        RetryableError: another writer committed first; nothing of this one is visible.
    """
    try:
        # Made empty first, so that two first writers of different dates do not replace each other.
        DeltaTable.create(table, schema=TOPK, mode="ignore", partition_by=["date"])
        write_deltalake(
            table,
            rows,
            mode="overwrite",
            predicate=f"date = '{date.isoformat()}'",
            commit_properties=CommitProperties(custom_metadata={"run_id": run_id}),
        )
    except CommitFailedError as error:
        raise RetryableError(
            f"{table}: another run published first, nothing of this one is visible. "
            f"Run again to replace its lists. ({error})"
        ) from None
    return DeltaTable(table).version()


def is_published(run: Run) -> bool:
    """Are a score run's lists what the table has for their date? Not after another run or a rollback."""
    figures = run.manifest["figures"]
    date = dt.date.fromisoformat(figures["date"])
    try:
        dataset = DeltaTable(figures["table"]).to_pyarrow_dataset()
    except TableNotFoundError:
        return False
    found = dataset.head(
        1, columns=["run_id"], filter=pa.compute.field("date") == pa.scalar(date, pa.date32())
    )
    return found["run_id"].to_pylist() == [run.run_id]


def read_user(table: str, user_id: str, date: dt.date | None = None) -> list[dict[str, Any]]:
    """One user's published rows in rank order: of a date, or of the latest date in the table.

    Raises:
        DataError: there is no table, or no list for this user.
    """
    try:
        dataset = DeltaTable(table).to_pyarrow_dataset()
    except TableNotFoundError:
        raise DataError(f"{table}: no lists are published there yet. Run jobs/score.py first.") from None
    wanted = pa.compute.field("user_id") == user_id
    if date is not None:
        wanted &= pa.compute.field("date") == pa.scalar(date, pa.date32())
    rows = dataset.to_table(filter=wanted).cast(TOPK).sort_by([("date", "descending"), ("rank", "ascending")])
    found = rows.to_pylist()
    if not found:
        raise DataError(f"{table}: no list for user {user_id!r}. Ids are those of the raw log.")
    return [row for row in found if row["date"] == found[0]["date"]]

"""What people do with the published table besides reading it: versions, rollback, export, vacuum."""

import csv
import datetime as dt
import json
import math
import os
import secrets
from collections.abc import Callable
from pathlib import Path
from typing import Any, TextIO

import pyarrow as pa
import pyarrow.parquet as pq
from deltalake import CommitProperties, DeltaTable
from deltalake.exceptions import CommitFailedError, DeltaError, TableNotFoundError

from recsys_dist.errors import ConfigError, DataError, RetryableError
from recsys_dist.schema import TOPK
from recsys_dist.scoring.publish import as_topk, of_date

SAFE_DAYS = 1.0
"""A night that is under way, and a reader of the version before, need files that are younger."""


def versions(table: str) -> str:
    """A line for each version that the table's log still has, the newest first.

    Raises:
        DataError: there is no table.
    """
    lines = [f"{'version':>7}  {'time (UTC)':<19}  {'date':<10}  {'rows':>11}  what"]
    for commit in opened(table).history():
        time = dt.datetime.fromtimestamp(commit["timestamp"] / 1000, dt.UTC)
        rows = f"{int(commit['rows']):,}" if "rows" in commit else ""
        date = commit.get("date", "")
        lines.append(
            f"{commit['version']:>7}  {time:%Y-%m-%d %H:%M:%S}  {date:<10}  {rows:>11}  {_what(commit)}"
        )
    return "\n".join(lines)


def rollback(table: str, version: int) -> str:
    """Make the table what it was at an earlier version, in one commit. Returns what it has now, in words.

    Raises:
        DataError: there is no such version, or its files were vacuumed.
        RetryableError: somebody else committed first.
    """
    found = opened(table)
    newest = int(found.version())
    known = [commit["version"] for commit in found.history()]
    if version not in known:
        raise DataError(
            f"{table}: there is no version {version}; it has {min(known)} to {newest}. See --versions."
        )
    if version == newest:
        return f"{table}: version {version} is the newest; nothing is to be rolled back."
    try:
        found.restore(version, commit_properties=CommitProperties(custom_metadata={"restored": str(version)}))
    except CommitFailedError as error:
        raise RetryableError(
            f"{table}: a run published first; the rollback was not made. ({error})"
        ) from None
    except DeltaError as error:
        if "missing file" not in str(error):
            raise RetryableError(f"{table}: {error}") from error
        raise DataError(
            f"{table}: version {version} cannot be had any more, its files were vacuumed. The table "
            f"still has what it had. ({error})"
        ) from None
    dates = _dates(opened(table))
    has = f"lists for {len(dates)} dates, the latest {dates[-1]}" if dates else "no lists"
    return f"{table}: version {version} again, as version {opened(table).version()}: {has}"


def export(table: str, date: str, path: str) -> str:
    """Write a date's lists to a file, whole or not at all. Returns what was written, in words.

    Args:
        table: URI of the Delta table.
        date: an ISO date that the table has.
        path: of a file; its ending decides: .parquet, .jsonl (JSON lines) or .csv.

    Raises:
        ConfigError: the date or path is none, or nothing can be written there.
        DataError: the table has no lists for the date.
    """
    to = Path(path).expanduser().absolute()
    write = WRITERS.get(to.suffix.lower())
    if write is None or "://" in path:
        raise ConfigError(f"--export {path}: expected a file's path ending in {', '.join(WRITERS)}")
    if not to.parent.is_dir() or to.is_dir():
        what = "is a folder" if to.is_dir() else f"there is no folder {to.parent}"
        raise ConfigError(f"--export {path}: {what}; give the path of a file in a folder that is there")
    try:
        day = dt.date.fromisoformat(date)
    except ValueError:
        raise ConfigError(f"--export {date}: expected a date such as 2024-05-01") from None
    found = opened(table)
    dates = _dates(found)
    if day.isoformat() not in dates:
        has = f"it has {len(dates)} dates, the latest {', '.join(dates[-3:])}" if dates else "it has none"
        raise DataError(f"{table}: no lists for {day}; {has}")
    batches = found.to_pyarrow_dataset().to_batches(filter=of_date(day))
    rows = pa.RecordBatchReader.from_batches(TOPK, as_topk(batches))
    unfinished = to.with_name(f".{to.name}.{secrets.token_hex(4)}.tmp")
    try:
        n = write(unfinished, rows)
        os.replace(unfinished, to)  # noqa: PTH105
    except FileNotFoundError:  # of the table
        raise
    except OSError as error:
        raise RetryableError(f"--export {path}: {error}; what was there before is as it was") from error
    finally:
        unfinished.unlink(missing_ok=True)
    return f"{to}: {n:,} rows of {day}"


def vacuum(table: str, days: float, recent: bool = False) -> str:
    """Remove the files that no version of the last `days` days has. Returns how many, in words.

    Args:
        table: URI of the Delta table.
        days: older versions cannot be rolled back to afterwards.
        recent: fewer than `SAFE_DAYS` are meant.

    Raises:
        ConfigError: fewer days than is safe, and not asked for.
    """
    if not 0 <= days < math.inf:
        raise ConfigError(f"--vacuum {days:g}: expected a number of days, 0 or more")
    if days < SAFE_DAYS and not recent:
        raise ConfigError(
            f"--vacuum {days:g}: below {SAFE_DAYS:g} day files that a night under way or a reader "
            f"needs would go too. Where there is none, add --recent."
        )
    try:
        # full: also what writers left that died before their commit.
        gone = opened(table).vacuum(
            retention_hours=math.ceil(days * 24), dry_run=False, enforce_retention_duration=False, full=True
        )
    except (OSError, DeltaError) as error:
        raise RetryableError(f"{table}: {error}") from error
    return f"{table}: {len(gone)} files removed; versions of the last {days:g} days can be rolled back to"


def opened(table: str) -> DeltaTable:
    """The table.

    Raises:
        DataError: there is none.
    """
    try:
        return DeltaTable(table)
    except TableNotFoundError:
        raise DataError(f"{table}: no lists are published there yet. Run jobs/score.py first.") from None


def _dates(table: DeltaTable) -> list[str]:
    """The dates that the table has lists for, oldest first."""
    return sorted(partition["date"] for partition in table.partitions())


def _what(commit: dict[str, Any]) -> str:
    """What a commit was, in words."""
    match commit["operation"]:
        case "RESTORE":
            return f"rollback to {commit['operationParameters']['version']}"
        case "WRITE" if "users" in commit:
            return f"{commit['run_id']}, {int(commit['users']):,} users"
        case "WRITE":
            return str(commit.get("run_id", "a writer without a run"))
        case other:
            return str(other).lower()


def _write_parquet(path: Path, rows: pa.RecordBatchReader) -> int:
    written = 0
    with pq.ParquetWriter(path, TOPK) as writer:
        for batch in rows:
            writer.write_batch(batch)
            written += batch.num_rows
    return written


def _write_jsonl(path: Path, rows: pa.RecordBatchReader) -> int:
    def line(stream: TextIO, row: dict[str, Any]) -> None:
        stream.write(json.dumps(row | {"date": str(row["date"])}, ensure_ascii=False) + "\n")

    with path.open("w", encoding="utf-8") as stream:
        return _each(rows, lambda row: line(stream, row))


def _write_csv(path: Path, rows: pa.RecordBatchReader) -> int:
    """With `sources` and `reason` as JSON."""
    with path.open("w", encoding="utf-8", newline="") as stream:
        writer = csv.writer(stream, lineterminator="\n")
        writer.writerow(TOPK.names)
        nested = [name for name in TOPK.names if pa.types.is_nested(TOPK.field(name).type)]

        def line(row: dict[str, Any]) -> None:
            as_text = {name: json.dumps(row[name], ensure_ascii=False) for name in nested}
            writer.writerow((row | as_text).values())

        return _each(rows, line)


def _each(rows: pa.RecordBatchReader, write: Callable[[dict[str, Any]], None]) -> int:
    written = 0
    for batch in rows:
        for row in batch.to_pylist():
            write(row)
        written += batch.num_rows
    return written


WRITERS: dict[str, Callable[[Path, pa.RecordBatchReader], int]] = {
    ".parquet": _write_parquet,
    ".jsonl": _write_jsonl,
    ".csv": _write_csv,
}
"""Ending of a path to what writes the rows there and says how many."""

"""Versions, rollback, export and vacuum of a small table."""

import argparse
import csv
import datetime as dt
import hashlib
import json
import os
import resource
import subprocess
import sys
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from recsys_dist.config import REPOSITORY
from recsys_dist.errors import ConfigError, DataError
from recsys_dist.schema import TOPK
from recsys_dist.scoring.commands import add_arguments, answer
from recsys_dist.scoring.publish import is_published, publish
from recsys_dist.scoring.table import export, rollback, vacuum, versions
from recsys_dist.workspace import Run
from tests.scoring.test_publish import MONDAY, TUESDAY, listed, rows


@pytest.fixture
def table(tmp_path):
    """Versions: 0 empty; 1 Monday; 2 Tuesday; 3 Monday again."""
    table = str(tmp_path / "topk")
    publish(table, rows(MONDAY, ["a", 'ä,"b'], "r1"), MONDAY, "r1")
    publish(table, rows(TUESDAY, ["c"], "r2"), TUESDAY, "r2")
    publish(table, rows(MONDAY, ["d"], "r3"), MONDAY, "r3", users=pa.chunked_array([["u1"]]))
    return table


def made(table, run_id, date, n, **figures):
    """A committed score run of n rows."""
    figures = {"table": table, "date": str(date), "rows": n, **figures}
    return Run(None, "", "", {"run_id": run_id, "figures": figures})


def test_versions_tell_when_what_and_how_much(table):
    rollback(table, 1)
    head, *lines = versions(table).splitlines()
    assert head.split() == ["version", "time", "(UTC)", "date", "rows", "what"]
    assert [line.split()[0] for line in lines] == ["4", "3", "2", "1", "0"]
    moment = dt.datetime.fromisoformat(" ".join(lines[0].split()[1:3]) + "+00:00")
    assert abs(dt.datetime.now(dt.UTC) - moment) < dt.timedelta(minutes=5)
    assert [line.split(None, 3)[3] for line in lines] == [
        "rollback to 1",
        "2024-01-01            1  r3, 1 users",
        "2024-01-02            1  r2",
        "2024-01-01            2  r1",
        "create table",
    ]


def test_a_rollback_brings_the_lists_back_and_the_later_run_counts_as_unpublished(table):
    first, tuesday, last = (
        made(table, "r1", MONDAY, 2),
        made(table, "r2", TUESDAY, 1),
        made(table, "r3", MONDAY, 1),
    )
    assert [is_published(run) for run in (first, tuesday, last)] == [False, True, True]
    assert "version 2 again, as version 4: lists for 2 dates, the latest 2024-01-02" in rollback(table, 2)
    assert listed(table, MONDAY, "u1") == ["a", 'ä,"b']
    assert [is_published(run) for run in (first, tuesday, last)] == [True, True, False]
    assert "no lists" in rollback(table, 0)
    assert not any(is_published(run) for run in (first, tuesday, last))
    # And forward again: a rollback is a version like any other.
    rollback(table, 3)
    assert [is_published(run) for run in (first, tuesday, last)] == [False, True, True]
    assert "nothing is to be rolled back" in rollback(table, 6)


def test_a_limited_run_is_published_while_all_its_rows_and_its_file_are_there(table, tmp_path):
    users = tmp_path / "users.txt"
    users.write_text("u1\nu2\n")
    chosen = {"path": str(users), "sha256": "?", "users": 2, "unknown": 0}
    assert not is_published(made(table, "r3", MONDAY, 1, chosen=chosen))
    chosen["sha256"] = hashlib.sha256(users.read_bytes()).hexdigest()
    assert is_published(made(table, "r3", MONDAY, 1, chosen=chosen))
    assert not is_published(made(table, "r3", MONDAY, 2, chosen=chosen))
    users.write_text("u1\n")
    assert not is_published(made(table, "r3", MONDAY, 1, chosen=chosen))


@pytest.mark.parametrize("version", [4, -1])
def test_versions_that_are_not_there_are_named(table, version):
    with pytest.raises(DataError, match=f"no version {version}; it has 0 to 3"):
        rollback(table, version)


def test_a_version_whose_files_were_vacuumed_is_refused(table):
    vacuum(table, 0, recent=True)
    with pytest.raises(DataError, match="version 1 cannot be had any more"):
        rollback(table, 1)
    assert listed(table, MONDAY, "u1") == ["d"]


def test_vacuum_keeps_what_is_referenced_or_young(table):
    orphan = Path(table, "date=2024-01-01", "part-dead.parquet")
    orphan.write_text("of a writer that died")
    old = time.time() - 3 * 86_400
    os.utime(orphan, (old, old))
    before = set(Path(table).rglob("*.parquet"))
    with pytest.raises(ConfigError, match="--recent"):
        vacuum(table, 0.9)
    for days in (-1, float("nan"), float("inf")):
        with pytest.raises(ConfigError, match="expected a number of days"):
            vacuum(table, days, recent=True)
    assert "1 files removed" in vacuum(table, 2)
    assert set(Path(table).rglob("*.parquet")) == before - {orphan}
    assert "1 files removed" in vacuum(table, 0, recent=True)  # Monday's first
    assert listed(table, MONDAY, "u1") == ["d"]
    assert listed(table, TUESDAY, "u1") == ["c"]


def read_back(path):
    """An export's rows as the table has them."""
    if path.suffix == ".parquet":
        assert pq.read_schema(path) == TOPK
        return pq.read_table(path).to_pylist()
    with path.open(encoding="utf-8", newline="") as stream:
        found = (
            [json.loads(line) for line in stream] if path.suffix == ".jsonl" else list(csv.DictReader(stream))
        )
    for row in found:
        row["date"] = dt.date.fromisoformat(row["date"])
        if path.suffix == ".csv":
            row |= {"rank": int(row["rank"]), "score": float(row["score"])}
            row |= {name: json.loads(row[name]) for name in ("sources", "reason", "source_scores")}
            row["propensity"] = float(row["propensity"])
    return found


@pytest.mark.parametrize("ending", ["parquet", "jsonl", "csv", "CSV"])
def test_exports_have_the_dates_rows(table, tmp_path, ending):
    rollback(table, 2)
    path = tmp_path / f"lists.{ending}"
    path.write_text("of yesterday")
    assert f"{path}: 2 rows of 2024-01-01" in export(table, "2024-01-01", str(path))
    assert (
        read_back(path.rename(path.with_suffix(path.suffix.lower())))
        == rows(MONDAY, ["a", 'ä,"b'], "r1").to_table().to_pylist()
    )
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize(
    ("date", "path", "error", "told"),
    [
        (
            "2024-01-03",
            "x.csv",
            DataError,
            "no lists for 2024-01-03; it has 2 dates, the latest .*01-01, 2024-01-02",
        ),
        ("monday", "x.csv", ConfigError, "expected a date"),
        ("2024-01-01", "x.xlsx", ConfigError, r"ending in \.parquet, \.jsonl, \.csv"),
        ("2024-01-01", "s3://bucket/x.csv", ConfigError, "expected a file's path"),
        ("2024-01-01", "nowhere/x.csv", ConfigError, "there is no folder"),
    ],
)
def test_exports_that_cannot_be_are_refused(table, tmp_path, monkeypatch, date, path, error, told):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(error, match=told):
        export(table, date, path)


@pytest.mark.parametrize("ending", ["parquet", "jsonl", "csv"])
def test_a_full_disk_leaves_the_file_of_before(tmp_path, ending):
    table, path = str(tmp_path / "topk"), tmp_path / f"lists.{ending}"
    publish(table, rows(MONDAY, [os.urandom(20).hex() for _ in range(20_000)], "r1"), MONDAY, "r1")
    path.write_text("of yesterday")
    script = (
        "import sys\nfrom recsys_dist.scoring.table import export\n"
        "from recsys_dist.errors import RetryableError\n"
        "try: export(sys.argv[1], '2024-01-01', sys.argv[2])\n"
        "except RetryableError as error: sys.exit(str(error))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, table, str(path)],
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000)),
        capture_output=True,
        text=True,
        check=False,
        cwd=REPOSITORY,
    )
    assert "File too large" in done.stderr, done.stderr
    assert "what was there before is as it was" in done.stderr
    assert path.read_text() == "of yesterday"
    assert sorted(found.name for found in tmp_path.iterdir()) == [path.name, "topk"]


def test_a_table_that_is_not_there_is_named(tmp_path):
    table = str(tmp_path / "topk")
    for command in (
        lambda: versions(table),
        lambda: rollback(table, 1),
        lambda: export(table, "2024-01-01", str(tmp_path / "x.csv")),
        lambda: vacuum(table, 7),
    ):
        with pytest.raises(DataError, match=r"Run jobs/score\.py first"):
            command()
    assert not Path(table).exists()


@pytest.mark.parametrize("words", [["--export", str(TUESDAY), "x.csv"], ["--user", "u1"]])
def test_a_file_that_is_missing_is_named(table, tmp_path, monkeypatch, words):
    monkeypatch.chdir(tmp_path)
    for file in Path(table).glob(f"date={TUESDAY}/*.parquet"):
        file.unlink()
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    parser.set_defaults(conf=None, overrides=[f"storage.root={tmp_path}"])
    with pytest.raises(DataError, match=r"topk is damaged, .*\.parquet.* --rollback"):
        answer(parser.parse_args(words))
    assert sorted(found.name for found in tmp_path.iterdir()) == ["topk"]

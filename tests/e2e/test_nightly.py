"""The whole pipeline on real data, killed in every stage; and on a log of another kind, from a wheel."""

import csv
import datetime as dt
import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pyarrow as pa
import pytest
from deltalake import DeltaTable, write_deltalake

from recsys_dist.config import REPOSITORY, load
from recsys_dist.datasets import fetch
from recsys_dist.workspace import STAGES, Workspace
from tests.processes import kill_group

SMALL = ("deepfm.epochs=2", "als.rank=8", "als.iterations=3", "evaluation.bootstrap=100")


def settings(root, *more):
    return [word for setting in (f"storage.root={root}", *SMALL, *more) for word in ("--set", setting)]


def start(words, **options):
    """Start a process in a group of its own, so that all it starts can be killed with it."""
    return subprocess.Popen(
        [sys.executable, *map(str, words)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        **options,
    )


def finish(process, code=0):
    printed, _ = process.communicate(timeout=400)
    assert process.returncode == code, printed
    return printed


def snapshot(root):
    """Every file under the root with its hash and time of change."""
    return {
        str(path.relative_to(root)): (hashlib.sha256(path.read_bytes()).hexdigest(), path.stat().st_mtime_ns)
        for path in Path(root).rglob("*")
        if path.is_file()
    }


@pytest.fixture(scope="module")
def movielens():
    return fetch("movielens_100k", REPOSITORY / "data")


@pytest.mark.long
def test_killed_in_every_stage_the_night_completes_and_redoes_nothing(movielens, tmp_path):
    root = tmp_path / "root"
    conf = ["--conf", "conf/movielens_100k.yaml", *settings(root, "data.sample_users=0.1")]
    conf += ["--set", "evaluation.must_beat=null"]
    workspace = Workspace(load(None, [f"storage.root={root}"]))
    nightly = [REPOSITORY / "jobs" / "nightly.py", *conf]
    for stage in STAGES:
        process = start(nightly)
        folder = root / stage
        deadline = time.monotonic() + 200
        while not folder.exists() or not any(folder.iterdir()):
            assert process.poll() is None, process.communicate()[0]
            assert time.monotonic() < deadline, f"{stage} never began"
            time.sleep(0.05)
        kill_group(process)
        assert process.returncode == -signal.SIGKILL
        left = list(folder.iterdir())
        assert len(left) == 1
        assert not (left[0] / "manifest.json").exists()
        assert workspace.runs(stage) == []
    assert not (root / "topk").exists()

    printed = finish(start([*nightly, "--samples", "2"]))
    assert {stage: len(workspace.runs(stage)) for stage in STAGES} == dict.fromkeys(STAGES, 1)
    assert printed.count(": done before,") == len(STAGES) - 1
    for word in ("popularity", "ALS", "DeepFM, all items", "two-stage", "Recommended", "found by"):
        assert word in printed
    (score,) = workspace.runs("score")
    published = DeltaTable(root / "topk").to_pyarrow_table()
    assert published.num_rows == score.manifest["figures"]["rows"] > 0
    spec = workspace.runs("features")[0].spec()
    assert 40 < spec.n_users < 150  # about a tenth of 943

    before = snapshot(root)
    assert finish(start(nightly)).count(": done before,") == len(STAGES)
    assert snapshot(root) == before


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The project as an installed wheel, without its checkout."""
    folder = tmp_path_factory.mktemp("wheel")
    build = ["-m", "build", "--wheel", "--no-isolation", "--outdir", folder, REPOSITORY]
    finish(start(build))
    with zipfile.ZipFile(next(folder.glob("*.whl"))) as built:
        built.extractall(folder / "site")
    return folder / "site"


def own_log(folder):
    """A shop's log: pipe-separated, ISO times, its own column names; items as JSON lines; no users file."""
    draw = random.Random(0)
    begin = dt.datetime(2025, 3, 1, tzinfo=dt.UTC)
    with (folder / "orders.psv").open("w", newline="") as file:
        writer = csv.writer(file, delimiter="|")
        writer.writerow(["at", "customer", "sku", "quantity", "till"])
        for customer in range(80):
            moment = begin
            for _ in range(25):
                moment += dt.timedelta(hours=draw.randint(1, 40))
                group = customer % 4 if draw.random() < 0.8 else draw.randrange(4)
                sku = f"S-{group}{draw.randrange(12):02d}"
                writer.writerow([moment.isoformat(), f"c{customer:03d}", sku, draw.randint(0, 3), 7])
        file.write("2025-03-01T10:00:00Z|c001|S-001\n")  # too few columns
        file.write("yesterday|c001|S-001|1|7\n")  # no such time
    with (folder / "skus.jsonl").open("w") as file:
        for group in range(4):
            for n in range(12):
                item = {"sku": f"S-{group}{n:02d}", "label": f"Thing {group}/{n}", "tags": f"g{group},all"}
                file.write(json.dumps(item) + "\n")


@pytest.mark.long
def test_own_log_of_another_format_from_an_installed_wheel(wheel, tmp_path):
    own_log(tmp_path)
    conf = tmp_path / "shop.yaml"
    conf.write_text("""
        storage: {root: out}
        data:
          events:
            path: orders.psv
            format: csv
            delimiter: "|"
            columns: {user: customer, item: sku, timestamp: at, value: quantity}
            timestamp_format: iso
          items: {path: skus.jsonl, format: jsonl, columns: {item: sku, title: label}}
        label: {positive_when: value > 0}
        fields:
          - {name: tags, kind: categorical, side: item, column: tags, delimiter: ","}
          - {name: till, kind: categorical, side: context, column: till}
          - {name: recent, kind: history, last: 5}
          - {name: weekday, kind: time, part: weekday}
        als: {earlier: true}
        recall: {late: 0.2}
        deepfm: {pair: [{name: next, measure: next_items}, {name: als, measure: als}]}
    """)
    overrides = [word for setting in SMALL for word in ("--set", setting)]
    environment = {**os.environ, "PYTHONPATH": str(wheel)}
    job = ["-m", "recsys_dist.jobs.nightly", "--conf", "shop.yaml", *overrides]
    job += ["--set", "deepfm.epochs=15", "--set", "deepfm.batch_size=256"]
    process = start(job, cwd=tmp_path, env=environment)
    printed = finish(process)
    assert str(tmp_path / "out" / "topk") in printed
    rows = DeltaTable(tmp_path / "out" / "topk").to_pyarrow_table().to_pylist()
    assert {row["user_id"] for row in rows} == {f"c{customer:03d}" for customer in range(80)}
    assert {row["item_id"][:2] for row in rows} == {"S-"}
    workspace = Workspace(load(None, [f"storage.root={tmp_path}/out"]))
    (features,) = workspace.runs("features")
    (als,), (deepfm,) = workspace.runs("als"), workspace.runs("deepfm")
    assert deepfm.inputs["als"] == als.run_id
    assert 0 < als.manifest["figures"]["earlier"]["ratings"] < als.manifest["figures"]["ratings"]
    assert deepfm.manifest["figures"]["head"]["of"] == "late"
    assert sum(features.manifest["figures"]["quarantined"]["events"].values()) == 2
    shown = ["-m", "recsys_dist.jobs.score", "--conf", "shop.yaml", "--user", "c001"]
    assert "Thing " in finish(start(shown, cwd=tmp_path, env=environment))


def readme_lines(start):
    """The indented commands of the README that begin so."""
    readme = (REPOSITORY / "README.md").read_text().splitlines()
    return [line.strip() for line in readme if line.startswith(f"    {start}")]


def test_the_readmes_one_liners_read_the_table(tmp_path):
    rows = pa.table(
        {
            "date": [dt.date(2024, 1, 1)] * 2,
            "user_id": ["196", "7"],
            "item_id": ["a", "b"],
            "rank": [1, 1],
            "score": [0.5, 0.25],
        }
    )
    write_deltalake(tmp_path / "runs" / "topk", rows, partition_by=["date"])
    from_python, from_duckdb = readme_lines("from deltalake"), readme_lines("import duckdb")
    from_spark = [*readme_lines("from pyspark.sql import"), *readme_lines("spark.read.")]
    assert [len(lines) for lines in (from_python, from_duckdb, from_spark)] == [1, 1, 2]
    for lines in (from_python, from_duckdb, from_spark):
        printed = finish(start(["-c", "\n".join(lines)], cwd=tmp_path))
        assert "196" in printed
        assert "0.25" in printed

"""The same log gives the same run on one core, two, a cluster that loses a machine, and with Spark 3.5."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import yaml

from recsys_dist.config import REPOSITORY, Config, load
from recsys_dist.features import session
from recsys_dist.workspace import Workspace
from tests.features.test_fields import random_log, shop_config
from tests.logs import featurized
from tests.processes import kill_group

pytestmark = pytest.mark.long

SPARK35 = REPOSITORY / ".venv" / "spark35"
SMALL_JVM = "-XX:TieredStopAtLevel=1 -XX:+UseSerialGC"
CLUSTER = "local-cluster[2,1,1024]"
PARTITIONS = "spark.sql.shuffle.partitions"


@pytest.fixture(scope="module")
def log(tmp_path_factory):
    """The shop log, a duplicate in another file of its folder, some unusable rows, and items listed again."""
    root = tmp_path_factory.mktemp("everywhere")
    config = shop_config(root, random_log())
    folder = root / "events"
    folder.mkdir()
    lines = (root / "log.jsonl").read_text().splitlines()
    (folder / "a.jsonl").write_text("\n".join([*lines[::2], lines[0]]) + "\n")
    more = [*lines[1::2], lines[0], lines[2], '{"who": "u1"}', "no"]
    (folder / "b.jsonl").write_text("\n".join(more) + "\n")
    settings = config.model_dump(mode="json")
    settings["data"]["events"]["path"] = str(folder)
    catalogue = root / "catalogue"
    catalogue.mkdir()
    items = [json.loads(line) for line in (root / "items.jsonl").read_text().splitlines()]
    again = [item | {"category": f"c{n % 5}", "price": n} for n in range(40) for item in items[:3]]
    for name, rows in {"1.jsonl": items, "2.jsonl": again}.items():
        (catalogue / name).write_text("\n".join(map(json.dumps, rows)) + "\n")
    settings["data"]["items"]["path"] = str(catalogue)
    settings["data"]["max_bad_rows"] = 0.95
    settings["data"]["k_core"] = {"user": 10, "item": 5}
    return root, settings


def started(log, name, master, parts, **environment):
    """Start jobs/featurize.py in a process of its own, its shuffles in so many parts; returns it and its
    root.
    """
    root, settings = log
    settings = json.loads(json.dumps(settings))
    settings["storage"]["root"] = str(root / name)
    settings["spark"]["submit"] = [
        "--master", master, "--driver-memory", "1g", "--driver-java-options", SMALL_JVM,
        "--conf", f"spark.executor.extraJavaOptions={SMALL_JVM}",
    ]  # fmt: skip
    settings["spark"]["conf"] = {PARTITIONS: str(parts)}
    conf = root / f"{name}.yaml"
    conf.write_text(yaml.safe_dump(settings))
    command = [sys.executable, "jobs/featurize.py", "--conf", str(conf)]
    process = subprocess.Popen(
        command, cwd=REPOSITORY, env=os.environ | environment, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True,
    )  # fmt: skip
    return process, conf


def finished(process, conf):
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    return Workspace(load(conf)).runs("features")[-1]


def content(run):
    """features.json's bytes, and the rows of every table in a fixed order."""
    tables = {"examples", "users", "items", "item_days", "quarantine"} | {
        f"vocab/{name}" for name in run.spec().vocabularies
    }
    rows = {name: sorted(map(repr, run.table(name).to_pylist())) for name in tables}
    return Path(run.path, "features.json").read_bytes(), rows


def _executors(process):
    found = []
    for child in psutil.Process(process.pid).children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):  # a script that is over already
            if "CoarseGrainedExecutorBackend" in " ".join(child.cmdline()):
                found.append(child)
    return found


@pytest.fixture(scope="module")
def reference(log):
    return finished(*started(log, "reference", "local[1]", 1))


def test_unusable_rows(reference):
    core = reference.manifest["figures"]["k_core"]
    assert core["events_dropped"] > 0
    assert core["rounds"] > 1
    assert reference.manifest["figures"]["quarantined"]["events"] == {
        "duplicate": 3,
        "missing item": 1,
        "not JSON": 1,
    }
    aside = [row["reason"] for row in reference.table("quarantine").to_pylist()]
    assert sorted(set(aside)) == ["duplicate", "item listed again later", "missing item", "not JSON"]
    assert aside.count("item listed again later") == 120
    # The last row of the last file stays.
    tokens = {row["index"]: row["token"] for row in reference.table("vocab/category").to_pylist()}
    of_items = {row["item_id"]: tokens.get(row["category"]) for row in reference.table("items").to_pylist()}
    assert [of_items[f"i{n}"] for n in range(3)] == ["c4"] * 3


def test_two_cores(spark, log, reference, monkeypatch):
    """And four parts of what is moved, two of what is put in order, two files of what is written."""
    assert spark.sparkContext.master == "local[2]"
    monkeypatch.setattr(session, "SMALL", 1)
    root, settings = log
    settings = settings | {"storage": {"root": str(root / "two")}}
    settings["spark"] = settings["spark"] | {"conf": {PARTITIONS: "4"}}
    before = spark.conf.get(PARTITIONS)
    spark.conf.set(PARTITIONS, "4")
    run = featurized(Config.model_validate(settings))
    spark.conf.set(PARTITIONS, before)
    files = [file["path"] for file in run.manifest["files"]]
    assert sum(path.startswith("examples/split=train/") for path in files) == 2
    assert sum(path.startswith("items/") for path in files) == 2
    assert content(run) == content(reference)


def test_a_cluster_that_loses_an_executor(log, reference):
    """One executor is killed between the first steps and the last."""
    process, conf = started(log, "cluster", CLUSTER, 7)
    try:
        killed = None
        while process.poll() is None and killed is None:
            if list((log[0] / "cluster").glob("features/*/vocab/user")):
                killed = _executors(process)[0]
                killed.send_signal(signal.SIGKILL)
            time.sleep(0.05)
        assert killed is not None, process.communicate()[0]
        run = finished(process, conf)
    finally:
        if process.poll() is None:
            kill_group(process)
    assert not killed.is_running() or killed.status() == psutil.STATUS_ZOMBIE
    assert content(run) == content(reference)


def test_pyspark_3_5(log, reference):
    found = subprocess.run(
        [sys.executable, "-c", "import pyspark; print(pyspark.__version__)"],
        env=os.environ | {"PYTHONPATH": str(SPARK35)}, capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    assert found.startswith("3.5."), "make setup-dev installs it"
    run = finished(*started(log, "spark35", "local[2]", 3, PYTHONPATH=str(SPARK35)))
    assert run.manifest["figures"]["spark"] == found.strip()
    assert content(run) == content(reference)

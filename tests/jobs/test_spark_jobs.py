"""The Spark jobs as their users start them: spark-submit and plain Python, as processes."""

import os
import re
import stat
import subprocess
import sys
from collections import Counter

import numpy as np
import pytest

from recsys_dist.config import REPOSITORY, load
from recsys_dist.spark import spark_environment, spark_home
from recsys_dist.workspace import Workspace
from tests.processes import run_here

pytestmark = pytest.mark.long

# What conf/movielens_100k.yaml sets for the same reason: these logs are small.
OPTIONS = "-XX:TieredStopAtLevel=1 -XX:+UseSerialGC"
FAST = ["--driver-java-options", OPTIONS, "--conf", f"spark.executor.extraJavaOptions={OPTIONS}"]


def run_process(words, code, environment=None):
    environment = spark_environment() | dict(os.environ) if environment is None else environment
    done = subprocess.run(words, capture_output=True, text=True, check=False, timeout=300, env=environment)
    printed = done.stdout + done.stderr
    assert done.returncode == code, printed
    assert code == 0 or "Traceback" not in printed, printed
    return printed


def submit(job, *arguments, master="local[1]", code=0):
    """spark-submit jobs/<job>, check its exit code, return what it printed."""
    words = [str(spark_home() / "bin" / "spark-submit"), "--master", master, *FAST]
    return run_process([*words, str(REPOSITORY / "jobs" / job), *arguments], code)


def python(job, *arguments, code=0, environment=None):
    """python jobs/<job>, likewise."""
    return run_process([sys.executable, str(REPOSITORY / "jobs" / job), *arguments], code, environment)


def latest(root, stage="features"):
    return Workspace(load(None, [f"storage.root={root}"])).runs(stage)[-1]


@pytest.fixture(scope="module")
def shop(tmp_path_factory):
    """A log that is none of ours: a folder of |-separated files, ISO times, other names, broken lines."""
    root = tmp_path_factory.mktemp("shop")
    random = np.random.default_rng(0)
    (root / "visits").mkdir()
    for day in (1, 2):
        lines = ["at|shopper|sku|device|stars"]
        for _ in range(600):
            hour, minute = random.integers(0, 24), random.integers(0, 60)
            sku = min(int(random.exponential(12)), 60)
            device = random.choice(["phone", "desk", ""])
            at = f"2024-05-{day:02d}T{hour:02d}:{minute:02d}:00Z"
            lines.append(f"{at}|shopper-{random.integers(50)}|sku-{sku}|{device}|{random.integers(1, 6)}")
        lines += ["2024-05-01T10:00:00Z|shopper-1|sku-1", "yesterday|shopper-1|sku-1|phone|5"]
        (root / "visits" / f"{day}.csv").write_text("\n".join(lines) + "\n")
    conf = root / "shop.yaml"
    conf.write_text(
        f"""
storage: {{root: {root}/runs}}
data:
  events:
    path: {root}/visits
    delimiter: "|"
    timestamp_format: iso
    columns: {{user: shopper, item: sku, timestamp: at, value: stars}}
label: {{positive_when: value >= 3}}
fields:
  - {{name: device, kind: categorical, side: context, column: device}}
  - {{name: recent, kind: history, last: 5}}
  - {{name: activity, kind: aggregate, measure: count}}
als: {{rank: 4, iterations: 12}}
"""
    )
    return root, conf


@pytest.fixture(scope="module")
def submitted(shop):
    """The shop's features, made by spark-submit on one core."""
    root, conf = shop
    submit("featurize.py", "--conf", str(conf))
    return latest(root / "runs")


def test_own_data(submitted):
    figures = submitted.manifest["figures"]
    assert figures["quarantined"]["events"]["wrong number of columns"] == 2
    assert figures["quarantined"]["events"]["unparseable timestamp"] == 2
    assert 1100 < sum(figures["examples"].values()) <= 1200
    assert [row["token"] for row in submitted.table("vocab/device").to_pylist()] in (
        ["phone", "desk"],
        ["desk", "phone"],
    )
    assert {file["path"].rpartition("/")[2] for file in submitted.manifest["files"]} >= {"features.json"}


def test_als(shop, submitted):
    root, conf = shop
    printed = submit("train_als.py", "--conf", str(conf), master="local[2]")
    run = latest(root / "runs", "als")
    assert run.inputs == {"features": submitted.run_id}
    assert run.uri in printed
    users, items = run.table("user_factors"), run.table("item_factors")
    assert users["index"].to_pylist() == sorted(users["index"].to_pylist())
    assert 0 < users.num_rows <= submitted.spec().n_users
    assert all(len(vector) == 4 for vector in items["vector"].to_pylist())
    # No checkpoint of the fit stays behind.
    assert {file["path"].partition("/")[0] for file in run.manifest["files"]} == {
        "key.json",
        "user_factors",
        "item_factors",
    }


def test_recall(spark, shop, submitted):
    root, conf = shop
    printed = run_here("recall.py", "--conf", str(conf), "--set", "recall.n=5")
    run = latest(root / "runs", "recall")
    assert run.inputs == {"features": submitted.run_id}
    assert run.uri in printed
    for name in ("next_items", "neighbors/measure=pearson"):
        rows = run.table(name).to_pylist()
        assert max(Counter(row["item"] for row in rows).values()) == 5
        order = [(row["item"], -row["weight"], row["other"]) for row in rows]
        assert order == sorted(order)
        assert {row["other"] for row in rows} <= set(range(1, submitted.spec().n_items + 1))
    assert {file["path"].partition("/")[0] for file in run.manifest["files"]} == {
        "daily",
        "key.json",
        "next_items",
        "neighbors",
    }


def test_als_names_the_job_to_run_first(shop, tmp_path):
    printed = python("train_als.py", "--conf", str(shop[1]), "--set", f"storage.root={tmp_path}", code=65)
    assert "Run jobs/featurize.py first" in printed


def test_again_does_nothing(shop, submitted):
    printed = python("featurize.py", "--conf", str(shop[1]))
    assert f"features: done before, {submitted.uri}" in printed


def test_an_unusable_log_exits_65(tmp_path):
    """One of many kinds: features/test_read.py has the others' messages."""
    (tmp_path / "log.csv").write_text("user_id,item,timestamp\nu,i,1\n")
    events = f"{{path: {tmp_path}/log.csv, columns: {{user: user, item: item, timestamp: timestamp}}}}"
    printed = python(
        "featurize.py", "--set", f"storage.root={tmp_path}", "--set", f"data.events={events}", code=65
    )
    message = r"log\.csv has no column 'user' .*nearest: 'user_id'. Columns found: user_id, item, timestamp"
    assert re.search(message, printed), printed


def test_too_little_memory(tmp_path):
    """A line longer than the heap: Spark dies of it, and what to do is said."""
    (tmp_path / "log.csv").write_text("user,item,timestamp\nann," + "x" * 150_000_000 + ",1700000000\n")
    events = f"{{path: {tmp_path}/log.csv, columns: {{user: user, item: item, timestamp: timestamp}}}}"
    submit = "[--master, 'local[1]', --driver-memory, 512m]"
    settings = (f"storage.root={tmp_path}/runs", f"data.events={events}", f"spark.submit={submit}")
    printed = python("featurize.py", *(word for text in settings for word in ("--set", text)), code=64)
    assert "OutOfMemoryError" in printed
    assert re.search(r"error: Spark has too little memory: .*\. Raise --driver-memory in", printed), printed
    assert Workspace(load(None, [f"storage.root={tmp_path}/runs"])).runs("features") == []


@pytest.mark.parametrize("java", ["none", "old"])
def test_java_is_checked_first(java, shop, tmp_path):
    if java == "old":
        fake = tmp_path / "java"
        fake.write_text("#!/bin/sh\necho 'openjdk version \"11.0.2\" 2019-01-15' >&2\n")
        fake.chmod(fake.stat().st_mode | stat.S_IXUSR)
    environment = {**os.environ, "PATH": str(tmp_path)}
    environment.pop("JAVA_HOME", None)
    arguments = ("--conf", str(shop[1]), "--set", f"storage.root={tmp_path}/runs")
    printed = python("featurize.py", *arguments, code=64, environment=environment)
    assert {"none": "No Java was found", "old": "is Java 11, and Spark runs on Java 17 or newer"}[
        java
    ] in printed

"""Logs whose shape breaks what was written for average users, items and days."""

import os
import subprocess
import sys

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pytest
import yaml

from recsys_dist.config import REPOSITORY, load
from recsys_dist.features.session import LARGE, MEBIBYTE, shuffle_partitions
from recsys_dist.workspace import Workspace
from tests.logs import log_config

pytestmark = pytest.mark.long

HEAVY = 1_000_000
OTHERS = 500_000
DAY = 86400


@pytest.fixture(scope="module")
def skewed(tmp_path_factory):
    """A user with a million events, an item in a third of all events, and days without any."""
    root = tmp_path_factory.mktemp("skewed")
    generator = np.random.default_rng(0)
    n = HEAVY + OTHERS
    users = np.concatenate([np.zeros(HEAVY, np.int64), generator.integers(1, 5000, OTHERS)])
    items = generator.integers(1, 2000, n)
    items[generator.random(n) < 1 / 3] = 0
    days = generator.choice([0, 1, 2, 5, 6, 9], n)  # nothing on days 3, 4, 7 and 8
    seconds = days * DAY + generator.integers(0, DAY, n)
    values = generator.integers(1, 6, n)
    table = pa.table({"user": users, "item": items, "timestamp": seconds, "value": values})
    fields = [
        {"name": "recent", "kind": "history", "when": "positive", "last": 20},
        {"name": "activity", "kind": "aggregate", "measure": "count"},
        {"name": "popular", "kind": "aggregate", "side": "item", "measure": "count", "days": 2},
    ]
    config = log_config(root, [], fields=fields, data={"max_bad_rows": 0.5})
    pyarrow.csv.write_csv(table, root / "events.csv")
    settings = config.model_dump(mode="json")
    settings["spark"]["submit"] = ["--master", "local[2]", "--driver-memory", "3g"]
    (root / "conf.yaml").write_text(yaml.safe_dump(settings))
    command = [sys.executable, "jobs/featurize.py", "--conf", str(root / "conf.yaml")]
    done = subprocess.run(
        command, cwd=REPOSITORY, env=os.environ, text=True, capture_output=True, timeout=400, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return Workspace(load(root / "conf.yaml")).runs("features")[-1], table


def test_a_user_with_a_million_events(skewed):
    run, log = skewed
    rows = run.table("examples")
    index = {row["token"]: row["index"] for row in run.table("vocab/user").to_pylist()}["0"]
    items = {row["token"]: row["index"] for row in run.table("vocab/item").to_pylist()}
    own = rows.filter(pc.equal(rows["user"], index)).sort_by([("timestamp", "ascending")])
    twice = run.manifest["figures"]["quarantined"]["events"]["duplicate"]
    assert rows.num_rows + twice == HEAVY + OTHERS
    distinct = log.group_by(["user", "item", "timestamp", "value"]).aggregate([])
    assert rows.num_rows == distinct.num_rows
    truth = distinct.filter(pc.equal(distinct["user"], 0))
    assert own.num_rows == truth.num_rows > 0.9 * HEAVY
    # The last moment's history: the positive events before it, in order of time, then raw item id.
    last = pc.max(truth["timestamp"]).as_py()
    earlier = truth.filter(pc.and_(pc.less(truth["timestamp"], last), pc.greater_equal(truth["value"], 4)))
    earlier = earlier.append_column("text", earlier["item"].cast(pa.string()))
    earlier = earlier.sort_by([("timestamp", "ascending"), ("text", "ascending"), ("value", "ascending")])
    assert own["recent"][-1].as_py() == [items[item] for item in earlier["text"].to_pylist()[-20:]]
    activity = run.spec().field("activity")
    before = truth.filter(pc.less(truth["timestamp"], last)).num_rows
    assert own["activity"][-1].as_py() == pytest.approx(activity.transformed(before), rel=1e-5)


def test_an_item_in_a_third_of_all_events_and_empty_days(skewed):
    run, log = skewed
    distinct = log.group_by(["user", "item", "timestamp", "value"]).aggregate([])
    index = {row["token"]: row["index"] for row in run.table("vocab/item").to_pylist()}["0"]
    rows = run.table("item_days").to_pylist()
    found = {row["day"].toordinal() - 719163: row["popular"] for row in rows if row["item"] == index}
    days = pc.divide(distinct.filter(pc.equal(distinct["item"], 0))["timestamp"], DAY).to_numpy()
    counts = np.bincount(days, minlength=11)
    for day in range(11):
        held = found[max(known for known in found if known <= day)]
        assert held == pytest.approx(np.log1p(counts[max(0, day - 2) : day].sum()), rel=1e-6)
    assert found[5] == 0  # days 3 and 4 are empty
    assert len(found) <= 11


def test_partitions_follow_from_the_data():
    assert shuffle_partitions(2 * MEBIBYTE, cores=8) == 1
    assert shuffle_partitions(40 * MEBIBYTE, cores=8) == 5
    assert shuffle_partitions(640 * MEBIBYTE, cores=2) == 6
    assert shuffle_partitions(1000 * LARGE, cores=64) == 1024


def test_a_run_is_a_few_files_when_it_is_small(skewed):
    run, _ = skewed
    examples = [file for file in run.manifest["files"] if file["path"].startswith("examples/")]
    assert len(examples) <= 6

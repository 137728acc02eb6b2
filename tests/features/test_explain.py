"""The table of `featurize.py --explain`, on a log small enough to count by hand."""

import json
import re

import pytest
from pyarrow.fs import copy_files

from recsys_dist.features.explain import WIDTH, explain
from recsys_dist.workspace import Workspace
from tests.logs import featurized, log_config
from tests.processes import run_here

DAY = 86_400
FIELDS = [
    {"name": "town", "kind": "categorical", "side": "user", "column": "town"},
    {"name": "tags", "kind": "categorical", "side": "item", "column": "tags", "list": True},
    {"name": "price", "kind": "numeric", "side": "item", "column": "price", "log": True},
    {"name": "weight", "kind": "numeric", "side": "item", "column": "price", "indicator": False},
    {"name": "level", "kind": "numeric", "side": "item", "column": "price", "buckets": 2},
    {"name": "size", "kind": "numeric", "side": "item", "column": "size", "buckets": 3},
    {"name": "device", "kind": "categorical", "side": "context", "column": "device", "hash_buckets": 7},
    {"name": "hour", "kind": "time", "part": "hour"},
    {"name": "weekday", "kind": "time", "part": "weekday"},
    {"name": "wave", "kind": "time", "part": "hour", "encoding": "cyclic"},
    {"name": "pause", "kind": "time", "part": "recency"},
    {"name": "wanted", "kind": "history", "when": "positive", "last": 3},
    {"name": "liked_tags", "kind": "history", "of": "tags", "when": "any", "last": 2},
    {"name": "activity", "kind": "aggregate", "measure": "count"},
    {"name": "taste", "kind": "aggregate", "measure": "share", "attribute": "tags", "top": 2},
    {"name": "idle", "kind": "aggregate", "measure": "days_since", "when": "positive"},
    {"name": "popularity", "kind": "aggregate", "side": "item", "measure": "count", "days": 7},
    {"name": "age", "kind": "aggregate", "side": "item", "measure": "age"},
]


@pytest.fixture(scope="module")
def made(spark, tmp_path_factory):
    """A configuration and its run.

    Ten events of each of two users at 06:00, ann's every day, bob's every second; 8 of each are train.
    """
    root = tmp_path_factory.mktemp("explain")
    lines = []
    for every, user in enumerate(("ann", "bob"), 1):
        for number in range(10):
            device = "" if number % 2 else "phone"
            time = number * every * DAY + 6 * 3600
            lines.append(f"{user},{'abcd'[number % 4]},{time},{5 if number else 1},{device}")
    items = [
        {"id": "a", "tags": ["x", "\u001b[31mred"], "price": 10, "size": 1234567},
        {"id": "b", "tags": ["x"], "price": 20, "size": 2345678},
        {"id": "c", "tags": [], "price": None, "size": 3456789},
        {"id": "d", "price": 30, "size": 4567890},
        {"id": "never seen", "tags": ["y"], "price": 40},
    ]
    (root / "items.jsonl").write_text("\n".join(map(json.dumps, items)))
    (root / "users.csv").write_text("who,town\nann,A rather long name of a rather long town\nbob,\n")
    data = {
        "items": {"path": str(root / "items.jsonl"), "format": "jsonl", "columns": {"item": "id"}},
        "users": {"path": str(root / "users.csv"), "columns": {"user": "who"}},
    }
    config = log_config(root, lines, header="user,item,timestamp,value,device", fields=FIELDS, data=data)
    return config, featurized(config)


@pytest.fixture(scope="module")
def rows(made):
    """Field to its cells: kind, source, side, cardinality, coverage, samples."""
    lines = explain(*made).splitlines()
    assert lines[0] == (
        "20 events, 18 of them positive, from 1970-01-01 to 1970-01-19: 16 train, 2 valid, 2 test; "
        "2 users, 5 items"
    )
    assert [line[:5] for line in lines if len(line) > WIDTH] == ["size "]
    cells = [re.split(r"\s{2,}", line.strip()) for line in lines[2:]]
    assert cells[0] == ["field", "kind", "source", "side", "cardinality", "coverage", "samples"]
    return {name: rest for name, *rest in cells[1:]}


def test_every_field_is_there_once_in_order(made, rows):
    assert list(rows) == [field.name for field in made[1].spec().fields]
    assert len(rows) == 22


def test_coverage(rows):
    """By hand: of the 16 train examples; of the 5 items."""
    assert {name: row[4] for name, row in rows.items()} == {
        "user": "100.0%",
        "item": "100.0%",
        "town": "50.0%",
        "tags": "60.0%",
        "price": "80.0%",
        "price_missing": "100.0%",
        "weight": "-",
        "level": "80.0%",
        "size": "80.0%",
        "device": "50.0%",
        "hour": "100.0%",
        "weekday": "100.0%",
        "wave_sin": "100.0%",
        "wave_cos": "100.0%",
        "pause": "87.5%",  # not a user's first event
        "wanted": "75.0%",  # nor the second: the first is no positive
        "liked_tags": "75.0%",  # items c and d have no tags
        "activity": "100.0%",
        "taste": "87.5%",
        "idle": "75.0%",
        "popularity": "100.0%",
        "age": "80.0%",
    }


def test_source_and_size(rows):
    assert rows["user"][:4] == ["id", "events.user", "user", "3"]
    assert rows["town"][:4] == ["categorical", "users.town", "user", "2"]
    assert rows["price"][:4] == ["numeric", "items.price", "item", "1"]
    assert rows["price_missing"][1] == "items.price missing"
    assert rows["device"][:4] == ["categorical", "events.device", "context", "8"]
    assert rows["wave_sin"][:4] == ["time", "events.timestamp, sin of hour", "context", "1"]
    assert rows["wanted"][:4] == ["history", "last 3 of item, positive", "user", "6"]
    assert rows["taste"][:4] == ["aggregate", "share of tags", "user", "2"]
    assert rows["idle"][1] == "days_since of positive"
    assert rows["popularity"][1:3] == ["count of events, 7 days", "item"]


def test_samples(rows):
    samples = {name: row[5].split(", ") for name, row in rows.items()}
    assert sorted(samples["user"]) == ["ann", "bob"]
    assert samples["town"][0].startswith("A rather long")
    assert sorted(samples["tags"]) == ["?[31mred", "x", "y"]  # an escape must not steer the terminal
    assert samples["price"] == ["10", "20", "30"]
    assert set(samples["level"]) == {"..20", "20.."}
    assert samples["device"][0].startswith("#")
    # No number is cut.
    assert samples["size"] == ["..2.346e+06", "2.346e+06..3.457e+06", "3.457e+06.."]
    assert samples["hour"] == ["6:00"]
    assert (samples["wave_sin"], samples["wave_cos"]) == (["1"], ["0"])  # not 6.12e-17
    assert set(samples["weekday"]) <= {"Mon", "Tue", "Wed", "Thu", "Fri", "Sat", "Sun"}
    assert set(samples["pause"]) == {"15 h+", "31 h+"}
    assert sorted(samples["wanted"]) == ["b", "c", "d"]
    assert set(samples["activity"]) < {str(n) for n in range(8)}
    assert sorted(samples["taste"])[0].startswith("?[31mred ")
    assert sorted(samples["idle"]) == ["1", "2"]


def test_the_job_shows_a_run_that_is_done(made, tmp_path):
    """Without Spark: the run is there."""
    config, run = made
    workspace = Workspace(config)
    shown = workspace.new("features", workspace.key("features", config, {}), {})
    copy_files(run.path, shown.path, run.filesystem, run.filesystem)
    shown.filesystem.delete_file(f"{shown.path}/manifest.json")
    shown.commit(config, run.manifest["figures"])
    conf = tmp_path / "conf.yaml"
    conf.write_text(json.dumps(config.model_dump(mode="json")))
    first, _, rest = run_here("featurize.py", "--conf", str(conf), "--explain").partition("\n")
    assert first == f"features: done before, {shown.uri}"
    assert rest.strip() == explain(config, run)

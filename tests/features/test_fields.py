"""Every kind of field against plain Python, which looks through the whole log for each event."""

import contextlib
import datetime as dt
import itertools
import json
import math
import statistics

import numpy as np
import pytest
from pyspark.sql import SparkSession
from pyspark.sql import functions as F

from recsys_dist.config import Config
from recsys_dist.features import numeric
from recsys_dist.features.numeric import Value, moments, quantiles
from recsys_dist.features.session import in_ranges
from recsys_dist.workspace import Workspace
from tests.logs import featurized, log_config

DAY = 86400
START = 1_700_000_000 // DAY * DAY
WEIGHTS = {"view": 1.0, "cart": 3.0, "purchase": 5.0}
FIELDS = [
    {"name": "device", "kind": "categorical", "side": "context", "column": "device", "min_count": 40},
    {"name": "position", "kind": "categorical", "side": "context", "column": "page", "hash_buckets": 7},
    {"name": "wait", "kind": "numeric", "side": "context", "column": "wait", "log": True, "impute": "median"},
    {"name": "category", "kind": "categorical", "side": "item", "column": "category"},
    {"name": "tags", "kind": "categorical", "side": "item", "column": "tags", "list": True},
    {"name": "price", "kind": "numeric", "side": "item", "column": "price", "scale": "min_max"},
    {"name": "price_range", "kind": "numeric", "side": "item", "column": "price", "buckets": 3},
    {"name": "hour", "kind": "time", "part": "hour"},
    {"name": "clock", "kind": "time", "part": "hour", "encoding": "cyclic"},
    {"name": "week", "kind": "time", "part": "weekday", "encoding": "cyclic"},
    {"name": "recency", "kind": "time", "part": "recency"},
    {"name": "recent", "kind": "history", "when": "positive", "last": 4},
    {"name": "views", "kind": "history", "when": "view", "last": 3},
    {"name": "categories", "kind": "history", "of": "category", "when": "any", "last": 3},
    {"name": "bought_tags", "kind": "history", "of": "tags", "when": "purchase", "last": 2},
    {"name": "activity", "kind": "aggregate", "measure": "count"},
    {"name": "spent", "kind": "aggregate", "measure": "mean_value", "when": "positive"},
    {"name": "days_since", "kind": "aggregate", "measure": "days_since", "when": "purchase"},
    {"name": "taste", "kind": "aggregate", "measure": "share", "attribute": "category", "top": 2},
    {"name": "tag_taste", "kind": "aggregate", "measure": "share", "attribute": "tags", "when": "positive"},
    {"name": "popular", "kind": "aggregate", "side": "item", "measure": "count", "days": 2},
    {"name": "sold", "kind": "aggregate", "side": "item", "measure": "count", "when": "purchase"},
    {"name": "worth", "kind": "aggregate", "side": "item", "measure": "mean_value", "days": 3},
    {"name": "age", "kind": "aggregate", "side": "item", "measure": "age"},
]
ITEMS = {
    f"i{n}": {
        "id": f"i{n}",
        "category": ["a", "b", "c", None][n % 4],
        "tags": [["x"], ["x", "y"], [], ["z", "y", "x"]][n % 4],
        "price": [1.5, 20, None, 7][n % 4] if n % 5 else "cheap",
        "from": dt.datetime.fromtimestamp(START + (n % 3) * DAY, dt.UTC).isoformat() if n % 2 else None,
    }
    for n in range(12)
}


def random_log(seed=0, users=14, events=30):
    """(user, item, second, type, device, page, wait), some at the same moment, none twice."""
    generator = np.random.default_rng(seed)
    rows = {}
    for user in range(users):
        for _ in range(int(generator.integers(1, events))):
            item = f"i{int(11 * generator.random() ** 2)}"
            second = START + int(generator.integers(0, 9 * 24)) * 3600
            kind = str(generator.choice(list(WEIGHTS), p=[0.6, 0.2, 0.2]))
            device = str(generator.choice(["phone", "desk", "tv"], p=[0.6, 0.35, 0.05]))
            wait = float(generator.integers(0, 50)) if generator.random() < 0.8 else None
            rows[f"u{user}", item, second, kind] = (device, f"p{int(generator.integers(0, 20))}", wait)
    return [(*key, *value) for key, value in rows.items()]


def shop_config(root, log, **sections):
    names = ("who", "what", "at", "type", "device", "page", "wait")
    lines = [json.dumps(dict(zip(names, row, strict=True))) for row in log]
    (root / "log.jsonl").write_text("\n".join(lines) + "\n")
    (root / "items.jsonl").write_text("\n".join(json.dumps(row) for row in ITEMS.values()) + "\n")
    columns = {"user": "who", "item": "what", "timestamp": "at", "event": "type"}
    items = {"item": "id", "active_from": "from"}
    return Config.model_validate(
        {
            "storage": {"root": str(root / "runs")},
            "data": {
                "events": {"path": str(root / "log.jsonl"), "format": "jsonl", "columns": columns},
                "items": {
                    "path": str(root / "items.jsonl"), "format": "jsonl", "columns": items,
                    "timestamp_format": "iso",
                },
            },
            "label": {"weights": WEIGHTS, "positive_when": "event in ('cart', 'purchase')"},
            "split": {"kind": "global_time"},
            "fields": FIELDS,
        }
        | sections
    )  # fmt: skip


@pytest.fixture(scope="module")
def shop(spark, tmp_path_factory):
    log = random_log()
    run = featurized(shop_config(tmp_path_factory.mktemp("shop"), log))
    return run, Oracle(log)


class Oracle:
    """What the features must be, by their definitions."""

    def __init__(self, log):
        self.log = sorted(log, key=lambda e: (e[0], e[2], e[1], WEIGHTS[e[3]], e[3]))
        times = sorted(event[2] for event in log)
        self.cuts = [times[int(0.8 * len(log))], times[int((0.8 + 0.1) * len(log))]]
        self.train = [event for event in self.log if event[2] < self.cuts[0]]
        self.end = (times[-1] // DAY + 1) * DAY

    def split(self, event):
        return "train" if event[2] < self.cuts[0] else "valid" if event[2] < self.cuts[1] else "test"

    def earlier(self, user, before):
        return [event for event in self.log if event[0] == user and event[2] < before]

    @staticmethod
    def matching(events, when):
        if when == "any":
            return events
        wanted = ("cart", "purchase") if when == "positive" else (when,)
        return [event for event in events if event[3] in wanted]

    def user(self, user, before, now):
        """The raw fields that look back: before a moment, told at `now`."""
        events = self.earlier(user, before)
        positive, bought = self.matching(events, "positive"), self.matching(events, "purchase")
        hours = (now - events[-1][2]) // 3600 if events else None
        return {
            "recency": 0 if hours is None else min(1 + int(math.log2(1 + max(hours, 0))), 24),
            "recent": [event[1] for event in positive[-4:]],
            "views": [event[1] for event in self.matching(events, "view")[-3:]],
            "categories": [c for event in events[-3:] if (c := ITEMS[event[1]]["category"])],
            "bought_tags": [tag for event in bought[-2:] for tag in ITEMS[event[1]]["tags"]],
            "activity": math.log1p(len(events)),
            "spent": statistics.fmean(WEIGHTS[e[3]] for e in positive) if positive else None,
            "days_since": math.log1p(max(now - bought[-1][2], 0) / DAY) if bought else None,
            "taste": lambda words: [_share(events, lambda i, w=w: ITEMS[i]["category"] == w) for w in words],
            "tag_taste": lambda tags: [_share(positive, lambda i, t=t: t in ITEMS[i]["tags"]) for t in tags],
        }

    def item(self, item, day):
        """The raw daily fields before a day (seconds)."""
        events = [event for event in self.log if event[1] == item and event[2] < day]
        worth = [WEIGHTS[event[3]] for event in events if event[2] >= day - 3 * DAY]
        seen = [event[2] // DAY * DAY for event in events]
        declared = ITEMS[item]["from"]
        born = [dt.datetime.fromisoformat(declared).timestamp()] if declared else []
        births = [birth for birth in [*born, *seen] if birth <= day]
        return {
            "popular": math.log1p(sum(event[2] >= day - 2 * DAY for event in events)),
            "sold": math.log1p(len(self.matching(events, "purchase"))),
            "worth": statistics.fmean(worth) if worth else None,
            "age": 1 + int(math.log2(1 + (day - min(births)) // DAY)) if births else 0,
        }


def _share(events, has):
    return sum(has(event[1]) for event in events) / len(events) if events else 0.0


def vocabulary(run, name):
    return {row["index"]: row["token"] for row in run.table(f"vocab/{name}").to_pylist()}


def compare(run, row, expected, names):
    """A stored row against raw values."""
    for name, raw in expected.items():
        field, found = run.spec().field(name), row[name]
        if field.type == "indices":
            assert [names[field.vocab][index] for index in found] == raw, name
        elif field.type == "vector":
            words = [names[field.vocab][index] for index in range(1, field.cardinality + 1)]
            assert found == pytest.approx(raw(words)), name
        elif field.type == "value":
            wanted = 0.0 if raw is None else (raw - field.offset) / field.scale
            assert found == pytest.approx(wanted, abs=1e-5), name
        else:
            assert found == raw, name


def test_events_see_what_is_strictly_earlier(shop):
    run, oracle = shop
    names = {name: vocabulary(run, name) for name in ("user", "item", "category", "tags", "device")}
    found = {}
    for row in run.table("examples").to_pylist():
        second = int(row["timestamp"].timestamp())
        value = {v: k for k, v in WEIGHTS.items()}[row["value"]]
        found[names["user"][row["user"]], names["item"][row["item"]], second, value] = row
    assert len(found) == len(oracle.log)
    for event in oracle.log:
        row = found[event[:4]]
        compare(run, row, oracle.user(event[0], event[2], event[2]), names)
        assert row["split"] == oracle.split(event)
        assert row["label"] == (event[3] != "view")
        hour = event[2] // 3600 % 24
        assert row["hour"] == hour + 1
        assert row["clock_sin"] == pytest.approx(math.sin(2 * math.pi * hour / 24), abs=1e-6)
        weekday = dt.datetime.fromtimestamp(event[2], dt.UTC).weekday()
        assert row["week_cos"] == pytest.approx(math.cos(2 * math.pi * weekday / 7), abs=1e-6)
        assert names["device"].get(row["device"]) == (event[4] if event[4] != "tv" else None)
        assert 1 <= row["position"] <= 7
        assert row["wait_missing"] == (event[6] is None)
    pages = {}
    for event in oracle.log:
        pages.setdefault(event[5], set()).add(found[event[:4]]["position"])
    assert all(len(buckets) == 1 for buckets in pages.values())
    assert len(set.union(*pages.values())) > 3


def test_statistics_are_of_the_train_part(shop):
    run, oracle = shop
    spec = run.spec()
    waits = sorted(event[6] for event in oracle.train if event[6] is not None)
    wait = spec.field("wait")
    assert wait.fill == waits[len(waits) // 2]
    assert wait.offset == pytest.approx(statistics.fmean(map(math.log1p, waits)))
    assert wait.scale == pytest.approx(statistics.pstdev(map(math.log1p, waits)))
    assert wait.log
    activity = [math.log1p(len(oracle.earlier(event[0], event[2]))) for event in oracle.train]
    assert spec.field("activity").offset == pytest.approx(statistics.fmean(activity))
    assert spec.field("activity").scale == pytest.approx(statistics.pstdev(activity))
    worth = [WEIGHTS[event[3]] for event in oracle.train]
    assert spec.field("worth").offset == pytest.approx(statistics.fmean(worth))
    known = {event[1] for event in oracle.train}
    prices = [ITEMS[item]["price"] for item in known if isinstance(ITEMS[item]["price"], int | float)]
    price = spec.field("price")
    assert (price.offset, price.scale) == (min(prices), max(prices) - min(prices))
    assert price.fill == pytest.approx(statistics.fmean(prices))
    assert spec.field("device").cardinality == 3
    assert spec.rows == {part: sum(oracle.split(e) == part for e in oracle.log) for part in spec.rows}


def test_items(shop):
    run, oracle = shop
    names = {name: vocabulary(run, name) for name in ("category", "tags")}
    spec = run.spec()
    rows = {row["item_id"]: row for row in run.table("items").to_pylist()}
    assert rows.keys() == ITEMS.keys()
    assert sorted(row["item"] for row in rows.values()) == list(range(1, 13))
    edges = spec.field("price_range").edges
    for name, item in ITEMS.items():
        row = rows[name]
        assert names["category"].get(row["category"]) == item["category"]
        assert [names["tags"][index] for index in row["tags"]] == item["tags"]
        missing = not isinstance(item["price"], int | float)
        assert row["price_missing"] == missing
        raw = spec.field("price").fill if missing else item["price"]
        assert row["price"] == pytest.approx(spec.field("price").transformed(raw), abs=1e-6)
        assert row["price_range"] == (0 if missing else 1 + sum(edge <= item["price"] for edge in edges))
        assert row["present"]
        declared = row["active_from"].isoformat() if row["active_from"] else None
        assert declared == item["from"]
        positive = [e for e in oracle.train if e[1] == name and e[3] != "view"]
        assert row["count"] == len(positive)


def test_item_days(shop):
    run, oracle = shop
    names = vocabulary(run, "item")
    rows = run.table("item_days").sort_by([("item", "ascending"), ("day", "ascending")]).to_pylist()
    spec = run.spec()
    assert len({(row["item"], row["day"]) for row in rows}) == len(rows)
    by_item = {}
    for row in rows:
        by_item.setdefault(names[row["item"]], []).append(row)
    assert by_item.keys() == ITEMS.keys()
    first = min(event[2] for event in oracle.log) // DAY * DAY
    for item, known in by_item.items():
        for day in range(first, oracle.end + 1, DAY):
            date = dt.datetime.fromtimestamp(day, dt.UTC).date()
            row = [row for row in known if row["day"] <= date][-1]
            raw = oracle.item(item, day)
            for name in ("popular", "sold", "worth"):
                field = spec.field(name)
                wanted = 0.0 if raw[name] is None else (raw[name] - field.offset) / field.scale
                assert row[name] == pytest.approx(wanted, abs=1e-5), (item, date, name)
            assert row["age"] == raw["age"], (item, date)


def test_users_as_of_every_cut(shop):
    run, oracle = shop
    names = {name: vocabulary(run, name) for name in ("user", "item", "category", "tags")}
    cuts = {"valid": oracle.cuts[0], "test": oracle.cuts[1], "date": oracle.end}
    rows = run.table("users").to_pylist()
    assert len(rows) == 3 * run.spec().n_users
    for row in rows:
        cut = cuts[row["as_of"]]
        later = [e[2] for e in oracle.log if e[0] == row["user_id"] and e[2] >= cut]
        now = min(later) // DAY * DAY if later else oracle.end
        assert names["user"][row["user"]] == row["user_id"]
        compare(run, row, oracle.user(row["user_id"], cut, now), names)
        events = oracle.earlier(row["user_id"], cut)
        assert {names["item"][index] for index in row["seen"]} == {e[1] for e in events}
        assert {names["item"][index] for index in row["liked"]} == {e[1] for e in events if e[3] != "view"}
        assert row["seen"] == sorted(set(row["seen"]))
        liked = [event[1] for event in oracle.matching(events, "positive")]
        assert [names["item"][index] for index in row["latest"]] == liked
        moments = [event[2] for event in oracle.matching(events, "positive")]
        assert row["latest_age"] == [max(now - moment, 0) // 3600 for moment in moments]


def test_a_perturbed_future_changes_nothing_earlier(spark, tmp_path):
    """Later events are deleted, changed and added: earlier rows and all statistics stay as they are."""
    log = random_log(1)
    oracle = Oracle(log)
    cut = oracle.cuts[0]
    dates = [dt.datetime.fromtimestamp(moment, dt.UTC).date() for moment in (cut + DAY, cut + 2 * DAY)]
    begin = int(dt.datetime.combine(dates[0], dt.time(), dt.UTC).timestamp())
    other = [event for event in log if event[2] < begin]
    changed = [(*e[:3], "purchase", "tv", "p1", 1000.0) for e in log if e[2] >= begin][::2]
    changed += [("new", "i3", begin + 3600, "view", "new device", "p", 5.0)]
    changed += [("u1", "new item", begin, "purchase", "phone", "p", 5.0)]
    changed = list({event[:4]: event for event in changed}.values())
    split = {"kind": "global_time", "dates": [str(day) for day in dates]}
    score = {"date": str(dates[1] + dt.timedelta(30))}
    runs = []
    for name, events in (("one", log), ("two", other + changed)):
        (tmp_path / name).mkdir()
        runs.append(featurized(shop_config(tmp_path / name, events, split=split, score=score)))
    one, two = (_earlier_rows(run, begin) for run in runs)
    assert len(one["examples"]) == len(other)
    assert one == two
    assert runs[0].table("examples").num_rows != runs[1].table("examples").num_rows
    for field in runs[0].spec().fields:
        theirs = runs[1].spec().field(field.name)
        assert (field.offset, field.scale, field.fill, field.edges) == (
            theirs.offset, theirs.scale, theirs.fill, theirs.edges,
        )  # fmt: skip


def _earlier_rows(run, begin):
    """Examples and item days before a moment, and the users as of it, with raw ids."""
    names = {name: vocabulary(run, name) for name in ("user", "item", "category", "tags", "device")}
    fields = {field.name: field for field in run.spec().fields}

    def readable(row):
        for name, value in row.items():
            vocab = fields[name].vocab if name in fields else None
            if vocab and fields[name].type == "index":
                row[name] = names[vocab].get(value)
            elif (vocab and fields[name].type == "indices") or name in ("seen", "liked", "latest"):
                row[name] = [names[vocab or "item"][index] for index in value]
                row[name] = sorted(row[name]) if name in ("seen", "liked") else row[name]
        return repr(sorted(row.items()))

    moment = dt.datetime.fromtimestamp(begin, dt.UTC)
    examples = [row for row in run.table("examples").to_pylist() if row["timestamp"] < moment]
    users = run.table("users/as_of=valid").to_pylist()
    users = [row for row in users if row["seen"]]
    for row in users:  # the day up to which time is counted is that of the user's next event
        for name in ("user", "recency", "days_since", "latest_age"):
            row.pop(name)
    days = [row for row in run.table("item_days").to_pylist() if row["day"] <= moment.date()]
    days = [row for row in days if names["item"][row["item"]] in ITEMS]
    return {
        "examples": sorted(map(readable, examples)),
        "users": sorted(map(readable, users)),
        "days": sorted(map(readable, days)),
    }


def test_runs_leave_no_scratch(shop):
    run, _ = shop
    assert not [file for file in run.manifest["files"] if file["path"].startswith("scratch")]
    assert Workspace(Config.model_validate(run.manifest["config"])).runs("features")[-1].run_id == run.run_id


def test_a_catalogue_too_large_to_be_sent_changes_nothing(shop, tmp_path, monkeypatch):
    """The log is then moved to the items and back; without it the rows are compared as they are."""
    monkeypatch.setattr("recsys_dist.features.tables.SMALL_ROWS", 0)
    settings = {"spark.sql.autoBroadcastJoinThreshold": "-1", "spark.sql.shuffle.partitions": "4"}
    config = shop_config(tmp_path, random_log(), spark={"conf": settings})
    with set_in_session(settings):
        moved = featurized(config)
    for name in ("examples", "users", "items", "item_days"):
        rows = [sorted(map(repr, run.table(name).to_pylist())) for run in (shop[0], moved)]
        assert rows[0] == rows[1], name


@contextlib.contextmanager
def set_in_session(settings):
    """Set properties of the running session, which the jobs leave alone where the configuration has them."""
    session = SparkSession.getActiveSession()
    before = {key: session.conf.get(key) for key in settings}
    for key, value in settings.items():
        session.conf.set(key, value)
    try:
        yield
    finally:
        for key, value in before.items():
            session.conf.set(key, value)


def test_equal_values_have_a_deviation_of_one(spark):
    """Whatever rounding makes of their squares."""
    rows = spark.range(1000).select((F.col("id") % 7 + 1).cast("double").alias("x"))
    for days in range(1, 12):
        value = Value(F.when(F.col("x") == 3, F.log1p(F.lit(float(days)))), 0.0, 15.2)
        found = moments(rows, {"equal": value, "all": Value(F.col("x"))})
        assert found["equal"].stddev == 1.0
        assert found["equal"].mean == pytest.approx(math.log1p(days), rel=1e-12)
        assert found["all"].mean == pytest.approx(3.997, rel=1e-12)
        assert found["all"].stddev == pytest.approx(float(np.std(np.arange(1000) % 7 + 1)), rel=1e-12)


def test_scale_beside_an_outlier(spark):
    """Bounds much wider than the values cost no digits."""
    rows = spark.range(1000).select((F.col("id") % 7 + 1).cast("double").alias("x"))
    numbers = np.arange(1000) % 7 + 1
    for bounds in ((1.0, 7.0), (0.0, 1e3), (-1e12, 1e12)):
        found = moments(rows, {"x": Value(F.col("x"), *bounds, loose=True)})["x"]
        assert found.mean == pytest.approx(float(np.mean(numbers)), rel=1e-9)
        assert found.stddev == pytest.approx(float(np.std(numbers)), rel=1e-9)


def test_scales_of_a_rare_event_type_beside_another_ones_outlier(spark, tmp_path):
    """Mean values of purchases are scaled by purchases, whatever a view is worth."""
    lines = ["u0,i0,1,1000000000,view"]
    lines += [f"u{n % 5},i{n % 3},{10 + n},{n % 4 + 1},purchase" for n in range(100)]
    fields = [
        {"name": "spent", "kind": "aggregate", "measure": "mean_value", "when": "purchase"},
        {"name": "worth", "kind": "aggregate", "side": "item", "measure": "mean_value", "when": "purchase"},
    ]
    header = "user,item,timestamp,value,event"
    events = {"path": str(tmp_path / "events.csv"), "columns": {name: name for name in header.split(",")}}
    run = featurized(log_config(tmp_path, lines, header=header, fields=fields, data={"events": events}))
    scales = {field.name: field.scale for field in run.spec().fields if field.name in ("spent", "worth")}
    train = [line.split(",") for line in lines[1:]]
    train = [row for row in train if int(row[2]) < 10 + 80]
    assert scales["worth"] == pytest.approx(float(np.std([float(row[3]) for row in train])), rel=1e-6)
    means = []
    for n, row in enumerate(train):
        before = [float(other[3]) for other in train[:n] if other[0] == row[0]]
        means += [statistics.fmean(before)] if before else []
    assert scales["spent"] == pytest.approx(float(np.std(means)), rel=1e-6)


@pytest.mark.parametrize("here", [True, False])
def test_quantiles_of_few_values_and_of_many(spark, monkeypatch, here):
    """Whether the counted values are sorted by the driver or over the partitions."""
    monkeypatch.setattr(numeric, "FEW_VALUES", 10_000 if here else 5)
    made = np.random.default_rng(3)
    drawn = {"a": made.integers(0, 30, 500) / 4, "b": made.normal(size=333), "c": np.array([2.5])}
    rows = [(name, float(x)) for name, of in drawn.items() for x in of] + [("a", None), ("d", None)]
    values = spark.createDataFrame(rows, "name string, x double").repartition(4)
    shares = [0.0, 0.1, 0.5, 0.9, 0.999]
    expected = {n: tuple(sorted(of.tolist())[int(s * len(of))] for s in shares) for n, of in drawn.items()}
    assert quantiles(values, shares) == expected


@pytest.mark.parametrize("partitions", [1, 2, 7, 64])
def test_in_ranges(spark, partitions):
    rows = in_ranges(spark.range(1, 1001).withColumnRenamed("id", "n"), "n", 1000, partitions)
    found = rows.select("n", F.spark_partition_id().alias("partition")).collect()
    by_partition = {}
    for row in found:
        by_partition.setdefault(row["partition"], []).append(row["n"])
    assert sorted(by_partition) == list(range(partitions))
    assert sorted(n for part in by_partition.values() for n in part) == list(range(1, 1001))
    for one, two in itertools.pairwise(range(partitions)):
        assert max(by_partition[one]) < min(by_partition[two])

"""Next items, neighbours and days, counted by Spark, against numbers made by hand and plain Python."""

import datetime as dt
import itertools
import math
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from recsys_dist.config import Recall
from recsys_dist.errors import ConfigError, DataError
from recsys_dist.schema import BEFORE_VALID, DAILY, LATE, RELATED
from recsys_dist.workspace import Workspace
from tests.logs import log_config
from tests.synthetic import synthetic_features

START = dt.datetime(2024, 1, 1, tzinfo=dt.UTC)
PLAIN = {"gap_decay": 0.5, "damping": 0, "item_damping": 0, "shrinkage": 0}
MEASURES = ("cosine", "jaccard", "pearson")


@pytest.fixture
def related(spark, tmp_path):
    """A function of (user, item, moment, label, split) rows and settings: the weights of each table."""
    config = log_config(tmp_path, [])
    features = synthetic_features(config)
    numbers = itertools.count()

    def run(rows, settings, partitions=2, split_kind="per_user_time", conf=None):
        from recsys_dist.recall.fit import fit_recall

        folder = tmp_path / f"features{next(numbers)}"
        for split in ("train", "valid", "test"):
            part = [
                {
                    "user": user,
                    "item": item,
                    "timestamp": START + dt.timedelta(hours=at),
                    "label": float(label),
                    "recent": [item, at],
                }
                for user, item, at, label, of in rows
                if of == split
            ]
            (folder / f"examples/split={split}").mkdir(parents=True)
            table = pa.Table.from_pylist(part, schema=EXAMPLES)
            pa.parquet.write_table(table, folder / f"examples/split={split}/part.parquet")
        manifest = features.manifest | {"config": {"split": {"kind": split_kind}}}
        log = features.__class__(features.filesystem, str(folder), str(folder), manifest)
        spec = features.spec()
        ids = spec.model_copy(
            update={"fields": tuple(spec.field(name) for name in ("user", "item", "recent"))}
        )
        (folder / "features.json").write_text(ids.model_dump_json())
        properties = {"spark.sql.shuffle.partitions": str(partitions)} | (conf or {})
        for key, value in properties.items():
            spark.conf.set(key, value)
        asked = config.model_copy(
            update={
                "recall": Recall.model_validate(settings),
                "spark": config.spark.model_copy(update={"conf": properties}),
            }
        )
        made = Workspace(config).new("recall", {}, {"features": log})
        return made.commit(asked, fit_recall(asked, made))

    return run


EXAMPLES = pa.schema(
    [
        ("user", pa.int32()),
        ("item", pa.int32()),
        ("timestamp", pa.timestamp("us", tz="UTC")),
        ("label", pa.float32()),
        ("recent", pa.list_(pa.int32())),
    ]
)


def stored(run, name):
    """{item: [(other, weight), ...]} in the order of the table."""
    rows = run.table(name).select(RELATED.names).to_pylist()
    assert [row["item"] for row in rows] == sorted(row["item"] for row in rows)
    found = {}
    for row in rows:
        found.setdefault(row["item"], []).append((row["other"], row["weight"]))
    return found


def weights(run, name):
    """The same, each weight equal to what is nearly so."""
    found = stored(run, name)
    return {
        item: [(other, pytest.approx(weight, rel=1e-5)) for other, weight in others]
        for item, others in found.items()
    }


def log(*histories, split="train"):
    """Users 1, 2, ...: the items that each liked, an hour apart."""
    return [
        (user, item, at, 1, split)
        for user, history in enumerate(histories, 1)
        for at, item in enumerate(history)
    ]


def test_next_items_by_hand(related):
    root_half = 2**-0.5
    run = related(log([1, 2, 3], [1, 3], [4, 4]), PLAIN | {"window": 2})
    assert weights(run, "next_items") == {
        1: [(3, 1 + root_half), (2, 1)],
        2: [(3, 1)],
        4: [(4, 1)],
    }
    one = related(log([1, 2, 3], [1, 3], [4, 4]), PLAIN | {"window": 1})
    assert weights(one, "next_items") == {1: [(2, 1), (3, 1)], 2: [(3, 1)], 4: [(4, 1)]}
    # Items 1 and 3 have two events each, item 2 has one.
    damped = related(log([1, 2, 3], [1, 3]), PLAIN | {"window": 1, "damping": 1, "item_damping": 0.5})
    assert weights(damped, "next_items") == {
        1: [(2, 1 / 2**0.5), (3, 1 / 2 / 2**0.5)],
        2: [(3, 1 / 2)],
    }


def test_neighbors_by_hand(related):
    # Users with item 1: 1, 2, 3; with item 2: 1, 2; with item 3: 3, 4. The second time counts for nothing.
    run = related(log([1, 2, 2], [2, 1], [3, 1], [3]), PLAIN | {"measures": MEASURES})
    tables = {measure: weights(run, f"neighbors/measure={measure}") for measure in MEASURES}
    assert tables["cosine"] == {
        1: [(2, 2 / 6**0.5), (3, 1 / 6**0.5)],
        2: [(1, 2 / 6**0.5)],
        3: [(1, 1 / 6**0.5)],
    }
    assert tables["jaccard"] == {1: [(2, 2 / 3), (3, 1 / 4)], 2: [(1, 2 / 3)], 3: [(1, 1 / 4)]}
    # Item 1 and 3: (4 - 6) / ..., below 0 and so left out.
    assert tables["pearson"] == {1: [(2, 2 / 12**0.5)], 2: [(1, 2 / 12**0.5)]}
    shrunk = related(log([1, 2, 2], [2, 1], [3, 1], [3]), PLAIN | {"measures": ["jaccard"], "shrinkage": 2})
    assert weights(shrunk, "neighbors/measure=jaccard") == {
        1: [(2, 2 / 3 * 2 / 4), (3, 1 / 4 * 1 / 3)],
        2: [(1, 2 / 3 * 2 / 4)],
        3: [(1, 1 / 4 * 1 / 3)],
    }


def test_of_equal_weights_the_lesser_item_stays(related):
    run = related(log([5, 9], [5, 7], [5, 3], [5, 8]), PLAIN | {"n": 2, "measures": ["cosine"]})
    assert weights(run, "next_items") == {5: [(3, 1), (7, 1)]}
    neighbors = weights(run, "neighbors/measure=cosine")
    assert neighbors[5] == [(3, 0.5), (7, 0.5)]
    assert set(neighbors) == {3, 5, 7, 8, 9}


def test_only_what_is_fitted_on_counts(related):
    rows = [*log([1, 2]), (1, 3, 5, 0, "train"), (1, 4, 6, 1, "valid"), (1, 5, 7, 1, "test")]
    assert weights(related(rows, PLAIN), "next_items") == {1: [(2, 1)]}
    both = related(rows, PLAIN | {"fit_on": "train_valid", "window": 1})
    assert weights(both, "next_items") == {1: [(2, 1)], 2: [(4, 1)]}
    every = related(rows, PLAIN | {"events": "any", "window": 1})
    assert weights(every, "next_items") == {1: [(2, 1)], 2: [(3, 1)]}


@pytest.mark.parametrize(
    "settings", [{}, {"events": "any", "late": 0.2}, {"fit_on": "train_valid", "max_events": 2}]
)
def test_days_are_counted_once_each_from_all_parts(related, settings):
    rows = random_rows(7, hours=200)
    rows += [(1, 3, 23 + at, 1, "train") for at in (0, 1)]  # the last hour of a day and the first of the next
    rows += [(2, 5, 300, 1, "valid"), (2, 5, 400, 1, "test")]
    counts = Counter()
    for _, item, at, label, _ in rows:
        if label or "events" in settings:
            counts[item, (START + dt.timedelta(hours=at)).date()] += 1
    run = related(rows, settings, partitions=5)
    found = [tuple(row.values()) for row in run.table("daily").select(DAILY.names).to_pylist()]
    assert found == [(*of, counts[of]) for of in sorted(counts)]
    assert run.manifest["figures"]["daily"] == len(counts)


def test_of_a_heavy_user_the_last_events_count(related):
    asked = {"max_events": 3, "neighbors_max_events": 2, "measures": ["jaccard"]}
    run = related(log([*range(1, 40)], [1, 2]), PLAIN | asked)
    assert weights(run, "next_items") == {1: [(2, 1)], 37: [(38, 1), (39, 2**-0.5)], 38: [(39, 1)]}
    assert set(weights(run, "neighbors/measure=jaccard")) == {1, 2, 38, 39}
    assert run.manifest["figures"]["events"] == 5
    assert run.manifest["figures"]["users"] == 2


@pytest.mark.parametrize("history", [[7], [7, 7, 7]])
def test_one_item_has_no_neighbour(related, history):
    run = related(log(history), PLAIN | {"measures": MEASURES})
    assert set(weights(run, "next_items")) == ({7} if len(history) > 1 else set())
    for measure in MEASURES:
        assert weights(run, f"neighbors/measure={measure}") == {}


def test_one_user(related):
    run = related(log([7, 8]), PLAIN | {"measures": MEASURES})
    assert weights(run, "neighbors/measure=cosine") == {7: [(8, 1)], 8: [(7, 1)]}
    # Who has one has the other, and there is nobody who has neither: no correlation is defined.
    assert weights(run, "neighbors/measure=pearson") == {}


def test_nothing_to_count_is_told(related):
    with pytest.raises(DataError, match="train has no event that"):
        related([(1, 1, 0, 0, "train"), (1, 2, 1, 1, "valid")], PLAIN)


def test_a_measure_named_twice_is_refused(tmp_path):
    from recsys_dist.config import load

    with pytest.raises(ConfigError, match="measures names one twice: cosine, cosine"):
        load(None, ["recall.measures=[cosine, cosine]"])


# --- against plain Python -----------------------------------------------------------------------------


def random_rows(seed, hours=20):
    """Few items and moments, so that many are equal; one user with very many events."""
    random = np.random.default_rng(seed)
    rows = []
    for user in range(1, 26):
        for _ in range(60 if user == 3 else int(random.integers(1, 14))):
            item = 1 + int(15 * random.random() ** 2)
            rows.append((user, item, int(random.integers(0, hours)), int(random.random() < 0.8), "train"))
    return rows


def expected(rows, settings):
    """The tables of `fit_recall`, by their definitions."""
    histories = {}
    for user, item, _, label, _ in sorted(rows, key=lambda row: (row[0], row[2], row[1])):
        if label:
            histories.setdefault(user, []).append(item)
    histories = [history[-settings.max_events :] for history in histories.values()]
    n = Counter(item for history in histories for item in history)
    following = Counter()
    for history in histories:
        for a, b in itertools.combinations(range(len(history)), 2):
            if b - a <= settings.window:
                following[history[a], history[b]] += (b - a) ** -settings.gap_decay
    tables = {
        "next_items": {
            (a, b): total / (n[a] ** settings.item_damping * n[b] ** settings.damping)
            for (a, b), total in following.items()
        }
    }
    users = [set(history[-settings.neighbors_max_events :]) for history in histories]
    owners = Counter(item for items in users for item in items)
    both = Counter(pair for items in users for pair in itertools.permutations(items, 2))
    for measure in MEASURES:
        found = tables[f"neighbors/measure={measure}"] = {}
        for (a, b), c in both.items():
            if measure == "cosine":
                value = c / math.sqrt(owners[a] * owners[b])
            elif measure == "jaccard":
                value = c / (owners[a] + owners[b] - c)
            else:
                columns = [[item in items for items in users] for item in (a, b)]
                value = np.corrcoef(np.array(columns, float))[0, 1]
            found[a, b] = value * c / (c + settings.shrinkage)
    return tables


@pytest.mark.parametrize("seed", [0, 1])
def test_tables_are_those_of_plain_python_and_of_any_number_of_partitions(related, seed):
    rows = random_rows(seed)
    asked = {
        "window": 5,
        "max_events": 30,
        "neighbors_max_events": 20,
        "measures": MEASURES,
        "n": 4,
        "shrinkage": 2,
    }
    one, five = (related(rows, asked, partitions) for partitions in (1, 5))
    for name, wanted in expected(rows, Recall.model_validate(asked)).items():
        table = one.table(name).select(RELATED.names)
        assert table.equals(five.table(name).select(RELATED.names))
        found = stored(one, name)
        for item in {a for a, b in wanted if wanted[a, b] > 1e-9} | set(found):
            # Rounded, so that sums of equal parts in another order are equal too.
            best = sorted(
                ((round(-value, 6), b) for (a, b), value in wanted.items() if a == item and value > 1e-9)
            )[:4]
            assert [other for other, _ in found[item]] == [b for _, b in best], (name, item)
            values = [-value for value, _ in best]
            assert [weight for _, weight in found[item]] == pytest.approx(values, abs=3e-6)


def test_of_more_items_than_can_be_sent_no_task_has_all_pairs_of_a_heavy_one(related, spark, monkeypatch):
    from pyspark.sql import functions as F

    from recsys_dist.recall import pairs

    rows = random_rows(5)
    asked = {"window": 5, "measures": ["cosine"], "n": 4}
    few = related(rows, asked)
    monkeypatch.setattr(pairs, "SENT", 3)
    # Nor does Spark send of itself what is small here.
    moved = {"spark.sql.autoBroadcastJoinThreshold": "-1"}
    threshold = spark.conf.get(*moved)
    try:
        many = related(rows, asked, partitions=3, conf=moved)
        for name in ("next_items", "neighbors/measure=cosine"):
            assert many.table(name).equals(few.table(name))

        # Item 1 follows, and is followed by, each of 2 to 999.
        heavy = spark.range(2, 1000).select(F.col("id").cast("int").alias("other"), F.lit(1).alias("item"))
        counts = spark.range(1, 1000).select(
            F.col("id").cast("int").alias("item"), F.when(F.col("id") == 1, 998).otherwise(1).alias("n")
        )
        spark.conf.set("spark.sql.shuffle.partitions", "4")
        both = heavy.unionByName(heavy.select(F.col("item").alias("other"), F.col("other").alias("item")))

        def most(joined):
            found = joined.groupBy(F.spark_partition_id()).count().collect()
            return max(row["count"] for row in found) / both.count()

        joined = pairs.with_counts(both, counts, 999, 2 * 998)
        found = {tuple(row) for row in joined.select("item", "n_item", "other", "n_other").collect()}
        assert found == {(1, 998, b, 1) for b in range(2, 1000)} | {(b, 1, 1, 998) for b in range(2, 1000)}
        assert most(joined) < 0.3
        assert most(both.join(counts, "item")) > 0.5, "the heavy item's pairs in one place"
    finally:
        spark.conf.set(*moved, threshold)


LATE_TABLES = ("next_items", "neighbors/measure=pearson")


def late_from(run):
    """{user: hours after START from which events are late}"""
    rows = run.table(f"{LATE}/late_from").to_pylist()
    return {row["user"]: (row["late_from"] - START) / dt.timedelta(hours=1) for row in rows}


def test_late_events_are_each_user_s_last_ones(related):
    rows = log([1, 2, 3, 4, 5], [1, 2, 3, 4, 5, 6, 7, 8, 9, 10], [1], [4, 3, 2, 1])
    # Two events of one moment, of which the split by places would cut one off.
    rows += [(5, item, at, 1, "train") for item, at in ((1, 0), (2, 1), (3, 2), (4, 2))]
    # Neither what is not liked nor what is not train counts.
    rows += [(1, 9, 90, 0, "train"), (1, 9, 99, 1, "valid")]
    run = related(rows, PLAIN | {"late": 0.25, "window": 2})
    assert late_from(run) == {1: 4, 2: 7, 4: 3, 5: 2}
    figures = run.manifest["figures"]
    assert figures["late"]["known"] == 4 + 7 + 1 + 3 + 2
    assert figures["known"] == 5 + 10 + 1 + 4 + 4
    assert "before_valid" not in figures
    early = log([1, 2, 3, 4], [1, 2, 3, 4, 5, 6, 7], [1], [4, 3, 2], [1, 2])
    expected = related(early, PLAIN | {"window": 2})
    for name in LATE_TABLES:
        assert stored(run, f"{LATE}/{name}") == stored(expected, name)
        assert stored(run, name) != stored(expected, name)


def test_the_state_before_late_events_tells_how_old_what_was_liked_is(related, monkeypatch):
    rows = [(1, item, at, label, "train") for item, at, label in ((1, 0, 1), (2, 5, 0), (3, 30, 1))]
    rows += [(1, item, at, 1, "train") for item, at in ((4, 49), (5, 60))]
    # Nobody's event is late; one is; two of one moment are, and nothing was before.
    rows += [(2, 1, 3, 1, "train"), (3, 1, 10, 1, "train"), (3, 2, 35, 1, "train")]
    rows += [(4, 8, 7, 1, "train"), (4, 7, 7, 1, "train"), (4, 9, 90, 1, "valid")]

    def state(run):
        return {
            row["user"]: (row["recent"], row["latest_age"]) for row in run.table(f"{LATE}/users").to_pylist()
        }

    asked = PLAIN | {"late": 0.25}
    expected = {1: ([5, 60], [48, 18, 0]), 3: ([2, 35], [14]), 4: ([7, 7], [])}
    assert state(related(rows, asked)) == expected
    monkeypatch.setattr("recsys_dist.recall.pairs.LATEST", 2)
    assert state(related(rows, asked, partitions=3)) == expected | {1: ([5, 60], [18, 0])}


def test_with_a_split_by_time_all_events_of_the_last_days_are_late(related):
    rows = [(user, item, 24 * item + user, 1, "train") for user in range(1, 4) for item in range(10)]
    rows = [row for row in rows if row[:2] not in ((2, 8), (3, 8), (3, 9))]
    rows += [(user, 30 + user, 24 * 2 + user, 1, "train") for user in range(4, 7)]
    run = related(rows, PLAIN | {"late": 0.09}, split_kind="global_time")
    assert late_from(run) == dict.fromkeys(range(1, 7), 24 * 8)
    assert run.manifest["figures"]["late"]["known"] == 24 + 3
    # Each as of the first event from then on, on whichever day; who has none is not there.
    state = {
        row["user"]: (row["recent"], row["latest_age"]) for row in run.table(f"{LATE}/users").to_pylist()
    }
    assert state == {
        1: ([8, 24 * 8 + 1], [24 * (8 - day) - 1 for day in range(8)]),
        2: ([9, 24 * 9 + 2], [24 * (9 - day) - 2 for day in range(8)]),
    }


@pytest.mark.parametrize("seed", [3, 4])
def test_nothing_late_changes_the_tables_of_what_is_earlier(related, seed):
    """Late events are of other items: what the ranking model learns by stays."""
    rows = random_rows(seed)
    settings = {"late": 0.3, "fit_on": "train_valid"}
    run = related(rows, settings)
    moments = late_from(run)
    early = [row for row in rows if row[4] == "train" and row[2] < moments.get(row[0], math.inf)]
    late = [row for row in rows if row[4] == "train" and row[2] >= moments.get(row[0], math.inf)]
    assert len(late) > len(early) / 5
    generator = np.random.default_rng(seed)
    others = [(user, int(generator.integers(1, 16)), at, label, split) for user, _, at, label, split in late]
    changed = related(early + others, settings)
    for name in LATE_TABLES:
        before, after = (of.table(f"{LATE}/{name}").select(RELATED.names) for of in (run, changed))
        assert before.equals(after)
        assert len(before) > 0
    # And what precedes valid knows nothing of it.
    train = related([row for row in rows if row[4] == "train"], {})
    for name in LATE_TABLES:
        assert stored(run, f"{BEFORE_VALID}/{name}") == stored(train, name)


def drawn(users=60, items=12, most=9, seed=3):
    """Random histories, in some of which an item comes again."""
    generator = np.random.default_rng(seed)
    return [generator.integers(1, items + 1, generator.integers(2, most + 1)).tolist() for _ in range(users)]


def solved(weights_II, n):
    """{item: [(other, weight), ...]} of the n weights farthest from 0."""
    found = {}
    for item in range(1, len(weights_II)):
        row = weights_II[item].astype(np.float32)
        order = sorted(range(1, len(row)), key=lambda other: (-abs(row[other]), other))[:n]
        found[item] = [(other, pytest.approx(row[other], rel=1e-3, abs=1e-6)) for other in order]
    return found


def test_transitions_are_the_least_squares_of_what_came_before_each_event(related):
    """Of earlier moments: of two events an hour with the same one, neither is before the other."""
    histories, items, window = drawn(), 12, 5
    asked = {
        "transitions_decay": 1.5, "transitions_penalty": 4.0, "transitions_damping": 0.5, "window": window,
    }  # fmt: skip
    rows = [
        (user, item, (at + user % 2) // 2, 1, "train")
        for user, history in enumerate(histories, 1)
        for at, item in enumerate(history)
    ]
    run = related(rows, PLAIN | asked | {"linear": ["transitions"], "linear_n": 5})
    before, came = [], []
    for user in range(1, len(histories) + 1):
        events = sorted((at, item) for of, item, at, *_ in rows if of == user)
        for place, (moment, own) in enumerate(events):
            row = np.zeros(items + 1)
            first = next(p for p, (at, _) in enumerate(events) if at == moment)
            for other in range(max(0, place - window), first):
                row[events[other][1]] += math.exp(-(first - 1 - other) / 1.5)
            before.append(row)
            came.append(np.eye(items + 1)[own])
    x_NI, y_NI = np.array(before), np.array(came)
    weights_II = np.linalg.solve(x_NI.T @ x_NI + 4 * np.eye(items + 1), x_NI.T @ y_NI)
    weights_II /= np.maximum(y_NI.sum(0), 1) ** 0.5
    assert any(item in history[:place] for history in histories for place, item in enumerate(history))
    assert stored(run, "linear/model=transitions") == solved(weights_II, 5)
    assert (weights_II < -0.01).any()
    assert not (Path(run.path) / "scratch").exists()


def test_ease_is_that_of_its_paper(related):
    """By its own formula, column by column: least squares of each item on all the others."""
    histories, items, penalty = drawn(), 12, 3.0
    run = related(log(*histories), PLAIN | {"linear": ["ease"], "ease_penalty": penalty, "linear_n": 20})
    x_UI = np.zeros((len(histories), items + 1))
    for user, history in enumerate(histories):
        x_UI[user, history] = 1
    weights_II = np.zeros((items + 1, items + 1))
    for item in range(1, items + 1):
        others = [other for other in range(1, items + 1) if other != item]
        x_UO = x_UI[:, others]
        found = np.linalg.solve(x_UO.T @ x_UO + penalty * np.eye(items - 1), x_UO.T @ x_UI[:, item])
        weights_II[others, item] = found
    expected = {item: [of for of in row if of[0] != item] for item, row in solved(weights_II, 12).items()}
    assert stored(run, "linear/model=ease") == expected


def test_linear_models_of_earlier_events_are_fitted_too(related):
    rows = log(*drawn(), split="train") + log(*drawn(seed=4), split="valid")
    settings = PLAIN | {"linear": ["ease", "transitions"], "late": 0.2, "fit_on": "train_valid"}
    run = related(rows, settings)
    found = {}
    for name in settings["linear"]:
        for folder in ("", f"{BEFORE_VALID}/", f"{LATE}/"):
            found[name, folder] = stored(run, f"{folder}linear/model={name}")
        alone = related([row for row in rows if row[-1] == "train"], settings | {"fit_on": "train"})
        assert stored(alone, f"linear/model={name}") == found[name, f"{BEFORE_VALID}/"]
    assert len({str(of) for of in found.values()}) == 6


def test_linear_models_do_not_depend_on_partitions(related):
    settings = PLAIN | {"linear": ["ease", "transitions"]}
    one, four = (related(log(*drawn()), settings, partitions) for partitions in (1, 4))
    for name in settings["linear"]:
        assert stored(one, f"linear/model={name}") == stored(four, f"linear/model={name}")


def test_a_catalogue_that_is_too_large_for_linear_models_is_refused(related):
    message = r"linear_items=7 items, and there are 50, whose equations take about 0\.0 GiB"
    with pytest.raises(ConfigError, match=message):
        related(log([1, 2]), PLAIN | {"linear": ["ease"], "linear_items": 7})

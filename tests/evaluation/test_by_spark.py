"""Lists measured by Spark have the figures, to the last digit, that they have without it."""

import io
import sys
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pytest
import torch

from recsys_dist.errors import RetryableError
from recsys_dist.evaluation import by_spark, large, metrics
from recsys_dist.evaluation.evaluate import _lists, _relevant, evaluate
from recsys_dist.evaluation.measured import Catalogue, measure
from recsys_dist.workspace import Workspace
from tests.models import untrained_night
from tests.synthetic import synthetic_config

USERS, ITEMS, LENGTHS = 60, 50, (1, 3, 10, 25)


@pytest.fixture
def here(monkeypatch, spark):
    """Spark measures in this process and its session."""

    def run(task):
        monkeypatch.setattr(sys, "stdin", io.StringIO(task))
        by_spark.main()
        return 0

    monkeypatch.setattr(large, "run_spark", run)


def catalogue(random, attributes):
    """Of items with few different numbers of events; some have no attribute."""
    values = torch.from_numpy(np.append([[0, 0]], random.integers(0, 6, (ITEMS, 2)), axis=0))
    names = ("tags",) if attributes else ()
    items = SimpleNamespace(
        present=random.random(ITEMS) < 0.9,
        counts=random.integers(0, 9, ITEMS) ** 2,
        values=lambda name: values,
        spec=SimpleNamespace(attributes=lambda names_, key: names),
    )
    return Catalogue(items, 0.5)


def random_lists(random):
    """[U, K] some of them short, some empty."""
    lists = np.argsort(random.random((USERS, ITEMS)), axis=1)[:, : LENGTHS[-1]] + 1
    ends = random.integers(0, LENGTHS[-1] + 10, USERS)[:, None]
    return np.where(np.arange(LENGTHS[-1]) < ends, lists, 0)


@pytest.mark.parametrize("attributes", [True, False])
def test_random_lists(tmp_path, here, attributes):
    random = np.random.default_rng(4)
    config = synthetic_config(tmp_path)
    config = config.model_copy(update={"evaluation": config.evaluation.model_copy(update={"k": LENGTHS})})
    # Users stand in another order than their indices, and have 1 to 30 relevant items.
    users = pa.table({"user": pa.array(random.permutation(900)[:USERS] + 1, pa.int32())})
    relevant = random.random((USERS, ITEMS + 1)) < random.choice([0.02, 0.2, 0.6], USERS)[:, None]
    relevant[:, 0] = False
    relevant[np.arange(USERS), random.integers(1, ITEMS + 1, USERS)] = True
    truth = np.argwhere(relevant)
    of = catalogue(random, attributes)
    models = {"als": random_lists(random), "fm": random_lists(random), "none": np.zeros((USERS, 25), int)}
    run = Workspace(config).new("evaluation", {}, {})
    tables = [_lists(name, users, items, items / 7) for name, items in models.items()]
    lists = pa.concat_tables(tables)
    run.write_table("lists", lists)
    run.write_table("relevant", _relevant(users, truth))
    found = dict(large.measured_by_spark(config, run, list(models), users, of, len(lists)))
    assert list(found) == list(models)
    for name, items_UK in models.items():
        expected = measure(LENGTHS, items_UK, truth, of)
        assert list(found[name].of_users) == list(expected.of_users)
        assert ("diversity@10" in expected.of_users) == attributes
        for metric, values in expected.of_users.items():
            assert np.array_equal(found[name].of_users[metric], values), (name, metric)
        for segment, metrics_of in expected.of_segments.items():
            assert list(found[name].of_segments[segment]) == list(metrics_of)
            for metric, values in metrics_of.items():
                assert np.array_equal(found[name].of_segments[segment][metric], values), (name, metric)
        for k in LENGTHS:
            assert np.array_equal(found[name].listed[k][1:], expected.listed[k][1:])
    assert (expected.of_users["ndcg@10"] == 0).all()
    assert {path.name for path in tmp_path.glob("evaluation/*/*") if path.is_dir()} == {"lists", "relevant"}


def test_both_ways_have_the_same_metrics():
    assert list(by_spark.METRICS) == list(metrics.METRICS)


def test_a_run_by_spark_says_the_same(tmp_path):
    """Whole runs, Spark as its own process."""
    config = synthetic_config(tmp_path)
    runs = untrained_night(config, users=40)
    found = []
    for rows in (10**8, 1):
        settings = config.evaluation.model_copy(update={"bootstrap": 100, "spark_rows": rows})
        chosen = config.model_copy(update={"evaluation": settings})
        run = Workspace(chosen).new("evaluation", {}, runs)
        done = run.commit(chosen, evaluate(chosen, run))
        found.append((done.json("metrics.json"), {file["path"] for file in done.manifest["files"]}))
    assert found[0] == found[1]
    assert {"lists/part-00000.parquet", "relevant/part-00000.parquet"} < found[0][1]


def test_a_failure_of_spark_is_told(tmp_path, monkeypatch):
    config = synthetic_config(tmp_path)
    run = Workspace(config).new("evaluation", {}, {})
    users = pa.table({"user": pa.array([1], pa.int32())})
    monkeypatch.setattr(large, "run_spark", lambda task: 137)
    of = catalogue(np.random.default_rng(0), True)
    with pytest.raises(
        RetryableError, match=r"exit code 137 .* 5,000 places .* evaluation\.spark_rows above"
    ):
        next(large.measured_by_spark(config, run, ["als"], users, of, 5000))

"""The evaluation of untrained models on synthetic features, against what the tables say."""

import pytest

from recsys_dist.config import load
from recsys_dist.evaluation.evaluate import _verdict, evaluate
from recsys_dist.workspace import Workspace
from tests.models import untrained_night
from tests.synthetic import listable, synthetic_config


@pytest.mark.parametrize("mode", ["two_stage", "exhaustive"])
@pytest.mark.parametrize("rival", ["popularity", None])
def test_the_verdict_is_about_the_lists_that_are_published(mode, rival):
    config = load(None, [f"score.mode={mode}", f"evaluation.must_beat={rival or 'null'}"])
    values = {"popularity": 0.2, "two_stage": 0.3, "deepfm": 0.1}
    found = _verdict(config, {name: {"ndcg@10": {"value": value}} for name, value in values.items()})
    name = {"two_stage": "two_stage", "exhaustive": "deepfm"}[mode]
    assert found["model"] == name
    assert found["passed"] == (mode == "two_stage" or rival is None)
    assert found["text"].startswith(f"{name} ndcg@10 ")


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory):
    """The features run, each test user's positive events in time order, and the evaluation run."""
    config = synthetic_config(tmp_path_factory.mktemp("root"))
    config = config.model_copy(update={"evaluation": config.evaluation.model_copy(update={"bootstrap": 100})})
    runs = untrained_night(config, gone=5)
    run = Workspace(config).new("evaluation", {}, runs)
    done = run.commit(config, evaluate(config, run))
    events = sorted(runs["features"].table("examples").to_pylist(), key=lambda row: row["timestamp"])
    positives = {}
    for row in events:
        if row["split"] == "test" and row["label"]:
            positives.setdefault(row["user"], []).append(row)
    return runs["features"], positives, done


def test_lists_are_those_of_the_day_of_the_first_positive_test_event(evaluated):
    features, positives, run = evaluated
    allowed = {
        user: listable(features, int(rows[0]["timestamp"].timestamp() // 86_400))
        for user, rows in positives.items()
    }
    assert len({frozenset(items) for items in allowed.values()}) > 1
    seen = {row["user"]: set(row["seen"]) for row in features.table("users/as_of=test").to_pylist()}
    lists = run.table("lists").to_pylist()
    assert {row["user"] for row in lists} == set(positives)
    for row in lists:
        assert row["item"] in allowed[row["user"]] - seen[row["user"]]
    # All that may be listed is, where the list has room for it.
    for user in positives:
        listed = {row["item"] for row in lists if row["user"] == user and row["model"] == "popularity"}
        assert len(listed) == min(20, len(allowed[user] - seen[user]))


def test_an_item_that_could_not_be_listed_counts_as_missed(evaluated):
    """What the user did take is relevant, whether or not a list of that morning could have had it."""
    _, positives, run = evaluated
    lists = run.table("lists").to_pylist()
    for model, figures in run.json("metrics.json")["models"].items():
        shares = []
        for user, rows in positives.items():
            relevant = {row["item"] for row in rows}
            listed = {
                r["item"] for r in lists if (r["user"], r["model"]) == (user, model) and r["rank"] <= 20
            }
            shares.append(len(relevant & listed) / len(relevant))
        assert figures["recall@20"]["value"] == pytest.approx(sum(shares) / len(shares))


def test_coverage_is_of_the_items_that_are_there(evaluated):
    features, _, run = evaluated
    present = sum(row["present"] for row in features.table("items").to_pylist())
    assert present == features.spec().n_items - 1
    lists = run.table("lists").to_pylist()
    listed = {row["item"] for row in lists if row["model"] == "two_stage" and row["rank"] <= 10}
    found = run.json("metrics.json")["models"]["two_stage"]["coverage@10"]
    assert found["value"] == pytest.approx(len(listed) / present)

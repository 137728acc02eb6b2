"""The evaluation of untrained models on synthetic features, against what the tables say."""

import itertools
import json
import math
import shutil
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest
import torch

from recsys_dist.config import load
from recsys_dist.deepfm.batches import side_batch
from recsys_dist.deepfm.items import Items
from recsys_dist.deepfm.published import load as load_model
from recsys_dist.errors import ConfigError
from recsys_dist.evaluation.evaluate import _verdict, evaluate
from recsys_dist.evaluation.metrics import METRICS
from recsys_dist.evaluation.nights import measured_alike, published_last
from recsys_dist.scoring.table import rollback
from recsys_dist.workspace import Workspace
from tests.models import published_night, untrained_night
from tests.scoring.test_publish import MONDAY, TUESDAY
from tests.synthetic import listable, synthetic_config


@pytest.mark.parametrize("mode", ["two_stage", "exhaustive"])
@pytest.mark.parametrize("rival", ["popularity", None])
def test_the_verdict_is_about_the_lists_that_are_published(mode, rival):
    config = load(None, [f"score.mode={mode}", f"evaluation.must_beat={rival or 'null'}"])
    values = {"popularity": 0.2, "two_stage": 0.3, "deepfm": 0.1}
    results = {name: {"ndcg@10": {"value": value}} for name, value in values.items()}
    found = _verdict(config, {"models": results})
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


def test_segments_are_parts_of_the_users_and_of_what_they_took(evaluated):
    """In plain Python. Every user of this log has as many events as the others, so that all are light."""
    features, positives, run = evaluated
    metrics = run.json("metrics.json")
    found = {(part["side"], part["segment"]): part for part in metrics["segments"]}
    assert list(found) == [("users", "light"), ("items", "head"), ("items", "tail")]
    assert set(metrics["protocol"]["segments"]) == {"new", "light", "heavy", "head", "tail"}
    light = found["users", "light"]
    assert light["users"] == metrics["users"]
    for model, figures in light["models"].items():
        assert figures == {name: metrics["models"][model][name] for name in figures}

    counts = {row["item"]: row["count"] for row in features.table("items").to_pylist()}
    head = set()
    for item in sorted(counts, key=lambda item: (-counts[item], item)):
        if sum(counts[item] for item in head) < sum(counts.values()) / 2:
            head.add(item)
    lists = {}
    for row in sorted(run.table("lists").to_pylist(), key=lambda row: row["rank"]):
        lists.setdefault((row["model"], row["user"]), []).append(row["item"])
    for segment, inside in (("head", head), ("tail", set(counts) - head)):
        relevant = {user: {row["item"] for row in rows} & inside for user, rows in positives.items()}
        relevant = {user: items for user, items in relevant.items() if items}
        part = found["items", segment]
        assert part["users"] == len(relevant)
        assert set(part["models"]) == set(metrics["models"])
        for model, figures in part["models"].items():
            for k in (10, 20):
                hits = {user: set(lists[model, user][:k]) & items for user, items in relevant.items()}
                shares = [len(hits[user]) / len(items) for user, items in relevant.items()]
                figure = figures[f"recall@{k}"]
                assert figure["value"] == pytest.approx(sum(shares) / len(shares))
                assert figure["low"] <= figure["value"] <= figure["high"]
            assert set(figures) == {f"{name}@{k}" for name in METRICS for k in (10, 20)}


def test_every_metric_is_there_at_every_length(evaluated):
    _, _, run = evaluated
    metrics = run.json("metrics.json")
    names = (*METRICS, "serendipity", "diversity", "popularity", "coverage", "novelty", "gini")
    for figures in metrics["models"].values():
        assert set(figures) == {f"{name}@{k}" for name in names for k in (10, 20)}


def test_differences_are_of_the_same_users(evaluated):
    _, _, run = evaluated
    metrics = run.json("metrics.json")
    assert (metrics["compared"]["metric"], metrics["compared"]["with"]) == ("ndcg@10", "two_stage")
    values = {name: figures["ndcg@10"]["value"] for name, figures in metrics["models"].items()}
    assert set(metrics["compared"]["models"]) == set(values) - {"two_stage"}
    for name, found in metrics["compared"]["models"].items():
        assert found["value"] == pytest.approx(values[name] - values["two_stage"])
        assert found["low"] <= found["value"] <= found["high"]
        assert 0 < found["p"] <= 1


def test_lists_by_attributes_popularity_and_surprise(evaluated):
    """Diversity, popularity and serendipity in plain Python."""
    features, positives, run = evaluated
    items = {row["item"]: row for row in features.table("items").to_pylist()}
    having = Counter(genre for row in items.values() for genre in set(row["genres"]))
    weight = {genre: math.log((1 + len(items)) / (1 + n)) for genre, n in having.items()}
    popular = sorted(items, key=lambda item: (-items[item]["count"], item))[:10]

    def cosine(a, b):
        a, b = set(items[a]["genres"]), set(items[b]["genres"])
        lengths = [sum(weight[genre] ** 2 for genre in of) ** 0.5 for of in (a, b)]
        return sum(weight[genre] ** 2 for genre in a & b) / (lengths[0] * lengths[1]) if all(lengths) else 0

    rows = [row for row in run.table("lists").to_pylist() if row["rank"] <= 10]
    for model, figures in run.json("metrics.json")["models"].items():
        apart, counts, surprises = [], [], []
        for user, truth in positives.items():
            listed = [row["item"] for row in rows if (row["user"], row["model"]) == (user, model)]
            pairs = list(itertools.combinations(listed, 2))
            apart.append(1 - sum(cosine(*pair) for pair in pairs) / len(pairs) if pairs else 0)
            counts.append(sum(items[item]["count"] for item in listed) / max(len(listed), 1))
            relevant = {row["item"] for row in truth}
            surprises.append(len((set(listed) & relevant) - set(popular)) / 10)
        for name, of in (("diversity", apart), ("popularity", counts), ("serendipity", surprises)):
            assert figures[f"{name}@10"]["value"] == pytest.approx(sum(of) / len(of)), (model, name)


@pytest.mark.parametrize(("most", "passed"), [(0.0, False), (0.2, True)])
def test_a_metric_that_fell_by_more_than_chance_and_what_is_allowed(most, passed):
    config = load(None, [f"evaluation.may_fall={{ndcg@10: {most}, hit_rate@10: 0}}"])
    now = {"two_stage": 0.2, "popularity": 0.1}
    results = {
        name: {
            metric: {"value": of, "low": of - 0.03, "high": of + 0.03}
            for metric in ("ndcg@10", "hit_rate@10")
        }
        for name, of in now.items()
    }
    figure = {"value": 0.3, "low": 0.28, "high": 0.32}
    before = {"protocol": {"k": [10]}, "models": {"two_stage": {"ndcg@10": figure}}}  # which had no hit rate
    last = SimpleNamespace(run_id="before", json=lambda _: before)
    metrics = {"protocol": {"k": [10]}, "models": results}
    found = _verdict(config, metrics, last)
    assert found["passed"] == passed
    assert ("ndcg@10 fell from 0.3000 to 0.2000, by 0.1000, of which 0.0361" in found["text"]) != passed
    assert list(found["changes"]) == ["ndcg@10"]
    assert found["not_compared"] == {"hit_rate@10": "did not measure it"}
    assert "hit_rate@10: not held against before, published last, which did not measure it" in found["text"]
    assert _verdict(config, metrics, None)["passed"]
    longer = _verdict(config, metrics | {"protocol": {"k": [20], "intervals": "others"}}, last)
    assert longer["changes"] == found["changes"]
    other = _verdict(config, metrics | {"protocol": {"k": [10], "relevant": "others"}}, last)
    assert other["passed"]
    assert not other["changes"]
    assert "ndcg@10, hit_rate@10: not held against before, published last, which measured in" in other["text"]


@pytest.mark.parametrize(
    ("change", "alike"),
    [
        ({"k": [5], "intervals": "other", "fitted_on": {"als": "train and valid"}}, True),
        ({"split": {"kind": "global_time", "dates": ["2024-01-02", "2024-01-03"]}}, True),
        ({"split": {"kind": "global_time", "dates": ["2024-01-02", "2024-01-09"]}}, False),
        ({"split": {"kind": "global_time", "dates": None}}, False),
        ({"label": {"positive_when": "value >= 5"}}, False),
        ({"split": {"kind": "user_time", "dates": None}}, False),
        ({"candidates": "others"}, False),
        ({"relevant": "others"}, False),
    ],
)
def test_what_makes_two_evaluations_comparable(change, alike):
    split = {"kind": "global_time", "dates": ["2024-01-01", "2024-01-02"]}
    protocol = {"split": split, "users": "all", "relevant": "some", "candidates": "some", "k": [10]}
    assert measured_alike({"protocol": protocol}, {"protocol": protocol | change}) == alike


@pytest.mark.parametrize("metric", ["gini@10", "popularity@10", "ndcg@7", "diversity@10"])
def test_a_metric_that_nothing_can_be_held_against_is_refused_before_anything_is_ranked(metric, tmp_path):
    """Diversity where items have no attributes; of a Gini coefficient more is not better."""
    config = synthetic_config(tmp_path)
    runs = untrained_night(config)
    spec = runs["features"].spec()
    if metric == "diversity@10":
        kinds = {field.name: {"kind": "numeric"} for field in spec.fields if field.kind == "categorical"}
        fields = tuple(field.model_copy(update=kinds.get(field.name, {})) for field in spec.fields)
        runs["features"] = SimpleNamespace(spec=lambda: spec.model_copy(update={"fields": fields}))
    for key, value in (("metric", metric), ("may_fall", {metric: 0.1})):
        asked = config.model_copy(update={"evaluation": config.evaluation.model_copy(update={key: value})})
        with pytest.raises(
            ConfigError, match=f"evaluation.{key}: {metric} is not computed, or more of it is"
        ):
            evaluate(asked, SimpleNamespace(inputs=runs))


def test_the_rival_and_the_protocol_know_what_the_models_were_fitted_on(tmp_path):
    config = synthetic_config(tmp_path, fit_on="train_valid")
    runs = untrained_night(config)
    run = Workspace(config).new("evaluation", {}, runs)
    evaluate(config, run)
    done = run.commit(config, {})
    assert done.json("metrics.json")["protocol"]["fitted_on"] == {
        "als": "train", "recall": "train", "deepfm": "train and valid"
    }  # fmt: skip
    examples = runs["features"].table("examples").to_pylist()
    counts = Counter(
        row["item"] for row in examples if row["split"] in ("train", "valid") and row["label"] > 0
    )
    train = Counter(row["item"] for row in examples if row["split"] == "train" and row["label"] > 0)
    lists = [row for row in done.table("lists").to_pylist() if row["model"] == "popularity"]
    assert lists
    assert all(row["score"] == counts[row["item"]] for row in lists)
    assert any(row["score"] != train[row["item"]] for row in lists)


@pytest.mark.parametrize(
    ("objective", "names"),
    [("logistic", ["auc", "gauc", "logloss", "calibration"]), ("squared", ["rmse", "mse"])],
)
def test_what_a_model_predicts_is_measured_on_test(objective, names, tmp_path):
    """In the examples' own order, without drawn items, by another way than the trainer's."""
    config = synthetic_config(tmp_path, negatives=0, objective=objective)
    # No table of users in memory: its rows are read where they are needed.
    config = config.model_copy(update={"score": config.score.model_copy(update={"users_megabytes": 0})})
    runs = untrained_night(config)
    run = Workspace(config).new("evaluation", {}, runs)
    figures = evaluate(config, run)
    found = json.loads(Path(run.path, "metrics.json").read_text())["predictions"]
    assert figures["predictions"] == found
    assert list(found["figures"]) == names
    features = runs["features"]
    model, items = load_model(runs["deepfm"], features.spec()), Items(features, features.spec())
    test = features.table("examples", filter=pc.field("split") == "test")
    assert found["examples"] == len(test)
    assert found["users"] == len(set(test["user"].to_pylist()))
    days = torch.from_numpy(test["timestamp"].cast(pa.date32()).cast(pa.int32()).to_numpy().copy())
    user = model.user_side(side_batch(test, features.spec().side("user", "context")))
    item = model.item_side(items.at(torch.from_numpy(test["item"].to_numpy().astype("int64")), days))
    said = model.logits(user, item).detach().double().numpy()
    if objective == "squared":
        expected = {"mse": ((said - test["value"].to_numpy()) ** 2).mean()}
    else:
        label, chance = test["label"].to_numpy(), 1 / (1 + np.exp(-said))
        above = (said[label == 1][:, None] > said[label == 0]).mean()
        expected = {"auc": above, "calibration": chance.mean() / label.mean()}
        expected["logloss"] = -np.log(np.where(label == 1, chance, 1 - chance)).mean()
    for name, value in expected.items():
        assert found["figures"][name] == pytest.approx(value, rel=1e-5)
    assert 'id="predictions"' in Path(run.path, "report.html").read_text()


def test_the_lists_published_last_are_those_that_the_table_has_of_all_users(tmp_path):
    config = synthetic_config(tmp_path)
    workspace = Workspace(config)
    assert published_last(workspace) is None
    first, second, third, _ = (workspace.new("evaluation", {}, {}).commit(config, {}) for _ in range(4))
    for evaluation, date in ((first, MONDAY), (second, TUESDAY)):
        published_night(config, evaluation, date)
    assert published_last(workspace).run_id == second.run_id
    published_night(config, third, TUESDAY, users=["u2"])
    assert published_last(workspace).run_id == second.run_id
    rollback(f"{workspace.uri}/topk", 1)
    assert published_last(workspace).run_id == first.run_id
    rollback(f"{workspace.uri}/topk", 2)
    shutil.rmtree(second.path)
    assert published_last(workspace).run_id == first.run_id


def test_coverage_is_of_the_items_that_are_there(evaluated):
    features, _, run = evaluated
    present = sum(row["present"] for row in features.table("items").to_pylist())
    assert present == features.spec().n_items - 1
    lists = run.table("lists").to_pylist()
    listed = {row["item"] for row in lists if row["model"] == "two_stage" and row["rank"] <= 10}
    found = run.json("metrics.json")["models"]["two_stage"]["coverage@10"]
    assert found["value"] == pytest.approx(len(listed) / present)

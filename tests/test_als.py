"""ALS on a log with two groups of users who like two groups of items."""

import json

import numpy as np
import pandas as pd
import pytest
from pydantic import ValidationError
from pyspark.sql import SparkSession

from recsys_dist.config import Als
from recsys_dist.errors import DataError
from recsys_dist.schema import BEFORE_VALID, LATE
from recsys_dist.workspace import Workspace
from tests.logs import featurized, log_config


@pytest.fixture(scope="module")
def features(spark, tmp_path_factory):
    """Users 0 to 19, of which the even ones like items a0 to a9, the odd ones b0 to b9; value 1 elsewhere."""
    root = tmp_path_factory.mktemp("groups")
    random = np.random.default_rng(1)
    lines = []
    for user in range(20):
        mine, other = ("a", "b") if user % 2 == 0 else ("b", "a")
        for time, number in enumerate(random.permutation(10)[:8]):
            lines.append(f"u{user},{mine}{number},{time},5")
        lines.append(f"u{user},{other}{user % 10},0,1")
    config = log_config(root, lines, als={"rank": 4, "reg": 0.01, "iterations": 12})
    return config, featurized(config)


def fitted(config, features):
    from recsys_dist.als import train_als

    run = Workspace(config).new("als", {}, {"features": features})
    return run.commit(config, train_als(config, run))


@pytest.mark.parametrize("implicit", [True, False])
def test_groups_are_found(features, implicit):
    config, run = features
    config = config.model_copy(update={"als": config.als.model_copy(update={"implicit": implicit})})
    als = fitted(config, run)
    vectors = {
        name: dict(als.table(name).select(["index", "vector"]).to_pandas().to_numpy()) for name in FACTORS
    }
    names = {
        kind: {row["index"]: row["token"] for row in run.table(f"vocab/{kind}").to_pylist()}
        for kind in ("user", "item")
    }
    gap = [
        np.dot(user, item)
        * (1 if (int(names["user"][u][1:]) % 2 == 0) == (names["item"][i][0] == "a") else -1)
        for u, user in vectors["user_factors"].items()
        for i, item in vectors["item_factors"].items()
    ]
    assert np.mean(gap) > 0.2
    train = run.table("examples", filter=None).to_pandas().query("split == 'train'")
    fitted_on = train if not implicit else train[train.label > 0]
    assert als.manifest["figures"]["ratings"] == len(fitted_on)
    assert set(vectors["user_factors"]) == set(fitted_on.user)


FACTORS = ("user_factors", "item_factors")


def test_settings_reach_the_fit(features):
    config, run = features
    config = config.model_copy(update={"als": Als(rank=3, iterations=1)})
    als = fitted(config, run)
    assert {len(vector) for vector in als.table("item_factors")["vector"].to_pylist()} == {3}
    assert als.manifest["figures"]["rank"] == 3
    json.dumps(als.manifest)


def test_an_implicit_event_may_count_by_its_value(features):
    """Of one block, whose result does not depend on anything else: the same events, counted five times."""
    from recsys_dist.als import _events

    config, run = features
    spark = SparkSession.active()
    settings = config.als.model_copy(update={"sample_weight": "value"})
    ratings = [
        {row["rating"] for row in _events(spark, run, of, ("train",)).collect()}
        for of in (config.als, settings)
    ]
    assert ratings == [{1.0}, {5.0}]
    als = [fitted(config.model_copy(update={"als": of}), run) for of in (config.als, settings)]
    assert als[1].manifest["figures"]["sample_weight"] == "value"
    plain, weighted = (of.table("item_factors").sort_by("index")["vector"].to_pylist() for of in als)
    assert not np.allclose(plain, weighted)


def test_nothing_to_fit_on(features, tmp_path):
    config, run = features
    empty = run.__class__(run.filesystem, str(tmp_path), str(tmp_path), run.manifest)
    (tmp_path / "examples").mkdir()
    table = run.table("examples", filter=None)
    import pyarrow as pa
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    table = table.set_column(
        table.column_names.index("label"), "label", pc.multiply(table["label"], pa.scalar(0.0, pa.float32()))
    )
    (tmp_path / "examples" / "split=train").mkdir()
    pq.write_table(table.drop_columns(["split"]), tmp_path / "examples" / "split=train" / "part.parquet")
    with pytest.raises(DataError, match="no events of train to fit ALS on"):
        fitted(config, empty)


def test_of_a_grid_the_best_on_valid_is_taken_and_fitted_on_what_is_asked(features):
    config, run = features
    grid = {"reg": [1000.0, 0.01], "rank": [4]}
    config = config.model_copy(update={"als": Als(rank=2, grid=grid, fit_on="train_valid")})
    als = fitted(config, run)
    figures = als.manifest["figures"]
    assert [(point["reg"], point["rank"]) for point in figures["tried"]] == [(1000.0, 4), (0.01, 4)]
    assert figures["tried"][1]["ndcg@10"] > figures["tried"][0]["ndcg@10"]
    assert (figures["reg"], figures["rank"]) == (0.01, 4)
    assert {len(vector) for vector in als.table("item_factors")["vector"].to_pylist()} == {4}
    events = run.table("examples").to_pandas()
    assert figures["ratings"] == (events.split.isin(["train", "valid"]) & (events.label > 0)).sum()
    assert {file["path"].split("/")[0] for file in als.manifest["files"]} == {*FACTORS, "key.json"}


@pytest.mark.parametrize(("fit_on", "folder"), [("train", LATE), ("train_valid", BEFORE_VALID)])
def test_factors_of_earlier_events_know_nothing_of_what_is_learned_on(features, fit_on, folder):
    config, run = features
    als = Als(rank=4, reg=0.01, iterations=3, fit_on=fit_on, earlier=True)
    recall = config.recall.model_copy(update={"late": 0.4})
    config = config.model_copy(update={"als": als, "recall": recall})
    found = fitted(config, run)
    events = run.table("examples").to_pandas()
    train = events[(events.split == "train") & (events.label > 0)].sort_values(["user", "timestamp", "item"])
    if fit_on == "train":
        share = (train.groupby("user").cumcount() + 0.5) / train.groupby("user").item.transform("size")
        begin = train[share >= 0.6].groupby("user").timestamp.min()
        train = train[train.timestamp < train.user.map(begin).fillna(train.timestamp.max() + pd.Timedelta(1))]
    told = found.manifest["figures"]
    assert told["earlier"]["ratings"] == len(train) < told["ratings"]
    earlier = {name: found.table(f"{folder}/{name}") for name in FACTORS}
    assert set(earlier["user_factors"]["index"].to_pylist()) == set(train.user)
    assert set(earlier["item_factors"]["index"].to_pylist()) == set(train.item)
    if fit_on == "train_valid":
        plain = als.model_copy(update={"fit_on": "train", "earlier": False})
        of_train = fitted(config.model_copy(update={"als": plain}), run)
        assert all(earlier[name].equals(of_train.table(name)) for name in FACTORS)
        # What was tried of a grid was fitted on train.
        grid = als.model_copy(update={"rank": 2, "grid": {"rank": (4,)}})
        of_grid = fitted(config.model_copy(update={"als": grid}), run)
        assert of_grid.manifest["figures"]["earlier"] == told["earlier"]
        assert all(earlier[name].equals(of_grid.table(f"{folder}/{name}")) for name in FACTORS)
        assert not any(file["path"].startswith("tried") for file in of_grid.manifest["files"])


@pytest.mark.parametrize("grid", [{"ranks": [1]}, {"rank": [0]}, {"rank": []}])
def test_a_grid_of_what_cannot_be(grid):
    with pytest.raises(ValidationError):
        Als(grid=grid)

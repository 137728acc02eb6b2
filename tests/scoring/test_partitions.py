"""Published rows, part by part, without Ray."""

import datetime as dt
from collections import Counter

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from recsys_dist import config as settings
from recsys_dist.deepfm.items import day_number
from recsys_dist.errors import DataError
from recsys_dist.schema import FACTORS
from recsys_dist.scoring.lists import finished
from recsys_dist.scoring.models import load_models
from recsys_dist.scoring.partitions import partitions
from recsys_dist.scoring.rules import Rules
from recsys_dist.scoring.scored import PartitionScorer, published_rows
from recsys_dist.scoring.users import with_context
from recsys_dist.workspace import Workspace
from tests.models import untrained_night
from tests.synthetic import listable, synthetic_config

GONE = 7
OF_SEVEN = [f"u{user}" for user in range(1, 8)]


@pytest.mark.parametrize("size", [1, 4, 7, 8, 100])
def test_partitions_hold_each_user_once_whatever_indices_are_missing(size):
    users = np.array([3, 2, 9, 30, 31, 32, 8])
    parts = partitions(users, size)
    assert [user for _, part in parts for user in part] == sorted(users)
    assert [len(part) for _, part in parts[:-1]] == [size] * (len(parts) - 1)
    assert [number for number, _ in parts] == list(range(len(parts)))


def test_nobody_there_makes_no_partition():
    assert partitions(np.empty(0, np.int32), 5) == []


def test_lists_are_those_of_the_date_for_the_users_that_are_there(tmp_path):
    config = synthetic_config(tmp_path)
    runs = untrained_night(config, users=30, gone=GONE)
    features, spec = runs["features"], runs["features"].spec()
    assert spec.n_users == 30 + GONE
    date = dt.date.fromisoformat(spec.date)
    run = Workspace(config).new("score", {}, runs)
    scorer = PartitionScorer(config, run, date)
    state = features.table("users/as_of=date").sort_by("user")
    figures = [scorer.score(*part) for part in partitions(state["user"].to_numpy(), 12)]
    assert [found["users"] for found in figures] == [12, 12, 6]
    nothing = [not latest for latest in state["latest"].to_pylist()]
    assert [found["without_history"] for found in figures] == [
        sum(of) for of in (nothing[:12], nothing[12:24], nothing[24:])
    ]
    counts = dict(
        zip(*(features.table("items")[name].to_pylist() for name in ("item", "count")), strict=True)
    )
    untrained = sum(not counts[item] for item in listable(features, day_number(date)))
    assert {found["untrained_items"] for found in figures} == {untrained}
    assert untrained > 0
    lists = run.commit(config, {}).table("lists").to_pylist()
    assert {row["user_id"] for row in lists} == {f"u{user}" for user in range(GONE + 1, GONE + 31)}
    allowed = {f"i{item}" for item in listable(features, day_number(date))}
    assert {row["item_id"] for row in lists} <= allowed
    days = np.full(len(state), day_number(date), np.int32)
    expected = scorer.models.two_stage.top_k(with_context(scorer.models.items, state, days, "all"), 10)
    for user, items in zip(state["user_id"].to_pylist(), expected.items.tolist(), strict=True):
        found = [row["item_id"] for row in lists if row["user_id"] == user]
        assert found == [f"i{item}" for item in items if item]


def test_what_no_history_speaks_for_is_popular_new_or_suggested(tmp_path):
    """Lists of all items, for users of whom some have no history."""
    config = synthetic_config(tmp_path)
    config = config.model_copy(update={"score": config.score.model_copy(update={"mode": "exhaustive"})})
    runs = untrained_night(config, users=30)
    models = load_models(runs, config.score)
    rows = runs["features"].table("users/as_of=date").sort_by("user")
    histories = [[] if user % 3 == 0 else of for user, of in enumerate(rows["recent"].to_pylist())]
    place = rows.column_names.index("recent")
    rows = rows.set_column(place, "recent", pa.array(histories, pa.list_(pa.int32())))
    date = dt.date.fromisoformat(runs["features"].spec().date)
    users = with_context(models.items, rows, np.full(len(rows), day_number(date), np.int32), "none")
    table, _ = published_rows(models, Rules(config.score.rules, models.items), users, 50, date, "run")
    # The synthetic recall run counts train events; of the last 30 days, which are all of this log.
    train = runs["features"].table("examples").to_pandas()
    train = train[(train.split == "train") & (train.label > 0)]
    counts = train.item.value_counts()
    most = counts.sort_index().sort_values(ascending=False, kind="stable")
    head = set(most.index[: int((most.cumsum() < len(train) / 2).sum()) + 1])
    assert 1 < len(head) < len(counts)
    kinds = Counter()
    for row in table.to_pylist():
        kind, item = row["reason"]["kind"], int(row["item_id"][1:])
        of_item = "popular" if item in head else "suggested" if item in counts.index else "new"
        assert kind == ("history" if row["reason"]["item_ids"] else of_item)
        kinds[kind] += 1
    assert all(kinds[kind] >= 10 for kind in ("history", "popular", "suggested", "new")), kinds


def test_a_score_that_is_nan_is_told_with_the_source_it_is_of(tmp_path):
    config = synthetic_config(tmp_path)
    runs = untrained_night(config, users=30)
    factors = runs["als"].table("item_factors").to_pylist()
    factors[3]["vector"][0] = float("nan")
    pq.write_table(
        pa.Table.from_pylist(factors, FACTORS), f"{runs['als'].path}/item_factors/part-00000.parquet"
    )
    run = Workspace(config).new("score", {}, runs)
    scorer = PartitionScorer(config, run, dt.date.fromisoformat(runs["features"].spec().date))
    users = runs["features"].table("users/as_of=date").sort_by("user")["user"].to_numpy()
    with pytest.raises(DataError, match="als: a score is NaN, for one of the 30 users from 'u1' to 'u30'"):
        scorer.score(0, users)
    assert not (tmp_path / "topk").exists()
    assert finished(run) == {}


@pytest.mark.parametrize("mode", ["two_stage", "exhaustive"])
def test_published_lists_obey_the_rules(tmp_path, mode):
    (tmp_path / "deny").write_text("i3\ni11\nI12\n")
    config = synthetic_config(tmp_path / "root")
    runs = untrained_night(config, users=30)
    rules = {"deny": str(tmp_path / "deny"), "at_most": {"genres": 3}, "explore": 2, "diversity": 0.3}
    changed = config.score.model_copy(update={"rules": settings.Rules(**rules), "k": 8, "mode": mode})
    config = config.model_copy(update={"score": changed})
    features = runs["features"]
    date = dt.date.fromisoformat(features.spec().date)
    run = Workspace(config).new("score", {}, runs)
    scorer = PartitionScorer(config, run, date)
    users = features.table("users/as_of=date").sort_by("user")["user"].to_numpy()
    figures = scorer.score(0, users)
    again = PartitionScorer(config, run, date)
    again.score(1, users[:7])  # among others, and alone, a user gets the same list
    rows = run.commit(config, {}).table("lists").to_pylist()
    lists = rows[: figures["rows"]]
    told = [[(row["user_id"], row["item_id"]) for row in part] for part in (rows[len(lists) :], lists)]
    assert told[0] == [entry for entry in told[1] if entry[0] in OF_SEVEN]
    assert figures["explored"] == sum(row["reason"]["kind"] == "explore" for row in lists) > 30
    (file,) = figures["files"]
    assert file | {"sha256": ""} == {
        "path": str(tmp_path / "deny"), "sha256": "", "unknown": 1, "such_as": "I12",
    }  # fmt: skip
    genres = dict(
        zip(*(features.table("items")[name].to_pylist() for name in ("item_id", "genres")), strict=True)
    )
    for user in {row["user_id"] for row in lists}:
        own = [row for row in lists if row["user_id"] == user]
        assert [row["rank"] for row in own] == list(range(1, len(own) + 1))
        assert not {"i3", "i11"} & {row["item_id"] for row in own}
        counted = [genre for row in own for genre in genres[row["item_id"]]]
        assert all(counted.count(genre) <= 3 for genre in counted)
        for row in own:
            drawn = row["rank"] > 6
            assert (row["reason"]["kind"] == "explore") == drawn
            assert 0 < row["propensity"] < 1 if drawn else row["propensity"] == 1
            assert len(row["sources"]) == len(row["source_scores"]) > 0
            if mode == "exhaustive":
                assert row["sources"] == ["deepfm"]
                assert row["source_scores"] == pytest.approx([row["score"]], abs=1e-5)

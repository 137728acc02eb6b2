import datetime as dt

import pyarrow as pa
import pytest
from deltalake import DeltaTable, write_deltalake

from recsys_dist.errors import DataError, RetryableError
from recsys_dist.schema import TOPK
from recsys_dist.scoring.publish import publish, read_user, version

MONDAY, TUESDAY = dt.date(2024, 1, 1), dt.date(2024, 1, 2)


def rows(date, items, run_id, user="u1"):
    listed = [
        {
            "date": date,
            "user_id": user,
            "rank": rank,
            "item_id": item,
            "score": 1.0 / rank,
            "sources": ["als"],
            "reason": {"kind": "history", "item_ids": ["x"], "contributions": [0.5]},
            "run_id": run_id,
            "source_scores": [0.25],
            "propensity": 1.0,
        }
        for rank, item in enumerate(items, 1)
    ]
    return pa.dataset.dataset(pa.Table.from_pylist(listed, TOPK))


def test_one_commit_replaces_one_date_and_leaves_the_others(tmp_path):
    table = str(tmp_path / "topk")
    publish(table, rows(MONDAY, ["a", "b"], "r1"), MONDAY, "r1")
    publish(table, rows(TUESDAY, ["c"], "r2"), TUESDAY, "r2")
    version = publish(table, rows(MONDAY, ["d"], "r3"), MONDAY, "r3")
    assert version == 3  # the empty table, and three commits
    assert [row["item_id"] for row in read_user(table, "u1", MONDAY)] == ["d"]
    assert [row["item_id"] for row in read_user(table, "u1")] == ["c"]
    before = DeltaTable(table, version=1).to_pyarrow_table()
    assert before["item_id"].to_pylist() == ["a", "b"]
    assert DeltaTable(table).history(1)[0]["run_id"] == "r3"


def test_columns_and_types_are_the_contract(tmp_path):
    table = str(tmp_path / "topk")
    publish(table, rows(MONDAY, ["a"], "r1"), MONDAY, "r1")
    assert DeltaTable(table).to_pyarrow_table().cast(TOPK).schema == TOPK


def test_a_table_that_is_older_than_a_column_is_read_and_gets_it(tmp_path):
    table = str(tmp_path / "topk")
    former = rows(MONDAY, ["a"], "r1").to_table().drop_columns(["source_scores"])
    write_deltalake(table, former, partition_by=["date"])
    assert read_user(table, "u1")[0]["source_scores"] is None
    publish(table, rows(TUESDAY, ["b"], "r2"), TUESDAY, "r2")
    assert [read_user(table, "u1", day)[0]["source_scores"] for day in (MONDAY, TUESDAY)] == [None, [0.25]]
    assert read_user(table, "u1", MONDAY)[0]["sources"] == ["als"]


def test_unknown_users_and_missing_tables_are_named(tmp_path):
    with pytest.raises(DataError, match=r"Run jobs/score\.py first"):
        read_user(str(tmp_path / "nowhere"), "u1")
    publish(str(tmp_path / "topk"), rows(MONDAY, ["a"], "r1"), MONDAY, "r1")
    with pytest.raises(DataError, match="'nobody'"):
        read_user(str(tmp_path / "topk"), "nobody")


def listed(table, date, user):
    return [row["item_id"] for row in read_user(table, user, date)]


def test_chosen_users_lists_are_replaced_and_nobody_elses(tmp_path):
    table = str(tmp_path / "topk")
    everyone = [rows(MONDAY, ["a", "b"], "r1", user).to_table() for user in ("u1", "u2", "u3")]
    publish(table, pa.dataset.dataset(pa.concat_tables(everyone)), MONDAY, "r1")
    publish(table, rows(TUESDAY, ["t"], "r2"), TUESDAY, "r2")
    # u1's list is shorter than before, u2 gets none any more, u4 is new.
    new = pa.concat_tables(
        [rows(MONDAY, items, "r3", u).to_table() for u, items in (("u1", "c"), ("u4", "d"))]
    )
    chosen = pa.chunked_array([["u1", "u2"], ["u4"]])
    before = version(table)
    assert publish(table, pa.dataset.dataset(new), MONDAY, "r3", users=chosen) == before + 1
    assert [listed(table, MONDAY, user) for user in ("u1", "u3", "u4")] == [["c"], ["a", "b"], ["d"]]
    with pytest.raises(DataError, match="'u2'"):
        read_user(table, "u2", MONDAY)
    assert listed(table, TUESDAY, "u1") == ["t"]
    assert DeltaTable(table).to_pyarrow_table().cast(TOPK).num_rows == 5
    commit = DeltaTable(table).history(1)[0]
    assert [commit[name] for name in ("run_id", "date", "rows", "users")] == ["r3", "2024-01-01", "2", "3"]


@pytest.mark.parametrize("users", [None, ["u1"], ["u9"]])
@pytest.mark.parametrize("published_before", [True, False])
def test_of_two_runs_for_a_date_one_wins_and_the_other_is_told(tmp_path, users, published_before):
    table = str(tmp_path / "topk")
    if published_before:
        publish(table, rows(MONDAY, ["a"], "r0"), MONDAY, "r0")
    since = version(table)
    chosen = pa.chunked_array([users]) if users else None
    publish(table, rows(MONDAY, ["b"], "r1"), MONDAY, "r1", since)
    with pytest.raises(RetryableError, match="another run published 2024-01-01 first"):
        publish(
            table, rows(MONDAY, ["c", "d"], "r2", users[0] if users else "u1"), MONDAY, "r2", since, chosen
        )
    assert [row["run_id"] for row in DeltaTable(table).to_pyarrow_table().to_pylist()] == ["r1"]
    # Another date is nobody's rival.
    publish(table, rows(TUESDAY, ["e"], "r3"), TUESDAY, "r3", since)
    assert listed(table, MONDAY, "u1") == ["b"]
    assert listed(table, TUESDAY, "u1") == ["e"]

import datetime as dt

import pyarrow as pa
import pytest
from deltalake import DeltaTable

from recsys_dist.errors import DataError
from recsys_dist.schema import TOPK
from recsys_dist.scoring.publish import publish, read_user

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
        }
        for rank, item in enumerate(items, 1)
    ]
    return pa.RecordBatchReader.from_batches(TOPK, pa.Table.from_pylist(listed, TOPK).to_batches())


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


def test_unknown_users_and_missing_tables_are_named(tmp_path):
    with pytest.raises(DataError, match=r"Run jobs/score\.py first"):
        read_user(str(tmp_path / "nowhere"), "u1")
    publish(str(tmp_path / "topk"), rows(MONDAY, ["a"], "r1"), MONDAY, "r1")
    with pytest.raises(DataError, match="'nobody'"):
        read_user(str(tmp_path / "topk"), "nobody")

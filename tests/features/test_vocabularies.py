"""Indices from night to night."""

import pyarrow.parquet as pq
import pytest

from recsys_dist.errors import ConfigError, DataError
from recsys_dist.features.featurize import featurize
from recsys_dist.workspace import Workspace
from tests.logs import featurized, log_config

FIELDS = [{"name": "shop", "kind": "categorical", "side": "context", "column": "shop", "min_count": 2}]
HEADER = "user,item,timestamp,value,shop"


def night(root, events, rebuild=False, **settings):
    """A features run of (user, item, shop) events, a second apart."""
    lines = [f"{user},{item},{second},5,{shop}" for second, (user, item, shop) in enumerate(events)]
    config = log_config(root, lines, header=HEADER, fields=FIELDS, **settings)
    run = Workspace(config).new("features", {}, {})
    return run.commit(config, featurize(config, run, rebuild))


def tokens(run, name):
    return [row["token"] for row in run.table(f"vocab/{name}").sort_by("index").to_pylist()]


FIRST = [("ann", "b", "x"), ("ann", "b", "y"), ("ann", "a", "x"), ("bob", "c", "z"), ("bob", "c", "z")] * 2


def test_an_index_never_moves(spark, tmp_path):
    one = night(tmp_path, FIRST)
    assert tokens(one, "item") == ["b", "c", "a"]
    assert one.spec().vocabularies["item"].ancestors == ()
    # b, the most frequent, is gone; d and e are new, e is more frequent than d and than all known ones.
    events = [("cat", "e", "q")] * 9 + [("ann", "d", "x"), ("bob", "c", "w"), ("bob", "a", "z")]
    two = night(tmp_path, events + [("zoe", "c", "w")] * 3)
    assert tokens(two, "item") == ["b", "c", "a", "e", "d"]
    assert tokens(two, "user") == ["ann", "bob", "cat", "zoe"]
    # z and y are as rare as w was, but known; w is known from two train events on
    assert tokens(two, "shop")[:3] == tokens(one, "shop")
    assert set(tokens(two, "shop")[3:]) == {"q", "w"}
    assert two.manifest["figures"]["parent"] == one.run_id
    ours, theirs = two.spec().vocabularies["item"], one.spec().vocabularies["item"]
    assert ours.ancestors == ((theirs.size, theirs.fingerprint),)
    assert ours.continues(theirs)
    assert not theirs.continues(ours)
    assert ours.gone == 1
    items = two.table("items").sort_by("item").to_pylist()
    assert [(row["item_id"], row["present"]) for row in items][:2] == [("b", False), ("c", True)]
    assert {row["user_id"] for row in two.table("users").to_pylist()} == {"ann", "bob", "cat", "zoe"}
    # a third night with the second's log is equal to it, the ancestors too
    three = night(tmp_path, events + [("zoe", "c", "w")] * 3)
    assert three.spec() == two.spec()
    # ann is gone: an index, but no row
    four = night(tmp_path, [event for event in events if event[0] != "ann"])
    assert tokens(four, "user") == ["ann", "bob", "cat", "zoe"]
    assert {row["user_id"] for row in four.table("users").to_pylist()} == {"bob", "cat"}
    assert four.spec().n_users == 4


def test_a_full_rebuild_compacts_and_forgets(spark, tmp_path):
    (tmp_path / "forget.txt").write_text("bob\n\n")
    night(tmp_path, FIRST)
    events = [("ann", "b", "x")] * 3 + [("bob", "c", "z")] * 5 + [("cat", "a", "x")]
    data = log_config(tmp_path, []).data.model_dump(mode="json") | {"forget": str(tmp_path / "forget.txt")}
    two = night(tmp_path, events, data=data)
    assert tokens(two, "user") == ["ann", "bob", "cat"]
    assert {row["user_id"] for row in two.table("users").to_pylist()} == {"ann", "cat"}
    assert sum(two.spec().rows.values()) == 4
    three = night(tmp_path, events, rebuild=True, data=data)
    assert tokens(three, "user") == ["ann", "cat"]
    assert tokens(three, "item") == ["b", "a"]
    assert three.manifest["figures"]["parent"] is None
    with pytest.raises(ConfigError, match=r"vocabulary (user|item) of three does not continue that of two"):
        three.spec().require_continues(two.spec(), "three", "two")
    with pytest.raises(ConfigError, match=r"data\.forget=.*nowhere"):
        night(tmp_path, events, data=data | {"forget": str(tmp_path / "nowhere")})


def test_another_log_begins_anew(spark, tmp_path, capsys):
    first = night(tmp_path, FIRST)
    other = night(tmp_path, [("dan", "f", "x"), ("dan", "g", "x"), ("eve", "f", "x")])
    assert tokens(other, "user") == ["dan", "eve"]
    assert other.manifest["figures"]["parent"] is None
    told = f"the vocabularies begin anew: {first.run_id} knew no user and no item of this log\n"
    assert told in capsys.readouterr().out


def test_logs_of_two_descriptions_under_one_root_each_go_on(spark, tmp_path, capsys):
    one = night(tmp_path, FIRST)
    lines = [f"{user},{item},{second},5" for second, (user, item, _) in enumerate(FIRST[::-1])]
    columns = {"user": "user", "item": "item", "timestamp": "timestamp"}
    data = {"events": {"path": str(tmp_path / "events.csv"), "columns": columns}}
    other = featurized(log_config(tmp_path, lines, data=data, label={"positive_when": "true"}))
    assert other.manifest["figures"]["parent"] is None
    latest = f"{one.run_id}, the latest run, was made from a log of other data.events.columns\n"
    assert f"features: the vocabularies begin anew: {latest}" in capsys.readouterr().out
    again = night(tmp_path, FIRST)
    assert again.manifest["figures"]["parent"] == one.run_id
    assert f"the vocabularies continue those of {one.run_id}: {other.run_id}" in capsys.readouterr().out


def test_mixed_lineages_are_refused(spark, tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    one = night(tmp_path / "a", FIRST)
    other = night(tmp_path / "b", FIRST[::-1] + [("eve", "h", "x")] * 5)
    (folder,) = {file["path"] for file in other.manifest["files"] if file["path"].startswith("vocab/user/")}
    table = pq.read_table(f"{other.path}/{folder}")
    (file,) = {file["path"] for file in one.manifest["files"] if file["path"].startswith("vocab/user/")}
    pq.write_table(table, f"{one.path}/{file}")
    with pytest.raises(DataError, match=r"vocab/user holds 3 tokens .* different lineages"):
        night(tmp_path / "a", FIRST)


def test_a_changed_field_begins_anew_and_others_go_on(spark, tmp_path):
    one = night(tmp_path, FIRST)
    other = {"name": "other", "kind": "categorical", "side": "context", "column": "shop"}
    fields = [FIELDS[0] | {"delimiter": "+"}, other]
    lines = [f"{u},{i},{second},5,{shop}" for second, (u, i, shop) in enumerate(FIRST)]
    two = featurized(log_config(tmp_path, lines, header=HEADER, fields=fields))
    assert two.spec().vocabularies["user"] == one.spec().vocabularies["user"]
    assert two.spec().vocabularies["shop"].ancestors == ()
    assert sorted(tokens(two, "other")) == ["x", "y", "z"]


def typed_night(root, header, lines):
    """A features run of a log whose header has types."""
    config = log_config(root, lines, header=header)
    run = Workspace(config).new("features", {}, {})
    return run.commit(config, featurize(config, run))


def test_a_new_column_is_told_and_one_of_another_type_fails_by_name(spark, tmp_path, capsys):
    header = "user:token,item:token,timestamp:float,value:float"
    lines = [f"u{n % 4},i{n % 3},{n},5" for n in range(40)]
    assert typed_night(tmp_path, header, lines).manifest["figures"]["new_columns"] == {}
    two = typed_night(tmp_path, f"{header},page:token", [f"{line},x" for line in lines])
    assert two.manifest["figures"]["new_columns"] == {"events": ["page"]}
    assert "data.events has new columns, which are ignored: page" in capsys.readouterr().out
    assert "page" not in two.table("examples").column_names
    with pytest.raises(DataError, match=r"column 'value' is of type token, in the run before it was float"):
        typed_night(tmp_path, header.replace("value:float", "value:token"), lines)


def test_users_and_items_of_the_test_part_that_train_does_not_know_are_counted(spark, tmp_path):
    # By time: 16 events of train, 2 of valid, 2 of test.
    known = [("ann", "a", "x"), ("bob", "b", "x")] * 8
    later = [("cat", "c", "x"), ("ann", "d", "x"), ("cat", "e", "x"), ("dan", "a", "x")]
    split = {"kind": "global_time", "fractions": [0.8, 0.1, 0.1]}
    run = night(tmp_path, [*known, *later], split=split)
    assert run.manifest["figures"]["examples"] == {"train": 16, "valid": 2, "test": 2}
    assert run.manifest["figures"]["cold_in_test"] == {"users": 2, "items": 1}

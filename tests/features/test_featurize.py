"""What featurize computes, on logs small enough to work out by hand or by plain Python."""

import math
import re

import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from recsys_dist import schema
from recsys_dist.errors import ConfigError, DataError
from tests.logs import FIELDS, events_of, featurized, log_config

HOUR = 3600


@pytest.fixture(scope="module")
def by_hand(spark, tmp_path_factory):
    """Ten events of ann (two at 3:00), two of bob, a duplicate, and five kinds of unusable rows."""
    root = tmp_path_factory.mktemp("by_hand")
    ann = [("a", 1, 5), ("b", 2, 1), ("d", 3, 4), ("c", 3, 5), ("e", 4, 4), ("f", 5, 2)]
    ann += [("a", 6, 4), ("g", 7, 4), ("h", 8, 5), ("b", 9, 5)]
    lines = [f"ann,{item},{hour * HOUR},{value}" for item, hour, value in reversed(ann)]
    lines += [f"bob,a,{100 * 24 * HOUR},4", f"bob,z,{101 * 24 * HOUR},3.5"]
    lines += [
        "ann,a,3600,5",
        "ann,a",
        ",a,3600,5",
        "ann, ,3600,5",
        "ann,a,soon,5",
        "ann,a,9,NaN",
        "ann,a,9,1e99",
    ]
    (root / "items.jsonl").write_text(
        '{"id": "a", "name": "First", "tags": "w"}\n{"id": "q", "name": null, "tags": ""}\n'
        '{"id": "b", "tags": "y"}\nnot json\n{"id": "a", "name": "Alpha", "tags": "x|y||x z"}\n'
    )
    (root / "users.csv").write_text('who,town\nann,"New, York"\nbob,\nzoe,Rome\n')
    fields = [
        *FIELDS,
        {"name": "tags", "kind": "categorical", "side": "item", "column": "tags", "delimiter": "|"},
        {"name": "town", "kind": "categorical", "side": "user", "column": "town"},
    ]
    items = {"path": str(root / "items.jsonl"), "format": "jsonl", "columns": {"item": "id", "title": "name"}}
    users = {"path": str(root / "users.csv"), "columns": {"user": "who"}}
    config = log_config(root, lines, fields=fields, data={"max_bad_rows": 0.6})
    data = config.data.model_dump(mode="json") | {"items": items, "users": users}
    config = log_config(root, lines, fields=fields, data=data)
    return config, featurized(config)


def test_split_by_position(by_hand):
    split = {key: row["split"] for key, row in events_of(by_hand[0]).items()}
    # (p + 0.5) / 10 for p = 0 .. 9: eight below 0.8, one below 0.9, one above; of two: 0.25 and 0.75.
    assert [split["ann", item, hour * HOUR] for item, hour in [("g", 7), ("h", 8), ("b", 9)]] == [
        "train", "valid", "test",
    ]  # fmt: skip
    assert {split["bob", "a", 100 * 24 * HOUR], split["bob", "z", 101 * 24 * HOUR]} == {"train"}
    assert by_hand[1].manifest["figures"]["examples"] == {"train": 10, "valid": 1, "test": 1}


def test_history_and_counts_look_strictly_back(by_hand):
    config, run = by_hand
    rows = events_of(config)
    d, c, e = rows["ann", "d", 3 * HOUR], rows["ann", "c", 3 * HOUR], rows["ann", "e", 4 * HOUR]
    # c and d happen at the same time: neither sees the other, later events see c before d.
    assert d["recent"] == c["recent"] == ["a"]
    assert d["last_any"] == c["last_any"] == ["a", "b"]
    assert e["recent"] == ["a", "c", "d"]
    assert e["last_any"] == ["c", "d"]
    assert rows["ann", "b", 9 * HOUR]["recent"] == ["a", "g", "h"]
    assert rows["ann", "a", HOUR]["recent"] == []
    activity = run.spec().field("activity")
    # ten train events: ann's see 0 1 2 2 4 5 6 7 earlier ones, bob's 0 and 1
    logs = [math.log1p(n) for n in (0, 1, 2, 2, 4, 5, 6, 7, 0, 1)]
    mean = sum(logs) / 10
    assert activity.offset == pytest.approx(mean)
    assert activity.scale == pytest.approx(math.sqrt(sum((x - mean) ** 2 for x in logs) / 10))
    assert e["activity"] == pytest.approx((math.log1p(4) - activity.offset) / activity.scale)
    likes = run.spec().field("likes")
    assert e["likes"] == pytest.approx((math.log1p(3) - likes.offset) / likes.scale)
    assert (e["hour"], e["weekday"]) == (5, 4)  # 04:00 on 1970-01-01, a Thursday
    assert run.spec().hour == 0  # bob's two events; every other hour has at most two, and is later


def test_vocabularies_count_the_train_part(by_hand):
    _, run = by_hand
    items = run.table("vocab/item").sort_by("index").to_pylist()
    assert [row["index"] for row in items] == list(range(1, 11))
    assert "".join(row["token"] for row in items) == "abcdefgzhq"
    assert [row["count"] for row in items] == [3, 1, 1, 1, 1, 1, 1, 1, 0, 0]
    assert run.table("vocab/user").sort_by("index")["token"].to_pylist() == ["ann", "bob"]
    tags = run.table("vocab/tags").sort_by("index").to_pylist()
    assert [(row["token"], row["count"]) for row in tags] == [("y", 2), ("x", 1), ("x z", 1)]
    # as of zoe, who has no event, the table's values are in the vocabulary all the same
    assert run.table("vocab/town").sort_by("index")["token"].to_pylist() == ["New, York", "Rome"]


def test_items_and_users(by_hand):
    _, run = by_hand
    items = run.table("items").to_pylist()
    assert [row["item"] for row in items] == list(range(1, 11))
    by_id = {row["item_id"]: row for row in items}
    assert (by_id["a"]["title"], by_id["a"]["tags"], by_id["a"]["count"]) == ("Alpha", [2, 1, 3], 3)
    assert (by_id["q"]["title"], by_id["q"]["tags"], by_id["q"]["count"]) == ("q", [], 0)
    assert by_id["b"]["count"] == 0  # its only train event is no positive
    index = {row["item_id"]: row["item"] for row in items}
    users = {(row["as_of"], row["user_id"]): row for row in run.table("users").to_pylist()}
    assert len(users) == 6
    ann = {cut: users[cut, "ann"] for cut in ("valid", "test", "date")}
    assert ann["valid"]["seen"] == sorted(index[item] for item in "abcdefg")
    assert ann["test"]["seen"] == sorted(index[item] for item in "abcdefgh")
    assert ann["date"]["liked"] == sorted(index[item] for item in "abcdegh")
    assert [ann[cut]["recent"][-1] for cut in ann] == [index["g"], index["h"], index["b"]]
    assert users["test", "bob"]["town"] == 0
    assert ann["date"]["activity"] > ann["test"]["activity"] > ann["valid"]["activity"]
    assert run.spec().date == "1970-04-13"


def test_unusable_rows_are_set_aside_and_counted(by_hand):
    _, run = by_hand
    figures = run.manifest["figures"]
    assert figures["quarantined"]["events"] == {
        "duplicate": 1,
        "missing item": 1,
        "missing user": 1,
        "unparseable timestamp": 1,
        "unparseable value": 2,
        "wrong number of columns": 1,
    }
    assert figures["quarantined"]["items"] == {"item listed again later": 1, "not JSON": 1}
    assert figures["rows"] == {"events": 19, "items": 5, "users": 3}
    aside = {(row["reason"], row["raw"]) for row in run.table("quarantine").to_pylist()}
    assert ("duplicate", "ann,a,3600,5") in aside
    assert ("wrong number of columns", "ann,a") in aside
    assert ("not JSON", "not json") in aside
    sources = set(run.table("quarantine")["source"].to_pylist())
    assert {source.rpartition("/")[2] for source in sources} == {"events.csv", "items.jsonl"}


def test_tables_have_the_declared_types(by_hand):
    _, run = by_hand
    spec = run.spec()
    for name, declared, partition in [
        ("examples", spec.examples_schema(), ["split"]),
        ("users", spec.users_schema(), ["as_of"]),
        ("items", spec.items_schema(), []),
        ("vocab/tags", schema.VOCAB, []),
        ("quarantine", schema.QUARANTINE, []),
    ]:
        found = run.dataset(name).schema
        assert found.names == [*declared.names, *partition]
        # Parquet also keeps that no element of a list is null, and how the elements are called.
        types = [pa.list_(type_.value_type) if pa.types.is_list(type_) else type_ for type_ in found.types]
        assert types[: len(declared)] == declared.types
    assert not [file for file in run.manifest["files"] if file["path"].rpartition("/")[2][0] in "._"]


@pytest.mark.parametrize("split", [{"kind": "per_user_time"}, {"kind": "column"}])
def test_latest_holds_the_last_positives_before_the_cut(spark, tmp_path, monkeypatch, split):
    monkeypatch.setattr("recsys_dist.features.state.LATEST", 3)
    log = [("a", 5), ("b", 5), ("c", 1), ("a", 4), ("d", 5), ("e", 2), ("f", 5), ("a", 5), ("g", 5), ("h", 4)]
    parts = ["train"] * 8 + ["valid", "test"]
    lines = [f"u,{log[n][0]},{n * HOUR},{log[n][1]},{parts[n]}" for n in range(10)]
    columns = {"user": "user", "item": "item", "timestamp": "timestamp", "value": "value"}
    columns |= {"split": "part"} if split["kind"] == "column" else {}
    data = {"events": {"path": str(tmp_path / "events.csv"), "columns": columns}}
    header = "user,item,timestamp,value,part"
    run = featurized(log_config(tmp_path, lines, header=header, data=data, split=split))
    names = {row["index"]: row["token"] for row in run.table("vocab/item").to_pylist()}
    rows = {row["as_of"]: row["latest"] for row in run.table("users").to_pylist()}
    found = {cut: "".join(names[index] for index in latest) for cut, latest in rows.items()}
    assert found == {"valid": "dfa", "test": "fag", "date": "agh"}
    # All on the first day: valid and test begin within it, and `date` is the next day's start.
    ages = {row["as_of"]: row["latest_age"] for row in run.table("users").to_pylist()}
    assert ages == {"valid": [0, 0, 0], "test": [0, 0, 0], "date": [17, 16, 15]}


def test_date_cuts_the_log(spark, tmp_path):
    day = 24 * HOUR
    lines = [f"u,{item},{number * day},5" for number, item in enumerate("abcdefghij")]
    config = log_config(tmp_path, lines, score={"date": "1970-01-04"})
    run = featurized(config)
    names = {row["index"]: row["token"] for row in run.table("vocab/item").to_pylist()}
    (user,) = run.table("users/as_of=date").to_pylist()
    assert [names[index] for index in user["recent"]] == ["a", "b", "c"]
    assert run.spec().date == "1970-01-04"


# --- against plain Python -----------------------------------------------------------------------------

event = st.tuples(st.sampled_from("abcdef"), st.integers(0, 6), st.integers(1, 5))
user_log = st.lists(event, min_size=1, max_size=9, unique_by=lambda e: (e[0], e[1]))
changed_log = st.tuples(user_log, user_log, st.integers(1, 6))


def expected(log):
    """Features of one user's events, event by event, each by looking through the whole log."""
    log = sorted(log, key=lambda e: (e[1], e[0]))
    rows = {}
    for place, (item, time, value) in enumerate(log):
        earlier = [e for e in log if e[1] < time]
        share = (place + 0.5) / len(log)
        rows[item, time] = {
            "split": "train" if share < 0.8 else "valid" if share < 0.9 else "test",
            "label": float(value >= 4),
            "recent": [e[0] for e in earlier if e[2] >= 4][-3:],
            "last_any": [e[0] for e in earlier][-2:],
            "activity": len(earlier),
            "likes": sum(e[2] >= 4 for e in earlier),
        }
    return rows


@settings(
    max_examples=3,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
@given(cases=st.lists(changed_log, min_size=25, max_size=25))
def test_no_event_sees_the_present_or_the_future(spark, tmp_path_factory, cases):
    """Two users share a past; whatever the second does from a moment on, the shared events look the same."""
    logs = {"fixed": [("a", 0, 5), ("b", 1, 5)]}
    for number, (log, other, moment) in enumerate(cases):
        past = [e for e in log if e[1] < moment]
        logs[f"{number}"] = log
        logs[f"{number}x"] = past + [e for e in other if e[1] >= moment]
    lines = [f"{user},{item},{time},{value}" for user, log in logs.items() for item, time, value in log]
    config = log_config(tmp_path_factory.mktemp("log"), lines)
    spec = featurized(config).spec()
    found = {}
    for (user, item, time), row in events_of(config).items():
        for name in ("activity", "likes"):
            field = spec.field(name)
            row[name] = round(math.expm1(row[name] * field.scale + field.offset), 3)
        names = ("split", "label", "recent", "last_any", "activity", "likes")
        found.setdefault(user, {})[item, time] = {name: row[name] for name in names}
    assert found == {user: expected(log) for user, log in logs.items() if log}
    for number, (log, _, moment) in enumerate(cases):
        for item, time, _ in log:
            if time < moment:
                one, two = (dict(found[user][item, time], split="") for user in (f"{number}", f"{number}x"))
                assert one == two


# --- what cannot be used ------------------------------------------------------------------------------

GOOD = [f"u{number % 3},i{number % 4},{number},5" for number in range(12)]


def test_too_many_unusable_rows(spark, tmp_path):
    config = log_config(tmp_path, [*GOOD, "u,i,yesterday,5", "u,i,today,5", "u,i"])
    with pytest.raises(DataError, match="3 of 15 rows are unusable, more than") as error:
        featurized(config)
    assert "2 x unparseable timestamp, for example in" in str(error.value)
    assert "'u,i,today,5'" in str(error.value)
    assert "1 x wrong number of columns" in str(error.value)


def test_too_many_duplicates_are_shown_by_their_text(spark, tmp_path, capsys):
    """Which the events themselves have lost by then."""
    lines = [*GOOD, *GOOD[:5], "u,i,yesterday,5"]
    with pytest.raises(DataError, match="6 of 18 rows are unusable, more than") as error:
        featurized(log_config(tmp_path, lines))
    assert re.search(r"5 x duplicate, for example in /.*/events\.csv: 'u0,i0,0,5'\n", str(error.value))
    run = featurized(log_config(tmp_path, lines, data={"max_bad_rows": 0.5}))
    told = [line for line in capsys.readouterr().out.splitlines() if "of 1970-01-01" not in line]
    assert told == [
        "  6 of 18 events are set aside: 5 duplicate, 1 unparseable timestamp",
        f"  what is set aside: {run.uri}/quarantine",
    ]


@pytest.mark.parametrize(
    ("condition", "found"),
    [
        ("valeu >= 4", "valeu"),
        ("value >=", "Syntax"),
        ("value + 1", "BOOLEAN"),
        ("sum(value) > 3", "sum"),
        ("rand() > 0.5", "another answer each time"),
    ],
)
def test_wrong_condition(spark, tmp_path, condition, found):
    config = log_config(tmp_path, GOOD, label={"positive_when": condition})
    with pytest.raises(ConfigError, match=r"label\.positive_when") as error:
        featurized(config)
    assert found in str(error.value)


@pytest.mark.parametrize(
    "condition", ["cast(item as int) > 3", "split(item, 'i')[5] = 'a'", "timestamp > 'soon'"]
)
def test_condition_that_fails_on_a_row(spark, tmp_path, condition):
    config = log_config(tmp_path, GOOD, label={"positive_when": condition})
    with pytest.raises(ConfigError, match="fails on a row") as error:
        featurized(config)
    assert f"label.positive_when={condition!r}" in str(error.value)


def test_event_types_that_differ_in_case_only(spark, tmp_path):
    lines = [f"u{n % 2},i{n},{n * 100},{['View', 'view', 'buy`s'][n % 3]}" for n in range(24)]
    fields = [
        {"name": f"last_{place}", "kind": "history", "when": when, "last": 2}
        for place, when in enumerate(["View", "view", "buy`s"])
    ]
    columns = {"user": "user", "item": "item", "timestamp": "timestamp", "event": "type"}
    config = log_config(
        tmp_path,
        lines,
        header="user,item,timestamp,type",
        data={"events": {"path": str(tmp_path / "events.csv"), "columns": columns}},
        label={"weights": {"View": 1, "view": 1, "buy`s": 1}, "positive_when": "value > 0"},
        fields=fields,
    )
    featurized(config)
    last = events_of(config)["u1", "i23", 2300]
    assert [last[f"last_{place}"] for place in range(3)] == [["i15", "i21"], ["i13", "i19"], ["i11", "i17"]]


def test_no_positive(spark, tmp_path):
    config = log_config(tmp_path, GOOD, label={"positive_when": "value > 5"})
    with pytest.raises(DataError, match="none of the 9 train events is positive"):
        featurized(config)


def test_wrong_timestamp_pattern(spark, tmp_path):
    config = log_config(tmp_path, GOOD)
    events = config.data.events.model_dump() | {"timestamp_format": "not a pattern"}
    with pytest.raises(ConfigError, match=r"data\.events\.timestamp_format='not a pattern'"):
        featurized(log_config(tmp_path, GOOD, data={"events": events}))


def test_field_without_its_table(spark, tmp_path):
    fields = [{"name": "town", "kind": "categorical", "side": "user", "column": "town"}]
    with pytest.raises(ConfigError, match=r"fields town have side user, but data\.users is not set"):
        featurized(log_config(tmp_path, GOOD, fields=fields))


def test_all_missing_columns_are_named_at_once(spark, tmp_path):
    """Of all sources."""
    (tmp_path / "items.csv").write_text("id,titel,price\na,A,1\n")
    (tmp_path / "users.csv").write_text("")
    items = {"path": str(tmp_path / "items.csv"), "columns": {"item": "item", "title": "title"}}
    users = {"path": str(tmp_path / "users.csv"), "columns": {"user": "user"}}
    data = log_config(tmp_path, GOOD).data.model_dump(mode="json") | {"items": items, "users": users}
    fields = [{"name": "town", "kind": "categorical", "side": "context", "column": "town"}]
    config = log_config(tmp_path, GOOD, header="user,itm,timestamp,value", data=data, fields=fields)
    with pytest.raises(DataError) as error:
        featurized(config)
    lines = [line.removeprefix(f"{tmp_path}/") for line in str(error.value).splitlines()]
    found = [line.partition(". Columns found: ")[0] for line in lines]
    assert found == [
        "events.csv has no column 'item' (data.events.columns.item); nearest: 'itm'",
        "events.csv has no column 'town' (fields: town.column)",
        "items.csv has no column 'item' (data.items.columns.item); nearest: 'titel'",
        "items.csv has no column 'title' (data.items.columns.title); nearest: 'titel'",
        f"data.users.path={tmp_path}/users.csv: all 1 files are empty, first {tmp_path}/users.csv",
    ]
    todo = "Name another column, or check data.events.format and .delimiter."
    assert lines[1].endswith(f". Columns found: user, itm, timestamp, value (read as csv). {todo}")


def test_sample_of_the_users(spark, tmp_path):
    lines = [f"user{user},item{n},{n},5" for user in range(200) for n in range(5)]
    config = log_config(tmp_path, lines)
    data = config.data.model_dump(mode="json") | {"sample_users": 0.1}
    run = featurized(log_config(tmp_path, lines, data=data))
    assert 8 <= run.spec().n_users <= 35
    assert run.manifest["figures"]["rows"]["events"] == 5 * run.spec().n_users


def test_events_on_and_after_the_lists_day_are_not_used(spark, tmp_path):
    day = 24 * HOUR
    lines = [f"u,{item},{n * day},5" for n, item in enumerate("abcdefgh")]
    run = featurized(log_config(tmp_path, lines, score={"date": "1970-01-06"}))
    assert run.manifest["figures"]["quarantined"]["events"] == {"future timestamp": 3}
    assert sum(run.spec().rows.values()) == 5
    (user,) = run.table("users/as_of=date").to_pylist()
    assert len(user["seen"]) == 5


def test_values_are_taken_without_the_spaces_around_them(spark, tmp_path):
    (tmp_path / "items.csv").write_text('item,tags\na,"red, blue"\nb," blue ,,red"\n')
    items = {"path": str(tmp_path / "items.csv"), "columns": {"item": "item"}}
    data = log_config(tmp_path, GOOD).data.model_dump(mode="json") | {"items": items}
    lines = [f"u,{item},{n},5" for n, item in enumerate("abab")]
    tags = {"name": "tags", "kind": "categorical", "side": "item", "column": "tags", "delimiter": ","}
    data["events"] = log_config(tmp_path, lines).data.events.model_dump(mode="json")
    run = featurized(log_config(tmp_path, lines, data=data, fields=[tags]))
    assert sorted(run.table("vocab/tags")["token"].to_pylist()) == ["blue", "red"]
    found = dict(zip(*(run.table("items")[name].to_pylist() for name in ("item_id", "tags")), strict=True))
    assert found["a"] == found["b"][::-1]
    assert len(found["a"]) == 2


def test_ids_and_words_are_taken_without_the_spaces_around_them(spark, tmp_path):
    lines = [f"{user},{item},{n},5,{word}" for n in range(4) for user, item, word in [("12", "a", "red")]]
    lines += [" 12,a ,1,5,red ", " 12 , b,9,5, red", '" 13",b,1,5,']
    fields = [{"name": "word", "kind": "categorical", "side": "context", "column": "word"}]
    fields += [{"name": "tags", "kind": "categorical", "side": "item", "column": "tags", "list": True}]
    (tmp_path / "items.jsonl").write_text('{"item": " a", "tags": [" x", "x ", " "]}\n')
    items = {"path": str(tmp_path / "items.jsonl"), "format": "jsonl", "columns": {"item": "item"}}
    data = log_config(tmp_path, []).data.model_dump(mode="json") | {"items": items, "max_bad_rows": 0.2}
    config = log_config(tmp_path, lines, header="user,item,timestamp,value,word", fields=fields, data=data)
    run = featurized(config)
    tokens = {name: run.table(f"vocab/{name}")["token"].to_pylist() for name in run.spec().vocabularies}
    assert tokens == {"user": ["12", "13"], "item": ["a", "b"], "word": ["red"], "tags": ["x"]}
    aside = run.table("quarantine").to_pylist()
    assert [row["reason"] for row in aside] == ["duplicate"]  # of "12,a,1,5"
    assert run.table("items")["tags"].to_pylist() == [[1, 1], []]


def numbers_config(tmp_path, waits, prices, decimal="."):
    """A log with the numeric fields wait, of the events, and price, of the items."""
    lines = [f"u{n % 2};i{n % len(prices)};{n};5;{wait}" for n, wait in enumerate(waits)]
    items = [f"i{n};{price}" for n, price in enumerate(prices)]
    (tmp_path / "items.csv").write_text("\n".join(["item;price in EUR", *items]) + "\n")
    both = {"delimiter": ";", "decimal": decimal}
    events = log_config(tmp_path, []).data.events.model_dump(mode="json") | both
    data = {
        "events": events,
        "items": {"path": str(tmp_path / "items.csv"), "columns": {"item": "item"}} | both,
    }
    fields = [
        {"name": "wait", "kind": "numeric", "side": "context", "column": "wait", "scale": "none"},
        {"name": "price", "kind": "numeric", "side": "item", "column": "price in EUR", "scale": "none"},
        {"name": "range", "kind": "numeric", "side": "item", "column": "price in EUR", "buckets": 2},
        {"name": "name", "kind": "categorical", "side": "item", "column": "item"},
    ]
    header = "user;item;timestamp;value;wait"
    return log_config(tmp_path, lines, header=header, data=data, fields=fields)


def test_texts_that_are_no_numbers_are_told(spark, tmp_path, capsys):
    waits = ["1", "2", "", "nan", " n/a ", "2d", "4", "soon"]
    run = featurized(numbers_config(tmp_path, waits, ["12,5", "7", "1e12", "NaN", "8.5"]))
    figures = run.manifest["figures"]
    assert figures["unreadable_numbers"] == {"price": 2, "range": 2, "wait": 3}
    assert figures["quarantined"]["events"] == figures["quarantined"]["items"] == {}
    items = run.table("items").sort_by("item_id").to_pylist()
    assert [row["price_missing"] for row in items] == [1, 0, 1, 1, 0]
    told = capsys.readouterr().out
    of_items = f"of the column 'price in EUR' of data.items ({tmp_path}/items.csv)"
    assert (
        f"  price: 2 texts {of_items} are no numbers below 1e+12 and count as missing, such as '12,5'" in told
    )
    assert f"  wait: 3 texts of the column 'wait' of data.events ({tmp_path}/events.csv) are" in told
    assert "such as '2d'" in told


def test_no_text_is_told_of_where_all_are_numbers(spark, tmp_path, capsys):
    run = featurized(numbers_config(tmp_path, ["1,5", "2", "", "-3"], ["12,5", "7"], decimal=","))
    assert run.manifest["figures"]["unreadable_numbers"] == {"price": 0, "range": 0, "wait": 0}
    assert run.table("items").sort_by("item_id")["price"].to_pylist() == [12.5, 7.0]
    assert "texts" not in capsys.readouterr().out


def test_numeric_fields_without_a_number_are_refused(spark, tmp_path):
    config = numbers_config(tmp_path, ["n/a", "", "soon", "n/a"], ["1,50", "7,25"])
    with pytest.raises(DataError, match=r"Name another column.*decimal: ','") as error:
        featurized(config)
    lines = str(error.value).splitlines()
    assert len(lines) == 4
    assert lines[0].startswith("field wait: none of the 3 texts of the column 'wait' of data.events (")
    assert lines[1].startswith("field price: none of the 2 texts of the column 'price in EUR' of data.items")
    assert lines[1].endswith("is a number below 1e+12, such as '1,50'")


def test_an_event_type_that_the_log_does_not_have_is_warned_of(spark, tmp_path, capsys):
    lines = [f"u{n % 3},i{n % 4},{n * 86400},{('view', 'cart')[n % 2]}" for n in range(30)]
    columns = {"user": "user", "item": "item", "timestamp": "timestamp", "event": "type"}
    fields = [
        {"name": "recent", "kind": "history", "last": 3},
        {"name": "carts", "kind": "history", "when": "cart", "last": 3},
        {"name": "bought", "kind": "aggregate", "when": "purchse", "measure": "count"},
        {"name": "last_bought", "kind": "history", "when": "purchse", "last": 2},
    ]
    events = {"path": str(tmp_path / "events.csv"), "columns": columns}
    settings = {"data": {"events": events}, "label": {"positive_when": "event = 'cart'"}, "fields": fields}
    featurized(log_config(tmp_path, lines, header="user,item,timestamp,type", **settings))
    warned = [line for line in capsys.readouterr().out.splitlines() if "warning: no train event" in line]
    (line,) = warned
    assert "no train event has the type 'purchse', so there is nothing in bought, last_bought" in line


def test_a_last_event_after_today_is_warned_of(spark, tmp_path, capsys):
    lines = [f"u,{item},{n},5" for n, item in enumerate("abcdefgh")] + ["u,i,4102444800,5"]
    featurized(log_config(tmp_path, lines))
    assert "warning: the last event is of 2100-01-01, and today is 20" in capsys.readouterr().out


def test_a_log_of_1970_is_warned_of(spark, tmp_path, capsys):
    """Seconds that are read as milliseconds."""
    data = log_config(tmp_path, []).data.model_dump(mode="json")
    data["events"] |= {"timestamp_format": "milliseconds"}
    featurized(
        log_config(tmp_path, [f"u,{item},{1714566600 + n},5" for n, item in enumerate("abcdefgh")], data=data)
    )
    assert (
        "warning: the last event is of 1970-01-20. Is data.events.timestamp_format=milliseconds what the log "
        "has?" in capsys.readouterr().out
    )


def test_shares_of_nothing_are_refused(spark, tmp_path):
    (tmp_path / "items.csv").write_text("item,kind\na,x\nb,y\n")
    data = log_config(tmp_path, []).data.model_dump(mode="json")
    data["items"] = {"path": str(tmp_path / "items.csv"), "columns": {"item": "item"}}
    fields = [
        {"name": "kind", "kind": "categorical", "side": "item", "column": "kind", "min_count": 9},
        {"name": "taste", "kind": "aggregate", "measure": "share", "attribute": "kind"},
    ]
    lines = [f"u{n % 3},{'ab'[n % 2]},{n},5" for n in range(20)]
    with pytest.raises(
        DataError, match=r"fields taste: kind has no value in the log, or none that min_count"
    ):
        featurized(log_config(tmp_path, lines, data=data, fields=fields))


def test_a_table_that_meets_no_event_is_refused(spark, tmp_path):
    (tmp_path / "users.csv").write_text("user\n001\n002\n")
    users = {"path": str(tmp_path / "users.csv"), "columns": {"user": "user"}}
    lines = ["1,a,1,5", "1,b,2,5", "2,c,3,5"]
    data = log_config(tmp_path, lines).data.model_dump(mode="json") | {"users": users}
    with pytest.raises(DataError, match=r"no user of it occurs in the events.*'001'.*'1'"):
        featurized(log_config(tmp_path, lines, data=data))


def test_events_that_are_not_positive_can_be_left_out(spark, tmp_path):
    """As if they were not in the log: splits, histories and lists go by the positive ones."""
    rows = [f"u{n % 3},i{n % 7},{n * HOUR},{1 + n % 5}" for n in range(60)]
    only = [row for row in rows if row[-1] in "45"]
    dropped = log_config(tmp_path, rows, label={"others": "drop"}, storage={"root": str(tmp_path / "a")})
    found, run = featurized(dropped), events_of(dropped)
    alone = log_config(tmp_path, only, storage={"root": str(tmp_path / "b")})
    expected = featurized(alone)
    assert run == events_of(alone)
    assert len(run) == len(only) < len(rows)
    for table in ("users", "items", "vocab/item"):
        assert found.table(table).equals(expected.table(table))

"""Which part an event belongs to, whatever the order and partitioning of the rows."""

import datetime as dt

import pytest

from recsys_dist.config import Split
from recsys_dist.errors import DataError
from tests.logs import events_of, featurized, log_config

DAY = 86400
LOG = [(f"u{n % 5}", f"i{n % 7}", n * DAY // 4, 5) for n in range(60)]
LINES = [",".join(map(str, event)) for event in LOG]


def parts(root, lines=LINES, header="user,item,timestamp,value", **settings):
    config = log_config(root, lines, header=header, **settings)
    run = featurized(config)
    return run, {key: row["split"] for key, row in events_of(config).items()}


def test_global_time(spark, tmp_path):
    _, found = parts(tmp_path, split={"kind": "global_time", "fractions": [0.5, 0.25, 0.25]})
    for (_, _, second), part in found.items():
        place = second * 4 // DAY
        assert part == ("train" if place < 30 else "valid" if place < 45 else "test")


def test_global_time_keeps_ties_together(spark, tmp_path):
    tied = [f"u{n % 5},i{n},{min(n, 20) * DAY},5" for n in range(60)]
    run, found = parts(tmp_path, tied, split={"kind": "global_time"})
    assert {part for (_, _, second), part in found.items() if second == 20 * DAY} == {"test"}
    assert run.spec().rows == {"train": 20, "valid": 0, "test": 40}


def test_global_time_by_dates(spark, tmp_path):
    dates = [dt.date(1970, 1, 5), dt.date(1970, 1, 9)]
    run, found = parts(tmp_path, split={"kind": "global_time", "dates": [str(date) for date in dates]})
    for (_, _, second), part in found.items():
        day = dt.date(1970, 1, 1) + dt.timedelta(seconds=second)
        assert part == ("train" if day < dates[0] else "valid" if day < dates[1] else "test")
    liked = {row["user_id"]: len(row["liked"]) for row in run.table("users/as_of=valid").to_pylist()}
    assert sum(liked.values()) == 16


def test_leave_last(spark, tmp_path):
    few = [*LINES, "short,i1,1,5", "short,i2,2,5", "short,i3,3,5", "short,i4,4,5"]
    _, found = parts(tmp_path, few, split={"kind": "leave_last", "last": 2})
    for user in range(5):
        in_order = sorted(found.items(), key=lambda e: e[0][2])
        own = [part for (name, _, _), part in in_order if name == f"u{user}"]
        assert own == ["train"] * 8 + ["valid"] * 2 + ["test"] * 2
    assert [part for (name, _, _), part in found.items() if name == "short"] == ["train"] * 4


BELOW = 3
"""A value that is not liked."""


@pytest.mark.parametrize("kind", ["per_user_time", "leave_last", "global_time"])
def test_positive_events_alone_are_counted(spark, tmp_path, kind):
    """The positives are split as if there were no others, and the others stand where they happened."""
    values = [(5, BELOW, BELOW, 4, BELOW)[n % 5] for n in range(120)]
    # Every second event is at the moment of the one before.
    log = [f"u{n % 4},i{n},{n // 8 * DAY},{value}" for n, value in enumerate(values)]
    only_low = [f"low,i{n},{n},{BELOW}" for n in range(4)]
    label = {"kind": "implicit", "positive_when": "value >= 4"}
    split = {"kind": kind, "events": "positive"}
    _, found = parts(tmp_path, [*log, *only_low], label=label, split=split)
    _, alone = parts(tmp_path, log, label=label | {"others": "drop"}, split={"kind": kind})
    positive = {_key(line) for line in log if not line.endswith(f",{BELOW}")}
    assert {key: part for key, part in found.items() if key in positive} == alone
    assert set(alone.values()) == {"train", "valid", "test"}
    ranks = {"train": 0, "valid": 1, "test": 2}
    for user in range(4):
        own = sorted((key for key in found if key[0] == f"u{user}"), key=lambda key: (key[2], key[1]))
        in_order = [ranks[found[key]] for key in own]
        assert in_order == sorted(in_order)
        following = "test"  # the part of the next positive one; there is none after the last
        for key in reversed(own):
            following = found[key] if key in positive else following
            assert found[key] == following or kind == "global_time"
    assert {part for key, part in found.items() if key[0] == "low"} == {"train"}


def _key(line):
    user, item, second, _ = line.split(",")
    return user, item, int(second)


def test_column(spark, tmp_path):
    names = ["train", "valid", "test"]
    lines = [*(f"{line},{names[n % 3]}" for n, line in enumerate(LINES)), "u1,i1,9,5,dev"]
    columns = {name: name for name in ("user", "item", "timestamp", "value")} | {"split": "part"}
    events = {"path": str(tmp_path / "events.csv"), "columns": columns}
    data = {"events": events, "max_bad_rows": 0.1}
    header = "user,item,timestamp,value,part"
    run, found = parts(tmp_path, lines, header, data=data, split={"kind": "column"})
    assert run.spec().rows == {"train": 20, "valid": 20, "test": 20}
    assert run.manifest["figures"]["quarantined"]["events"] == {"unknown split": 1}
    for (_, _, second), part in found.items():
        assert part == names[second * 4 // DAY % 3]


def test_k_core_reaches_its_fixed_point(spark, tmp_path):
    # A chain: each user shares an item with the next, so that the ends fall off one after the other.
    chain = [f"c{n},x{n + d},{n},5" for n in range(6) for d in (0, 1)]
    core = [f"u{u},i{i},{u * 10 + i},5" for u in range(4) for i in range(3)]
    data = log_config(tmp_path, []).data.model_dump(mode="json") | {"k_core": {"user": 2, "item": 2}}
    run, found = parts(tmp_path, [*chain, *core], data=data)
    assert {user for user, _, _ in found} == {"u0", "u1", "u2", "u3"}
    assert run.manifest["figures"]["k_core"] == {"events_dropped": 12, "rounds": 4}
    with pytest.raises(DataError, match=r"no events left by data\.k_core"):
        parts(tmp_path, chain, data=data)


def test_k_core_with_a_duplicate_whose_original_it_drops(spark, tmp_path):
    core = [f"u{u},i{i},{u + i * 10},5" for u in range(4) for i in range(6)]
    data = log_config(tmp_path, []).data.model_dump(mode="json")
    data |= {"k_core": {"user": 1, "item": 2}, "max_bad_rows": 0.5}
    rare = ["u1,rare,5,5"] * 2 + ["u2,odd,99,5"] * 2
    run, found = parts(tmp_path, [*core, *rare], data=data, split={"kind": "leave_last"})
    assert run.manifest["figures"]["quarantined"]["events"] == {"duplicate": 2}
    assert run.spec().rows == {"train": 16, "valid": 4, "test": 4}
    for user in range(4):
        own = [found[f"u{user}", f"i{i}", user + i * 10] for i in range(6)]
        assert own == ["train"] * 4 + ["valid", "test"]


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"fractions": [0.8, 0.1, 0.2]}, "add up to 1"),
        ({"kind": "column", "events": "positive"}, "goes by a column"),
        (
            {"kind": "global_time", "dates": ["2024-01-01", "2024-01-02"], "events": "positive"},
            "this split goes by dates",
        ),
        ({"kind": "leave_last", "dates": ["2024-01-01", "2024-01-02"]}, "dates belong to kind global_time"),
        ({"kind": "global_time", "dates": ["2024-01-02", "2024-01-02"]}, "valid must begin before test"),
    ],
)
def test_wrong_settings(section, message):
    with pytest.raises(ValueError, match=message):
        Split.model_validate(section)

"""Every reason for which a row is set aside, and what becomes of the others."""

import datetime as dt
import json
import time
from collections import Counter

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from recsys_dist.config import Config, Source
from recsys_dist.errors import ConfigError, DataError
from recsys_dist.features import session
from recsys_dist.features.check import (
    FUTURE,
    check_events,
    check_table,
    positive_condition,
    quarantine,
    require_few,
    require_pattern,
)
from recsys_dist.features.read import read
from recsys_dist.features.source import open_source

DAY = 86_400_000_000
ROLES = ("user", "item", "timestamp", "value", "event", "label", "split")


@pytest.fixture(scope="module", autouse=True)
def _settings(spark):
    with session.start("test", Config(), 0):
        yield


@pytest.fixture
def check(spark, tmp_path):
    """The checked rows of a csv file with the given columns, by the settings given."""

    def check_it(header, lines, date_micros=None, label=None, **settings):
        (tmp_path / "log.csv").write_text("\n".join([header, *lines]) + "\n")
        names = header.split(settings.get("delimiter", ","))
        columns = {name: name for name in names if name in ROLES}
        events = {"path": str(tmp_path / "log.csv"), "columns": columns, **settings}
        sections = {"data": {"events": events}, "label": label or {}}
        if "split" in columns:
            sections["split"] = {"kind": "column"}
        config = Config.model_validate(json.loads(json.dumps(sections)))
        source = config.data.events
        return check_events(
            read(spark, open_source("events", source, source.columns), ""), config, date_micros
        )

    return check_it


def reasons(checked):
    return {row["_raw"]: row["_reason"] for row in checked.select("_raw", "_reason").collect()}


def moments(checked):
    """The times of the usable rows, in order of the items."""
    rows = checked.where("_reason IS NULL").orderBy("item").select("micros").collect()
    return [
        dt.datetime.fromtimestamp(row[0] / 1e6, dt.UTC).strftime("%y-%m-%d %H:%M:%S.%f")[:-3] for row in rows
    ]


def test_reasons(check):
    expected = {
        "a,x,1,5": None,
        "a,x,1": "wrong number of columns",
        "a,x,1,5,6": "wrong number of columns",
        ",x,1,5": "missing user",
        "  ,x,1,5": "missing user",
        "a,,1,5": "missing item",
        '"",,nonsense,nonsense': "missing user",
        "a,x,,5": "unparseable timestamp",
        "a,x,soon,5": "unparseable timestamp",
        "a,x,1e30,5": "unparseable timestamp",
        "a,x,253402300800,5": "unparseable timestamp",  # the year 10000
        "a,x,-62135596801,5": "unparseable timestamp",
        "a,x,9223372036854775807,5": "unparseable timestamp",
        "a,x,172800,5": FUTURE,
        "a,x,172800,nonsense": FUTURE,
        "a,x,172799.999999, 5 ": None,
        "a,x,1.7E3,5e0": None,
        "a,x,1,": "unparseable value",
        "a,x,1,NaN": "unparseable value",
        "a,x,1,-Infinity": "unparseable value",
        "a,x,1,1e99": "unparseable value",  # none in float32
        "a,x,1,five": "unparseable value",
        "a,x,1,5d": "unparseable value",
        "a,x,1,5F ": "unparseable value",
        "a,x,1,0.5": "value out of range",
        "a,x,1,10.1": "value out of range",
        "a,x,1,1": None,
        "a,x,1,10": None,
    }
    checked = check("user,item,timestamp,value", expected, 2 * DAY, value_range=[1, 10])
    assert reasons(checked) == expected
    aside = quarantine(checked).collect()
    assert Counter(row["reason"] for row in aside) == Counter(
        reason for reason in expected.values() if reason
    )
    assert {row["source"].rpartition("/")[2] for row in aside} == {"log.csv"}
    usable = checked.where("_reason IS NULL")
    assert {row["micros"] for row in usable.collect()} == {10**6, 172_799_999_999, 1_700_000_000}
    assert (
        dict(usable.dtypes).items() >= {"micros": "bigint", "value": "double", "positive": "boolean"}.items()
    )
    assert not {"event", "split", "label", "timestamp", "_broken"} & set(usable.columns)


def test_decimal_comma(check):
    expected = {"2,5": None, " 3": None, "1.5": "unparseable value", "1.234,5": "unparseable value"}
    expected |= {"2,5d": "unparseable value", "1,2,3": "unparseable value"}
    lines = {f"a;{text};1;{text}": reason for text, reason in expected.items()}
    checked = check("user;item;timestamp;value", lines, delimiter=";", decimal=",")
    assert reasons(checked) == lines
    assert {row["value"] for row in checked.where("_reason IS NULL").collect()} == {2.5, 3.0}


def test_event_types(check):
    lines = ["a,x,1,view", "a,x,1,buy", "a,x,1,", "a,x,1,View"]
    weighted = check("user,item,timestamp,event", lines, label={"weights": {"view": 0.5, "buy": 5}})
    assert reasons(weighted) == dict(zip(lines, [None, None, *["unknown event type"] * 2], strict=True))
    found = weighted.where("_reason IS NULL").orderBy("value").select("event", "value", "positive").collect()
    assert list(map(tuple, found)) == [("view", 0.5, True), ("buy", 5.0, True)]
    condition = {"positive_when": "event = 'buy' AND item = 'x' AND timestamp < '1970-01-02'"}
    plain = check("user,item,timestamp,event", lines, label=condition)
    assert [tuple(row) for row in plain.orderBy("_raw").select("event", "value", "positive").collect()] == [
        (None, 1.0, False),
        ("View", 1.0, False),
        ("buy", 1.0, True),
        ("view", 1.0, False),
    ]


def test_label_column(check):
    texts = {"1": True, "0": False, "true": True, "False": False, "1.0": True, " 0.0": False}
    wrong = ["", "2", "yes", "0.5"]
    lines = [f"a,x,1,{text}" for text in [*texts, *wrong]]
    checked = check("user,item,timestamp,label", lines, label={"kind": "column"})
    usable = checked.where("_reason IS NULL").select("_raw", "positive").collect()
    assert {row["_raw"].rpartition(",")[2]: row["positive"] for row in usable} == texts
    assert Counter(reasons(checked).values()) == {None: 6, "label is not 0 or 1": 4}
    assert checked.where("_reason IS NOT NULL AND positive").isEmpty()


def test_split_column(check):
    lines = ["a,x,1,train", "a,x,1,valid", "a,x,1, test", "a,x,1,", "a,x,1,dev"]
    checked = check("user,item,timestamp,split", lines)
    found = [(row["split"], row["_reason"]) for row in checked.select("split", "_reason").collect()]
    assert found[:3] == [("train", None), ("valid", None), ("test", None)]
    assert [reason for _, reason in found[3:]] == ["unknown split"] * 2


@pytest.mark.parametrize(
    ("condition", "found"),
    [("valeu >= 4", "valeu"), ("value >=", "Syntax"), ("value + 1", "BOOLEAN"), ("sum(value) > 3", "sum")],
)
def test_wrong_condition(spark, condition, found):
    with pytest.raises(
        ConfigError, match=r"label\.positive_when.*on user, item, timestamp, value \("
    ) as error:
        positive_condition(spark, condition, has_event=False)
    assert found.lower() in str(error.value).lower()
    with pytest.raises(ConfigError):
        positive_condition(spark, "event = 'buy'", has_event=False)


# --- times --------------------------------------------------------------------------------------------

TIMES = {
    "seconds": ["1714566600", "1714566600.25", "-1"],
    "milliseconds": ["1714566600000", "1714566600250", "-1000"],
    "iso": [
        "2024-05-01T12:30:00Z",
        "2024-05-01 14:30:00.25+02:00",
        "1969-12-31T18:59:59-05:00",
        "2024-07-01",
        "2024-07-01T08:00",
        "2024-01-01 08:00:00.5",
        "2024-07-01T08:00:00 Asia/Tokyo",
    ],
    "dd/MM/yyyy HH:mm:ss": ["01/05/2024 12:30:00", "31/12/1969 23:59:59"],
    "dd MMM yyyy HH:mm XXX": ["01 May 2024 14:30 +02:00"],
    "yyyyMMdd'Z'": ["20240701Z"],
}
EXPECTED = {
    "seconds": {"UTC": ["24-05-01 12:30:00.000", "24-05-01 12:30:00.250", "69-12-31 23:59:59.000"]},
    "iso": {
        "UTC": [
            "24-05-01 12:30:00.000",
            "24-05-01 12:30:00.250",
            "69-12-31 23:59:59.000",
            "24-07-01 00:00:00.000",
            "24-07-01 08:00:00.000",
            "24-01-01 08:00:00.500",
            "24-06-30 23:00:00.000",
        ],
        "Europe/Berlin": [
            "24-05-01 12:30:00.000",
            "24-05-01 12:30:00.250",
            "69-12-31 23:59:59.000",
            "24-06-30 22:00:00.000",
            "24-07-01 06:00:00.000",
            "24-01-01 07:00:00.500",
            "24-06-30 23:00:00.000",
        ],
    },
    "dd/MM/yyyy HH:mm:ss": {
        "UTC": ["24-05-01 12:30:00.000", "69-12-31 23:59:59.000"],
        "Europe/Berlin": ["24-05-01 10:30:00.000", "69-12-31 22:59:59.000"],
    },
    "dd MMM yyyy HH:mm XXX": {"UTC": ["24-05-01 12:30:00.000"]},
    "yyyyMMdd'Z'": {"UTC": ["24-07-01 00:00:00.000"], "Europe/Berlin": ["24-06-30 22:00:00.000"]},
}
EXPECTED["milliseconds"] = EXPECTED["seconds"]


@pytest.mark.parametrize("machine", ["UTC", "America/New_York"])
@pytest.mark.parametrize("zone", ["UTC", "Europe/Berlin"])
def test_times(spark, check, monkeypatch, machine, zone):
    """Whatever zone Python's and Java's machine is in."""
    monkeypatch.setenv("TZ", machine)
    time.tzset()
    java = spark.sparkContext._jvm.java.util.TimeZone
    default = java.getDefault()
    java.setDefault(java.getTimeZone(machine))
    try:
        for pattern, texts in TIMES.items():
            lines = [f"a,{place},{text}" for place, text in enumerate(texts)]
            checked = check("user,item,timestamp", lines, timestamp_format=pattern, timezone=zone)
            known = EXPECTED[pattern]
            assert moments(checked) == known.get(zone, known["UTC"]), pattern
    finally:
        java.setDefault(default)
        monkeypatch.undo()
        time.tzset()


def test_no_times(check):
    for pattern, texts in {
        "seconds": ["2024-05-01", "0x10"],
        "iso": ["12:30:00", "2024", "2024-05", "2024-13-01", "1714566600", "2024-02-30"],
        "dd/MM/yyyy": ["5/1/2024", "2024-05-01", "31/02/2024", "01/05/2024 12:00"],
    }.items():
        checked = check("user,item,timestamp", [f"a,x,{text}" for text in texts], timestamp_format=pattern)
        assert set(reasons(checked).values()) == {"unparseable timestamp"}


def test_patterns(spark):
    for pattern in ("not a pattern", "yyyy-MM-dd'T"):
        source = Source(path="x", columns={}, timestamp_format=pattern)
        with pytest.raises(ConfigError, match=r"data\.events\.timestamp_format"):
            require_pattern(spark, "events", source)
    source = Source(path="x", columns={}, timestamp_format="yyyy-MM-dd HH:mm[XXX]", timezone="Asia/Tokyo")
    with pytest.raises(ConfigError, match="has an optional zone"):
        require_pattern(spark, "events", source)
    require_pattern(spark, "events", source.model_copy(update={"timezone": "UTC"}))


# --- tables -------------------------------------------------------------------------------------------


def table(spark, tmp_path, header, lines, key, **settings):
    (tmp_path / "table.csv").write_text("\n".join([header, *lines]) + "\n")
    columns = {name: name for name in header.split(",")}
    source = Source(path=str(tmp_path / "table.csv"), columns=columns, **settings)
    return check_table(read(spark, open_source("items", source, columns), "", placed=True), key, source)


def test_table(spark, tmp_path):
    expected = {
        "a,Beta": "item listed again later",
        "a,Alpha": None,
        ",Gamma": "missing item",
        " ,Gamma": "missing item",
        "b,More": "item listed again later",
        "b,": None,
        "c,d,e": "wrong number of columns",
        "c,x": None,
    }
    assert reasons(table(spark, tmp_path, "item,title", expected, "item")) == expected


@pytest.mark.parametrize("format_", ["csv", "parquet"])
def test_the_last_row_of_the_last_file_stays(spark, tmp_path, format_):
    """However Spark cuts the files, and whatever the rows say."""
    columns = {"item": "item", "title": "title"}
    for file, numbers in {"b/9": (5, 1), "b/10": (9, 0), "a": (7, 8)}.items():
        rows = [(f"i{place % 700}", f"{number}{place:05d}") for number in numbers for place in range(3000)]
        path = tmp_path / f"{file}.{format_}"
        path.parent.mkdir(exist_ok=True)
        if format_ == "csv":
            path.write_text("\n".join(["item,title", *map(",".join, rows)]) + "\n")
        else:
            pq.write_table(pa.table(dict(zip(columns, zip(*rows, strict=True), strict=True))), path, 500)
    source = Source(path=str(tmp_path), format=format_, columns=columns)
    opened = open_source("items", source, columns)
    for size in ("2k", "1m", "1g"):
        spark.conf.set("spark.sql.files.maxPartitionBytes", size)
        rows = read(spark, opened, "", placed=True)
        assert (rows.rdd.getNumPartitions() > 10) == (size == "2k")
        checked = check_table(rows, "item", source)
        kept = checked.where("_reason IS NULL").select("item", "title").collect()
        # b/9 comes after b/10, and its last rows begin with 1.
        last = {f"i{place % 700}": f"1{place:05d}" for place in range(3000)}
        assert {row["item"]: row["title"] for row in kept} == last
        assert checked.where("_reason = 'item listed again later'").count() == 18_000 - 700
    spark.conf.unset("spark.sql.files.maxPartitionBytes")


def test_a_broken_row_takes_no_ones_place(spark, tmp_path):
    lines = ["a,2024-02-30", "a,2024-02-28"]
    checked = table(spark, tmp_path, "item,active_from", lines, "item", timestamp_format="iso")
    assert reasons(checked) == {"a,2024-02-30": "unparseable active_from", "a,2024-02-28": None}


def test_active(spark, tmp_path):
    lines = ["a,2024-07-01,", "b,,2024-07-01 12:00:00", "c,,", "d,soon,", "e,, never"]
    settings = {"timestamp_format": "iso", "timezone": "Europe/Berlin"}
    checked = table(spark, tmp_path, "item,active_from,active_to", lines, "item", **settings)
    assert dict(checked.dtypes).items() >= {"active_from": "timestamp", "active_to": "timestamp"}.items()
    texts = checked.selectExpr("item", "string(active_from)", "string(active_to)", "_reason").orderBy("item")
    assert list(map(tuple, texts.collect())) == [
        ("a", "2024-06-30 22:00:00", None, None),
        ("b", None, "2024-07-01 10:00:00", None),
        ("c", None, None, None),
        ("d", None, None, "unparseable active_from"),
        ("e", None, None, "unparseable active_to"),
    ]


# --- too many -----------------------------------------------------------------------------------------


def test_too_many_unusable_rows(check):
    good = [f"u{number},i,{number},5" for number in range(12)]
    bad = ["u,i,yesterday,5", "u,i,today,5", "u,i,tomorrow,5", "u,i", "u,i,1", ",i,1,5", "u,,1,5"]
    future = [f"u,{number},{10**9},5" for number in range(100)]
    checked = check("user,item,timestamp,value", [*good, *bad, *future], DAY)
    counted = Counter(reason or "" for reason in reasons(checked).values())
    assert counted.total() == 119
    require_few("events", counted, checked, 7 / 19)
    with pytest.raises(DataError, match=r"data\.events: 7 of 19 rows are unusable, more than") as error:
        require_few("events", counted, checked, 0.36)
    message = str(error.value)
    assert "3 x unparseable timestamp, for example in" in message
    assert f"log.csv: {'u,i,today,5'!r}" in message
    assert "2 x wrong number of columns" in message
    assert message.count(" x ") == 3
    assert FUTURE not in message

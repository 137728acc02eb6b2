"""Raw files of every format, encoding and packing through Spark: the same rows come out."""

import bz2
import datetime as dt
import gzip
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from py4j.protocol import Py4JJavaError
from pyspark.errors import PySparkException

from recsys_dist.config import Config, Source
from recsys_dist.errors import ConfigError, DataError
from recsys_dist.features import heads, session
from recsys_dist.features.check import quarantine
from recsys_dist.features.drift import columns_of, require_same
from recsys_dist.features.read import NOT_JSON, WRONG_COLUMNS, read, unpack, unreadable
from recsys_dist.features.source import open_source
from recsys_dist.workspace import raw_files, raw_input

COLUMNS = {"user": "user", "item": "item", "timestamp": "time"}
ROWS = [("ann", "ä", "1"), ("bob", "b", "2"), ("zoë", "c d", "3")]
LINES = ["user,item,time", *(",".join(row) for row in ROWS)]


@pytest.fixture(scope="module", autouse=True)
def _settings(spark):
    with session.start("test", Config(), 0):
        yield


@pytest.fixture
def opened(tmp_path):
    """Open what is under `tmp_path`."""

    def open_it(path="log.csv", columns=COLUMNS, several=(), **settings):
        source = Source.model_validate({"path": f"{tmp_path}/{path}", "columns": columns, **settings})
        return open_source("events", source, source.columns, several)

    return open_it


@pytest.fixture
def found(spark, tmp_path, opened):
    """The rows of what is under `tmp_path`: our columns of those that can be used, as tuples in order."""

    def read_it(*args, **settings):
        source = opened(*args, **settings)
        rows = read(spark, source, f"{tmp_path}/scratch").where("_broken IS NULL").select(*source.columns)
        return sorted(map(tuple, rows.collect()), key=str)

    return read_it


@pytest.fixture
def aside(spark, tmp_path, opened):
    """(reason, text) of the rows without columns."""

    def read_it(*args, **settings):
        rows = read(spark, opened(*args, **settings), f"{tmp_path}/scratch")
        bad = quarantine(rows.withColumnRenamed("_broken", "_reason"))
        return sorted((row["reason"], row["raw"]) for row in bad.collect())

    return read_it


def write(tmp_path, lines, name="log.csv", encoding="utf-8", end="\n"):
    path = tmp_path / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes("".join(line + end for line in lines).encode(encoding))
    return path


# --- text ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("delimiter", ["\t", ";", "|", "::", "||", ".", "^", "\\"])
@pytest.mark.parametrize("quote", ["", '"'])
def test_delimiters(tmp_path, found, delimiter, quote):
    write(tmp_path, [delimiter.join(f"{quote}{part}{quote}" for part in line.split(",")) for line in LINES])
    assert found(delimiter=delimiter, quote=quote) == ROWS


def test_quotes(tmp_path, found, aside):
    lines = [
        "a",
        '"x,""y"" z",b,1',
        '5" nail,"",2',
        'one,"two',
        'lines",3',
        'two,three,"not closed',
        "a,b,c,d",
    ]
    write(tmp_path, ['user,"item, the",time', *lines])
    assert found(columns=COLUMNS | {"item": "item, the"}) == [('5" nail', None, "2"), ('x,"y" z', "b", "1")]
    assert aside(columns=COLUMNS | {"item": "item, the"}) == [
        (WRONG_COLUMNS, line)
        for line in sorted(["a", 'one,"two', 'lines",3', 'two,three,"not closed', "a,b,c,d"])
    ]


@pytest.mark.parametrize("format_", ["csv", "jsonl", "parquet"])
def test_spaces_around_a_value(tmp_path, found, format_):
    rows = [(" ann", "a b ", " 1 "), ("bob  ", "   ", "2"), ("zoe", " c", "3")]
    table = pa.table(dict(zip(("user", "item", "time"), zip(*rows, strict=True), strict=True)))
    if format_ == "csv":
        quoted = ",".join(f'"{part}"' for part in rows[0])
        write(tmp_path, [LINES[0], quoted, *map(",".join, rows[1:])])
    elif format_ == "jsonl":
        write(tmp_path, map(json.dumps, table.to_pylist()))
    else:
        pq.write_table(table, tmp_path / "log.csv")
    assert found(format=format_) == [("ann", "a b", "1"), ("bob", None, "2"), ("zoe", "c", "3")]


def test_no_header(tmp_path, found):
    write(tmp_path, LINES[1:])
    assert found(header=["user", "item", "time"]) == ROWS


def test_header_false_asks_for_the_names(tmp_path, opened):
    write(tmp_path, LINES)
    with pytest.raises(ConfigError, match=r"data\.events\.header=false: list the names"):
        opened(header=False)


def test_typed_header(tmp_path, found, opened):
    write(tmp_path, ["user:token,item:token,time:float", *LINES[1:]])
    assert found() == ROWS
    assert found(columns=COLUMNS | {"item": "item:token"}) == ROWS
    assert columns_of(opened()) == {"user": "token", "item": "token", "time": "float"}
    write(tmp_path, ["user:token,item,time,user,time:a,time:b", "x,b,1,ann,2,3"])
    assert found() == [("ann", "b", "1")]
    write(tmp_path, ["user:token,item,user:float,time", "x,b,1,2"])
    with pytest.raises(
        DataError, match=r"'user' \(data\.events\.columns\.user\) as user:token or user:float"
    ):
        opened()


@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize("mark", ["", "\ufeff"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-16-le", "utf-16-be", "utf-32-le"])
def test_unicode_with_and_without_byte_order_mark(tmp_path, found, encoding, mark, end):
    write(tmp_path, [mark + LINES[0], "", *LINES[1:], "  "], encoding=encoding, end=end)
    assert found(encoding=encoding) == ROWS


@pytest.mark.parametrize("order", ["utf-16-le", "utf-16-be"])
def test_byte_order_from_the_mark(tmp_path, found, opened, order):
    write(tmp_path, ["\ufeff" + LINES[0], *LINES[1:]], encoding=order)
    assert found(encoding="utf-16") == ROWS
    write(tmp_path, LINES, encoding=order)
    with pytest.raises(DataError, match=r"log\.csv has no byte order mark.*utf-16-le"):
        opened(encoding="utf-16")


@pytest.mark.parametrize("encoding", ["latin-1", "cp1252", "iso-8859-15", "cp437", "gb18030", "mac-roman"])
def test_other_encodings(tmp_path, found, encoding):
    write(tmp_path, [LINES[0].replace("item", "ïtem"), *LINES[1:]], encoding=encoding)
    columns = COLUMNS | {"item": "ïtem"}
    if encoding == "mac-roman":
        with pytest.raises(ConfigError, match=r"data\.events\.encoding='mac-roman' is not known to Java"):
            found(columns=columns, encoding=encoding)
    else:
        assert found(columns=columns, encoding=encoding) == ROWS


def test_japanese(tmp_path, found):
    write(tmp_path, ["user|item|time", "表|ソ|1"], encoding="shift_jis")  # their second bytes are ASCII
    assert found(encoding="shift_jis", delimiter="|") == [("表", "ソ", "1")]


@pytest.mark.parametrize(
    ("format_", "encoding", "text"),
    [
        ("csv", "utf-8", b"user,item,time\nann,x\xff,1\nann,x\xfe,2\nann,\xef\xbf\xbd,3\n"),
        ("csv", "utf-8", b'user,item,time\nann,"x\xff",1\nann,"x\xfe",2\nann,\xef\xbf\xbd,3\n'),
        ("tsv", "utf-8", b"user\titem\ttime\nann\tx\xff\t1\nann\tx\xfe\t2\nann\t\xef\xbf\xbd\t3\n"),
        ("csv", "gb18030", b"user,item,time\nann,x\xff,1\nann,x\xfe,2\nann,\x841\xa47,3\n"),
        (
            "jsonl",
            "utf-8",
            (
                b'{"user": "ann", "item": "x\xff", "time": 1}\n{"user": "ann", "item": "x\xfe", "time": 2}\n'
                b'{"user": "ann", "item": "\xef\xbf\xbd", "time": 3}\n'
            ),
        ),
    ],
)
def test_ids_that_are_no_text_are_not_merged(tmp_path, found, aside, format_, encoding, text):
    """A replacement character that the file itself has is text like any other."""
    (tmp_path / "log.csv").write_bytes(text)
    assert found(format=format_, encoding=encoding) == [("ann", "\ufffd", "3")]
    reasons = aside(format=format_, encoding=encoding)
    assert [reason for reason, _ in reasons] == [f"not {encoding}"] * 2
    assert all("x\ufffd" in raw for _, raw in reasons)


def test_json_lines(tmp_path, found, aside, opened):
    write(
        tmp_path,
        [
            '{"user": 7, "item": "a\\u00e4", "time": 1.5, "tags": ["x", 2, "y,z"], "a.b": true}',
            "",
            '{"time": 2, "item": null, "tags": "one", "user": "bob", "a.b": {"c": [1]}}',
            '{"user": "zoe", "item": "c", "time": 3, "tags": null, "new": 1}',
            '{"user": "zoe", "item": "c", "time": 3',
            "5",
            '[{"user": "u", "item": "i", "time": 4}]',
            '{"user": "zoe"} {"user": 5',
        ],
        end="\r\n",
    )
    columns = COLUMNS | {"user": "user"}
    asked = {"format": "jsonl", "columns": columns}
    assert found(**asked) == [("7", "aä", "1.5"), ("bob", None, "2"), ("zoe", "c", "3")]
    assert [reason for reason, _ in aside(**asked)] == [NOT_JSON] * 4
    source = opened(**asked)
    lists = open_source(
        "events", source.source, columns | {"raw:tags": "tags", "raw:ab": "a.b"}, {"raw:tags"}
    )
    assert columns_of(lists)["tags"] == "mixed"


@pytest.mark.parametrize("encoding", ["utf-8", "utf-16"])
def test_a_key_that_the_first_lines_leave_out(spark, tmp_path, monkeypatch, encoding):
    """As writers do with what is null: another file begins with it, or it comes late in one, or nowhere."""
    rows = [json.dumps({"user": f"u{n}", "item": "a", "time": n}) for n in range(250)]
    late = json.dumps({"user": "u", "item": "a", "time": 250, "note": 'said "until"', "until": "2024"})
    (tmp_path / "1.json").write_text("\n".join([*rows, late]), encoding=encoding)
    (tmp_path / "2.json").write_text("\n".join(rows[:150]), encoding=encoding)
    (tmp_path / "3.json").write_text('{"user": "v", "item": "b", "time": 1, "shop": "x"}', encoding=encoding)
    asked = {"user": "user", "item": "item", "raw:until": "until", "raw:shop": "shop"}
    source = Source(path=f"{tmp_path}/*.json", format="jsonl", columns=COLUMNS, encoding=encoding)
    opened = open_source("events", source, asked)
    assert {head.types["until"] for head in opened.heads} == {"null"}
    assert [head.types["shop"] for head in opened.heads] == ["null", "null", "string"]
    found = read(spark, opened, f"{tmp_path}/scratch").select("user", "raw:until", "raw:shop").collect()
    assert len(found) == 402
    assert {tuple(row) for row in found if row["raw:until"] or row["raw:shop"]} == {
        ("u", "2024", None),
        ("v", None, "x"),
    }
    with pytest.raises(DataError, match=r"1\.json has no column 'said' \(fields: gone\.column\)"):
        open_source("events", source, asked | {"raw:gone": "said"})
    monkeypatch.setattr(heads, "RARE_BYTES", 1)
    monkeypatch.setattr(heads, "HEAD_BYTES", 1 << 12)
    with pytest.raises(DataError, match=r"1\.json has no column 'until' \(fields: until\.column\)"):
        open_source("events", source, asked)


def test_lists(spark, tmp_path):
    rows = [
        {"user": "a", "tags": ["x", "y z"]},
        {"user": "b", "tags": []},
        {"user": "c", "tags": None},
        {"user": "d", "tags": ["1", None]},
    ]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "rows.parquet")
    for format_ in ("jsonl", "parquet"):
        source = Source(path=f"{tmp_path}/rows.{format_}", format=format_, columns={"user": "user"})
        opened = open_source("users", source, {"user": "user", "raw:tags": "tags"}, {"raw:tags"})
        frame = read(spark, opened, f"{tmp_path}/scratch").orderBy("user")
        assert dict(frame.dtypes)["raw:tags"] == "array<string>"
        assert [row["raw:tags"] for row in frame.collect()] == [["x", "y z"], [], None, ["1", None]]
    with pytest.raises(DataError, match=r"'tags' \(fields: tags\.column\) is of type list.*list: true"):
        open_source("users", source, {"user": "user", "raw:tags": "tags"})
    with pytest.raises(DataError, match=r"'user' \(fields: who\.column\) is of type string. list: true"):
        open_source("users", source, {"raw:who": "user"}, {"raw:who"})
    write(tmp_path, LINES)
    source = Source(path=f"{tmp_path}/log.csv", columns=COLUMNS)
    with pytest.raises(ConfigError, match="fields who: list: true is for jsonl and parquet"):
        open_source("events", source, {"raw:who": "user"}, {"raw:who"})


# --- packed -------------------------------------------------------------------------------------------


def zstd(text):
    return pa.Codec("zstd").compress(text, asbytes=True)


PACKERS = {".gz": gzip.compress, ".bz2": bz2.compress, ".zst": zstd}


@pytest.mark.parametrize("suffix", PACKERS)
def test_packed(spark, tmp_path, found, opened, suffix):
    text = "\n".join(LINES).encode()
    (tmp_path / f"a b.csv{suffix}").write_bytes(PACKERS[suffix](text))
    (tmp_path / "plain.csv").write_bytes(text)
    assert found("a b.csv" + suffix) == ROWS
    assert found("{a b,plain}.csv*") == sorted(ROWS * 2)
    rows = read(spark, opened("a b.csv" + suffix), f"{tmp_path}/scratch")
    assert {row["_source"] for row in rows.select("_source").collect()} == {f"{tmp_path}/a b.csv{suffix}"}


def test_unpack(tmp_path):
    path = write(tmp_path, ["x" * 1000] * 1000, "day=1/a b.csv")
    text = path.read_bytes()
    (tmp_path / "day=1/a b.csv.zst").write_bytes(zstd(text)[:-10])
    filesystem, files = raw_input(f"{tmp_path}/day=1/*.zst")
    with pytest.raises(DataError, match=r"a b\.csv\.zst cannot be decompressed"):
        unpack(filesystem, [files[0].path], f"{tmp_path}/scratch")
    (tmp_path / "day=1/a b.csv.zst").write_bytes(zstd(text))
    for _ in range(2):
        (uri,) = unpack(filesystem, [files[0].path], f"{tmp_path}/scratch")
    assert uri == f"file://{tmp_path}/scratch/unpacked-zstd{tmp_path}/day=1/a b.csv"
    (copy,) = raw_files(f"{tmp_path}/scratch")
    assert (copy.path, copy.size) == (uri.removeprefix("file://"), len(text))


@pytest.mark.parametrize("suffix", PACKERS)
def test_a_cut_file_fails_by_name(spark, tmp_path, opened, suffix):
    lines = [LINES[0], *(f"u{n * 7919 % 10007},i{n * 104729 % 99991},{n}" for n in range(200_000))]
    packed = PACKERS[suffix]("\n".join(lines).encode())
    (tmp_path / f"b%20 c.csv{suffix}").write_bytes(packed[: len(packed) * 9 // 10])
    name = f"{tmp_path}/b%20 c.csv{suffix}"
    errors = (DataError, Py4JJavaError, PySparkException)
    source = opened("b*")
    with pytest.raises(errors) as caught:
        read(spark, source, f"{tmp_path}/scratch").count()
    is_ours = isinstance(caught.value, DataError)
    assert name in (str(caught.value) if is_ours else unreadable(caught.value, [source]))


def test_a_cut_parquet_file_fails_by_name(tmp_path, opened):
    pq.write_table(pa.table({name: ["1"] * 1000 for name in COLUMNS.values()}), tmp_path / "log.parquet")
    whole = (tmp_path / "log.parquet").read_bytes()
    (tmp_path / "log.parquet").write_bytes(whole[:-20])
    with pytest.raises(DataError, match=r"log\.parquet cannot be read as parquet"):
        opened("log.parquet", format="parquet")


def test_parquet_with_an_unreadable_page_fails_by_name(spark, tmp_path, opened):
    table = pa.table({name: [str(n) for n in range(50_000)] for name in COLUMNS.values()})
    pq.write_table(table, tmp_path / "t b.parquet", compression="gzip", use_dictionary=False)
    whole = bytearray((tmp_path / "t b.parquet").read_bytes())
    whole[1000:30_000] = b"\x5a" * 29_000
    (tmp_path / "t b.parquet").write_bytes(whole)
    with pytest.raises((Py4JJavaError, PySparkException)) as error:
        read(spark, opened("t b.parquet", format="parquet"), "").selectExpr("max(user)").collect()
    assert unreadable(error.value) == f"{tmp_path}/t b.parquet"


def test_another_error_names_no_file():
    assert unreadable(ValueError("something else")) is None


# --- names of files -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["a b", "a%20b", "100%", "e[1]", "f{1,2}", "g+h", "i?j", "k*l", "ü"])
def test_odd_names_are_taken_literally(spark, tmp_path, opened, name):
    write(tmp_path, LINES, f"{name}/{name}.csv")
    write(tmp_path, [LINES[0], "other,x,1"], "e1/e1.csv")
    for path in (f"{name}/{name}.csv", name):
        rows = read(spark, opened(path), "").select("user", "_source").collect()
        assert sorted(row["user"] for row in rows) == ["ann", "bob", "zoë"]
        assert {row["_source"] for row in rows} == {f"{tmp_path}/{name}/{name}.csv"}


def test_globs(tmp_path):
    names = ("a1.csv", "a2.csv", "b.tsv", "deep/1/z.csv", "d=1/x.csv", "d=2/y.csv", "_tmp/p.csv", ".h/q.csv")
    for name in (*names, "d=2/_SUCCESS", "[a]1.csv"):
        write(tmp_path, ["x"], name)

    def matches(glob):
        return " ".join(info.path.removeprefix(f"{tmp_path}/") for info in raw_files(f"{tmp_path}/{glob}"))

    assert matches("*.csv") == "[a]1.csv a1.csv a2.csv"
    assert matches("[ab]1.csv") == "a1.csv"
    assert matches("[a]1.csv") == "[a]1.csv"  # it exists as written
    assert matches("[!b]?.csv") == "a1.csv a2.csv"
    assert matches("{a2,b}.?sv") == "a2.csv b.tsv"
    assert matches("{d=1,deep/{1,2}}/*.csv") == "d=1/x.csv deep/1/z.csv"
    assert matches("**/z.csv") == "deep/1/z.csv"
    assert matches("d=*") == "d=1/x.csv d=2/y.csv"
    assert matches("deep/**") == "deep/1/z.csv"
    assert matches("_tmp/p.csv") == "_tmp/p.csv"
    assert matches("*/*.csv") == "d=1/x.csv d=2/y.csv"
    assert matches("*.parquet") == matches("nowhere/*") == ""
    with pytest.raises(ConfigError, match="nor is it a glob"):
        matches("[z-a].csv")


@pytest.mark.parametrize("format_", ["csv", "jsonl", "parquet"])
def test_a_folders_key_is_a_column(tmp_path, found, opened, format_):
    for place, (day, user) in enumerate(
        [("2024-05-01", "ann"), ("a%3Ab+c d%", "bob"), ("__HIVE_DEFAULT_PARTITION__", "cy")]
    ):
        folder = tmp_path / f"x=1/the day={day}/x=2"
        folder.mkdir(parents=True)
        row = {"user": user, "item": "i"}
        if format_ == "parquet":
            pq.write_table(pa.Table.from_pylist([row]), folder / f"{place}.parquet")
        else:
            lines = ["user,item", f"{user},i"] if format_ == "csv" else [json.dumps(row)]
            (folder / f"{place}.txt").write_text("\n".join(lines))
    asked = {
        "path": "x=1",
        "format": format_,
        "columns": {"user": "user", "timestamp": "the day", "item": "x"},
    }
    assert found(**asked) == [
        ("ann", "2024-05-01", "2"),
        ("bob", "a%3Ab+c d%", "2"),
        ("cy", None, "2"),
    ]
    assert columns_of(opened(**asked))["the day"] == "text"
    # a column of the files themselves comes first
    assert [
        row[1] for row in found(**(asked | {"columns": {"user": "user", "timestamp": "item", "item": "x"}}))
    ] == ["i"] * 3


def test_encoded_value_of_a_folder(tmp_path, found):
    write(tmp_path, ["user,item", "ann,i"], "at=10%3A30/log.csv")
    assert found("*", columns={"user": "user", "item": "item", "timestamp": "at"}) == [("ann", "i", "10:30")]


# --- several files, and the night before --------------------------------------------------------------


def test_files_with_other_columns(spark, tmp_path, found, opened):
    write(tmp_path, LINES, "1.csv")
    write(tmp_path, ["time,new,user,item", "4,n,dan,d"], "2.csv")
    write(tmp_path, ['"user","item","time"', "eve,e,5"], "3.csv")
    write(tmp_path, ["user,item,time"], "4.csv")
    write(tmp_path, [], "5.csv")
    assert found("*.csv") == [*ROWS[:2], ("dan", "d", "4"), ("eve", "e", "5"), ROWS[2]]
    assert len(opened("*.csv").groups) == 2
    write(tmp_path, ["user,item", "fay,f"], "6.csv")
    with pytest.raises(DataError, match=r"6\.csv has no column 'time' \(data\.events\.columns\.timestamp\)"):
        opened("*.csv")


def test_nothing_to_read(tmp_path, opened):
    with pytest.raises(DataError, match="there is no such file, folder or match"):
        opened("nowhere*.csv")
    write(tmp_path, [], "empty.csv")
    (tmp_path / "empty.csv.gz").write_bytes(gzip.compress(b""))
    with pytest.raises(DataError, match="all 2 files are empty"):
        opened("empty*")
    write(tmp_path, LINES[:1])
    with pytest.raises(DataError, match="no rows, only header lines"):
        opened()


def test_parquet_files_with_other_types(tmp_path, found, opened):
    day = dt.datetime(2024, 5, 1)
    for number, (kind, unit) in enumerate([(pa.int32(), "us"), (pa.int64(), "ns"), (pa.float64(), "ms")]):
        table = {
            "user": pa.array([number], kind),
            "item": pa.array(["x"]),
            "time": pa.array([day], pa.timestamp(unit)),
        }
        if number == 1:
            table = dict(reversed(table.items())) | {
                "new": pa.array([1]),
                "item": pa.array(["x"], pa.large_string()),
            }
        pq.write_table(pa.table(table), tmp_path / f"{number}.parquet")
    assert [row[0] for row in found("*.parquet", format="parquet")] == ["0", "1", "2"]
    assert {row[2] for row in found("*.parquet", format="parquet")} == {day}
    pq.write_table(pa.table({"user": ["x"], "item": ["x"], "time": [day]}), tmp_path / "3.parquet")
    with pytest.raises(
        DataError, match=r"'user' \(data\.events\.columns\.user\) is of type double in .*string in"
    ):
        opened("*.parquet", format="parquet")


def test_the_night_before(tmp_path, opened):
    def columns(table):
        pq.write_table(pa.table(table), tmp_path / "log.parquet")
        return opened("log.parquet", format="parquet")

    stamps = pa.array([0], pa.timestamp("us"))
    before = columns_of(
        columns({"user": pa.array([1], pa.int32()), "item": ["a"], "time": stamps, "gone": [1]})
    )
    assert before == {"user": "int32", "item": "string", "time": "timestamp[us]", "gone": "int64"}
    wide = pa.array(["a"], pa.large_string())
    now = columns({"time": stamps, "user": [1], "item": wide, "new": ["b"]})
    assert require_same("events", now, before) == ["new"]
    for wrong in ({"user": ["1"]}, {"time": [5]}, {"item": [1.5]}):
        now = columns({"user": [1], "item": ["a"], "time": stamps} | wrong)
        with pytest.raises(DataError, match=rf"data\.events.*column '{next(iter(wrong))}' is of type"):
            require_same("events", now, before)


def test_the_night_before_in_text(tmp_path, opened):
    write(tmp_path, ["user:token,item,time:float", "a,b,1"])
    before = columns_of(opened())
    write(tmp_path, ["user,item:token,time:float,new", "a,b,1,2"])
    assert require_same("events", opened(), before) == ["new"]
    write(tmp_path, ["user,item,time:token", "a,b,1"])
    with pytest.raises(DataError, match="'time' is of type token, in the run before it was float"):
        require_same("events", opened(), before)
    rows = [{"user": 1, "item": "a", "time": None}, {"user": 2, "item": "b", "time": 5}]
    write(tmp_path, map(json.dumps, rows))
    before = columns_of(opened(format="jsonl"))
    assert before == {"user": "number", "item": "string", "time": "number"}
    write(tmp_path, [json.dumps(rows[0] | {"user": "1"})])
    with pytest.raises(DataError, match="'user' is of type string, in the run before it was number"):
        require_same("events", opened(format="jsonl"), before)
    # Beside what was there.
    write(tmp_path, map(json.dumps, [*rows, rows[0] | {"user": "1"}]))
    with pytest.raises(DataError, match="'user' is of type mixed, in the run before it was number"):
        require_same("events", opened(format="jsonl"), before)
    assert require_same("events", opened(format="jsonl"), before | {"user": "mixed"}) == []


# --- hash and time ------------------------------------------------------------------------------------


def test_hash_tells_rows_and_files_apart(spark, tmp_path, opened):
    for name in ("1.csv", "2.csv"):
        write(tmp_path, [*LINES, LINES[1]], name)
    pq.write_table(pa.table({name: ["x", "x"] for name in COLUMNS.values()}), tmp_path / "log.parquet")
    for path, expected in (("*.csv", 6), ("log.parquet", 2)):
        source = opened(path, format=path.rpartition(".")[2])
        hashes = [
            {row["_hash"] for row in read(spark, source, "").select("_hash").collect()} for _ in range(2)
        ]
        assert hashes[0] == hashes[1]
        assert len(hashes[0]) == expected


def test_parquet_as_others_write_it(spark, tmp_path, found):
    """Nanoseconds with and without a zone, days, INT96, and integer ids made floats by one missing value."""
    local = dt.datetime(2024, 7, 1, 12)
    moment = local.replace(tzinfo=dt.UTC)
    ids = {"user": pa.array([12345678901.0]), "item": pa.array([7])}
    times = {
        "ns": pa.array([local], pa.timestamp("ns")),
        "ns_utc": pa.array([moment], pa.timestamp("ns", "UTC")),
        "us": pa.array([local], pa.timestamp("us")),
        "us_utc": pa.array([moment], pa.timestamp("us", "UTC")),
        "day": pa.array([local.date()]),
        "int96": pa.array([local], pa.timestamp("ns")),
    }
    berlin = {"ns": 10, "ns_utc": 12, "us": 10, "us_utc": 12, "day": 22, "int96": 12}
    for name, values in times.items():
        path = tmp_path / f"{name}.parquet"
        pq.write_table(
            pa.table({**ids, "time": values}), path, use_deprecated_int96_timestamps=name == "int96"
        )
        source = Source(path=str(path), format="parquet", columns=COLUMNS, timezone="Europe/Berlin")
        rows = read(spark, open_source("events", source, COLUMNS), "")
        (row,) = rows.selectExpr("user", "item", "date_format(timestamp, 'dd HH') AS time").collect()
        day = 30 if name == "day" else 1
        assert tuple(row) == ("12345678901", "7", f"{day:02} {berlin[name]}"), name

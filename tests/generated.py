"""Generated logs of the shapes that the ready conf files read, with faults planted in known numbers.

People are active log-normally, in sessions, more in the evening than at night; items are chosen by Zipf's
law. All is decided by the seed. A fault is a copy of a good row with one thing broken, so has one reason.
"""

import gzip
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

DAY = 86_400
START = 1_714_521_600
"""2024-05-01T00:00:00Z."""
DAYS = 28
DATE = "2024-05-30"
"""The night the lists are made for: after the last event, before a fault of the future."""
ABSENT = object()
"""jsonl: the key is not there."""
_NO_UTF8 = "\ue000"
"""Stands for a byte that is not UTF-8."""

Bad = Mapping[str, tuple[str, Sequence[Any]]]
"""Reason to the column that is broken and the values it takes in turn."""


@dataclass(frozen=True)
class Generated:
    """A log on disk, and what is true of it."""

    overrides: tuple[str, ...]
    """For config.load: where the files are, and the date."""
    rows: dict[str, int]
    """Source to the rows written."""
    planted: dict[str, dict[str, int]]
    """Source to reason to the rows that must be set aside."""
    usable: pd.DataFrame
    """The other events: user, item, micros, value, positive, and `event` where the shape has types."""
    items: pd.DataFrame | None = None
    """The items table's usable rows, in the columns it has on disk."""
    raw: dict[str, list[str]] | None = None
    """Text: reason to the sorted lines of events that must be set aside."""


def interactions(
    rng: np.random.Generator, events: int, users: int, items: int, days: int = DAYS
) -> pd.DataFrame:
    """`events` rows of user, item (from 0, int64) and ms (since START, int64), in time order.

    No two have the same user, item and second.
    """
    drawn = events + events // 50 + 100  # some will be repetitions
    activity = rng.lognormal(0, 1.2, users)
    user = np.repeat(np.arange(users), rng.multinomial(drawn, activity / activity.sum()))
    begins = rng.random(drawn) < 1 / 6
    begins[0] = True
    begins[1:] |= user[1:] != user[:-1]
    session = np.cumsum(begins) - 1
    evening = np.where(rng.random(drawn) < 0.7, rng.normal(20, 3, drawn), rng.uniform(0, 24, drawn)) % 24
    start = (rng.integers(0, days, drawn) * DAY + evening * 3600) * 1000
    gaps = np.where(begins, 0, rng.exponential(90_000, drawn))
    elapsed = np.cumsum(gaps)
    first = np.flatnonzero(begins)
    ms = (start[first][session] + elapsed - elapsed[first][session]).astype(np.int64)
    weights = 1 / np.arange(1, items + 1) ** 1.05
    rank = np.searchsorted(np.cumsum(weights / weights.sum()), rng.random(drawn)).clip(max=items - 1)
    log = pd.DataFrame({"user": user, "item": rng.permutation(items)[rank], "ms": ms})
    log = log[~pd.DataFrame({**log, "ms": log.ms // 1000}).duplicated()]
    kept = np.sort(rng.permutation(len(log))[:events])
    return log.iloc[kept].sort_values("ms", kind="stable", ignore_index=True)


# --- the five shapes ----------------------------------------------------------------------------------


def movielens_100k(folder: Path, events: int = 100_000, seed: int = 1) -> Generated:
    """Tab separated, typed headers; the log in two files, one of them gzip, where the data set has one."""
    return _movielens(folder, "ml-100k", events, 943, 1682, seed)


def movielens_1m(folder: Path, events: int = 100_000, seed: int = 2) -> Generated:
    """As the data set recbole has: lines end in CR LF, movies are keyed by title, users are 1m_<id>."""
    return _movielens(folder, "ml-1m", events, 2000, 3883, seed)


def _movielens(folder: Path, name: str, events: int, users: int, items: int, seed: int) -> Generated:
    rng = np.random.default_rng(seed)
    log = interactions(rng, events, users, items)
    large = name == "ml-1m"
    end = "\r\n" if large else "\n"
    user_ids = np.array([f"1m_{n}" if large else f"{n}" for n in range(1, users + 1)])
    titles = np.array([f"Thé Movie, {n} ({1930 + n % 90})" for n in range(1, items + 1)])
    item_ids = titles if large else np.array([f"{n}" for n in range(1, items + 1)])
    seconds = START + log.ms // 1000
    rating = rng.choice(5, len(log), p=[0.06, 0.11, 0.27, 0.34, 0.22]) + 1
    table = pd.DataFrame(
        {
            "user_id:token": user_ids[log.user],
            "item_id:token": item_ids[log.item],
            "rating:float": rating.astype(str),
            "timestamp:float": seconds.astype(str),
        }
    )
    usable = pd.DataFrame(
        {
            "user": table["user_id:token"],
            "item": table["item_id:token"],
            "micros": seconds * 10**6,
            "value": rating.astype(float),
            "positive": rating >= 4,
        }
    )
    bad = _text_faults("user_id:token", "item_id:token") | {
        "unparseable timestamp": ("timestamp:float", ["soon", "", "1e400", "12:30"]),
        "future timestamp": ("timestamp:float", [str(START + day * DAY) for day in (29, 30, 400, 36_500)]),
        "unparseable value": ("rating:float", ["NaN", "", "five", "Infinity", "-inf", "1e39"]),
        "value out of range": ("rating:float", ["0", "5.5", "-3", "99"]),
    }
    whole = _plant(rng, table, bad, files=2)
    lines = _delimited(whole, "\t")
    header = "\t".join(table.columns)
    for file, suffix in enumerate(["", "" if large else ".gz"]):
        path = folder / "log" / f"{name}-{file}.inter{suffix}"
        _write_lines(path, header, lines[whole["_file"] == file], end)

    genres = np.array(["Action", "Comedy", "Drama", "Horror", "Sci-Fi", "Children's", "Film-Noir"])
    of_item = pd.DataFrame(
        {
            "item_id:token": item_ids,
            "movie_title:token" if large else "movie_title:token_seq": titles,
            "release_year:float" if large else "release_year:token": [
                str(1930 + n % 90) for n in range(items)
            ],
            "genre:token" if large else "class:token_seq": [
                " ".join(rng.choice(genres, 1 + n % 3, replace=False)) for n in range(items)
            ],
        }
    )
    of_user = pd.DataFrame(
        {
            "user_id:token": user_ids,
            "age:float" if large else "age:token": rng.choice(["1", "18", "25", "35", "45", "50"], users),
            "gender:token": rng.choice(["F", "M"], users),
            "occupation:float" if large else "occupation:token": rng.integers(0, 21, users).astype(str),
            "zip_code:token": [f"{n:05d}" for n in rng.integers(0, 99_999, users)],
        }
    )
    planted = {"events": _counts(whole)}
    rows = {"events": len(whole)}
    for source, key, one in (("items", "item", of_item), ("users", "user", of_user)):
        bad = {
            "wrong number of columns": ("_line", ["more", "less"]),
            f"missing {key}": (f"{key}_id:token", ["", " "]),
        }
        bad[f"{key} listed again later"] = ("_line", [""])
        both = _plant(rng, one, bad, first=1)
        _write_lines(folder / f"{name}.{key}", "\t".join(one.columns), _delimited(both, "\t"), end)
        planted[source], rows[source] = _counts(both), len(both)
    overrides = (
        f"data.events.path={folder}/log",
        f"data.items.path={folder}/{name}.item",
        f"data.users.path={folder}/{name}.user",
        f"score.date={DATE}",
    )
    return Generated(overrides, rows, planted, usable, of_item, _raw(whole, lines))


def shop_events(folder: Path, events: int = 110_000, seed: int = 3) -> Generated:
    """csv.gz in folders by day; ISO times with zones; products as JSON lines, some without a price."""
    rng = np.random.default_rng(seed)
    users, items = 5000, 3000
    log = interactions(rng, events, users, items)
    kinds = np.array(["view", "cart", "purchase"])
    weights = np.array([1.0, 3.0, 5.0])
    kind = rng.choice(3, len(log), p=[0.86, 0.09, 0.05])
    moment = pd.to_datetime(START * 1000 + log.ms // 1000 * 1000, unit="ms")
    # Three ways to write the same moment: in UTC, with an offset, and as the conf's zone has it (UTC + 2).
    local = (moment + pd.Timedelta(hours=2)).dt.strftime("%Y-%m-%dT%H:%M:%S")
    way = rng.integers(0, 3, len(log))
    written = np.select(
        [way == 0, way == 1], [moment.dt.strftime("%Y-%m-%dT%H:%M:%SZ"), local + "+02:00"], local
    )
    product_ids = np.array([f"p{n}" for n in range(items)])
    table = pd.DataFrame(
        {
            "event_time": written,
            "event_type": kinds[kind],
            "product_id": product_ids[log.item],
            "user_id": np.array([f"visitor-{n}" for n in range(users)])[log.user],
            "device": rng.choice(
                ["phone", '"tablet, large"', "desktop", ""], len(log), p=[0.5, 0.1, 0.3, 0.1]
            ),
            "referrer": np.array([f"https://site{n}.example/" for n in range(8000)])[
                rng.zipf(1.4, len(log)).clip(max=8000) - 1
            ],
        }
    )
    usable = pd.DataFrame(
        {
            "user": table.user_id,
            "item": table.product_id,
            "micros": START * 10**6 + log.ms // 1000 * 10**6,
            "value": weights[kind],
            "event": table.event_type,
            "positive": kind > 0,
        }
    )
    bad = _text_faults("user_id", "product_id") | {
        "unparseable timestamp": ("event_time", ["yesterday", "", "2024-13-01T00:00:00Z", "12:30:00"]),
        "future timestamp": ("event_time", ["2024-05-30T00:00:00Z", "2031-01-01T00:00:00+02:00"]),
        "unknown event type": ("event_type", ["wishlist", "", "PURCHASE", "refund"]),
    }
    whole = _plant(rng, table, bad, files=DAYS, file=log.ms // 1000 // DAY)
    lines = _delimited(whole, ",")
    for day in range(whole["_file"].max() + 1):
        name = f"date={pd.Timestamp(START + day * DAY, unit='s'):%Y-%m-%d}"
        of_day = lines[whole["_file"] == day]
        _write_lines(folder / "events" / name / "part-0.csv.gz", ",".join(table.columns), of_day)

    names = np.array(["garden", "tools", "kitchen", "toys", "books", "sport", "beauty", "office"])
    products = [
        {
            "product_id": product_ids[n],
            "name": f"Product {n}",
            "categories": sorted(rng.choice(names, n % 3, replace=False).tolist()),
            "brand": None if n % 11 == 0 else f"brand {n % 97}",
            "price": None if n % 7 == 0 else round(float(np.exp(rng.normal(3, 1))), 2),
            "active_from": f"2024-0{1 + n % 4}-01T00:00:00Z",
            "active_to": "2024-05-20T00:00:00+02:00" if n % 10 == 0 else None,
        }
        for n in range(items)
    ]
    good = pd.DataFrame(products, dtype=object)
    bad = {
        "not JSON": ("_line", ["broken"]),
        "missing item": ("product_id", [None, "", ABSENT]),
        "item listed again later": ("_line", [""]),
    }
    both = _plant(rng, good, bad, first=2)
    _write_lines(folder / "products.jsonl", None, _json(both))
    overrides = (
        f"data.events.path={folder}/events",
        f"data.items.path={folder}/products.jsonl",
        f"score.date={DATE}",
    )
    return Generated(
        overrides,
        {"events": len(whole), "items": len(both)},
        {"events": _counts(whole), "items": _counts(both)},
        usable,
        good,
        _raw(whole, lines),
    )


def music_plays(folder: Path, events: int = 110_000, seed: int = 4) -> Generated:
    """Plays as JSON lines with milliseconds, in zstd; tracks as |-separated latin-1 without a header line."""
    rng = np.random.default_rng(seed)
    users, items = 1500, 6000
    log = interactions(rng, events, users, items)
    ms = START * 1000 + log.ms
    played = np.where(rng.random(len(log)) < 0.3, rng.uniform(0, 30, len(log)), rng.normal(210, 60, len(log)))
    seconds = np.round(played.clip(0, 900), 1)
    table = pd.DataFrame(
        {
            "user": [f"u{n}" for n in log.user],
            "track": [f"t{n}" for n in log.item],
            "played_at": ms,
            "seconds": seconds,
            "device": rng.choice(["phone", "car", "speaker", None], len(log)),
        },
        dtype=object,
    )
    usable = pd.DataFrame(
        {
            "user": table.user,
            "item": table.track,
            "micros": ms * 1000,
            "value": seconds,
            "positive": seconds >= 30,
        }
    )
    bad = {
        "not JSON": ("_line", ["broken", "prose"]),
        "not utf-8": ("track", [f"t{_NO_UTF8}1"]),
        "missing user": ("user", [None, "", "  ", ABSENT]),
        "missing item": ("track", [None, "", ABSENT]),
        "unparseable timestamp": ("played_at", [None, "never", ABSENT, "2024-05-01"]),
        "future timestamp": ("played_at", [(START + day * DAY) * 1000 for day in (29, 3000)]),
        "unparseable value": ("seconds", [None, "NaN", "long", ABSENT, 1e300]),
        "value out of range": ("seconds", [-1, 86_401, -0.5, 1e9]),
        "duplicate": ("_line", [""]),
    }
    whole = _plant(rng, table, bad, files=3)
    lines = _json(whole)
    for file in range(3):
        name = folder / "plays" / f"plays-{file}.jsonl.zst"
        _write_lines(name, None, lines[whole["_file"] == file])

    tags = np.array(["latin", "pop", "rock", "jazz", "folk", "techno", "bossa nova", "chanson"])
    tracks = pd.DataFrame(
        {
            "track": [f"t{n}" for n in range(items)],
            "title": [f'Señorita "{n}"' for n in range(items)],
            "artist": [f"Beyoncé {n % 900}" for n in range(items)],
            "tags": [",".join(rng.choice(tags, n % 4, replace=False)) for n in range(items)],
            "year": ["" if n % 9 == 0 else str(1960 + n % 64) for n in range(items)],
            "seconds": rng.normal(220, 50, items).round().astype(int).astype(str),
        }
    )
    bad = {
        "wrong number of columns": ("_line", ["more", "less"]),
        "missing item": ("track", ["", " "]),
        "item listed again later": ("_line", [""]),
    }
    both = _plant(rng, tracks, bad, first=2)
    (folder / "tracks.txt").write_text("\n".join(_delimited(both, "|")) + "\n", encoding="latin-1")
    overrides = (
        f"data.events.path={folder}/plays/*.jsonl.zst",
        f"data.items.path={folder}/tracks.txt",
        f"score.date={DATE}",
    )
    return Generated(
        overrides,
        {"events": len(whole), "items": len(both)},
        {"events": _counts(whole), "items": _counts(both)},
        usable,
        tracks,
        _raw(whole, lines),
    )


def ad_clicks(folder: Path, events: int = 120_000, seed: int = 5) -> Generated:
    """Parquet in two files: impressions with a click, times in a pattern and a zone, many columns."""
    rng = np.random.default_rng(seed)
    users, ads = 8000, 400
    log = interactions(rng, events, users, ads)
    n = len(log)
    click = (rng.random(n) < 0.15).astype(int)
    local = pd.to_datetime(START + log.ms // 1000 + 2 * 3600, unit="s")  # Berlin in May

    def drawn(prefix: str, size: int) -> np.ndarray:
        return np.array([f"{prefix}{value}" for value in range(size)])[rng.zipf(1.3, n).clip(max=size) - 1]

    table = pd.DataFrame(
        {
            "device_id": np.array([f"{user:08x}" for user in range(users)])[log.user],
            "ad_id": 5000 + log.item,
            "shown_at": local.dt.strftime("%d.%m.%Y %H:%M:%S"),
            "click": click,
            "site_id": drawn("site", 3000),
            "site_category": drawn("sc", 20),
            "app_id": drawn("app", 4000),
            "app_category": drawn("ac", 30),
            "banner_position": rng.integers(0, 7, n),
            "device_model": drawn("model ", 2000),
            "connection_type": rng.choice(["wifi", "4g", "5g", None], n),
            "ip_prefix": [f"10.{a}.{b}" for a, b in rng.integers(0, 256, (n, 2))],
            "page_keywords": [[f"k{word}" for word in words] for words in rng.integers(0, 5000, (n, 2))],
            "floor_price": np.where(rng.random(n) < 0.2, np.nan, rng.exponential(0.4, n)),
            "slot_width": rng.choice([120, 160, 300, 320, 728, 970], n),
        },
        dtype=object,
    )
    usable = pd.DataFrame(
        {
            "user": table.device_id,
            "item": table.ad_id.astype(str),
            "micros": (START + log.ms // 1000) * 10**6,
            "value": 1.0,
            "positive": click == 1,
        }
    )
    bad = {
        "missing user": ("device_id", [None, "", " "]),
        "missing item": ("ad_id", [None]),
        "unparseable timestamp": ("shown_at", [None, "", "2024-05-01 12:00:00", "31.02.2024 10:00:00"]),
        "future timestamp": ("shown_at", ["30.05.2024 02:00:00", "01.01.2030 00:00:00"]),
        "label is not 0 or 1": ("click", [None, 2, -1]),
        "duplicate": ("_line", [""]),
    }
    whole = _plant(rng, table, bad, files=2)
    schema = pa.schema(
        [
            ("device_id", pa.string()),
            ("ad_id", pa.int64()),
            ("shown_at", pa.string()),
            ("click", pa.int8()),
            ("site_id", pa.string()),
            ("site_category", pa.string()),
            ("app_id", pa.string()),
            ("app_category", pa.string()),
            ("banner_position", pa.int32()),
            ("device_model", pa.string()),
            ("connection_type", pa.string()),
            ("ip_prefix", pa.string()),
            ("page_keywords", pa.list_(pa.string())),
            ("floor_price", pa.float64()),
            ("slot_width", pa.int16()),
        ]
    )
    for file in range(2):
        rows = whole[whole["_file"] == file].drop(columns=["_file", "_reason", "_line"])
        pq.write_table(
            pa.Table.from_pandas(rows, schema, preserve_index=False), folder / f"impressions-{file}.parquet"
        )
    overrides = (f"data.events.path={folder}/*.parquet", f"score.date={DATE}")
    return Generated(overrides, {"events": len(whole)}, {"events": _counts(whole)}, usable)


# --- faults -------------------------------------------------------------------------------------------


def _text_faults(user: str, item: str) -> Bad:
    """What any text log can have."""
    return {
        "wrong number of columns": ("_line", ["more", "less"]),
        "not utf-8": (user, [f"x{_NO_UTF8}", f"{_NO_UTF8}"]),
        "missing user": (user, ["", "  "]),
        "missing item": (item, ["", " "]),
        "duplicate": ("_line", [""]),
    }


def _plant(
    rng: np.random.Generator,
    table: pd.DataFrame,
    bad: Bad,
    *,
    first: int = 10,
    files: int = 1,
    file: Any = None,
) -> pd.DataFrame:
    """The table with faulty rows among its own: the first reason `first` times, every further one once more.

    Args:
        rng: decides the rows and their places.
        table: good rows.
        bad: the columns that are broken.
        first: see above.
        files: every second fault of a reason goes to the next of so many files.
        file: [rows] the file of each good row; None: equal parts in the table's order.

    Returns:
        the columns, `_file`, `_reason` (empty: a good row) and `_line` (what is done to the written line).
    """
    n = len(table)
    good = table.astype(object)
    good["_file"] = np.arange(n) * files // n if file is None else file
    good["_reason"] = good["_line"] = ""
    places = [np.arange(n, dtype=float)]
    parts = [good]
    for count, (reason, (column, values)) in enumerate(bad.items(), first):
        rows = good.iloc[rng.choice(n, count, replace=False)].copy()
        rows[column] = pd.Series([values[k % len(values)] for k in range(count)], rows.index, dtype=object)
        rows["_reason"] = reason
        rows["_file"] = (rows["_file"].to_numpy(int) + np.arange(count) % 2) % files
        parts.append(rows)
        # Tables keep the last of several rows with one id.
        places.append(rng.uniform(*((-1, 0) if "listed again later" in reason else (0, n)), count))
    order = np.argsort(np.concatenate(places), kind="stable")
    return pd.concat(parts, ignore_index=True).iloc[order].reset_index(drop=True)


def _counts(planted: pd.DataFrame) -> dict[str, int]:
    return planted.loc[planted["_reason"] != "", "_reason"].value_counts().to_dict()


def _raw(planted: pd.DataFrame, lines: np.ndarray) -> dict[str, list[str]]:
    readable = np.array([line.replace(_NO_UTF8, "\ufffd") for line in lines], object)
    reasons = planted["_reason"].to_numpy()
    return {reason: sorted(readable[reasons == reason]) for reason in _counts(planted)}


# --- text ---------------------------------------------------------------------------------------------


def _delimited(planted: pd.DataFrame, delimiter: str) -> np.ndarray:
    """[rows] lines of text."""
    columns = [planted[name] for name in planted.columns if not name.startswith("_")]
    lines = np.array([delimiter.join(values) for values in zip(*columns, strict=True)], object)
    for place in np.flatnonzero(planted["_line"] == "more"):
        lines[place] += f"{delimiter}extra"
    for place in np.flatnonzero(planted["_line"] == "less"):
        lines[place] = lines[place].rpartition(delimiter)[0]
    return lines


def _json(planted: pd.DataFrame) -> np.ndarray:
    """[rows] JSON objects."""
    names = [name for name in planted.columns if not name.startswith("_")]
    rows = [dict(zip(names, row, strict=True)) for row in zip(*map(planted.get, names), strict=True)]
    objects = [{name: value for name, value in row.items() if value is not ABSENT} for row in rows]
    lines = np.array([json.dumps(row, ensure_ascii=False) for row in objects], object)
    for place in np.flatnonzero(planted["_line"] == "broken"):
        lines[place] = lines[place][: len(lines[place]) // 2]
    for place in np.flatnonzero(planted["_line"] == "prose"):
        lines[place] = "-- rotated --"
    return lines


def _write_lines(path: Path, header: str | None, lines: Sequence[str], end: str = "\n") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    text = end.join([*([header] if header else []), *lines, ""])
    opened = {".gz": gzip.open, ".zst": _open_zstd}.get(path.suffix, open)
    with opened(path, "wb") as stream:
        stream.write(text.encode().replace(_NO_UTF8.encode(), b"\xff"))


def _open_zstd(path: Path, mode: str) -> pa.CompressedOutputStream:
    return pa.CompressedOutputStream(pa.OSFile(str(path), mode), "zstd")

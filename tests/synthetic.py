"""A small features run made without Spark: random users who like items of their own group.

Deterministic in its arguments. Users and items fall into `GROUPS` groups; a user's next item is mostly from
his group, so that a model which learned the group beats popularity.

Of the items, the last has no event; the one before is known to an earlier night only; item 1 is taken off the
shelves, and item 2 is put there, within the week that the events take.
"""

import datetime as dt
import itertools
from collections.abc import Iterable
from typing import Any

import numpy as np
import pyarrow as pa

from recsys_dist.config import Config, load
from recsys_dist.schema import LATEST, VOCAB, FeatureSpec, FieldSpec, VocabularySpec
from recsys_dist.workspace import Run, Workspace

GROUPS = 4
START = dt.datetime(2024, 1, 1, tzinfo=dt.UTC)
ROW_WISE = "{user: row_wise, item: row_wise, recent: row_wise}"
CUTS = {"valid": 0.8, "test": 0.9, "date": 1.0}
ACTIVE_TO = {1: START + dt.timedelta(days=4)}
ACTIVE_FROM = {2: START + dt.timedelta(days=4, hours=12)}


def synthetic_config(root: Any, **deepfm: Any) -> Config:
    """The default configuration with this root and these settings of the model."""
    small = {"embedding_dim": 4, "hidden": [16, 8], "batch_size": 64, "epochs": 2}
    small |= {"sharding": ROW_WISE}
    small |= {"objective": "logistic", "negatives": 4}
    overrides = [f"deepfm.{key}={value}" for key, value in (small | deepfm).items()]
    overrides += ["recall.late=0.2"] if "pair" in deepfm else []
    return load(None, [f"storage.root={root}", *overrides])


def synthetic_spec(n_users: int, n_items: int) -> FeatureSpec:
    """Fields of every kind, side and type."""
    fields = (
        FieldSpec(name="user", kind="id", side="user", type="index", cardinality=n_users + 1, vocab="user"),
        FieldSpec(name="item", kind="id", side="item", type="index", cardinality=n_items + 1, vocab="item"),
        FieldSpec(
            name="group", kind="categorical", side="user", type="index", cardinality=GROUPS + 1, vocab="group"
        ),
        FieldSpec(
            name="genres",
            kind="categorical",
            side="item",
            type="indices",
            cardinality=GROUPS + 2,
            vocab="genres",
            pooling="mean",
        ),
        FieldSpec(
            name="recent",
            kind="history",
            side="user",
            type="indices",
            cardinality=n_items + 1,
            vocab="item",
            pooling="mean",
            last=5,
            when="positive",
            of="item",
        ),
        FieldSpec(
            name="genres_seen",
            kind="history",
            side="user",
            type="indices",
            cardinality=GROUPS + 2,
            vocab="genres",
            pooling="sum",
            last=3,
            when="any",
            of="genres",
        ),
        FieldSpec(
            name="price",
            kind="numeric",
            side="item",
            type="value",
            cardinality=1,
            fill=10.0,
            offset=10.0,
            scale=5.0,
        ),
        FieldSpec(
            name="trend",
            kind="aggregate",
            side="item",
            daily=True,
            type="value",
            cardinality=1,
            of="count",
            when="any",
            log=True,
            offset=2.0,
            scale=0.5,
        ),
        FieldSpec(
            name="price_missing",
            kind="numeric",
            side="item",
            type="value",
            cardinality=1,
            indicator_of="price",
        ),
        FieldSpec(
            name="age", kind="aggregate", side="item", daily=True, type="index", cardinality=12, of="age"
        ),
        FieldSpec(
            name="activity",
            kind="aggregate",
            side="user",
            type="value",
            cardinality=1,
            of="count",
            when="any",
            log=True,
            offset=1.5,
            scale=0.5,
        ),
        FieldSpec(
            name="tastes",
            kind="aggregate",
            side="user",
            type="vector",
            cardinality=GROUPS,
            vocab="genres",
            of="share",
            when="any",
        ),
        FieldSpec(name="hour", kind="time", side="context", type="index", cardinality=25, part="hour"),
        *(
            FieldSpec(
                name=f"hour_{wave}",
                kind="time",
                side="context",
                type="value",
                cardinality=1,
                part="hour",
                wave=wave,
            )
            for wave in ("sin", "cos")
        ),
        FieldSpec(name="weekday", kind="time", side="context", type="index", cardinality=8, part="weekday"),
    )
    none = dict.fromkeys(("train", "valid", "test"), 0)
    return FeatureSpec(
        fields=fields,
        vocabularies={
            name: VocabularySpec(size=size, fingerprint=f"{name} {size}")
            for name, size in _sizes(n_users, n_items).items()
        },
        n_users=n_users,
        n_items=n_items,
        rows=none,
        positives=none,
        date="2024-03-01",
        hour=12,
    )


def synthetic_features(
    config: Config, users: int = 60, items: int = 50, events: int = 30, seed: int = 0, gone: int = 0
) -> Run:
    """Write and commit a features run under config.storage.root.

    Args:
        config: of `synthetic_config` or any other.
        users: number of users; the last one has a single event.
        items: number of items; the last two have no event.
        events: of each user, in time order, split 80/10/10.
        seed: of everything drawn.
        gone: users with an index, before the others', and without rows: known to an earlier night only.
    """
    generator = np.random.default_rng(seed)
    spec = synthetic_spec(gone + users, items)
    rows: dict[str, list[dict[str, Any]]] = {"train": [], "valid": [], "test": []}
    states: dict[str, list[dict[str, Any]]] = {cut: [] for cut in CUTS}
    counts = np.zeros(items + 1, dtype=np.int64)
    days: dict[int, list[int]] = {item: [] for item in range(1, items + 1)}
    for user in range(gone + 1, gone + users + 1):
        own = [item for item in range(1, items - 1) if item % GROUPS == user % GROUPS]
        order = [*generator.permutation(own), *generator.permutation(np.arange(1, items - 1))]
        chosen = list(dict.fromkeys(int(item) for item in order))[: events if user < gone + users else 1]
        chosen = [
            chosen[i] for i in np.argsort(np.arange(len(chosen)) + generator.uniform(0, 6, len(chosen)))
        ]
        moments = [
            START + dt.timedelta(hours=int(h)) for h in np.cumsum(generator.integers(1, 9, len(chosen)))
        ]
        labels = [float(item % GROUPS == user % GROUPS or generator.random() < 0.3) for item in chosen]
        for position, (item, moment, label) in enumerate(zip(chosen, moments, labels, strict=True)):
            share = (position + 0.5) / len(chosen)
            split = next(name for name, end in zip(rows, (0.8, 0.9, 1.0), strict=True) if share < end)
            rows[split].append(
                {
                    "item": item,
                    "timestamp": moment,
                    "value": 3.0 + 2 * label,
                    "label": label,
                    "hour": moment.hour + 1,
                    "hour_sin": np.sin(2 * np.pi * moment.hour / 24),
                    "hour_cos": np.cos(2 * np.pi * moment.hour / 24),
                    "weekday": moment.weekday() + 1,
                    **_state(user, chosen[:position], labels[:position], spec),
                }
            )
            counts[item] += split == "train" and label == 1
            days[item].append((moment - START).days)
        for cut, end in CUTS.items():
            known = sum((position + 0.5) / len(chosen) < end for position in range(len(chosen)))
            liked = sorted(itertools.compress(chosen[:known], labels[:known]))
            until = moments[known].date() if known < len(moments) else dt.date.fromisoformat(spec.date)
            ages = hours_before(until, itertools.compress(moments[:known], labels[:known]))
            states[cut].append(
                {
                    "user_id": f"u{user}",
                    "seen": sorted(chosen[:known]),
                    "liked": liked,
                    "latest": list(itertools.compress(chosen[:known], labels[:known]))[-LATEST:],
                    "latest_age": ages[-LATEST:],
                    **_state(user, chosen[:known], labels[:known], spec),
                }
            )
    spec = spec.model_copy(
        update={
            "rows": {name: len(found) for name, found in rows.items()},
            "positives": {name: int(sum(row["label"] for row in found)) for name, found in rows.items()},
        }
    )
    run = Workspace(config).new("features", {"synthetic": [users, items, events, seed, gone]}, {})
    for split, found in rows.items():
        found.sort(key=lambda row: row["timestamp"])
        run.write_table(f"examples/split={split}", pa.Table.from_pylist(found, schema=spec.examples_schema()))
    for cut, found in states.items():
        run.write_table(f"users/as_of={cut}", pa.Table.from_pylist(found, schema=spec.users_schema()))
    run.write_table("items", pa.Table.from_pylist(_items(items, counts, spec), schema=spec.items_schema()))
    by_day = pa.Table.from_pylist(_item_days(days, spec), schema=spec.item_days_schema())
    run.write_table("item_days", by_day)
    for name, size in _sizes(gone + users, items).items():
        tokens = [{"index": index, "token": f"{name[0]}{index}", "count": 1} for index in range(1, size + 1)]
        run.write_table(f"vocab/{name}", pa.Table.from_pylist(tokens, schema=VOCAB))
    run.write_json("features.json", spec.model_dump(mode="json"))
    return run.commit(config, {"rows": spec.rows})


def listable(features: Run, day: int) -> set[int]:
    """The items that may be in a list of a day (since 1970): present, and active when it begins."""
    start = dt.datetime.fromtimestamp(day * 86_400, dt.UTC)
    return {
        row["item"]
        for row in features.table("items").to_pylist()
        if row["present"]
        and (row["active_from"] is None or row["active_from"] <= start)
        and (row["active_to"] is None or start < row["active_to"])
    }


def items_as_of(features: Run, day: int) -> pa.Table:
    """items/ with the daily fields of a day (since 1970) beside the others, item i in row i - 1."""
    date = dt.date(1970, 1, 1) + dt.timedelta(days=day)
    found: dict[int, dict[str, Any]] = {}
    for row in sorted(features.table("item_days").to_pylist(), key=lambda row: (row["item"], row["day"])):
        if row["item"] not in found or row["day"] <= date:
            found[row["item"]] = row
    items = features.table("items").sort_by("item")
    for field in features.spec().daily:
        values = [found[item][field.name] for item in items["item"].to_pylist()]
        items = items.append_column(field.name, pa.array(values, field.arrow_type))
    return items


def without_daily(spec: FeatureSpec) -> FeatureSpec:
    """The spec without the fields of item_days/."""
    return spec.model_copy(update={"fields": tuple(field for field in spec.fields if not field.daily)})


def hours_before(day: dt.date, moments: Iterable[dt.datetime]) -> list[int]:
    """Full hours from each moment to the start of a day (UTC); 0 for later ones."""
    start = dt.datetime.combine(day, dt.time(), dt.UTC)
    return [max(0, int((start - moment) / dt.timedelta(hours=1))) for moment in moments]


def _state(user: int, before: list[int], labels: list[float], spec: FeatureSpec) -> dict[str, Any]:
    """A user's fields after these events."""
    recent, genres_seen = spec.field("recent"), spec.field("genres_seen")
    assert recent.last
    assert genres_seen.last
    groups = np.bincount([item % GROUPS for item in before], minlength=GROUPS)
    return {
        "user": user,
        "group": user % GROUPS + 1,
        "recent": list(itertools.compress(before, labels))[-recent.last :],
        "genres_seen": [genre for item in before[-genres_seen.last :] for genre in _genres(item)],
        "activity": spec.field("activity").transformed(len(before)),
        "tastes": groups / len(before) if before else None,
    }


def _sizes(users: int, items: int) -> dict[str, int]:
    """The vocabularies' sizes."""
    return {"user": users, "item": items, "group": GROUPS, "genres": GROUPS + 1}


def _genres(item: int) -> list[int]:
    return [item % GROUPS + 1] + [GROUPS + 1] * (item % 3 == 0)


def _item_days(days: dict[int, list[int]], spec: FeatureSpec) -> list[dict[str, Any]]:
    """Each item's daily fields on the first day, and on every day that changes them.

    Args:
        days: item to the days of its events, from 0.
    """
    rows = []
    last = max(day for found in days.values() for day in found) + 1
    for item, found in days.items():
        before = None
        for day in range(last + 1):
            count = sum(other < day for other in found)
            age = 1 + int(np.log2(1 + day - min(found))) if count else 0
            if (count, age) != before:
                fields = {"trend": spec.field("trend").transformed(count), "age": age}
                rows.append({"item": item, "day": START.date() + dt.timedelta(days=day), **fields})
            before = (count, age)
    return rows


def _items(items: int, counts: np.ndarray, spec: FeatureSpec) -> list[dict[str, Any]]:
    price = spec.field("price")
    assert price.fill
    return [
        {
            "item": item,
            "item_id": f"i{item}",
            "title": f"Item {item}",
            "count": int(counts[item]),
            "present": item != items - 1,
            "active_from": ACTIVE_FROM.get(item),
            "active_to": ACTIVE_TO.get(item),
            "genres": _genres(item),
            "price": price.transformed(price.fill if item % 5 == 0 else item % 20),
            "price_missing": float(item % 5 == 0),
        }
        for item in range(1, items + 1)
    ]

"""A small features run made without Spark: random users who like items of their own group.

Deterministic in its arguments. Users and items fall into `GROUPS` groups; a user's next item is mostly from
his group, so that a model which learned the group beats popularity.
"""

import datetime as dt
import itertools
from typing import Any

import numpy as np
import pyarrow as pa

from recsys_dist.config import Config, load
from recsys_dist.schema import VOCAB, FeatureSpec, FieldSpec
from recsys_dist.workspace import Run, Workspace

GROUPS = 4
START = dt.datetime(2024, 1, 1, tzinfo=dt.UTC)
CUTS = {"valid": 0.8, "test": 0.9, "date": 1.0}


def synthetic_config(root: Any, **deepfm: Any) -> Config:
    """The default configuration with this root and these settings of the model."""
    small = {"embedding_dim": 4, "hidden": [16, 8], "batch_size": 64, "epochs": 2, "row_wise_from": 40}
    small |= {"objective": "logistic", "negatives": 4}
    overrides = [f"deepfm.{key}={value}" for key, value in (small | deepfm).items()]
    return load(None, [f"storage.root={root}", *overrides])


def synthetic_spec(n_users: int, n_items: int) -> FeatureSpec:
    """One field of every kind."""
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
        ),
        FieldSpec(
            name="activity",
            kind="count",
            side="user",
            type="value",
            cardinality=1,
            transform="log1p_standardise",
            mean=1.5,
            stddev=0.5,
        ),
        FieldSpec(name="hour", kind="time", side="context", type="index", cardinality=25, part="hour"),
        FieldSpec(name="weekday", kind="time", side="context", type="index", cardinality=8, part="weekday"),
    )
    none = dict.fromkeys(("train", "valid", "test"), 0)
    return FeatureSpec(
        fields=fields,
        n_users=n_users,
        n_items=n_items,
        rows=none,
        positives=none,
        date="2024-03-01",
        hour=12,
    )


def synthetic_features(
    config: Config, users: int = 60, items: int = 50, events: int = 30, seed: int = 0
) -> Run:
    """Write and commit a features run under config.storage.root.

    Args:
        config: of `synthetic_config` or any other.
        users: number of users; the last one has a single event.
        items: number of items; the last one has no event.
        events: of each user, in time order, split 80/10/10.
        seed: of everything drawn.
    """
    generator = np.random.default_rng(seed)
    spec = synthetic_spec(users, items)
    rows: dict[str, list[dict[str, Any]]] = {"train": [], "valid": [], "test": []}
    states: dict[str, list[dict[str, Any]]] = {cut: [] for cut in CUTS}
    counts = np.zeros(items + 1, dtype=np.int64)
    for user in range(1, users + 1):
        own = [item for item in range(1, items) if item % GROUPS == user % GROUPS]
        order = [*generator.permutation(own), *generator.permutation(np.arange(1, items))]
        chosen = list(dict.fromkeys(int(item) for item in order))[: events if user < users else 1]
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
                    "weekday": moment.weekday() + 1,
                    **_state(user, chosen[:position], labels[:position], spec),
                }
            )
            counts[item] += split == "train" and label == 1
        for cut, end in CUTS.items():
            known = sum((position + 0.5) / len(chosen) < end for position in range(len(chosen)))
            liked = sorted(itertools.compress(chosen[:known], labels[:known]))
            states[cut].append(
                {
                    "user_id": f"u{user}",
                    "seen": sorted(chosen[:known]),
                    "liked": liked,
                    **_state(user, chosen[:known], labels[:known], spec),
                }
            )
    spec = spec.model_copy(
        update={
            "rows": {name: len(found) for name, found in rows.items()},
            "positives": {name: int(sum(row["label"] for row in found)) for name, found in rows.items()},
        }
    )
    run = Workspace(config).new("features", {"synthetic": [users, items, events, seed]}, {})
    for split, found in rows.items():
        found.sort(key=lambda row: row["timestamp"])
        run.write_table(f"examples/split={split}", pa.Table.from_pylist(found, schema=spec.examples_schema()))
    for cut, found in states.items():
        run.write_table(f"users/as_of={cut}", pa.Table.from_pylist(found, schema=spec.users_schema()))
    run.write_table("items", pa.Table.from_pylist(_items(items, counts), schema=spec.items_schema()))
    for name, size in {"user": users, "item": items, "group": GROUPS, "genres": GROUPS + 1}.items():
        tokens = [{"index": index, "token": f"{name[0]}{index}", "count": 1} for index in range(1, size + 1)]
        run.write_table(f"vocab/{name}", pa.Table.from_pylist(tokens, schema=VOCAB))
    run.write_json("features.json", spec.model_dump(mode="json"))
    return run.commit(config, {"rows": spec.rows})


def _state(user: int, before: list[int], labels: list[float], spec: FeatureSpec) -> dict[str, Any]:
    """A user's fields after these events."""
    recent, activity = spec.field("recent"), spec.field("activity")
    assert recent.last
    assert activity.mean
    assert activity.stddev
    return {
        "user": user,
        "group": user % GROUPS + 1,
        "recent": list(itertools.compress(before, labels))[-recent.last :],
        "activity": (np.log1p(len(before)) - activity.mean) / activity.stddev,
    }


def _items(items: int, counts: np.ndarray) -> list[dict[str, Any]]:
    return [
        {
            "item": item,
            "item_id": f"i{item}",
            "title": f"Item {item}",
            "count": int(counts[item]),
            "genres": [item % GROUPS + 1] + [GROUPS + 1] * (item % 3 == 0),
        }
        for item in range(1, items + 1)
    ]

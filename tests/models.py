"""Runs of every model stage over a synthetic features run, made without Spark and without training."""

import datetime as dt
import json
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset

from recsys_dist.config import Config
from recsys_dist.deepfm.model import DeepFM, used_fields
from recsys_dist.deepfm.published import publish
from recsys_dist.schema import DAILY, FACTORS, LATE, LATE_FROM, LATEST, RELATED, TOPK
from recsys_dist.scoring.publish import publish as publish_lists
from recsys_dist.workspace import Run, Workspace
from tests.synthetic import hours_before, synthetic_features

PAIR = (
    "[{name: next, measure: next_items, recency: 2}, {name: near, measure: neighbors}, "
    "{name: since, measure: since}, {name: days, measure: days_since}]"
)
"""deepfm.pair: what the tables of `random_recall` can say."""


def untrained_night(config: Config, **sizes: int) -> dict[str, Run]:
    """Commit features, als, recall (random numbers) and deepfm (initial weights) runs under the root.

    Every item speaks for every other and for itself, with random weights of which many are equal.
    """
    features = synthetic_features(config, **sizes)
    spec = features.spec()
    workspace = Workspace(config)
    generator = np.random.default_rng(1)

    als = workspace.new("als", workspace.key("als", config, {"features": features}), {"features": features})
    for name, size in (("user_factors", spec.n_users), ("item_factors", spec.n_items)):
        vectors = generator.standard_normal((size, 3)).astype(np.float32).tolist()
        als.write_table(name, pa.table({"index": range(1, size + 1), "vector": vectors}, schema=FACTORS))

    recall = random_recall(config, features)
    key = workspace.key("deepfm", config, {"features": features})
    deepfm = workspace.new("deepfm", key, {"features": features})
    settings = config.deepfm.model_copy(update={"init_scale": 0.5})
    spec = used_fields(spec, settings)
    publish(deepfm, spec, config.deepfm, DeepFM(spec, settings, seed=3).state_dict().__getitem__)
    line: dict[str, Any] = {"epoch": 1, "step": 10, "loss": 0.5, "metric": "ndcg@10", "ndcg@10": 0.1}
    deepfm.filesystem.open_output_stream(f"{deepfm.path}/history.jsonl").write(json.dumps(line).encode())
    return {
        "features": features,
        "als": als.commit(config, {}),
        "recall": recall,
        "deepfm": deepfm.commit(config, {}),
    }


def random_recall(config: Config, features: Run) -> Run:
    """A recall run with random tables of pairs, of late events others. It tells the truth about the days of
    positive train events, and about the late ones: the last fifth of each user's.
    """
    workspace, n = Workspace(config), features.spec().n_items
    generator = np.random.default_rng(2)
    key = workspace.key("recall", config, {"features": features})
    recall = workspace.new("recall", key, {"features": features})
    items = np.arange(1, n + 1)
    for folder in ("", f"{LATE}/") if config.recall.late else ("",):
        measures = (f"neighbors/measure={measure}" for measure in config.recall.measures)
        for name in ("next_items", *measures, *(f"linear/model={model}" for model in config.recall.linear)):
            weights = generator.integers(1, 9, n**2) / 8
            columns = {"item": items.repeat(n), "other": np.tile(items, n), "weight": weights}
            recall.write_table(f"{folder}{name}", pa.table(columns).cast(RELATED))
    train = features.table("examples", filter=(pc.field("split") == "train") & (pc.field("label") > 0))
    moments: dict[int, list[Any]] = {}
    for row in train.sort_by("timestamp").select(["user", "timestamp"]).to_pylist():
        moments.setdefault(row["user"], []).append(row["timestamp"])
    daily: dict[tuple[int, Any], int] = {}
    for row in train.select(["item", "timestamp"]).to_pylist():
        of = (row["item"], row["timestamp"].date())
        daily[of] = daily.get(of, 0) + 1
    counted = [{"item": item, "day": day, "count": daily[item, day]} for item, day in sorted(daily)]
    recall.write_table("daily", pa.Table.from_pylist(counted, schema=DAILY))
    late = {
        user: min(m for p, m in enumerate(of) if (p + 0.5) / len(of) >= 0.8)
        for user, of in moments.items()
        if len(of) > 2
    }
    columns = {"user": list(late), "late_from": list(late.values())}
    recall.write_table(f"{LATE}/late_from", pa.table(columns).cast(LATE_FROM))
    first = [
        row
        for row in train.sort_by([("timestamp", "ascending"), ("item", "ascending")]).to_pylist()
        if row["timestamp"] == late.get(row["user"])
    ]
    schema = features.spec().state_schema()
    liked: dict[int, list[dt.datetime]] = {}
    for row in train.sort_by("timestamp").to_pylist():
        if row["label"] > 0 and row["timestamp"] < late.get(row["user"], row["timestamp"]):
            liked.setdefault(row["user"], []).append(row["timestamp"])
    state = {
        row["user"]: {
            **{name: row.get(name) for name in schema.names},
            "latest_age": hours_before(row["timestamp"].date(), liked.get(row["user"], []))[-LATEST:],
        }
        for row in reversed(first)
    }
    recall.write_table(f"{LATE}/users", pa.Table.from_pylist(list(state.values()), schema=schema))
    known = sum(m < late.get(user, m + dt.timedelta(1)) for user, of in moments.items() for m in of)
    return recall.commit(config, {"known": train.num_rows, "late": {"known": known}})


def published_night(
    config: Config, evaluation: Run, date: dt.date, users: Sequence[str] | None = None
) -> Run:
    """Commit a score run after an evaluation and publish its lists, of one item: of all users there are, u1
    and u2, or of chosen ones alone.
    """
    workspace = Workspace(config)
    run = workspace.new("score", {}, {"evaluation": evaluation})
    row = {"date": date, "rank": 1, "item_id": "i1", "score": 1.0, "sources": [], "run_id": run.run_id}
    lists = pa.Table.from_pylist([row | {"user_id": user} for user in users or ("u1", "u2")], TOPK)
    ids = None if users is None else pa.chunked_array([users])
    publish_lists(f"{workspace.uri}/topk", pa.dataset.dataset(lists), date, run.run_id, users=ids)
    figures = {"table": f"{workspace.uri}/topk", "date": date.isoformat(), "rows": len(lists)}
    return run.commit(config, figures | ({"chosen": {"users": len(users)}} if users else {}))

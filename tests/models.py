"""Runs of every model stage over a synthetic features run, made without Spark and without training."""

import json
from typing import Any

import numpy as np
import pyarrow as pa

from recsys_dist.config import Config
from recsys_dist.deepfm.model import DeepFM, publish, used_fields
from recsys_dist.schema import FACTORS, RELATED
from recsys_dist.workspace import Run, Workspace
from tests.synthetic import synthetic_features


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

    key = workspace.key("recall", config, {"features": features})
    recall = workspace.new("recall", key, {"features": features})
    items = np.arange(1, spec.n_items + 1)
    for name in ("next_items", *(f"neighbors/measure={measure}" for measure in config.recall.measures)):
        weights = generator.integers(1, 9, spec.n_items**2) / 8
        columns = {
            "item": items.repeat(spec.n_items),
            "other": np.tile(items, spec.n_items),
            "weight": weights,
        }
        recall.write_table(name, pa.table(columns).cast(RELATED))

    key = workspace.key("deepfm", config, {"features": features})
    deepfm = workspace.new("deepfm", key, {"features": features})
    settings = config.deepfm.model_copy(update={"init_scale": 0.5})
    spec = used_fields(spec, settings)
    publish(deepfm, spec, config.deepfm, DeepFM(spec, settings, seed=3).state_dict())
    line: dict[str, Any] = {"epoch": 1, "step": 10, "loss": 0.5, "metric": "ndcg@10", "ndcg@10": 0.1}
    deepfm.filesystem.open_output_stream(f"{deepfm.path}/history.jsonl").write(json.dumps(line).encode())
    return {
        "features": features,
        "als": als.commit(config, {}),
        "recall": recall.commit(config, {}),
        "deepfm": deepfm.commit(config, {}),
    }

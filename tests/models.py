"""Runs of every model stage over a synthetic features run, made without Spark and without training."""

import json
from typing import Any

import numpy as np
import pyarrow as pa

from recsys_dist.config import Config
from recsys_dist.deepfm.model import DeepFM, publish, used_fields
from recsys_dist.schema import FACTORS
from recsys_dist.workspace import Run, Workspace
from tests.synthetic import synthetic_features


def untrained_night(config: Config, **sizes: int) -> dict[str, Run]:
    """Commit features, als (random factors) and deepfm (initial weights) runs under config.storage.root."""
    features = synthetic_features(config, **sizes)
    spec = features.spec()
    workspace = Workspace(config)
    generator = np.random.default_rng(1)

    als = workspace.new("als", workspace.key("als", config, {"features": features}), {"features": features})
    for name, size in (("user_factors", spec.n_users), ("item_factors", spec.n_items)):
        vectors = generator.standard_normal((size, 3)).astype(np.float32).tolist()
        als.write_table(name, pa.table({"index": range(1, size + 1), "vector": vectors}, schema=FACTORS))

    key = workspace.key("deepfm", config, {"features": features})
    deepfm = workspace.new("deepfm", key, {"features": features})
    settings = config.deepfm.model_copy(update={"init_scale": 0.5})
    spec = used_fields(spec, settings)
    publish(deepfm, spec, config.deepfm, DeepFM(spec, settings, seed=3).state_dict())
    line: dict[str, Any] = {"epoch": 1, "step": 10, "loss": 0.5, "metric": "ndcg@10", "ndcg@10": 0.1}
    deepfm.filesystem.open_output_stream(f"{deepfm.path}/history.jsonl").write(json.dumps(line).encode())
    return {"features": features, "als": als.commit(config, {}), "deepfm": deepfm.commit(config, {})}

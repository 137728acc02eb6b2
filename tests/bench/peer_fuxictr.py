"""DeepFM as FuxiCTR trains it: run with the Python of .venv/peers, on a folder of `clicks.for_fuxictr`.

    .venv/peers/bin/python -P tests/bench/peer_fuxictr.py FOLDER SETTINGS

SETTINGS are JSON: loader (npz or parquet), num_workers, threads, batch_size, embedding_dim, hidden_units,
seed, epochs, and what else FuxiCTR's BaseModel and MLP_Block take. Prints JSON: the seconds of each epoch and
the most memory that this process held, or, where there is a test part, the figures on it.

The wheel has the layers and not the model zoo, so the model is put together here as the zoo does it.
"""

import json
import logging
import sys
import time
from pathlib import Path
from typing import Any

import torch
from fuxictr.features import FeatureMap
from fuxictr.pytorch.dataloaders import RankDataLoader
from fuxictr.pytorch.layers import FactorizationMachine, FeatureEmbedding, MLP_Block
from fuxictr.pytorch.models import BaseModel
from fuxictr.pytorch.torch_utils import seed_everything


class DeepFM(BaseModel):
    """The zoo's DeepFM."""

    def __init__(self, feature_map: FeatureMap, **settings: Any) -> None:
        super().__init__(feature_map, **settings)
        self.embedding_layer = FeatureEmbedding(feature_map, settings["embedding_dim"])
        self.fm = FactorizationMachine(feature_map)
        self.mlp = MLP_Block(
            input_dim=feature_map.sum_emb_out_dim(),
            output_dim=1,
            hidden_units=settings["hidden_units"],
            dropout_rates=settings.get("net_dropout", 0.0),
            batch_norm=settings.get("batch_norm", False),
        )
        self.compile("adam", "binary_crossentropy", settings.get("learning_rate", 1e-3))
        self.reset_parameters()
        self.model_to_device()

    def forward(self, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The predicted probabilities."""
        found = self.get_inputs(inputs)
        embeddings = self.embedding_layer(found)
        logit = self.fm(found, embeddings) + self.mlp(embeddings.flatten(start_dim=1))
        return {"y_pred": self.output_activation(logit)}


def main(folder: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """Train, and say how it went."""
    logging.disable(logging.CRITICAL)
    torch.set_num_threads(settings["threads"])
    seed_everything(settings["seed"])
    feature_map = FeatureMap(folder.name, str(folder))
    feature_map.load(str(folder / "feature_map.json"), settings)
    own = {"verbose": 0, "model_root": str(folder.parent), "metrics": ["AUC", "logloss"]}
    model = DeepFM(feature_map, **own, **settings)
    kind = settings["loader"]
    parts = {f"{split}_data": folder / f"{split}.{kind}" for split in ("train", "valid", "test")}
    train, valid, test = RankDataLoader(
        feature_map,
        **{name: str(path) for name, path in parts.items() if path.exists()},
        batch_size=settings["batch_size"],
        data_format=kind,
        num_workers=settings["num_workers"],
    )
    if settings["quality"]:
        model.fit(train, validation_data=valid, epochs=settings["epochs"])
        figures = {name: model.evaluate(part) for name, part in (("valid", valid), ("test", test))}
        return figures | {"epochs": model._epoch_index + 1}
    # The trainer's own epoch, without evaluations.
    model._eval_steps, model._max_gradient_norm, model._total_steps = sys.maxsize, 10.0, 0
    model._stop_training = False
    seconds = []
    for _ in range(settings["epochs"]):
        begin = time.perf_counter()
        model.train_epoch(train)
        seconds.append(time.perf_counter() - begin)
    status = Path("/proc/self/status").read_text()
    peak = int(status.partition("VmHWM:")[2].split()[0]) / 2**20
    return {"seconds": seconds, "steps": len(train), "peak_gib": peak}


if __name__ == "__main__":
    answer = main(Path(sys.argv[1]), json.loads(sys.argv[2]))
    print(json.dumps(answer))

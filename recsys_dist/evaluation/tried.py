"""How well factors that were tried rank on valid, for ALS' grid: NDCG@10 of each.

Run by `als.train_als` as a process of its own: no module reaches both pyspark and torch.
"""

import json
import sys

import pyarrow.dataset
from pydantic import BaseModel

from recsys_dist.config import Config
from recsys_dist.deepfm.items import Items
from recsys_dist.evaluation.evaluate import held_out, rank
from recsys_dist.evaluation.measured import Catalogue, measure
from recsys_dist.recall.factors import FactorTables
from recsys_dist.schema import FACTORS_OF
from recsys_dist.scoring.scorers import Factors
from recsys_dist.workspace import Workspace

K = 10


class Task(BaseModel):
    """What is to be measured; JSON on the standard input."""

    config: Config
    features: str
    """Run id."""
    folders: list[str]
    """Paths in the workspace's filesystem, with user_factors/ and item_factors/ each."""


def measured(task: Task) -> list[float]:
    """NDCG@10 on valid of each folder's factors."""
    evaluation = task.config.evaluation.model_copy(update={"k": (K,)})
    config = task.config.model_copy(update={"evaluation": evaluation})
    workspace = Workspace(config)
    features = next(run for run in workspace.runs("features") if run.run_id == task.features)
    items = Items(features, features.spec())
    users, truth = held_out(features, config.score.filter_seen, "valid")
    catalogue = Catalogue(items, config.evaluation.head_share)
    found = []
    for folder in task.folders:
        user_factors, item_factors = (
            pyarrow.dataset.dataset(f"{folder}/{name}", filesystem=workspace.filesystem)
            for name in FACTORS_OF
        )
        scorer = Factors(FactorTables(items.spec, user_factors, item_factors.to_table()))
        lists = rank(config, items, "als", scorer, users)[0]
        found.append(float(measure((K,), lists, truth, catalogue).of_users[f"ndcg@{K}"].mean()))
    return found


if __name__ == "__main__":
    json.dump(measured(Task.model_validate_json(sys.stdin.buffer.read())), sys.stdout)

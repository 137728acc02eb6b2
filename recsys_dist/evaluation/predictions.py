"""What a model that has learned labels or values predicts of the test part, about which lists say nothing.

Legend: N examples.
"""

from typing import Any

import numpy as np
import pyarrow as pa
import torch

from recsys_dist.deepfm.examples import targets, wanted
from recsys_dist.deepfm.items import days_of
from recsys_dist.deepfm.validation import ROWS_AT_ONCE, predicted
from recsys_dist.scoring.scorers import Ranker
from recsys_dist.workspace import Run


@torch.inference_mode()
def predictions(features: Run, ranker: Ranker) -> dict[str, Any] | None:
    """`metric`, by which it was trained, numbers of `examples` and `users` of the test part, and `figures`;
    None where the model has learned to rank, or where there is nothing to tell apart.

    Args:
        features: of the model.
        ranker: the model; of the examples no more than their targets and logits are held.
    """
    settings, spec = ranker.model.settings, ranker.items.spec
    if settings.negatives:
        return None
    found: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
    scan = {"columns": spec.examples_schema().names, "filter": wanted(("test",), settings)}
    for batch in features.dataset("examples").to_batches(**scan, batch_size=ROWS_AT_ONCE):
        table = pa.Table.from_batches([batch])
        if len(table):
            items = torch.as_tensor(table["item"].to_numpy().astype(np.int64))
            days = torch.as_tensor(days_of(table["timestamp"]))
            item = ranker.model.item_side(ranker.items.at(items, days))
            logits = ranker.model.logits(ranker.user_side(table), item).float().numpy()
            found.append((targets(table, settings), logits, table["user"].to_numpy()))
    if not found:
        return None
    targets_N, logits_N, users_N = (np.concatenate(parts) for parts in zip(*found, strict=True))
    if settings.metric == "auc" and (targets_N == targets_N[0]).all():
        print(f"  predictions are not measured: all labels of the test part are {targets_N[0]:g}", flush=True)
        return None
    return {
        "metric": settings.metric,
        "examples": len(targets_N),
        "users": len(np.unique(users_N)),
        "figures": predicted(settings.metric, targets_N, logits_N, users_N),
    }

"""How the parameters move: row-wise Adagrad inside the backward for the tables, AdamW for the rest."""

import torch
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.optim.apply_optimizer_in_backward import apply_optimizer_in_backward
from torchrec.optim.keyed import KeyedOptimizerWrapper
from torchrec.optim.optimizers import in_backward_optimizer_filter
from torchrec.optim.rowwise_adagrad import RowWiseAdagrad

from recsys_dist import config
from recsys_dist.deepfm.model import DeepFM


def fuse(model: DeepFM) -> None:
    """Give the tables their optimizer. Before sharding: later, the sharder would leave them untrained."""
    for collection in (model.user_tables, model.item_tables):
        # A fresh dict each time: the call changes it.
        settings = {"lr": model.settings.embedding_learning_rate, "eps": 1e-8}
        apply_optimizer_in_backward(RowWiseAdagrad, collection.parameters(), settings)


def dense_optimizer(model: DistributedModelParallel, settings: config.DeepFM) -> KeyedOptimizerWrapper:
    """AdamW over all that is not in a table."""
    parameters = dict(in_backward_optimizer_filter(model.named_parameters()))
    return KeyedOptimizerWrapper(
        parameters,
        lambda found: torch.optim.AdamW(found, lr=settings.learning_rate, weight_decay=settings.weight_decay),
    )

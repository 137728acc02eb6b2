"""How the parameters move: the tables within the backward pass, the rest by a step after it."""

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils import clip_grad_norm_
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.optim.apply_optimizer_in_backward import apply_optimizer_in_backward
from torchrec.optim.keyed import KeyedOptimizerWrapper
from torchrec.optim.optimizers import in_backward_optimizer_filter
from torchrec.optim.rowwise_adagrad import RowWiseAdagrad

from recsys_dist import config
from recsys_dist.config import in_epoch
from recsys_dist.deepfm.decay import TableDecay
from recsys_dist.deepfm.model import TABLES, DeepFM

OF_TABLES: dict[str, tuple[Any, dict[str, float]]] = {
    "rowwise_adagrad": (RowWiseAdagrad, {"eps": 1e-8}),
    "adagrad": (torch.optim.Adagrad, {"eps": 1e-8}),
    "sgd": (torch.optim.SGD, {}),
}
"""torchrec fuses the same formulas into the lookup, but not for a table that is whole on every worker."""
DENSE = {"adamw": torch.optim.AdamW, "adam": torch.optim.Adam, "adagrad": torch.optim.Adagrad}


def fuse(model: DeepFM) -> None:
    """Give the tables their optimizer. Before sharding: later, the sharder would leave them untrained."""
    kind, settings = OF_TABLES[model.settings.table_optimizer]
    for collection in model.collections.values():
        # A fresh dict each time: the call changes it.
        rate = {"lr": model.settings.embedding_learning_rate}
        apply_optimizer_in_backward(kind, collection.parameters(), settings | rate)


def dense_optimizer(model: DistributedModelParallel, settings: config.DeepFM) -> KeyedOptimizerWrapper:
    """The optimizer of all that is not in a table."""
    parameters = {
        name: parameter
        for name, parameter in in_backward_optimizer_filter(model.named_parameters())
        if TABLES not in name
    }
    kind = DENSE[settings.dense_optimizer]
    return KeyedOptimizerWrapper(
        parameters,
        lambda found: kind(found, lr=settings.learning_rate, weight_decay=in_epoch(settings.weight_decay, 0)),
    )


def rate_factor(settings: config.DeepFM, step: int, last: int, reductions: int) -> float:
    """What both learning rates are multiplied by.

    Args:
        settings: warm-up and schedule.
        step: from 0, over all epochs.
        last: number of steps of all epochs.
        reductions: evaluations so far that were not better than all before.
    """
    warm = min(1.0, (step + 1) / settings.warmup_steps) if settings.warmup_steps else 1.0
    if settings.schedule == "cosine":
        return warm * (1 + math.cos(math.pi * step / last)) / 2
    return warm * settings.plateau_factor**reductions if settings.schedule == "plateau" else warm


class Replicated:
    """The optimizer of the tables that are whole on every worker, with the state that a fused one keeps.

    Args:
        model: sharded.
        settings: which optimizer.
    """

    def __init__(self, model: DistributedModelParallel, settings: config.DeepFM) -> None:
        named = in_backward_optimizer_filter(model.named_parameters())
        self.tables = {name: parameter for name, parameter in named if TABLES in name}
        kind, keywords = OF_TABLES[settings.table_optimizer]
        self.optimizer: torch.optim.Optimizer | None = None
        if self.tables:
            rate = settings.embedding_learning_rate
            self.optimizer = kind(list(self.tables.values()), lr=rate, **keywords)

    def state(self) -> dict[str, dict[str, Tensor]]:
        """Of each table the tensors that the fused optimizer would have, under the same names."""
        if self.optimizer is None:
            return {}
        return {
            name: {f"{name.split('.')[-2]}.momentum1": state["sum"].squeeze(-1)}
            for name, table in self.tables.items()
            if "sum" in (state := self.optimizer.state[table])
        }

    def begin(self, rate: float, decay: float) -> None:
        """Before the forward pass: the step's rate, and what all weights are multiplied by."""
        if self.optimizer is not None:
            self.optimizer.param_groups[0]["lr"] = rate
            if decay != 1:
                torch._foreach_mul_([table.detach() for table in self.tables.values()], decay)

    def zero_grad(self) -> None:
        """Before the backward pass."""
        if self.optimizer is not None:
            self.optimizer.zero_grad()

    def step(self) -> None:
        """After the backward pass."""
        if self.optimizer is not None:
            self.optimizer.step()


class Optimizers:
    """All that moves the weights of a sharded model, in step."""

    def __init__(self, model: DistributedModelParallel, settings: config.DeepFM) -> None:
        self.settings = settings
        self.dense = dense_optimizer(model, settings)
        self.fused = model.fused_optimizer
        self.parameters = [p for group in self.dense.param_groups for p in group["params"]]
        self.replicated = Replicated(model, settings)
        self.decay = TableDecay(model) if settings.embedding_weight_decay else None
        self.epoch = 0

    def begin(self, factor: float, epoch: int = 0) -> None:
        """Before the forward pass: rates and penalties for this step.

        Args:
            factor: of `rate_factor`.
            epoch: from 0.
        """
        self.epoch = epoch
        if self.settings.warmup_steps or self.settings.schedule != "constant":
            for group in self.dense.param_groups:
                group["lr"] = self.settings.learning_rate * factor
            for group in self.fused.param_groups:
                group["lr"] = self.settings.embedding_learning_rate * factor
            self.fused.step()  # hands the rate to the kernels, which move the tables in the backward pass
        for group in self.dense.param_groups:
            group["weight_decay"] = in_epoch(self.settings.weight_decay, epoch)
        rate = self.settings.embedding_learning_rate * factor
        decay = 1 - rate * in_epoch(self.settings.embedding_weight_decay, epoch)
        if self.decay:
            self.decay.begin(decay)
        self.replicated.begin(rate, decay)

    def zero_grad(self) -> None:
        """Before the backward pass: no gradients."""
        self.dense.zero_grad()
        self.replicated.zero_grad()

    def step(self) -> None:
        """After the backward pass, which has moved the tables."""
        l1 = in_epoch(self.settings.l1, self.epoch)
        if l1:
            for parameter in self.parameters:
                if parameter.grad is not None:
                    parameter.grad.add_(parameter.detach().sign(), alpha=l1)
        if self.settings.clip_norm is not None:
            clip_grad_norm_(self.parameters, self.settings.clip_norm)
        self.dense.step()
        self.replicated.step()

    def of_tables(self) -> dict[str, dict[str, Any]]:
        """The state of the tables' optimizer, a tensor sharded as its table is."""
        state: dict[str, dict[str, Any]] = self.fused.state_dict()["state"]
        return state | self.replicated.state()

    def finish(self) -> None:
        """Before the weights are saved or used: bring those that are behind to where they should be."""
        if self.decay:
            self.decay.catch_up()

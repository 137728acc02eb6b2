"""Training checkpoints: folders `step_<n>-<attempt>` by torch.distributed.checkpoint.

A folder counts from the moment its `.metadata` is there, which is renamed into place last. Loading one
unpickles, so checkpoints are read from the own run only; what is published is safetensors.
"""

import math
import re
import shutil
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.optim.keyed import KeyedOptimizerWrapper

NAME = re.compile(r"step_(\d+)-(\d+)")
KEEP = 2


@dataclass
class Progress:
    """Where the training stands."""

    step: int = 0
    """Steps done, over all epochs."""
    best: float = -math.inf
    """The best validation metric so far, negative where less is better; -inf before the first evaluation."""
    best_step: int = 0
    """The step of that evaluation."""
    stale: int = 0
    """Evaluations since then."""


class Checkpoints:
    """The checkpoints of one training, in a folder that all workers see. Every method is collective."""

    def __init__(self, folder: Path, attempt: int) -> None:
        self.folder = folder
        self.attempt = attempt

    def save(self, model: DistributedModelParallel, dense: KeyedOptimizerWrapper, progress: Progress) -> None:
        """Save everything, then remove all but the newest two and the best."""
        state = _state(model, dense) | vars(progress)
        dcp.save(state, checkpoint_id=str(self.folder / f"step_{progress.step}-{self.attempt}"))
        if dist.get_rank() == 0:
            steps = sorted({step for step, _, _ in complete(self.folder)})
            kept = {*steps[-KEEP:], progress.best_step}
            for step, attempt, path in found(self.folder):
                if step not in kept or (step == progress.step and attempt != self.attempt):
                    shutil.rmtree(path)
        dist.barrier()

    def load(self, model: DistributedModelParallel, dense: KeyedOptimizerWrapper, path: Path) -> Progress:
        """Restore everything from a checkpoint, of any number of workers."""
        dense.init_state()  # or Adam's state would silently not be loaded
        state = _state(model, dense) | vars(Progress())
        dcp.load(state, checkpoint_id=str(path))
        model.load_state_dict(state["model"])
        model.fused_optimizer.load_state_dict(state["fused"])
        dense.load_state_dict(state["dense"])
        return Progress(**{name: state[name] for name in vars(Progress())})


def found(folder: Path) -> list[tuple[int, int, Path]]:
    """All checkpoints as (step, attempt, path), complete or not."""
    matches = [(NAME.fullmatch(path.name), path) for path in folder.glob("step_*")]
    return sorted((int(m[1]), int(m[2]), path) for m, path in matches if m)


def complete(folder: Path) -> list[tuple[int, int, Path]]:
    """The complete checkpoints as (step, attempt, path), oldest first."""
    return [entry for entry in found(folder) if (entry[2] / ".metadata").exists()]


def load_weights(path: Path, state: dict[str, torch.Tensor]) -> None:
    """Read a checkpoint's model into the tensors of an unsharded state_dict, in one process."""
    read_into({"model": state}, str(path))


def read_into(state: dict[str, Any], path: str) -> None:
    """Read parts of a checkpoint into whole tensors, each process for itself."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # as intended
        dcp.load(state, checkpoint_id=path, no_dist=True)


def _state(model: DistributedModelParallel, dense: KeyedOptimizerWrapper) -> dict[str, Any]:
    return {
        "model": model.state_dict(),
        "fused": model.fused_optimizer.state_dict(),
        "dense": dense.state_dict(),
    }

"""Training checkpoints: folders `step_<n>-<attempt>` by torch.distributed.checkpoint.

They are written in the background, from a copy, while the training goes on. A folder counts from the moment
its `sha256.json` is there, the hash of every file, which is renamed into place last; one whose files are not
what was saved is not read. Loading one unpickles, so checkpoints are read from the own runs only; what is
published is safetensors.
"""

import hashlib
import json
import math
import os
import re
import shutil
import threading
import time
import warnings
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed._state_dict_utils import _copy_state_dict, _create_cpu_state_dict
from torch.distributed.checkpoint.api import CheckpointException
from torchrec.distributed.model_parallel import DistributedModelParallel

from recsys_dist.deepfm.optimizer import Optimizers
from recsys_dist.deepfm.reports import write_json

NAME = re.compile(r"step_(\d+)-(\d+)")
SEAL = "sha256.json"


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
    reductions: int = 0
    """Evaluations in all that were not better than all before."""


class Checkpoints:
    """The checkpoints of one training, in a folder that all workers see. Every method is collective.

    Args:
        folder: theirs.
        attempt: number of this start of the workers, part of the names.
        keep: how many of the newest stay, beside the best.
        device: of this worker.
    """

    def __init__(self, folder: Path, attempt: int, keep: int, device: torch.device) -> None:
        self.folder, self.attempt, self.keep = folder, attempt, keep
        # A group of its own: in the training's, its messages would mix with those of the steps meanwhile.
        self.group = dist.new_group(backend="gloo")
        self.pinned = device.type == "cuda"
        self.copy: dict[str, Any] | None = None
        """What is being written. Kept: new memory of that size takes far longer to get than to fill."""
        self.pool = ThreadPoolExecutor(1, thread_name_prefix="checkpoint", initializer=_give_way)
        self.writing: Future[None] | None = None
        self.saved = time.monotonic()
        """When the last one was begun."""

    def save(self, model: DistributedModelParallel, optimizers: Optimizers, progress: Progress) -> None:
        """Copy everything and begin to write it; all but the newest and the best are removed after that.

        One is written at a time: the next waits for it.
        """
        self.wait()
        self.saved = time.monotonic()
        state = _state(model, optimizers) | vars(progress)
        if self.copy is None:
            self.copy = _create_cpu_state_dict(state, pin_memory=self.pinned)
        # torch's BlockingAsyncStager does the same, but can only keep pinned memory, which needs a GPU.
        copied = _copy_state_dict(state, self.copy)
        self.writing = self.pool.submit(self._write, copied, replace(progress))

    def wait(self) -> None:
        """Return when what was begun is complete; raise what went wrong with it."""
        if self.writing:
            self.writing.result()
            self.writing = None

    def _write(self, state: dict[str, Any], progress: Progress) -> None:
        path = self.folder / f"step_{progress.step}-{self.attempt}"
        try:
            dcp.save(state, checkpoint_id=str(path), process_group=self.group)
        except CheckpointException as error:  # which is no Exception
            raise OSError(f"checkpoint {path} could not be written: {error}") from error
        _seal(path, self.group)
        if dist.get_rank() == 0:
            passed = [entry for entry in found(self.folder) if entry[0] <= progress.step]
            steps = sorted({step for step, _, other in passed if (other / SEAL).exists()})
            kept = {*steps[-self.keep :], progress.best_step}
            for step, attempt, other in passed:
                if step not in kept or (step == progress.step and attempt != self.attempt):
                    shutil.rmtree(other)
        dist.barrier(self.group)

    def load(self, model: DistributedModelParallel, optimizers: Optimizers, path: Path) -> Progress:
        """Restore everything from a checkpoint, of any number of workers and under any plan."""
        optimizers.dense.init_state()  # or Adam's state would silently not be loaded
        state = _state(model, optimizers) | vars(Progress())
        dcp.load(state, checkpoint_id=str(path))  # into the tensors themselves
        model.load_state_dict(state["model"])
        optimizers.dense.load_state_dict(state["dense"])
        return Progress(**{name: state[name] for name in vars(Progress())})


def _give_way() -> None:
    """Let this thread have what the training leaves: nobody waits for it."""
    os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 19)
    torch.serialization.set_crc32_options(False)  # what is written gets a sha256


def found(folder: Path) -> list[tuple[int, int, Path]]:
    """All checkpoints as (step, attempt, path), complete or not."""
    matches = [(NAME.fullmatch(path.name), path) for path in folder.glob("step_*")]
    return sorted((int(m[1]), int(m[2]), path) for m, path in matches if m)


def complete(folder: Path) -> list[tuple[int, int, Path]]:
    """The complete checkpoints as (step, attempt, path), oldest first."""
    return [entry for entry in found(folder) if (entry[2] / SEAL).exists()]


def newest(folder: Path) -> tuple[Path | None, list[str]]:
    """The newest checkpoint that is whole, and what is wrong with each newer one. Collective.

    Every worker hashes its share of the files.
    """
    listed: list[Any] = [found(folder)]
    dist.broadcast_object_list(listed)
    refused: list[str] = []
    for _, _, path in reversed(listed[0]):
        problems: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(problems, problem_of(path, dist.get_rank(), dist.get_world_size()))
        problem = next((problem for problem in problems if problem), None)
        if problem is None:
            return path, refused
        refused.append(f"checkpoint {path.name} is refused: {problem}")
    return None, refused


def problem_of(path: Path, rank: int = 0, world_size: int = 1) -> str | None:
    """What is wrong with a checkpoint, as far as a worker's share of its files shows."""
    if not (path / SEAL).exists():
        return "it was not finished"
    try:
        sealed: dict[str, list[Any]] = json.loads((path / SEAL).read_text())
    except ValueError:
        return f"{SEAL} cannot be read"
    if ".metadata" not in sealed:
        return f"{SEAL} does not name all files"
    for name in sorted(sealed)[rank::world_size]:
        size, digest = sealed[name]
        if not (path / name).exists():
            return f"{name} is missing"
        if (path / name).stat().st_size != size:
            return f"{name} has {(path / name).stat().st_size} bytes, expected {size}"
        if _sha256(path / name) != digest:
            return f"{name} is not what was saved, its sha256 differs"
    return None


def _seal(path: Path, group: dist.ProcessGroup) -> None:
    """Write down size and hash of every file, each worker those of its share. Collective."""
    names = sorted(file.name for file in path.iterdir())[dist.get_rank() :: dist.get_world_size()]
    own = {name: [(path / name).stat().st_size, _sha256(path / name)] for name in names}
    shares: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(shares, own, group)
    if dist.get_rank() == 0:
        write_json(path / SEAL, {name: of for share in shares for name, of in share.items()})


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def load_weights(path: Path, state: dict[str, torch.Tensor]) -> None:
    """Read a checkpoint's model into the tensors of an unsharded state_dict, in one process."""
    read_into({"model": state}, str(path))


def read_into(state: dict[str, Any], path: str) -> None:
    """Read parts of a checkpoint into whole tensors, each process for itself."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # as intended
        dcp.load(state, checkpoint_id=path, no_dist=True)


def _state(model: DistributedModelParallel, optimizers: Optimizers) -> dict[str, Any]:
    # Of the tables' optimizer nothing but its tensors: rates follow from the step.
    return {
        "model": model.state_dict(),
        "fused": {"state": optimizers.of_tables()},
        "dense": optimizers.dense.state_dict(),
    }

"""The training loop that every worker runs."""

import json
import math
import os
import socket
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from recsys_dist.config import Config
from recsys_dist.deepfm.batches import Batch
from recsys_dist.deepfm.checkpoint import Checkpoints, Progress, newest
from recsys_dist.deepfm.examples import Ahead, Examples
from recsys_dist.deepfm.items import Items
from recsys_dist.deepfm.late import Early
from recsys_dist.deepfm.model import DeepFM, used_fields
from recsys_dist.deepfm.not_finite import complaint, diverged
from recsys_dist.deepfm.optimizer import Optimizers, rate_factor
from recsys_dist.deepfm.reports import (
    ATTEMPT,
    DATA,
    HISTORY,
    NOW,
    PLAN,
    RESUMED,
    WORKERS,
    lines,
    write_json,
    write_text,
)
from recsys_dist.deepfm.sharding import shard
from recsys_dist.deepfm.start_from import summary, take_over
from recsys_dist.deepfm.steps import Steps, has_bfloat16
from recsys_dist.deepfm.validation import LOWER_IS_BETTER, validation
from recsys_dist.workspace import Run

EVERY_SECONDS = 10
"""Time between two writes of now.json."""
CATCH_UP_STEPS = 500
"""With table decay the rows that are behind catch up after every so many steps, and a checkpoint that the
clock asks for waits for that: to multiply in two steps rounds in another way than in one. If the clock
decided when it happens, a resumed training would not end with the bits of an undisturbed one."""


@dataclass(frozen=True)
class Task:
    """What the workers are to do."""

    config: Config
    features: Run
    folder: Path
    """Where checkpoints and progress go; all workers see it."""
    parts: tuple[str, ...] = ("train",)
    """Of whose examples it learns."""
    before_late: Run | None = None
    """The recall run whose late events are left out of these."""
    epochs: int | None = None
    """Fit for so many; None: until valid no longer gets better."""
    start_from: Run | None = None
    """Whose model the first attempt starts from."""
    on_epoch: Callable[[dict[str, Any]], None] | None = None
    """Called by every worker with an epoch's line of the history, when its checkpoint is complete: nothing is
    being written then, so that whoever ends the training in this call may remove what there is."""


def train(task: Task, device: torch.device) -> Progress:
    """Train until the epochs are done or the metric stops improving, from the newest checkpoint if any.

    Where the number of epochs is given nothing is measured, and the last one is the best. The default process
    group must be there. On return the checkpoint of `Progress.best_step` is the result.

    Args:
        task: the same for all workers.
        device: of this worker.

    Raises:
        ConfigError: the settings do not fit the fields, or the loss is no longer finite.
        DataError: there is nothing to learn from or to measure with, or a number of it is not finite.
    """
    settings, seed = task.config.deepfm, task.config.seed
    rank, world_size = dist.get_rank(), dist.get_world_size()
    attempt = _attempt(task.folder)
    whole, refused = newest(task.folder)
    spec = used_fields(task.features.spec(), settings)
    items = Items(task.features, spec)
    keep = Early(task.features, task.before_late) if task.before_late else None
    examples = Examples(task.features, items, task.config, task.parts, keep)
    valid = None if task.epochs else validation(task.features, items, task.config)
    model = DeepFM(spec, settings, device=device, tables="meta", seed=seed)
    model.start_at(examples.average)
    assert dist.group.WORLD
    sharded, plan = shard(model, dist.group.WORLD, device, seed)
    optimizers = Optimizers(sharded, settings)
    checkpoints = Checkpoints(task.folder, attempt, settings.checkpoints_kept, device)
    progress = checkpoints.load(sharded, optimizers, whole) if whole else Progress()
    remarks = [*refused]
    if task.start_from and not whole:
        state = sharded.state_dict()
        taken = take_over(state, spec, task.start_from, optimizers.of_tables())
        remarks.append(summary(taken, state, task.start_from))
    last = (task.epochs or settings.epochs) * examples.steps
    log = _Log(task, attempt, progress.step, examples, last)
    log.write(DATA, {"told": [examples.told(), *([valid.told] if valid else [])]})
    log.write(PLAN, plan)
    if settings.precision == "bfloat16" and not has_bfloat16(device):
        remarks.append("deepfm.precision=bfloat16 is not to be had on this processor: float32 instead")
    log.write(RESUMED, {"attempt": attempt, "step": progress.step, "workers": world_size, "remarks": remarks})
    workers: list[Any] = [None] * world_size
    dist.all_gather_object(workers, {"rank": rank, "host": socket.gethostname(), "pid": os.getpid()})
    log.write(WORKERS, workers)

    def judge(loss: Tensor, logits: Tensor, batch: Batch) -> tuple[float, bool]:
        """What all workers must see alike: the mean loss, and whether one's clock asks for a checkpoint."""
        minutes = settings.checkpoint_every_minutes
        late = minutes is not None and time.monotonic() - checkpoints.saved > 60 * minutes
        told = torch.stack([loss.detach() / world_size, loss.new_tensor(float(late))])
        dist.all_reduce(told)
        mean, late_somewhere = told.tolist()
        if not math.isfinite(mean):  # before the tables move, which they do in the backward pass
            checkpoints.wait()
            raise complaint(model, examples, batch, logits, *divmod(progress.step, examples.steps))
        return mean, late_somewhere > 0

    steps = Steps(sharded, optimizers, device, judge)
    batches = Ahead(examples, rank, world_size, pin=device.type == "cuda").from_step(progress.step, last)
    while progress.step < last and progress.stale < settings.patience:
        epoch, step = divmod(progress.step, examples.steps)
        # Dropout is the one thing left to chance; seeded by the step, a resumed training repeats it.
        torch.manual_seed(int(np.random.SeedSequence([seed, progress.step, rank]).generate_state(1)[0]))
        model.begin_epoch(epoch)
        # A refit goes the way of the fit that chose its number of epochs.
        factor = rate_factor(settings, progress.step, settings.epochs * examples.steps, progress.reductions)
        mean, late = steps.step(batches, factor, epoch)
        progress.step += 1
        log.step(progress.step, mean, examples.rows(step))
        epoch_ends = step + 1 == examples.steps
        # While one is written, the other half of the steps that may be lost are taken.
        by_steps = progress.step % max(1, settings.checkpoint_every_steps // 2) == 0
        catches_up = optimizers.decay is not None and progress.step % CATCH_UP_STEPS == 0
        saves = epoch_ends or by_steps or (late and (catches_up or not optimizers.decay))
        if saves or catches_up:
            optimizers.finish()
        if epoch_ends:
            steps.pause()
            figures = valid.figures(model, device) if valid else {}
            if valid and not math.isfinite(figures[valid.metric]):  # the epoch's last step did it
                checkpoints.wait()
                raise diverged(f"After epoch {epoch + 1} the model's predictions are not finite", model)
            merit = _merit(valid.metric, figures) if valid else float(progress.step)
            better = merit > progress.best
            progress.stale = 0 if better else progress.stale + 1
            progress.reductions += not better
            if better:
                progress.best, progress.best_step = merit, progress.step
            measured = figures | ({"metric": valid.metric} if valid else {})
            _require_current(task.folder, attempt)
            line = log.evaluation(epoch, progress, measured)
        if saves:
            _require_current(task.folder, attempt)
            checkpoints.save(sharded, optimizers, progress)
            if settings.checkpoint_every_steps == 1:
                checkpoints.wait()
        if epoch_ends and task.on_epoch:
            checkpoints.wait()
            task.on_epoch(line)
    checkpoints.wait()
    return progress


def _merit(metric: str, figures: Mapping[str, float]) -> float:
    return -figures[metric] if metric in LOWER_IS_BETTER else figures[metric]


def _attempt(folder: Path) -> int:
    """The number of this start of the workers, from 0. Collective."""
    answer = [0]
    if dist.get_rank() == 0:
        file = folder / ATTEMPT
        answer = [int(file.read_text()) + 1 if file.exists() else 0]
        write_text(file, str(answer[0]))
    dist.broadcast_object_list(answer)
    return answer[0]


def _require_current(folder: Path, attempt: int) -> None:
    """Raise where other workers have begun in the same folder: the driver of these is dead."""
    current = int((folder / ATTEMPT).read_text())
    if current != attempt:
        raise RuntimeError(f"attempt {attempt} of {folder} was superseded by attempt {current}")


class _Log:
    """What worker 0 tells the driver. The other workers' write nothing."""

    def __init__(self, task: Task, attempt: int, resumed_from: int, examples: Examples, last: int) -> None:
        self.folder, self.attempt, self.resumed_from = task.folder, attempt, resumed_from
        self.epoch_steps, self.last, self.evaluation_seconds = examples.steps, last, 0.0
        self.drawn = examples.drawn
        self.active = dist.get_rank() == 0
        self.told = time.monotonic()
        self._restart()
        if not self.active:
            return
        (task.folder / NOW).unlink(missing_ok=True)
        if (task.folder / HISTORY).exists():
            # What came after the checkpoint is done, and told, again.
            kept = [line for line in lines(task.folder / HISTORY) if line["step"] <= resumed_from]
            write_text(task.folder / HISTORY, "".join(f"{json.dumps(line)}\n" for line in kept))

    def _restart(self) -> None:
        self.steps, self.examples, self.seconds, self.losses = 0, 0, 0.0, 0.0
        self.start = time.monotonic()

    def step(self, step: int, loss: float, examples: int) -> None:
        """Count a step."""
        self.steps += 1
        self.examples += examples
        self.losses += loss
        now = time.monotonic()
        self.seconds = now - self.start
        if self.active and now - self.told > EVERY_SECONDS:
            self.told = now
            epoch = 1 + (step - 1) // self.epoch_steps
            loss = self.losses / self.steps
            self.write(NOW, {"epoch": epoch, "step": step, "loss": loss, **self._speed(step)})

    def evaluation(self, epoch: int, progress: Progress, figures: Mapping[str, Any]) -> dict[str, Any]:
        """Append an epoch's line, and return it."""
        self.evaluation_seconds = time.monotonic() - self.start - self.seconds
        line = {
            "epoch": epoch + 1,
            "step": progress.step,
            "loss": round(self.losses / self.steps, 6),
            **{name: round(of, 6) if isinstance(of, float) else of for name, of in figures.items()},
            "best": progress.stale == 0,
            **self._speed(progress.step),
            "train_seconds": round(self.seconds, 3),
            "evaluation_seconds": round(self.evaluation_seconds, 3),
            "attempt": self.attempt,
            "resumed_from": self.resumed_from,
        }
        if self.active:
            with (self.folder / HISTORY).open("a") as file:
                file.write(json.dumps(line) + "\n")
        self.told = time.monotonic()
        self._restart()
        return line

    def write(self, name: str, value: Any) -> None:
        """Write a JSON file, whole or not at all."""
        if self.active:
            write_json(self.folder / name, value)

    def _speed(self, step: int) -> dict[str, int]:
        """Rates since the last evaluation, and the seconds left at these if all epochs are needed."""
        rate = self.examples / max(self.seconds, 1e-9)
        evaluations = -(-(self.last - step) // self.epoch_steps)
        left = (self.last - step) * self.seconds / self.steps + evaluations * self.evaluation_seconds
        return {
            "examples_per_s": round(rate),
            "pairs_per_s": round(rate * (1 + self.drawn)),
            "seconds_left": round(left),
        }

"""Scoring users in partitions, each a Ray task that reads its own users and writes its own file."""

import datetime as dt
from typing import TYPE_CHECKING, Any

import numpy as np
import ray
from ray.exceptions import RayActorError, RayTaskError
from ray.util import ActorPool

from recsys_dist.cluster import local_or_cluster
from recsys_dist.config import Config
from recsys_dist.errors import RecsysError, RetryableError
from recsys_dist.scoring.lists import finished, remove_unfinished
from recsys_dist.workspace import OpenRun

if TYPE_CHECKING:
    from recsys_dist.scoring.scored import PartitionScorer


def score_partitions(config: Config, run: OpenRun, date: dt.date, users: np.ndarray) -> list[dict[str, Any]]:
    """Write the lists of users to the run's lists/ and return each partition's figures.

    A task takes `score.partition_users` users, so that its memory does not depend on their number. Partitions
    that are there already, left by a driver that died, are taken as they are.

    Args:
        config: the settings.
        run: that the lists become part of.
        date: that they are for.
        users: [U] int32, indices of those who get one.
    """
    done = finished(run)
    parts = partitions(users, config.score.partition_users)
    to_do = [part for part in parts if part[0] not in done]
    if done:
        print(f"score: {len(done)} of {len(parts)} partitions are there already", flush=True)
    if to_do:
        with local_or_cluster():
            done |= dict(zip([number for number, _ in to_do], _scored(config, run, date, to_do), strict=True))
    remove_unfinished(run)
    return list(done.values())


def _scored(
    config: Config, run: OpenRun, date: dt.date, parts: list[tuple[int, np.ndarray]]
) -> list[dict[str, Any]]:
    """Score partitions by as many workers as there are GPUs or, where there is none, CPUs."""
    there = ray.cluster_resources()
    gpus = int(there.get("GPU", 0))
    workers = min(len(parts), gpus or int(there.get("CPU", 1)))
    actor = ray.remote(num_cpus=1, num_gpus=min(gpus, 1), max_restarts=3, max_task_retries=3)(ScoringWorker)
    device = "cuda" if gpus else "cpu"
    pool = ActorPool([actor.remote(config, run, date, device) for _ in range(workers)])
    try:
        return list(pool.map(lambda worker, part: worker.score.remote(*part), parts))
    except RayActorError as error:
        raise RetryableError(
            f"A scoring worker died again and again: {error}. If it was for want of memory, lower "
            f"score.partition_users. Run again: it goes on with what is there."
        ) from None
    except RayTaskError as error:
        # Ray's own error has the cause's class, but not what it holds, such as errno.
        if isinstance(error.cause, RecsysError | OSError):
            raise error.cause from None
        raise


def partitions(users: np.ndarray, size: int) -> list[tuple[int, np.ndarray]]:
    """Cut the users, whose indices may have gaps, into parts of `size`.

    Returns:
        of each part its number and its users' indices, in order, which come before those of the next part.
    """
    ordered = np.sort(users)
    return [(part, ordered[start : start + size]) for part, start in enumerate(range(0, len(ordered), size))]


class ScoringWorker:
    """A process that scores. The driver needs no torch, whose import takes seconds."""

    def __init__(self, config: Config, run: OpenRun, date: dt.date, device: str) -> None:
        self.arguments = config, run, date, device
        self.scorer: PartitionScorer | None = None

    def score(self, part: int, users: np.ndarray) -> dict[str, Any]:
        """As the PartitionScorer's."""
        from recsys_dist.scoring.scored import PartitionScorer

        # Not at the start: what fails there Ray tells as a worker's death, without the cause.
        self.scorer = self.scorer or PartitionScorer(*self.arguments)
        return self.scorer.score(part, users)

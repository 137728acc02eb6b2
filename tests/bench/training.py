"""How fast DeepFM trains on MovieLens 1M: end to end, beside the same step on one batch held in memory.

Both run in one process a worker, in turns, with the settings of conf/movielens_1m.yaml; a step is 1/24 of an
epoch or more. What is counted are steps after the first few, which still allocate.
"""

import os
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from recsys_dist.cluster import MALLOC
from recsys_dist.config import Config
from recsys_dist.workspace import Run
from tests.bench.measure import Measure
from tests.deepfm.workers import run_workers

STEPS, REPEATS, WARM = 30, 3, 5


def bench(config: Config, features: Run) -> tuple[list[Measure], dict[str, Any]]:
    """Run all of it.

    Args:
        config: its section `deepfm` is used.
        features: what to train on.

    Returns:
        the measures, and the seconds a step of every single run.
    """
    os.environ.update(MALLOC)
    found: dict[int, dict[str, list[float]]] = {}
    for workers in (1, 2):
        with tempfile.TemporaryDirectory(prefix="bench-") as folder:
            found[workers] = run_workers(workers, _steps, Path(folder), config, features)[0]
            for name, seconds in found[workers].items():
                print(
                    f"{workers} workers, {name:<11} {', '.join(f'{s * 1e3:6.1f}' for s in seconds)} ms a step"
                )
    step = {
        workers: {name: statistics.median(seconds) for name, seconds in of.items()}
        for workers, of in found.items()
    }
    rate = {workers: config.deepfm.batch_size / of["end to end"] for workers, of in step.items()}
    measures = [
        Measure("training, 1 worker, examples/s", rate[1]),
        Measure("training, 1 worker, end to end / floor", step[1]["end to end"] / step[1]["floor"], 1 / 0.9),
        Measure("training, 2 workers / 1, examples/s", rate[2] / rate[1]),
        Measure("training, 2 workers, end to end / floor", step[2]["end to end"] / step[2]["floor"]),
    ]
    return measures, {str(workers): of for workers, of in found.items()}


def _steps(config: Config, features: Run) -> dict[str, list[float]]:
    """Seconds a step: of the loop's own batches, and of its first one over and over."""
    from recsys_dist.deepfm.examples import Ahead, Examples
    from recsys_dist.deepfm.items import Items
    from recsys_dist.deepfm.model import DeepFM, used_fields
    from recsys_dist.deepfm.optimizer import Optimizers
    from recsys_dist.deepfm.sharding import shard

    rank, world_size, device = dist.get_rank(), dist.get_world_size(), torch.device("cpu")
    torch.set_num_threads(max(1, torch.multiprocessing.cpu_count() // world_size))
    spec = used_fields(features.spec(), config.deepfm)
    examples = Examples(features, Items(features, spec), config)
    assert examples.steps >= STEPS
    model = DeepFM(spec, config.deepfm, device=device, tables="meta", seed=config.seed)
    assert dist.group.WORLD
    sharded, _ = shard(model, dist.group.WORLD, device, config.seed)
    optimizers = Optimizers(sharded, config.deepfm)
    ahead = Ahead(examples, rank, world_size)
    first = ahead.get(0, 0)

    def seconds(batches: Iterator[Any]) -> float:
        for step, batch in enumerate(batches):
            if step == WARM:
                dist.barrier()
                begin = time.perf_counter()
            optimizers.begin(1.0)
            loss, _ = sharded(batch)
            loss.backward()
            optimizers.step()
        return (time.perf_counter() - begin) / (STEPS - WARM)

    found: dict[str, list[float]] = {"end to end": [], "floor": []}
    for repeat in range(REPEATS):
        found["floor"].append(seconds(first for _ in range(STEPS)))
        found["end to end"].append(seconds(ahead.get(repeat, step) for step in range(STEPS)))
    return found

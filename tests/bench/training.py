"""How fast DeepFM trains on MovieLens 1M: end to end, beside the same step on one batch held in memory.

Both run in one process a worker, in turns, with the settings of conf/movielens_1m.yaml; a step is 1/24 of an
epoch or more. What is counted are steps after the first few, which still allocate.

Where the time of two workers goes is read off torch's profiler: what computes, by kind, and the time in which
nothing does while something is on its way between the workers. The rest is Python's, and waits for a batch.

What a checkpoint costs is measured with a table of 5 million rows in the place of the users': how long `save`
keeps the loop waiting, and how much longer BESIDE steps take with one at their beginning, which is on disk
before they end or is waited for. The first checkpoint, which gets its memory, is told apart.

AUC and GAUC are those of an evaluation: of predictions for 200,000 rows of 40,000 users.
"""

import itertools
import math
import os
import resource
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch.profiler import ProfilerActivity, profile

from recsys_dist.cluster import MALLOC
from recsys_dist.config import Config
from recsys_dist.evaluation.metrics import auc, grouped_auc
from recsys_dist.workspace import Run
from tests.bench.measure import Measure
from tests.deepfm.workers import run_workers

CPU = torch.device("cpu")
STEPS, REPEATS, WARM = 30, 3, 5
BESIDE = 75
"""Steps of about half the time between two checkpoints."""
ROWS = 5_000_000
"""Of the table that makes a checkpoint large."""
ROWS_RANKED, GROUPS = 200_000, 40_000
OF_TABLES = ("embedding", "split", "jagged", "permute", "radix", "sort", "bounds", "cumsum", "lengths")
"""What has one of these in its name is the tables': lookup, backward pass, update, and their indices."""


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
    peak: dict[int, float] = {}
    for workers in (1, 2):
        with tempfile.TemporaryDirectory(prefix="bench-") as folder:
            found[workers] = run_workers(workers, _steps, Path(folder), config, features)[0]
            peak[workers] = found[workers].pop("peak")[0]
            (rows,) = found[workers].pop("rows")
            for name, seconds in found[workers].items():
                print(
                    f"{workers} workers, {name:<11} {', '.join(f'{s * 1e3:6.1f}' for s in seconds)} ms a step"
                )
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        saves = run_workers(2, _saves, Path(folder), config, features, Path(folder) / "training")[0]
    pairs = zip(saves["plain"], saves["beside"], strict=True)  # each a moment apart
    first, *others = (beside - plain for plain, beside in pairs)
    longer = statistics.median(others)
    print(f"checkpoint of {saves['bytes'][0] / 2**20:.0f} MiB: {saves}")
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        where = run_workers(2, _where, Path(folder), config, features)[0]
    step = {
        workers: {name: statistics.median(seconds) for name, seconds in of.items()}
        for workers, of in found.items()
    }
    rate = {workers: rows / of["end to end"] for workers, of in step.items()}
    measures = [
        Measure("training, 1 worker, examples/s", rate[1]),
        Measure("training, 1 worker, end to end / floor", step[1]["end to end"] / step[1]["floor"], 1 / 0.9),
        Measure("training, 2 workers / 1, examples/s", rate[2] / rate[1]),
        Measure("training, 2 workers, end to end / floor", step[2]["end to end"] / step[2]["floor"]),
        *(Measure(f"  2 workers, % of the time, {kind}", share * 100) for kind, share in where.items()),
        *(Measure(f"training, peak memory of each of {n}, MiB", peak[n]) for n in peak),
        Measure("checkpoint, MiB", saves["bytes"][0] / 2**20),
        Measure("checkpoint, the loop waits, ms", statistics.median(saves["stall"][1:]) * 1e3),
        Measure("checkpoint, the first one, steps take longer, s", first),
        Measure("checkpoint every 60 s, steps take longer, %", longer / 60 * 100, 5),
        Measure("checkpoint, peak memory of each of 2 before, MiB", saves["peak before"][0]),
        Measure("checkpoint, peak memory of each of 2 after, MiB", saves["peak after"][0]),
        Measure(f"AUC and GAUC, {ROWS_RANKED:,} rows in {GROUPS:,} groups, s", _metrics(), 0.1),
    ]
    return measures, {str(workers): of for workers, of in found.items()} | {"checkpoint": saves}


def epochs(config: Config, features: Run, number: int) -> tuple[list[float], float]:
    """Train for some epochs, without evaluations: the seconds of each, and the most memory held, in GiB."""
    ahead, steps = ready(config, features)
    batches = ahead.from_step(0, number * ahead.examples.steps)
    found = []
    for _ in range(number):
        begin = time.perf_counter()
        for _ in range(ahead.examples.steps):
            steps.step(batches)
        found.append(time.perf_counter() - begin)
    return found, int(Path("/proc/self/status").read_text().partition("VmHWM:")[2].split()[0]) / 2**20


def in_turns(config: Config, runs: Sequence[Run], number: int) -> list[float]:
    """Train a model on each of some runs, an epoch of one after an epoch of the other: the median seconds a
    step of each. The machine's better and worse minutes come to all of them alike.
    """
    each = [ready(config, run) for run in runs]
    seconds: list[list[float]] = [[] for _ in runs]
    for epoch in range(1 + number):
        for (ahead, steps), found in zip(each, seconds, strict=True):
            size = ahead.examples.steps
            batches = ahead.from_step(epoch * size, (epoch + 1) * size)
            begin = time.perf_counter()
            for _ in range(size):
                steps.step(batches)
            found.append((time.perf_counter() - begin) / size)
    return [statistics.median(found[1:]) for found in seconds]


def ready(
    config: Config, features: Run, rows: int | None = None, device: torch.device = CPU
) -> tuple[Any, Any]:
    """This worker's batches and what trains on them; with `rows`, so many in the place of the users'."""
    from recsys_dist.deepfm.examples import Ahead, Examples
    from recsys_dist.deepfm.items import Items
    from recsys_dist.deepfm.model import DeepFM, used_fields
    from recsys_dist.deepfm.optimizer import Optimizers
    from recsys_dist.deepfm.sharding import shard
    from recsys_dist.deepfm.steps import Steps

    rank, world_size = dist.get_rank(), dist.get_world_size()
    torch.set_num_threads(max(1, torch.multiprocessing.cpu_count() // world_size))
    spec = used_fields(features.spec(), config.deepfm)
    examples = Examples(features, Items(features, spec), config)
    if rows:
        changed = (f.model_copy(update={"cardinality": rows}) if f.name == "user" else f for f in spec.fields)
        spec = spec.model_copy(update={"fields": tuple(changed)})
    model = DeepFM(spec, config.deepfm, device=device, tables="meta", seed=config.seed)
    assert dist.group.WORLD
    sharded, _ = shard(model, dist.group.WORLD, device, config.seed)
    return Ahead(examples, rank, world_size, pin=device.type == "cuda"), Steps(
        sharded, Optimizers(sharded, config.deepfm), device, lambda *_: None
    )


def _steps(config: Config, features: Run) -> dict[str, list[float]]:
    """Seconds a step: of the loop's own batches, and of its first one over and over."""
    ahead, steps = ready(config, features)
    assert ahead.examples.steps >= STEPS
    first = next(ahead.from_step(0, 1))

    def seconds(batches: Iterator[Any]) -> float:
        for number in range(STEPS):
            if number == WARM:
                dist.barrier()
                begin = time.perf_counter()
            steps.step(batches)
        return (time.perf_counter() - begin) / (STEPS - WARM)

    found: dict[str, list[float]] = {"end to end": [], "floor": []}
    for repeat in range(REPEATS):
        found["floor"].append(seconds(itertools.repeat(first, STEPS)))
        begin = repeat * ahead.examples.steps
        found["end to end"].append(seconds(ahead.from_step(begin, begin + STEPS)))
    return found | {"peak": [_peak()], "rows": [float(ahead.examples.rows(0))]}


def _where(config: Config, features: Run) -> dict[str, float]:
    """Shares of the time of this worker's steps."""
    ahead, steps = ready(config, features)
    batches = ahead.from_step(0, WARM + STEPS)
    for _ in range(WARM):
        steps.step(batches)
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        begin = time.perf_counter()
        for _ in range(STEPS):
            steps.step(batches)
        whole = (time.perf_counter() - begin) * 1e6
    kinds, computing, exchanging = {"dense": 0.0, "tables": 0.0}, [], []
    for event in profiler.events():
        span = event.time_range.start, event.time_range.end
        if event.name.startswith("gloo:"):
            exchanging.append(span)
        elif not event.is_user_annotation and not event.name.startswith(("##", "Optimizer", "enumerate")):
            computing.append(span)
            of_table = any(word in event.name.lower() for word in OF_TABLES)
            kinds["tables" if of_table else "dense"] += event.self_cpu_time_total
    busy = covered(computing)
    scale = busy / sum(kinds.values())  # kinds overlap where several threads compute
    shares = {kind: of * scale / whole for kind, of in kinds.items()}
    shares["waiting for the other"] = (covered(computing + exchanging) - busy) / whole
    return shares | {"Python, waiting for a batch": 1 - sum(shares.values())}


def covered(spans: list[tuple[float, float]]) -> float:
    """The length of what intervals cover, counted once."""
    length, until = 0.0, -math.inf
    for start, end in sorted(spans):
        length += max(0.0, end - max(start, until))
        until = max(until, end)
    return length


def _metrics() -> float:
    """Seconds that both take together, the median of five."""
    generator = np.random.default_rng(0)
    labels, scores = generator.integers(0, 2, ROWS_RANKED), generator.standard_normal(ROWS_RANKED)
    groups, found = generator.integers(0, GROUPS, ROWS_RANKED), []
    for _ in range(5):
        begin = time.perf_counter()
        auc(labels, scores)
        grouped_auc(labels, scores, groups)
        found.append(time.perf_counter() - begin)
    return statistics.median(found)


def _saves(config: Config, features: Run, folder: Path) -> dict[str, list[float]]:
    """Seconds of steps without and beside a checkpoint, of the wait for it, its bytes, peak memory in MiB."""
    from recsys_dist.deepfm.checkpoint import Checkpoints, Progress

    ahead, trained = ready(config, features, ROWS)
    checkpoints = Checkpoints(folder, 0, 1, torch.device("cpu"))
    first = next(ahead.from_step(0, 1))

    def steps(number: int) -> None:
        batches = itertools.repeat(first, number)
        for _ in range(number):
            trained.step(batches)

    steps(WARM)
    found: dict[str, list[float]] = {"peak before": [_peak()], "plain": [], "beside": [], "stall": []}
    for repeat in range(1 + REPEATS):
        begin = time.perf_counter()
        steps(BESIDE)
        found["plain"].append(time.perf_counter() - begin)
        begin = time.perf_counter()
        checkpoints.save(trained.model, trained.optimizers, Progress(repeat, best_step=repeat))
        found["stall"].append(time.perf_counter() - begin)
        steps(BESIDE)
        checkpoints.wait()
        found["beside"].append(time.perf_counter() - begin)
    size = sum(file.stat().st_size for file in folder.glob("step_*/*"))
    return found | {"peak after": [_peak()], "bytes": [float(size)]}


def _peak() -> float:
    """The most memory that this process had, MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024

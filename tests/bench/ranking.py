"""How fast users and items are ranked, beside the matrix products that this takes on random input.

Two-stage: the model's part, 500 candidates a user, three hidden layers, beside all products of the MLP.
Exhaustive: every item for every user, beside the products of the layers after the first, of which either
side's part is computed once; and beside the plain forward over all pairs. Then the lists of 1, 4 and 16 times
as many users, by one worker: does the time grow with them, and the memory not? They take turns.
"""

import datetime as dt
import itertools
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from recsys_dist.config import REPOSITORY, Config, load
from recsys_dist.deepfm.items import day_number
from recsys_dist.scoring import scorers
from recsys_dist.scoring.models import Models, load_models
from recsys_dist.scoring.scorers import Exhaustive
from recsys_dist.scoring.users import Users, with_context
from tests.bench.measure import Measure
from tests.models import untrained_night
from tests.synthetic import START

DIM, HIDDEN = 16, (256, 128, 64)
USERS, ITEMS, CANDIDATES = 1000, 4000, 500
PAIRS_AT_ONCE = scorers.PAIRS_AT_ONCE["cpu"]
FEW = 100
"""Users of the exhaustive ranking."""
REPEATS = 5
GROWTH = (1000, 4000, 16000)
"""Users of the whole stage."""


def bench(folder: Path) -> tuple[list[Measure], dict[str, Any]]:
    """Run all of it.

    Args:
        folder: an empty one.

    Returns:
        the measures, and the seconds of every single run.
    """
    config = _config(folder / "night")
    runs = untrained_night(config, users=USERS, items=ITEMS, events=30)
    models = load_models(runs, config.score)
    rows = runs["features"].table("users/as_of=date").sort_by("user")
    days = np.full(len(rows), day_number(START.date()) + 20, np.int32)
    users = with_context(models.items, rows, days, "all")
    few = with_context(models.items, rows.slice(0, FEW), days[:FEW], "all")
    made = np.random.default_rng(0)
    candidates = torch.from_numpy(made.integers(1, ITEMS, (USERS, CANDIDATES)))
    inputs = sum(len(models.ranker.spec.side(*sides)) for sides in (("user", "context"), ("item",))) * DIM
    found: dict[str, list[float]] = {}
    with torch.inference_mode():
        calls: dict[str, Callable[[], Any]] = {
            "two_stage": lambda: models.ranker.logits(users, candidates),
            "mlp": lambda: _products((inputs, *HIDDEN, 1), USERS * CANDIDATES),
            "exhaustive": lambda: Exhaustive(models.ranker).top_k(few, 10),
            "later_layers": lambda: _products((*HIDDEN, 1), FEW * (ITEMS + 1)),
            "plain": lambda: _plain(models, few),
        }
        for _ in range(REPEATS):
            for name, call in calls.items():
                found.setdefault(name, []).append(_seconds(call))
    took = {name: statistics.median(of) for name, of in found.items()}
    nights: dict[int, list[list[float]]] = {size: [] for size in GROWTH}
    for size in GROWTH:
        untrained_night(_config(folder / str(size)), users=size, items=ITEMS, events=30)
    for _ in range(REPEATS):
        for size in GROWTH:
            nights[size].append(_night(folder / str(size)))
    small, middle, large = (list(map(statistics.median, zip(*of, strict=True))) for of in nights.values())
    measures = [
        Measure("two-stage, users/s", USERS / took["two_stage"]),
        Measure("  time / that of the MLP's products", took["two_stage"] / took["mlp"], 1 / 0.6),
        Measure("exhaustive, thousand pairs/s", FEW * ITEMS / took["exhaustive"] / 1e3),
        Measure(
            "  time / that of the later layers' products", took["exhaustive"] / took["later_layers"], 1.25
        ),
        Measure("  plain forward over all pairs / exhaustive", took["plain"] / took["exhaustive"]),
        Measure(
            "lists of 1/4/16 times the users, growth", (large[0] - middle[0]) / (middle[0] - small[0]), 4.2
        ),
        Measure("  peak memory of a worker, 16 / 1", large[1] / small[1], 1.1),
    ]
    found |= {f"users_{size}": [seconds for seconds, _ in of] for size, of in nights.items()}
    return measures, {name: [round(value, 3) for value in of] for name, of in found.items()}


def _config(root: Path) -> Config:
    overrides = [f"storage.root={root}", f"deepfm.embedding_dim={DIM}", f"deepfm.hidden={list(HIDDEN)}"]
    return load(None, overrides)


def _products(widths: tuple[int, ...], pairs: int) -> None:
    """The products of an MLP of these widths for so many pairs, block by block."""
    inputs = [torch.rand(PAIRS_AT_ONCE, width) for width in widths[:-1]]
    weights = [torch.rand(b, a) for a, b in itertools.pairwise(widths)]
    outputs = [torch.empty(PAIRS_AT_ONCE, width) for width in widths[1:]]
    for start in range(0, pairs, PAIRS_AT_ONCE):
        rows = min(PAIRS_AT_ONCE, pairs - start)
        for x, weight, out in zip(inputs, weights, outputs, strict=True):
            torch.mm(x[:rows], weight.T, out=out[:rows])


def _plain(models: Models, users: Users) -> None:
    """Each pair through the whole model, the first layer from inputs of its own."""
    ranker = models.ranker
    side = ranker.users(users)
    catalogue = ranker.catalogue(int(users.days[0]))
    user_layer, item_layer = ranker.model.user_hidden, ranker.model.item_hidden
    user_input, item_input = (
        torch.rand(n, layer.in_features) for n, layer in ((len(users), user_layer), (ITEMS + 1, item_layer))
    )
    for row in range(len(users)):
        for start in range(0, ITEMS + 1, PAIRS_AT_ONCE):
            part = catalogue.rows(start, start + PAIRS_AT_ONCE)
            mine = side.take(torch.full((len(part.first),), row))
            hidden = user_layer(user_input[row].expand(len(part.first), -1).contiguous())
            part = part._replace(hidden=item_layer(item_input[start : start + PAIRS_AT_ONCE]))
            ranker.model.logits(mine._replace(hidden=hidden), part)


def _seconds(call: Callable[[], Any]) -> float:
    begin = time.perf_counter()
    call()
    return time.perf_counter() - begin


def _night(root: Path) -> list[float]:
    """Seconds of scoring all users by one worker in a process of its own, and its peak memory in MiB."""
    command = [sys.executable, "-m", "tests.bench.ranking", str(root)]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"scoring failed:\n{done.stdout}{done.stderr}")
    told = json.loads(done.stdout.splitlines()[-1])
    return [float(told["seconds"]), float(told["mebibytes"])]


def _score(root: Path) -> dict[str, float]:
    """Score all partitions as a worker does."""
    from recsys_dist.scoring.partitions import partitions
    from recsys_dist.scoring.scored import PartitionScorer
    from recsys_dist.workspace import Workspace

    config = _config(root)
    workspace = Workspace(config)
    runs = {stage: workspace.runs(stage)[-1] for stage in ("features", "als", "recall", "deepfm")}
    run = workspace.new("score", {}, runs)
    users = runs["features"].table("users/as_of=date", columns=["user"])["user"].to_numpy()
    worker = PartitionScorer(config, run, dt.date.fromisoformat(runs["features"].spec().date))
    begin = time.perf_counter()
    for number, some in partitions(users, 250):
        worker.score(number, some)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return {"seconds": time.perf_counter() - begin, "mebibytes": peak}


if __name__ == "__main__":
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    print(json.dumps(_score(Path(sys.argv[1]))))

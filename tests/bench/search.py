"""How fast all items are searched: exact top-100 of inner products, what a user has seen left out.

Beside the products alone (same blocks of users, nothing else), beside `implicit` on the same factors and
threads, and beside Spark MLlib's recommendForAllUsers at the same rank on a smaller size, which it finishes.
Ours and its rivals take turns.
"""

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from recsys_dist.config import REPOSITORY, load
from recsys_dist.recall.inner_product import USERS_AT_ONCE, nearest_items
from tests.bench.measure import Measure
from tests.bench.peer import PYTHON

USERS, ITEMS, RANK, K, SEEN = 50_000, 50_000, 64, 100, 100
TASK = load(None, []).score.partition_users
"""Users at a time, as a scoring task takes them."""
SPARK_USERS, SPARK_ITEMS = 4_000, 20_000
REPEATS = 3


def bench(folder: Path) -> tuple[list[Measure], dict[str, Any]]:
    """Run all of it.

    Args:
        folder: an empty one.

    Returns:
        the measures, and the seconds of every single run.
    """
    made = np.random.default_rng(0)
    users, items = (made.normal(size=(n, RANK)).astype(np.float32) for n in (USERS, ITEMS + 1))
    seen = made.integers(1, ITEMS + 1, (USERS, SEEN))
    for name, array in (("users", users), ("items", items), ("seen", seen)):
        np.save(folder / f"{name}.npy", array)
    tensors = torch.from_numpy(users), torch.from_numpy(items), torch.from_numpy(seen)
    found: dict[str, list[float]] = {"ours": [], "products": [], "implicit": []}
    for _ in range(REPEATS):
        found["ours"].append(_seconds(lambda: search(*tensors)))
        found["products"].append(_seconds(lambda: products(*tensors[:2])))
        found["implicit"].append(_implicit(folder))
    pairs = USERS * ITEMS
    rate = {name: pairs / statistics.median(of) for name, of in found.items()}
    small = (
        tensors[0][:SPARK_USERS],
        tensors[1][: SPARK_ITEMS + 1],
        tensors[2][:SPARK_USERS] % SPARK_ITEMS + 1,
    )
    found |= {"spark": [], "as_spark": []}
    for _ in range(REPEATS):
        found["spark"].append(_spark(folder))
        found["as_spark"].append(_seconds(lambda: search(*small)))
    rate |= {
        name: SPARK_USERS * SPARK_ITEMS / statistics.median(found[name]) for name in ("spark", "as_spark")
    }
    measures = [
        Measure("exact search, million pairs/s", rate["ours"] / 1e6),
        Measure("  time / that of the products alone", rate["products"] / rate["ours"], 1 / 0.7),
        Measure("  time / implicit's", rate["implicit"] / rate["ours"], 1 / 1.05),
        Measure("  time / Spark MLlib's, a pair", rate["spark"] / rate["ours"], 1 / 60),
        Measure(
            f"  the same, ours of {SPARK_USERS:,} x {SPARK_ITEMS:,} as well", rate["spark"] / rate["as_spark"]
        ),
    ]
    return measures, {name: [round(seconds, 3) for seconds in of] for name, of in found.items()}


def search(users: torch.Tensor, items: torch.Tensor, seen: torch.Tensor) -> None:
    """What a night does, task by task."""
    for start in range(0, len(users), TASK):
        own = seen[start : start + TASK]
        excluded = torch.arange(len(own)).repeat_interleave(own.shape[1]), own.flatten()
        nearest_items(users[start : start + TASK], items, K, excluded)


def products(users: torch.Tensor, items: torch.Tensor) -> None:
    """The products of the same blocks."""
    scores = torch.empty(USERS_AT_ONCE, len(items))
    for start in range(0, len(users), TASK):
        for block in users[start : start + TASK].split(USERS_AT_ONCE):
            torch.mm(block, items.T, out=scores[: len(block)])


def _seconds(call: Callable[[], None]) -> float:
    begin = time.perf_counter()
    call()
    return time.perf_counter() - begin


def _implicit(folder: Path) -> float:
    command = [str(PYTHON), "-W", "ignore", "-P", "tests/bench/peer_implicit.py", str(folder), str(K)]
    threads = str(len(os.sched_getaffinity(0)))
    done = subprocess.run([*command, threads], cwd=REPOSITORY, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"implicit failed:\n{done.stdout}{done.stderr}")
    return float(json.loads(done.stdout.splitlines()[-1])["seconds"])


def _spark(folder: Path) -> float:
    """Seconds of recommendForAllUsers alone, in a process of its own."""
    command = [sys.executable, "-m", "tests.bench.peer_mllib", str(SPARK_USERS), str(SPARK_ITEMS), str(RANK)]
    done = subprocess.run([*command, str(K)], cwd=REPOSITORY, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"Spark failed:\n{done.stdout}{done.stderr}")
    return float(json.loads(done.stdout.splitlines()[-1])["seconds"])

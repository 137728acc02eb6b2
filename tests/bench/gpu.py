"""What one GPU does: DeepFM of 26 fields with 100 million embeddings, and exact search over 10 million items.

python -m tests.bench.gpu
python -m tests.bench.gpu --device cpu --rows 100000 --examples 100000 --items 10000   to see that it works

Training steps are counted end to end and beside it on one batch in memory. Where the time goes is read off
torch's profiler: kernels of the tables, all others, and the time in which the GPU has nothing to do. Last
comes the job's own loop, with evaluations and with checkpoints that are written while it trains.
"""

import argparse
import itertools
import json
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.profiler import ProfilerActivity, profile

from recsys_dist.config import Config, load
from recsys_dist.deepfm.loop import Task, train
from recsys_dist.deepfm.reports import HISTORY, lines
from recsys_dist.deepfm.train import quiet
from recsys_dist.recall.inner_product import GPU_SCORES, nearest_items
from recsys_dist.workspace import Run
from tests.bench import clicks
from tests.bench.training import OF_TABLES, covered, ready

EPOCHS, STEPS, WARM, REPEATS = 3, 40, 10, 3
RANK, K, SEEN, USERS = 64, 100, 100, 1 << 14


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cuda:0")
    parser.add_argument("--rows", type=int, default=100_000_000, help="embeddings of all fields together")
    parser.add_argument("--examples", type=int, default=1 << 23, help="of an epoch")
    parser.add_argument("--items", type=int, default=10_000_000, help="that are searched")
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[65536, 16384])
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    quiet()
    if device.type == "cuda":
        torch.cuda.set_device(device)
        print(f"{torch.cuda.get_device_name(device)}, torch {torch.__version__}", flush=True)
    backend = "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    _tell(search(arguments.items, device))
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        begin = time.perf_counter()
        run = clicks.generated(Path(folder), arguments.rows, arguments.examples, arguments.examples // 64)
        print(f"examples made in {time.perf_counter() - begin:.0f} s", flush=True)
        for size in arguments.batch_sizes:
            common = ["deepfm.objective=logistic", "deepfm.negatives=0", "deepfm.hidden=[400,400,400]"]
            config = load(None, [*common, "deepfm.precision=bfloat16", f"deepfm.batch_size={size}"])
            _tell({"batch": size} | training(config, run, device))
        epochs = config.deepfm.model_copy(update={"epochs": EPOCHS, "patience": EPOCHS})
        config = config.model_copy(update={"deepfm": epochs})
        with tempfile.TemporaryDirectory(prefix="training-", dir=folder) as scratch:
            begin = time.perf_counter()
            train(Task(config, run, Path(scratch)), device)
            found = {"whole loop, s": round(time.perf_counter() - begin, 1)}
            for line in lines(Path(scratch) / HISTORY):
                _tell(found | {name: line[name] for name in ("epoch", "examples_per_s", "train_seconds")})
    dist.destroy_process_group()


def _tell(found: dict[str, Any]) -> None:
    print(json.dumps(found), flush=True)


def training(config: Config, run: Run, device: torch.device) -> dict[str, Any]:
    """Examples a second, end to end and on one batch in memory, and where the time goes."""
    begin = time.perf_counter()
    ahead, steps = ready(config, run, device=device)
    found: dict[str, Any] = {"ready, s": round(time.perf_counter() - begin, 1)}
    first = next(ahead.from_step(0, 1))
    _steps(steps, itertools.repeat(first, WARM), WARM, device)
    floor, whole = [], []
    for repeat in range(REPEATS):
        floor.append(_steps(steps, itertools.repeat(first, STEPS), STEPS, device))
        batches = ahead.from_step(repeat * STEPS, (repeat + 1) * STEPS + WARM)
        _steps(steps, itertools.islice(batches, WARM), WARM, device)
        whole.append(_steps(steps, batches, STEPS, device))
    size = ahead.examples.rows(0)
    found["in memory, examples/s"] = round(size / sorted(floor)[REPEATS // 2])
    found["end to end, examples/s"] = round(size / sorted(whole)[REPEATS // 2])
    if device.type == "cuda":
        found["peak GiB"] = round(torch.cuda.max_memory_allocated(device) / 2**30, 1)
        batches = ahead.from_step(0, STEPS + WARM)
        _steps(steps, itertools.islice(batches, WARM), WARM, device)
        with profile(activities=[ProfilerActivity.CUDA]) as profiler:
            seconds = _steps(steps, batches, STEPS, device) * STEPS
        found |= _shares(profiler, seconds)
    return found


def _steps(steps: Any, batches: Any, number: int, device: torch.device) -> float:
    """Seconds a step."""
    begin = time.perf_counter()
    for _ in range(number):
        steps.step(batches)
    _finish(device)
    return (time.perf_counter() - begin) / number


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _shares(profiler: Any, seconds: float) -> dict[str, Any]:
    """Of so many seconds the shares of the GPU's work, and of its idle time; and its longest kernels."""
    spans, by_kind, by_name = [], {"tables": 0.0, "dense": 0.0, "copies": 0.0}, {}
    for event in profiler.events():
        length = event.time_range.elapsed_us()
        if event.device_type != torch.autograd.DeviceType.CUDA or event.is_user_annotation or not length:
            continue
        name = event.name.lower()
        kind = "tables" if any(word in name for word in OF_TABLES) else "dense"
        kind = "copies" if name.startswith("mem") else kind
        by_kind[kind] += length / 1e6
        by_name[event.name[:60]] = by_name.get(event.name[:60], 0.0) + length / 1e6
        spans.append((event.time_range.start, event.time_range.end))
    busy = covered(spans) / 1e6
    longest = sorted(by_name.items(), key=lambda item: -item[1])[:12]
    shares = {f"{kind}, share": round(of / seconds, 3) for kind, of in by_kind.items()}
    return {
        **shares,
        "nothing to do, share": round(1 - busy / seconds, 3),
        "kernels": {name: round(of / seconds, 3) for name, of in longest},
    }


def search(number: int, device: torch.device) -> dict[str, Any]:
    """Pairs a second of the exact top-100 with what a user has seen left out, and of the products alone."""
    generator = torch.Generator(device).manual_seed(0)
    users = torch.randn(USERS, RANK, device=device, generator=generator)
    items = torch.randn(number + 1, RANK, device=device, generator=generator)
    seen = torch.randint(1, number + 1, (USERS, SEEN), device=device, generator=generator)
    excluded = torch.arange(USERS, device=device).repeat_interleave(SEEN), seen.flatten()
    block = max(1, min(USERS, GPU_SCORES // number))

    def products() -> None:
        out = torch.empty(block, number + 1, device=device)
        for some in users.split(block):
            torch.mm(some, items.T, out=out[: len(some)])

    alone = _seconds(products, device)
    whole = _seconds(lambda: nearest_items(users, items, K, excluded), device)
    pairs = USERS * number
    return {
        "items": number,
        "search, billion pairs/s": round(pairs / whole / 1e9, 2),
        "products alone, billion pairs/s": round(pairs / alone / 1e9, 2),
        "100 million users, hours": round(1e8 * number * whole / pairs / 3600, 2),
    }


def _seconds(call: Callable[[], Any], device: torch.device) -> float:
    """The median of three calls after one."""
    found = []
    for _ in range(4):
        begin = time.perf_counter()
        call()
        _finish(device)
        found.append(time.perf_counter() - begin)
    return sorted(found[1:])[1]


if __name__ == "__main__":
    os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    main()

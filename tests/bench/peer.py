"""How fast DeepFM trains beside FuxiCTR's, and in how much memory: same fields, sizes, examples and batches.

On MovieLens 1M with the sizes of conf/default.yaml, and on a generated log of 26 fields with 100,000 and 10
million embeddings. Both take turns, each with all cores; FuxiCTR with the loader that was fastest for it, and
with Adam, as its configurations have it. What counts is the second epoch, whole: loading, shuffling and
steps, no evaluation. Its memory is that of the training process alone, without its loader's. Ours computes
the MLP in bfloat16 where the processor has it, which FuxiCTR does not offer; what that gains is measured too.
A step of ours at either size is measured again in one process, an epoch of one after an epoch of the other.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from recsys_dist.cluster import MALLOC
from recsys_dist.config import REPOSITORY, Config, load
from recsys_dist.workspace import Run, Workspace
from tests.bench import clicks, training
from tests.bench.features import python
from tests.bench.measure import Measure
from tests.deepfm.workers import run_workers

LOADERS = [{"loader": kind, "num_workers": n} for kind, n in (("npz", 0), ("npz", 1), ("parquet", 1))]
PYTHON = REPOSITORY / ".venv/peers/bin/python"
REPEATS, EPOCHS = 3, 2
OURS = ["deepfm.objective=logistic", "deepfm.negatives=0", "deepfm.precision=bfloat16"]
GENERATED = [*OURS, "deepfm.hidden=[400,400,400]"]
SIZES = SMALL, LARGE = 100_000, 10_000_000


def bench(folder: Path) -> tuple[list[Measure], dict[str, Any]]:
    """Run all of it.

    Args:
        folder: an empty one.

    Returns:
        the measures, and the seconds of every epoch.
    """
    found: dict[str, dict[str, Any]] = {}
    (folder / "clicks").mkdir()
    conf = clicks.movielens(folder / "clicks")
    python("jobs/featurize.py", "--conf", conf)
    config = load(conf, OURS)
    run = Workspace(config).runs("features")[-1]
    clicks.for_fuxictr(run, folder / "movielens")
    tried = {str(choice): fuxictr(config, folder / "movielens", **choice, epochs=2) for choice in LOADERS}
    loader = min(LOADERS, key=lambda choice: tried[str(choice)]["seconds"][-1])
    print(f"FuxiCTR's fastest loader: {loader}", flush=True)
    found["MovieLens 1M"] = _in_turns(config, run, folder / "movielens", loader)
    for rows in SIZES:
        config = load(None, GENERATED)
        run = clicks.generated(folder / str(rows), rows)
        clicks.for_fuxictr(run, folder / f"{rows}-fuxictr")
        found[f"{rows:,} rows"] = _in_turns(config, run, folder / f"{rows}-fuxictr", loader)
        if rows == SMALL:
            plain = _ours(load(None, [*GENERATED, "deepfm.precision=float32"]), run)["seconds"][-1]
    measures = []
    goals = ((1 / 1.5, None), (None, None), (1 / 5, 1))
    for name, (of_time, of_memory) in zip(found, goals, strict=True):
        ours, theirs = found[name]["ours"], found[name]["theirs"]
        measures += [
            Measure(f"training, {name}, examples/s", ours["rate"]),
            Measure(f"  FuxiCTR, {name}, examples/s", theirs["rate"]),
            Measure(f"  time an example / FuxiCTR's, {name}", theirs["rate"] / ours["rate"], of_time),
            Measure(f"  peak memory, {name}, GiB", ours["peak_gib"]),
            Measure(f"  peak memory / FuxiCTR's, {name}", ours["peak_gib"] / theirs["peak_gib"], of_memory),
        ]
    runs = [Workspace(load(None, [f"storage.root={folder / str(n)}"])).runs("features")[-1] for n in SIZES]
    with tempfile.TemporaryDirectory(prefix="bench-") as scratch:
        steps = run_workers(1, training.in_turns, Path(scratch), load(None, GENERATED), runs, 7)[0]
    measures.append(Measure(f"training, a step at {LARGE:,} rows / at {SMALL:,}", steps[1] / steps[0], 1.2))
    small = found[f"{SMALL:,} rows"]["ours"]["rate"]
    gain = plain * small / run.spec().rows["train"]
    measures.append(Measure(f"training, bfloat16 / float32, {SMALL:,} rows, examples/s", gain))
    return measures, {"loaders": tried, **found}


def _ours(config: Config, run: Run) -> dict[str, Any]:
    """Seconds of each epoch and peak memory of our side."""
    with tempfile.TemporaryDirectory(prefix="bench-") as scratch:
        seconds, peak = run_workers(1, training.epochs, Path(scratch), config, run, EPOCHS)[0]
    return {"seconds": seconds, "peak_gib": peak}


def _in_turns(config: Config, run: Run, folder: Path, loader: dict[str, Any]) -> dict[str, Any]:
    """Examples a second (median) and peak memory of both sides, and the seconds of every epoch.

    Args:
        config: of our side.
        run: what is trained on.
        folder: the same for FuxiCTR.
        loader: of FuxiCTR.
    """
    os.environ.update(MALLOC)
    sides: dict[str, list[dict[str, Any]]] = {"ours": [], "theirs": []}
    for _ in range(REPEATS):
        sides["ours"].append(_ours(config, run))
        sides["theirs"].append(fuxictr(config, folder, **loader, epochs=EPOCHS))
    print(json.dumps({folder.name: sides}), flush=True)
    rows = run.spec().rows["train"]
    return {name: _summary(rows, answers) for name, answers in sides.items()}


def _summary(rows: int, answers: Sequence[dict[str, Any]]) -> dict[str, Any]:
    epochs = [seconds for answer in answers for seconds in answer["seconds"][1:]]
    peak = max(answer["peak_gib"] for answer in answers)
    return {"rate": rows / statistics.median(epochs), "peak_gib": peak, "seconds": epochs}


def fuxictr(config: Config, folder: Path, **settings: Any) -> dict[str, Any]:
    """What tests/bench/peer_fuxictr.py answers, with our model's sizes."""
    ours = config.deepfm
    sizes = {"embedding_dim": ours.embedding_dim, "hidden_units": ours.hidden, "batch_size": ours.batch_size}
    threads = len(os.sched_getaffinity(0))
    told = {"seed": config.seed, "threads": threads, "quality": False, **sizes, **settings}
    command = [PYTHON, "-W", "ignore", "-P", "tests/bench/peer_fuxictr.py"]
    done = subprocess.run(
        [*command, folder, json.dumps(told)], cwd=REPOSITORY, capture_output=True, text=True
    )
    if done.returncode:
        sys.exit(f"FuxiCTR failed:\n{done.stdout}{done.stderr}")
    answer: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return answer

"""make bench: how fast the stages are, beside what the same machine needs at least.

python -m tests.bench
python -m tests.bench --events 50000    a smaller run, to see that the benches work
python -m tests.bench --only training   one of them

Prints a table and writes bench.json; with --only what another call found on this machine stays there.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pyspark

from recsys_dist.config import REPOSITORY, load
from recsys_dist.workspace import Workspace
from tests.bench import features, peer, ranking, search, training
from tests.bench.measure import Measure


def machine() -> dict[str, Any]:
    """What the numbers were measured on."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    cpu = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    said = subprocess.run(["java", "-version"], capture_output=True, text=True, check=True)
    return {
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "cpu": cpu[0] if cpu else platform.machine(),
        "python": platform.python_version(),
        "spark": pyspark.__version__,
        "java": (said.stderr + said.stdout).splitlines()[0],
    }


def table(measures: list[Measure]) -> str:
    """A line a measure."""
    width = max(len(measure.name) for measure in measures)
    lines = [f"{'':<{width}}  {'measured':>9}  {'goal':>7}"]
    for measure in measures:
        goal = "" if measure.goal is None else f"<= {measure.goal:g}"
        missed = "  missed" if measure.goal is not None and measure.value > measure.goal else ""
        lines.append(f"{measure.name:<{width}}  {measure.value:>9.2f}  {goal:>7}{missed}".rstrip())
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--events", type=int, default=1_000_000, help="of the smallest generated log")
    parser.add_argument(
        "--only",
        choices=["features", "training", "peer", "search", "ranking"],
        help="leave the others out",
    )
    arguments = parser.parse_args()
    found = {"machine": machine(), "events": arguments.events}
    for name, value in found["machine"].items():
        print(f"{name:<12}{value}")
    with tempfile.TemporaryDirectory(prefix="bench-") as scratch:
        if arguments.only in (None, "features"):
            measures, details = features.bench(arguments.events, Path(scratch))
            _tell(found, "features", measures, details)
        if arguments.only in (None, "training"):
            features.movielens_1m(Path(scratch))
            config = load("conf/movielens_1m.yaml", [f"storage.root={scratch}/movielens"])
            _tell(found, "training", *training.bench(config, Workspace(config).runs("features")[-1]))
        if arguments.only in (None, "peer"):
            _tell(found, "peer", *peer.bench(Path(scratch)))
        if arguments.only in (None, "search"):
            _tell(found, "search", *search.bench(Path(scratch)))
        if arguments.only in (None, "ranking"):
            _tell(found, "ranking", *ranking.bench(Path(scratch)))
    file = REPOSITORY / "bench.json"
    before = json.loads(file.read_text()) if arguments.only and file.exists() else {}
    if before.get("machine") == found["machine"] and before["events"] == found["events"]:
        found = before | found
    file.write_text(json.dumps(found, indent=1) + "\n")
    return 0


def _tell(found: dict[str, Any], name: str, measures: list[Measure], details: dict[str, Any]) -> None:
    print(f"\n{table(measures)}\n", flush=True)
    found[name] = {measure.name: {"value": measure.value, "goal": measure.goal} for measure in measures}
    found[f"{name}_details"] = details


if __name__ == "__main__":
    sys.exit(main())

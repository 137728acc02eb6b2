"""How long the features take: as the log grows, beside a floor, step by step, and on MovieLens 1M.

The floor is what Spark needs to read the same csv file with its own reader, to bring each user's rows
together in order of time and to write them as Parquet. Ours and the floor run alternately, each in a fresh
process with the same session; both are timed from the session's start on.
"""

import json
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv

from recsys_dist import datasets
from recsys_dist.config import REPOSITORY, Config
from recsys_dist.config import load as load_config
from recsys_dist.features.session import start
from tests.bench.measure import Measure
from tests.generated import START, interactions

SCALES = (1, 4, 16)
STEPS_OF = 4
"""The scale of which the steps are told."""
REPEATS = 3
SUBMIT = ["--master", "local[*]", "--driver-memory", "4g"]
FIELDS = [
    {"name": "device", "kind": "categorical", "side": "context", "column": "device"},
    {"name": "recent", "kind": "history", "of": "item", "when": "any", "last": 20},
    {"name": "activity", "kind": "aggregate", "measure": "count"},
    {"name": "mean_value", "kind": "aggregate", "measure": "mean_value"},
    {"name": "idle_days", "kind": "aggregate", "measure": "days_since"},
]


def bench(events: int, folder: Path) -> tuple[list[Measure], dict[str, Any]]:
    """Run all of it.

    Args:
        events: of the smallest generated log; the others have 4 and 16 times as many.
        folder: an empty one.

    Returns:
        the measures, and the seconds of every single run.
    """
    ours: dict[int, list[float]] = {scale: [] for scale in SCALES}
    floor: dict[int, list[float]] = {scale: [] for scale in SCALES}
    steps: list[dict[str, float]] = []
    for scale in SCALES:
        conf = _write_log(folder, events * scale)
        for _ in range(1 if scale == SCALES[-1] else REPEATS):
            seconds, of_step = _featurize(conf)
            ours[scale].append(seconds)
            print(f"{events * scale:>12,} events  {seconds:7.1f} s", flush=True)
            floor[scale].append(_apart(conf))
            print(f"{'floor':>19}  {floor[scale][-1]:7.1f} s", flush=True)
            if scale == STEPS_OF:
                steps.append(of_step)
        (folder / "log.csv").unlink()
    t1, t4, t16 = (statistics.median(ours[scale]) for scale in SCALES)
    floors = {scale: statistics.median(floor[scale]) for scale in SCALES}
    movielens = movielens_1m(folder)
    millions = {scale: f"{events * scale / 1e6:g} million events" for scale in SCALES}
    measures = [
        *(Measure(f"features, {millions[scale]}, s", statistics.median(ours[scale])) for scale in SCALES),
        Measure("features, (t16 - t4) / (t4 - t1)", (t16 - t4) / (t4 - t1), 4.6),
        *(Measure(f"floor, {millions[scale]}, s", floors[scale]) for scale in SCALES),
        Measure(f"features / floor, {millions[1]}", t1 / floors[1]),
        Measure(f"features / floor, {millions[4]}", t4 / floors[4], 3.5),
        Measure(f"features / floor, {millions[16]}", t16 / floors[16], 3.5),
        *(
            Measure(f"  {millions[STEPS_OF]}, step: {name}, s", statistics.median(one[name] for one in steps))
            for name in steps[0]
        ),
        Measure("features, MovieLens 1M, whole process, s", movielens, 45),
    ]
    return measures, {"ours": ours, "floor": floor, "steps": steps}


def _write_log(folder: Path, events: int) -> Path:
    """Write log.csv and the conf file that reads it; return the conf file."""
    rng = np.random.default_rng(7)
    log = interactions(rng, events, max(events // 40, 10), max(events // 50, 1000), days=365)
    devices = pa.array([f"device {n}" for n in range(40)])
    schema = pa.schema(
        [
            ("user", pa.string()),
            ("item", pa.string()),
            ("timestamp", pa.int64()),
            ("value", pa.int8()),
            ("device", pa.string()),
        ]
    )
    with pyarrow.csv.CSVWriter(
        folder / "log.csv", schema, write_options=pyarrow.csv.WriteOptions(quoting_style="none")
    ) as writer:
        for begin in range(0, len(log), 1 << 20):
            part = log.iloc[begin : begin + (1 << 20)]
            columns = [
                pa.array("u" + part.user.astype(str), pa.string()),
                pa.array("p" + part.item.astype(str).str.zfill(7), pa.string()),
                pa.array(START + part.ms // 1000),
                pa.array(rng.integers(1, 6, len(part)).astype(np.int8)),
                devices.take(pa.array(rng.integers(0, len(devices), len(part)))),
            ]
            writer.write_batch(pa.record_batch(columns, schema=schema))
    columns = {"user": "user", "item": "item", "timestamp": "timestamp", "value": "value"}
    conf = {
        "storage": {"root": str(folder / "runs")},
        "data": {"events": {"path": str(folder / "log.csv"), "columns": columns}},
        "label": {"positive_when": "value >= 4"},
        "fields": FIELDS,
        "spark": {"submit": SUBMIT},
    }
    (folder / "conf.yaml").write_text(json.dumps(conf))
    return folder / "conf.yaml"


def _featurize(conf: Path) -> tuple[float, dict[str, float]]:
    """Seconds of a features run from the session's start on, and of each of its steps."""
    python("jobs/featurize.py", "--conf", conf, "--force")
    (manifest,) = conf.parent.glob("runs/features/*/manifest.json")
    run = json.loads(manifest.read_text())
    shutil.rmtree(conf.parent / "runs")
    steps = run["figures"]["seconds"]
    whole = np.datetime64(run["ended"][:-6]) - np.datetime64(run["started"][:-6])
    return whole / np.timedelta64(1, "s") - steps["start"], steps


def _apart(conf: Path) -> float:
    """Seconds of the floor, in a process of its own."""
    return float(python("-m", "tests.bench.features", conf))


def python(*arguments: str | Path) -> str:
    """What a process of its own prints; how Spark starts is shown only where the process fails."""
    done = subprocess.run([sys.executable, *arguments], cwd=REPOSITORY, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(map(str, arguments))} failed:\n{done.stdout}{done.stderr}")
    return done.stdout


def _floor(config: Config, conf: Path) -> float:
    assert config.data.events is not None
    path = config.data.events.path
    with start("floor", config, Path(path).stat().st_size) as spark:
        begin = time.perf_counter()
        rows = spark.read.csv(path, header=True)
        rows = rows.repartition("user").sortWithinPartitions("user", "timestamp")
        rows.write.parquet(str(conf.parent / "floor"))
        seconds = time.perf_counter() - begin
    shutil.rmtree(conf.parent / "floor")
    return seconds


def movielens_1m(folder: Path) -> float:
    """Seconds of `python jobs/featurize.py --conf conf/movielens_1m.yaml`, Python's start included."""
    datasets.fetch("movielens_1m", REPOSITORY / "data")
    begin = time.perf_counter()
    python(
        "jobs/featurize.py", "--conf", "conf/movielens_1m.yaml", "--set", f"storage.root={folder}/movielens"
    )
    return time.perf_counter() - begin


if __name__ == "__main__":
    print(_floor(load_config(sys.argv[1]), Path(sys.argv[1])))

"""The night: every stage in order, each its own process, skipping what is done, and a summary at the end."""

import importlib.util
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow.compute as pc

from recsys_dist import job
from recsys_dist.config import DEFAULT_CONF, REPOSITORY, Config, load
from recsys_dist.errors import ConfigError, RecsysError
from recsys_dist.evaluation.labels import COLUMNS, LABELS
from recsys_dist.scoring.show import show_user
from recsys_dist.workspace import STAGES, Run, Workspace

SPARK_STAGES = ("features", "als")


class StageFailed(RecsysError):
    """A stage ended with this exit code; its own message is printed above."""

    def __init__(self, stage: str, code: int) -> None:
        super().__init__(
            f"{stage} ended with exit code {code}. What was done before it is kept: run again to go on."
        )
        self.exit_code = code


def run_night(conf: str | None, overrides: Sequence[str], samples: int) -> None:
    """Run the stages that are not done, print where the time went, the models' table and sample lists.

    Args:
        conf: as in `load`; handed on to every stage.
        overrides: likewise.
        samples: print the lists of so many users.

    Raises:
        StageFailed: with the exit code of the stage.
    """
    config = load(conf, overrides)
    done: dict[str, Run] = {}
    seconds: dict[str, float] = {}
    for stage in STAGES:
        pins = [f"storage.pin.{name}={run.run_id}" for name, run in done.items()]
        workspace = Workspace(load(conf, [*overrides, *pins]))
        found = _find(workspace, stage, config)
        if found:
            print(f"=== {stage}: done before, {found.uri}", flush=True)
        else:
            print(f"=== {stage}", flush=True)
            start = time.perf_counter()
            _run_stage(stage, config, conf, [*overrides, *pins])
            seconds[stage] = time.perf_counter() - start
            found = workspace.runs(stage)[-1]
        done[stage] = found
    print(_summary(done, seconds))
    for user_id in _sample(done["features"], samples):
        print("\n" + show_user(Workspace(config), user_id))
    print(f"\nLists:  {done['score'].manifest['figures']['table']} (a Delta table)")
    print(f"Report: {done['evaluation'].uri}/report.html")


def command(stage: str, config: Config, conf: str | None, overrides: Sequence[str]) -> list[str]:
    """The command line that starts a stage: spark-submit for the Spark stages, else this Python."""
    script = str(REPOSITORY / "jobs" / STAGES[stage].job)
    settings = [word for override in overrides for word in ("--set", override)]
    arguments = [script, *(["--conf", conf] if conf else []), *settings]
    if stage in SPARK_STAGES:
        return [str(spark_home() / "bin" / "spark-submit"), *config.spark.submit, *arguments]
    return [sys.executable, *arguments]


def spark_home() -> Path:
    """The Spark named by SPARK_HOME, as on a cluster, else the one inside the pyspark package."""
    home = os.environ.get("SPARK_HOME")
    if home:
        return Path(home)
    pyspark = importlib.util.find_spec("pyspark")
    if pyspark is None or pyspark.origin is None:
        raise ConfigError("pyspark is not installed and SPARK_HOME is not set: `make setup` installs it")
    return Path(pyspark.origin).parent


def spark_environment() -> dict[str, str]:
    """What spark-submit needs to know of this installation; the user's own environment goes before it."""
    environment = {"SPARK_HOME": str(spark_home())}
    environment |= dict.fromkeys(("PYSPARK_PYTHON", "PYSPARK_DRIVER_PYTHON"), sys.executable)
    if "SPARK_HOME" not in os.environ:
        environment["SPARK_CONF_DIR"] = str(DEFAULT_CONF.parent / "spark")
        environment["SPARK_LOCAL_IP"] = "127.0.0.1"
    return environment


def _run_stage(stage: str, config: Config, conf: str | None, overrides: Sequence[str]) -> None:
    environment = dict(os.environ)
    if stage in SPARK_STAGES:
        job.require_java()
        environment = spark_environment() | environment
    line = command(stage, config, conf, overrides)
    code = subprocess.run(line, check=False, env=environment).returncode
    if code:
        raise StageFailed(stage, code if code > 0 else 128 - code)


def _find(workspace: Workspace, stage: str, config: Config) -> Run | None:
    return workspace.find(stage, workspace.key(stage, config, workspace.inputs(stage)))


def _summary(done: dict[str, Run], seconds: dict[str, float]) -> str:
    """Where the time went, and every model with its intervals."""
    lines = ["", "Stage          seconds"]
    lines += [f"{stage:<14}{seconds[stage]:8.1f}" for stage in done if stage in seconds]
    lines += [f"{'all':<14}{sum(seconds.values()):8.1f}"] if seconds else ["everything was done before"]
    figures = done["evaluation"].manifest["figures"]
    models = figures["models"]
    columns = [name for name in COLUMNS if name in models["two_stage"]]
    lines += ["", f"{figures['users']} test users, 95% intervals"]
    lines += ["Model             " + "".join(f"{COLUMNS[name]:<23}" for name in columns).rstrip()]
    for model, values in models.items():
        cells = [f"{v['value']:.4f} ({v['low']:.4f}-{v['high']:.4f})" for v in map(values.get, columns)]
        lines += [f"{LABELS[model]:<18}" + "".join(f"{cell:<23}" for cell in cells).rstrip()]
    return "\n".join(lines)


def _sample(features: Run, n: int) -> list[str]:
    """Raw ids of n users with a history, spread over the vocabulary."""
    if not n:
        return []
    users = features.table("users/as_of=date", columns=["user_id", "liked"])
    ids = users.filter(pc.greater(pc.list_value_length(users["liked"]), 4))["user_id"].to_pylist()
    return [ids[place] for place in np.linspace(0, len(ids) - 1, n + 2, dtype=int)[1:-1]] if ids else []

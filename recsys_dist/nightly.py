"""The night: every stage in order, each its own process, skipping what is done, and a summary at the end."""

import datetime as dt
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from typing import Any

from recsys_dist import job
from recsys_dist.config import REPOSITORY, Config, load
from recsys_dist.errors import DataError, RecsysError, RetryableError
from recsys_dist.evaluation.labels import LABELS, figure, metric_label, summary_columns
from recsys_dist.schema import FUTURE
from recsys_dist.scoring.publish import is_published
from recsys_dist.scoring.show import sample_users, show_user
from recsys_dist.spark import spark_environment, submit
from recsys_dist.workspace import STAGES, Run, Workspace

SPARK_STAGES = ("features", "als", "recall")


class StageFailed(RecsysError):
    """A stage ended with this exit code; its own message is printed above."""

    def __init__(self, stage: str, code: int) -> None:
        super().__init__(
            f"{stage} ended with exit code {code}; what it said is above. The stages before it are kept: "
            f"once that is mended, run again to go on."
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
        workspace = Workspace(load(conf, [*pins, *overrides]))
        found = find(workspace, stage, config)
        if found:
            print(f"=== {stage}: done before, {found.uri}", flush=True)
        else:
            print(f"=== {stage}", flush=True)
            start = time.perf_counter()
            try:
                run_stage(stage, config, conf, [*pins, *overrides])
            except StageFailed:
                if "evaluation" in done:
                    print(_summary(done, seconds))
                raise
            seconds[stage] = time.perf_counter() - start
            found = find(workspace, stage, config)
            if found is None:
                raise RetryableError(
                    f"The {stage} run that was just made does not fit what was asked: the log or the code "
                    f"changed in the meantime. Run again."
                )
        print(f"    {headline(stage, found.manifest['figures'])}", flush=True)
        done[stage] = found
    print(_summary(done, seconds))
    figures = done["score"].manifest["figures"]
    for user_id in sample_users(figures["table"], dt.date.fromisoformat(figures["date"]), samples):
        print("\n" + show_user(Workspace(config), user_id, dt.date.fromisoformat(figures["date"])))
    print(f"\nLists: {figures['table']} (a Delta table)")


def headline(stage: str, figures: dict[str, Any]) -> str:
    """What a run has come to, in one line."""
    match stage:
        case "features":
            aside = sum(sum(reasons.values()) for reasons in figures["quarantined"].values())
            later = figures["quarantined"]["events"].get(FUTURE, 0)
            return (
                f"{figures['rows']['events']:,} events, {figures['users']:,} users, {figures['items']:,} "
                f"items, {aside - later:,} rows set aside, and {later:,} events as after score.date"
            )
        case "als":
            return "user and item factors"
        case "recall":
            neighbors = ", ".join(
                f"{rows:,} {name} neighbours" for name, rows in figures["neighbors"].items()
            )
            return f"{figures['next_items']:,} next items, {neighbors}, of {figures['events']:,} events"
        case "deepfm":
            metric = figures["metric"]
            return f"best epoch {figures['best_epoch']}, valid {metric.upper()} {figures[metric]:.4f}"
        case "evaluation":
            return str(figures["verdict"]["text"])
        case _:
            return f"{figures['served']:,} of {figures['users']:,} users have a list for {figures['date']}"


def command(stage: str, config: Config, conf: str | None, overrides: Sequence[str]) -> list[str]:
    """The command line that starts a stage: spark-submit for the Spark stages, else this Python."""
    script = REPOSITORY / "jobs" / STAGES[stage].job
    settings = [word for override in overrides for word in ("--set", override)]
    words = [*(["--conf", conf] if conf else []), *settings]
    if stage in SPARK_STAGES:
        return submit(script, words, config)
    return [sys.executable, str(script), *words]


def run_stage(stage: str, config: Config, conf: str | None, overrides: Sequence[str]) -> None:
    """Make a run of a stage, in a process of its own.

    Raises:
        StageFailed: with its exit code.
    """
    environment = dict(os.environ)
    if stage in SPARK_STAGES:
        job.require_java()
        environment = spark_environment() | environment
    line = command(stage, config, conf, overrides)
    code = subprocess.run(line, check=False, env=environment).returncode
    if code:
        raise StageFailed(stage, code if code > 0 else 128 - code)


def find(workspace: Workspace, stage: str, config: Config) -> Run | None:
    """The run of a stage that need not be made: the pinned one, or one with an equal key."""
    pinned = config.storage.pin.get(stage)  # type: ignore[call-overload]
    if pinned:
        found = next((run for run in workspace.runs(stage) if run.run_id == pinned), None)
        if found is None:
            raise DataError(
                f"storage.pin.{stage}={pinned}: there is no such run under {workspace.uri}/{stage}"
            )
        return found
    found = workspace.find(stage, workspace.key(stage, config, workspace.inputs(stage)))
    return None if found and stage == "score" and not is_published(found) else found


def _summary(done: dict[str, Run], seconds: dict[str, float]) -> str:
    """Where the time went, and every model with its intervals."""
    lines = ["", "Stage          seconds"]
    lines += [f"{stage:<14}{seconds[stage]:8.1f}" for stage in done if stage in seconds]
    lines += [f"{'all':<14}{sum(seconds.values()):8.1f}"] if seconds else ["everything was done before"]
    if "evaluation" not in done:
        return "\n".join(lines)
    evaluation = done["evaluation"]
    figures, models = evaluation.manifest["figures"], evaluation.manifest["figures"]["models"]
    columns = summary_columns(evaluation.manifest["config"]["evaluation"]["k"])
    lines += ["", f"{figures['users']} test users, 95% intervals"]
    lines += ["Model             " + "".join(f"{label:<23}" for label in columns.values()).rstrip()]
    for model, values in models.items():
        cells = [f"{v['value']:.4f} ({v['low']:.4f}-{v['high']:.4f})" for v in map(values.get, columns)]
        lines += [f"{LABELS[model]:<18}" + "".join(f"{cell:<23}" for cell in cells).rstrip()]
    if found := figures.get("predictions"):
        numbers = ", ".join(
            f"{metric_label(name)} {figure(name, of)}" for name, of in found["figures"].items()
        )
        lines += ["", f"Predictions of {found['examples']:,} test events: {numbers}"]
    return "\n".join([*lines, "", f"Report: {evaluation.uri}/report.html"])

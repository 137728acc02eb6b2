"""A search: Ray Tune trains with many settings, ASHA stops those that fall behind, and the best is kept.

Each trial is the ordinary loop in one process, in a folder of its own. What stands there is all that the same
command needs after a crash: trials that have ended are not repeated, their histories are told to the new
scheduler; others go on from their checkpoints. Ray's own snapshots would lag seconds behind, and do not hold
what the scheduler knows.
"""

import dataclasses
import json
import logging
import math
import os
import shlex
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from recsys_dist.cluster import local_or_cluster

# isort: split
# After recsys_dist.cluster, which sets what Ray reads when it is imported.
import numpy as np
import ray
import yaml
from ray import tune
from ray.tune.schedulers import ASHAScheduler

from recsys_dist.config import Config, merge
from recsys_dist.deepfm import train
from recsys_dist.deepfm.reports import HISTORY, best, forget_refused, lines, refused, refusing, write_json
from recsys_dist.errors import ConfigError, RecsysError, RetryableError, named
from recsys_dist.workspace import OpenRun

# Read by Tune in this process. It prints nothing, and writes no files beside its own; a trial may end without
# a result, when its settings are refused; Ctrl-C ends this job as it does any other.
os.environ["RAY_AIR_NEW_OUTPUT"] = "0"
os.environ["TUNE_DISABLE_AUTO_CALLBACK_LOGGERS"] = "1"
os.environ["TUNE_PRINT_ALL_TRIAL_ERRORS"] = "0"
os.environ["TUNE_DISABLE_STRICT_METRIC_CHECKING"] = "1"
os.environ["TUNE_DISABLE_SIGINT_HANDLER"] = "1"

TRIALS, BEST = "trials.jsonl", "best.yaml"
ENDED = "ended.json"
"""In a trial's folder once it has ended: its row of trials.jsonl."""
DRAWS = 100
"""A trial's settings are drawn at most so often where all before had been drawn already."""


def make(
    config: Config, run: OpenRun, asked: dict[str, Any], overrides: Sequence[str] = ()
) -> dict[str, Any]:
    """Search, and write best.yaml, a conf file, and trials.jsonl, a row a trial.

    best.yaml is the user's conf file with the chosen settings over it, and nothing else: what `--set` said,
    such as another root or fewer epochs, held for the search alone, and is only named there, in a comment.

    Args:
        config: what it is all about.
        run: reads the features run.
        asked: what the user's conf file says.
        overrides: what `--set` said.

    Returns:
        The run's figures.

    Raises:
        ConfigError: the space is empty or mixes what cannot be compared, or the Ray cluster is too small.
        RecsysError: every trial failed; of the first one's kind.
    """
    from recsys_dist.deepfm.validation import LOWER_IS_BETTER

    start = time.perf_counter()
    points = draw(config)
    run.training.mkdir(parents=True, exist_ok=True)
    search = _prepare(config, run, points, run.training)
    if search.left:
        with local_or_cluster(min(config.tune.concurrent, len(points)), "tune.concurrent"):
            _run(search, config)
    rows = [search.row(number) for number in range(1, len(points) + 1)]
    succeeded = [row for row in rows if "error" not in row]
    if not succeeded:
        raise named(rows[0]["class"], f"All {len(rows)} trials failed, the first with: {rows[0]['error']}")
    metric = search.metric
    first = (min if metric in LOWER_IS_BETTER else max)(succeeded, key=lambda row: row[metric])
    told = f"trial {first['trial']}, {metric.upper()} {first[metric]:.4f} on valid in epoch {first['epoch']}"
    conf = merge(asked, {"deepfm": first["settings"]})
    text = yaml.safe_dump(conf, sort_keys=False, allow_unicode=True, default_flow_style=None, width=110)
    features = run.inputs["features"].run_id
    head = f"# The best of {len(rows)} trials: {told}.\n# Search {run.run_id}, features run {features}.\n"
    if overrides:
        words = " ".join(f"--set {shlex.quote(override)}" for override in overrides)
        head += f"# Searched with the following, which is not in here: {' '.join(words.split())}\n"
    run.write_text(TRIALS, "".join(f"{json.dumps(row)}\n" for row in rows))
    run.write_text(BEST, head + text)
    print(f"  the best: {told}: {_words(first['settings'])}")
    print(f"  a conf file with these settings: {run.uri}/{BEST}")
    return {
        "metric": metric,
        metric: first[metric],
        "best_trial": first["trial"],
        "settings": first["settings"],
        "trials": len(rows),
        "failed": len(rows) - len(succeeded),
        "stopped_early": sum(row["stopped_early"] for row in succeeded),
        "epochs": sum(row["epochs"] for row in succeeded),
        "seconds": round(time.perf_counter() - start, 1),
    }


def left_behind(run: OpenRun) -> bool:
    """Has a driver left trials of this run?"""
    return train.left_behind(run, "trial_*")


def draw(config: Config) -> list[dict[str, Any]]:
    """The settings of every trial, no two alike. They follow from seed and space; more trials only add some.

    Raises:
        ConfigError: the space is empty.
    """
    if not config.tune.space:
        raise ConfigError(
            "tune.space is empty: say which settings are to be tried, for example "
            "--set tune.space.dropout='{uniform: [0, 0.5]}'"
        )
    generator = np.random.default_rng(config.seed)
    domains = {}
    for key, distribution in sorted(config.tune.space.items()):
        values = distribution.model_dump(mode="json")[distribution.kind]
        domain = getattr(tune, distribution.kind)
        domains[key] = domain(values) if distribution.kind == "choice" else domain(*values)
    found: dict[str, dict[str, Any]] = {}
    for _ in range(DRAWS * config.tune.trials):
        point = {key: domain.sample(random_state=generator) for key, domain in domains.items()}
        # Four digits are enough, and can be read.
        point = {key: float(f"{of:.4g}") if isinstance(of, float) else of for key, of in point.items()}
        found.setdefault(json.dumps(point), point)
        if len(found) == config.tune.trials:
            break
    return list(found.values())


@dataclass(frozen=True)
class _Search:
    """The trials, by number from 1."""

    folder: Path
    metric: str
    tasks: dict[int, Any]
    """What the loop is to do, of the trials whose settings go together."""
    points: list[dict[str, Any]]

    def place(self, number: int) -> Path:
        """A trial's folder."""
        return self.folder / f"trial_{number}"

    @property
    def left(self) -> list[int]:
        """The trials that have not ended."""
        return [number for number in self.tasks if not (self.place(number) / ENDED).exists()]

    def row(self, number: int) -> dict[str, Any]:
        """What came out of a trial that has ended."""
        return dict(json.loads((self.place(number) / ENDED).read_text()))

    def end(self, number: int, error: RecsysError | None = None) -> None:
        """Write down and print what came out of a trial."""
        place, point = self.place(number), self.points[number - 1]
        place.mkdir(exist_ok=True)
        row: dict[str, Any] = {"trial": number, "settings": point}
        if error is None:
            history = lines(place / HISTORY)
            line = best(history)
            settings, epochs = self.tasks[number].config.deepfm, history[-1]["epoch"]
            row |= {self.metric: line[self.metric], "epoch": line["epoch"], "epochs": epochs}
            ended = epochs == settings.epochs or epochs - line["epoch"] >= settings.patience
            row |= {"stopped_early": not ended, "attempts": history[-1]["attempt"] + 1}
            row |= {"history": [line[self.metric] for line in history]}
            what = f"{self.metric.upper()} {row[self.metric]:.4f}  {epochs:>3} epochs"
            what += "               " if ended else ", stopped early"
        else:
            row |= {"class": type(error).__name__, "error": str(error)}
            what = "failed"
        write_json(place / ENDED, row)
        # The trial's process has ended its training, or waits in on_epoch: it writes none of these. After a
        # RetryableError another try may go on from them.
        if not isinstance(error, RetryableError):
            for path in place.glob("step_*"):
                shutil.rmtree(path, ignore_errors=True)  # what stays goes with the folder
        print(f"  trial {number:>3}  {what}  {_words(point)}", flush=True)
        if error is not None:
            print(f"    {error}", flush=True)


def _prepare(config: Config, run: OpenRun, points: list[dict[str, Any]], folder: Path) -> _Search:
    """The search as it stands: what is to be done, and what was ended by a driver before this one."""
    from recsys_dist.deepfm.loop import Task

    features = run.inputs["features"]
    tasks, wrong = {}, {}
    for number, point in enumerate(points, start=1):
        try:
            # What is searched is what the pair fields stand beside.
            own = config.with_deepfm(point | {"pair": ()})
            # What YAML takes for a text, such as 1e-4, is a number from here on.
            points[number - 1] = own.deepfm.model_dump(mode="json", include=set(point))
            before = train.earlier(own, run.inputs)
            if before:
                before.require_intact("model", "checkpoint")
            tasks[number] = Task(own, features, folder / f"trial_{number}", start_from=before)
        except ConfigError as error:
            wrong[number] = error
    metrics = sorted({task.config.deepfm.metric for task in tasks.values()})
    if len(metrics) > 1:
        raise ConfigError(
            f"tune.space: {' and '.join(metrics)} of different trials cannot be compared. Search over one "
            f"kind of objective, and either with negatives of 0 or with others."
        )
    if tasks:
        train.require_enough(features, next(iter(tasks.values())).config)
    search = _Search(folder, metrics[0] if metrics else "", tasks, points)
    space = ", ".join(config.tune.space)
    print(f"  {len(points)} trials of {space}; {config.tune.concurrent} at a time", flush=True)
    for place in folder.glob("trial_*"):
        if (place / ENDED).exists() and search.row(int(place.name[6:])).get("class") == "RetryableError":
            (place / ENDED).unlink()  # another try may end better
    finished = len(tasks) - len(search.left)
    if finished:
        print(f"  {finished} of them were finished before", flush=True)
    for number in wrong:
        search.end(number, wrong[number])
    return search


def _run(search: _Search, config: Config) -> None:
    """Run what is left of the trials."""
    from recsys_dist.deepfm.validation import LOWER_IS_BETTER

    shutil.rmtree(search.folder / train.RAY, ignore_errors=True)  # of a driver that died
    logging.getLogger("ray.tune").setLevel(logging.CRITICAL)  # _Told tells of failed trials
    settings = config.tune
    epochs = max(task.config.deepfm.epochs for task in search.tasks.values())
    scheduler = ASHAScheduler(
        time_attr="epoch",
        metric=search.metric,
        mode="min" if search.metric in LOWER_IS_BETTER else "max",
        max_t=epochs,
        grace_period=min(settings.grace_epochs, epochs),
        reduction_factor=settings.reduction_factor,
    )
    left = search.left
    for number in set(search.tasks) - set(left):
        trial = SimpleNamespace(trial_id=f"before_{number}")
        scheduler.on_trial_add(None, trial)
        for line in lines(search.place(number) / HISTORY):
            scheduler.on_trial_result(None, trial, line)
        scheduler.on_trial_remove(None, trial)
    together, gpus = min(settings.concurrent, len(search.points)), train.gpus_of_cluster()
    if 0 < gpus < together:
        together = gpus
        print(f"  {gpus} at a time: each trial has a GPU, and the cluster no more", flush=True)
    resources = {"cpu": _cores(together), "gpu": min(1, gpus)}
    trainable = tune.with_parameters(_trial, tasks=search.tasks, resources=resources)
    tune.Tuner(
        tune.with_resources(trainable, resources),
        param_space={"trial": tune.grid_search(left)},
        tune_config=tune.TuneConfig(scheduler=scheduler, max_concurrent_trials=together, reuse_actors=True),
        run_config=tune.RunConfig(
            name=train.RAY,
            storage_path=str(search.folder),
            failure_config=tune.FailureConfig(max_failures=config.deepfm.max_failures),
            callbacks=[_Told(search)],
            verbose=0,
        ),
    ).fit()


def _cores(together: int) -> int:
    """Of each of the trials that run at the same time, so that all find a place."""
    nodes = [int(node["Resources"].get("CPU", 0)) for node in ray.nodes() if node["Alive"]]
    nodes = [cores for cores in nodes if cores]
    return max(1, min(nodes) // math.ceil(together / len(nodes)))


class _Told(tune.Callback):
    """What Ray Tune tells of the trials."""

    def __init__(self, search: _Search) -> None:
        self.search = search

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """It came to its end, was stopped, or its settings were refused."""
        number = trial.config["trial"]
        self.search.end(number, refused(self.search.place(number)))

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Its process died more often than is allowed."""
        text = Path(trial.error_file).read_text()
        self.search.end(trial.config["trial"], RetryableError(text.strip().splitlines()[-1]))


def _trial(trial: dict[str, int], tasks: dict[int, Any], resources: dict[str, int]) -> None:
    """What a trial's process runs."""
    train.quiet()

    import torch
    import torch.distributed as dist

    from recsys_dist.deepfm.loop import train as train_loop

    task = tasks[trial["trial"]]
    task.folder.mkdir(exist_ok=True)
    forget_refused(task.folder)
    metric = task.config.deepfm.metric

    def report(line: dict[str, Any]) -> None:
        tune.report({"epoch": line["epoch"], metric: line[metric]})

    for line in lines(task.folder / HISTORY):  # of an earlier process
        report(line)
    torch.set_num_threads(resources["cpu"])
    gpu = resources["gpu"] > 0
    dist.init_process_group("nccl" if gpu else "gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        with refusing(task.folder):
            train_loop(dataclasses.replace(task, on_epoch=report), torch.device("cuda:0" if gpu else "cpu"))
    finally:
        dist.destroy_process_group()  # the next trial has its own, in the same process


def _words(point: dict[str, Any]) -> str:
    return " ".join(f"{key}={json.dumps(value)}" for key, value in point.items())

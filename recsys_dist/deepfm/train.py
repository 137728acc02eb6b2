"""A deepfm run: Ray Train starts the workers, watches them, and the best checkpoint is published."""

import json
import logging
import math
import os
import shutil
import threading
import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from recsys_dist.cluster import local_or_cluster

# isort: split
# After recsys_dist.cluster, which sets what Ray reads when it is imported.
import pyarrow.compute
import pyarrow.fs
import ray
import ray.train
from ray.train import FailureConfig, LoggingConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer
from ray.train.v2.api.exceptions import TrainingFailedError

from recsys_dist.config import FIT_ON, OF_FACTORS, Config
from recsys_dist.deepfm.reports import (
    DATA,
    HISTORY,
    NOW,
    PLAN,
    RESUMED,
    best,
    forget_refused,
    lines,
    refused,
    refusing,
    write_bytes,
    write_json,
)
from recsys_dist.deepfm.tracking import Tracking
from recsys_dist.errors import ConfigError, DataError, RetryableError
from recsys_dist.workspace import OpenRun, Run, Workspace

HEAD, LEARNED = "head.safetensors", "head.json"
"""What was learned of the pair fields, and what is told of it."""
RAY = "ray"
"""The folder in which Ray Train keeps its own state."""
MEASURED = {
    "ndcg@10": "NDCG@10",
    "auc": "AUC",
    "gauc": "GAUC",
    "logloss": "log loss",
    "calibration": "calibration",
    "rmse": "RMSE",
    "mse": "MSE",
}
"""Figures of the valid part, the deciding one of a kind first, to what is printed."""


def make(config: Config, run: OpenRun) -> dict[str, Any]:
    """Train on the features run that `run` reads, and write checkpoint/, model/ and history.jsonl.

    Returns:
        The run's figures.

    Raises:
        ConfigError: see `check`; the Ray cluster is too small, or MLflow is asked for and not installed.
        DataError: the run to start from is damaged.
        RetryableError: it cannot be reached, or the training failed more often than allowed.
    """
    start = time.perf_counter()
    require_enough(run.inputs["features"], config)
    before = check(config, run.inputs)
    if before and not left_behind(run):
        before.require_intact("model", "checkpoint")
        print(f"  starts from {before.uri}", flush=True)
    run.training.mkdir(parents=True, exist_ok=True)
    least, most = config.deepfm.workers
    with local_or_cluster(most, least=least), Tracking(config, run) as tracking:
        fitted = _fit(config, run, before, tracking)
    figures = _publish(config, run, fitted)
    return figures | {"seconds": round(time.perf_counter() - start, 1)}


def check(config: Config, inputs: Mapping[str, Run]) -> Run | None:
    """The run that `deepfm.start_from` names, if any.

    Raises:
        ConfigError: see `earlier`; the runs lack what pair fields are learned with, or the earlier model has
            learned it with other factors.
    """
    from recsys_dist.deepfm.late import require_tables

    before = earlier(config, inputs)
    if config.deepfm.pair and before is None:
        require_tables(inputs, config.deepfm.fit_on)
    elif before and "als" in inputs:
        told, found = before.manifest["figures"].get("factors"), _factors(inputs["als"])
        if told != found:
            raise ConfigError(
                f"deepfm.start_from={config.deepfm.start_from}: what the pair fields of measure als are "
                f"worth was learned in {before.uri} with factors of {told}, and those of "
                f"{inputs['als'].uri} are of {found}. Fit ALS with those settings, or leave start_from out "
                f"once."
            )
    return before


def _factors(als: Run) -> dict[str, Any]:
    """What an als run's inner products are like."""
    figures = als.manifest["figures"]
    return {name: figures[name] for name in OF_FACTORS if figures.get(name) is not None}


def earlier(config: Config, inputs: Mapping[str, Run]) -> Run | None:
    """The run that `deepfm.start_from` names, if any.

    Raises:
        ConfigError: see `earlier_run` and `require_unseen`; or a setting names a field that is not there.
    """
    from recsys_dist.deepfm.model import used_fields
    from recsys_dist.deepfm.start_from import earlier_run, require_unseen

    spec = used_fields(inputs["features"].spec(), config.deepfm)
    found = earlier_run(Workspace(config), config.deepfm, spec)
    if found:
        require_unseen(found, inputs["features"])
    return found


def left_behind(run: OpenRun, sign: str = "**/step_*") -> bool:
    """Has a driver left checkpoints of this run, from which to go on?

    Args:
        run: that may be gone on with.
        sign: glob of what it left in the run's training folder.
    """
    return any(run.training.glob(sign))


def require_enough(features: Run, config: Config) -> None:
    """Raise a DataError where there is nothing to train on or to validate with."""
    spec = features.spec()
    if not config.deepfm.negatives:
        return  # what reads the examples looks at their labels
    present = features.dataset("items").count_rows(filter=pyarrow.compute.field("present"))
    if present < 2:
        raise DataError(
            f"{features.uri} has {present} items, and ranking needs at least 2: it "
            f"draws others beside each positive. Check data.events.columns.item, and give a longer log."
        )
    for split in ("train", "valid"):
        if not spec.positives[split]:
            raise DataError(
                f"{features.uri} has no positive example in split={split}, of {spec.rows[split]} examples. "
                f"Check label.positive_when and split.fractions, and run jobs/featurize.py again."
            )


def _best_checkpoint(folder: Path) -> Path:
    """That of a fit's best step.

    Raises:
        DataError: it is not there, or not what was saved.
    """
    from recsys_dist.deepfm.checkpoint import complete, problem_of

    step = int(best(lines(folder / HISTORY))["step"])
    found = {of: path for of, _, path in complete(folder)}
    if step not in found:
        raise DataError(
            f"{folder} has no checkpoint of step {step}, the best one by {HISTORY}, but of "
            f"{', '.join(map(str, found)) or 'none'}: train again, --force."
        )
    wrong = problem_of(found[step])
    if wrong:
        raise DataError(
            f"checkpoint {found[step]} is refused: {wrong}. It is the best one: train again, --force."
        )
    return found[step]


@dataclass(frozen=True)
class _Fitted:
    """What the training left in its folders."""

    history: list[dict[str, Any]]
    """Of the fit on train."""
    folder: Path
    """Of the last fit, whose best checkpoint is published; that of a fit of given epochs is its last."""
    head: dict[str, Any] = field(default_factory=dict)
    """The weights that say what pair fields are worth, by name; where there are such fields."""
    told: dict[str, Any] = field(default_factory=dict)
    """What is told of them, where they were learned."""


def _fit(config: Config, run: OpenRun, before: Run | None, tracking: Tracking) -> _Fitted:
    """Fit on train, and, where it is asked for, once more on train and valid, for as many epochs.

    What pair fields are worth is learned on events that the model does not know, and stays the same beside
    one that knows all. Those of valid, where that is fitted on in the end; else the late ones of train, for
    which there is a fit on the early ones alone. A model that starts from an earlier one, which knows them
    all, takes over that one's head.
    """
    from safetensors.torch import load_file

    from recsys_dist.deepfm.late import Early, require_earlier
    from recsys_dist.deepfm.start_from import earlier_head

    folder, settings = run.training, config.deepfm
    features, recall = run.inputs["features"], run.inputs.get("recall")
    task = {"config": config.with_deepfm({"pair": ()}), "features": features, "start_from": before}
    early, learned, refit = (folder / name for name in ("early", "head", "refit"))
    if settings.pair and not before and not learned.exists():
        assert recall is not None, "checked with the configuration"
        # Found out now, not when the model is fitted.
        require_earlier(run.inputs, None if settings.fit_on == "train_valid" else Early(features, recall))
    if not any(
        later.exists() for later in (early, learned, refit)
    ):  # or a driver that died was there already
        _train(config, folder, task, tracking)
    history = lines(folder / HISTORY)
    epochs = best(history)["epoch"]
    print(f"  the best epoch is {epochs} (* marks an epoch better than all before)")
    head: dict[str, Any] = {}
    told: dict[str, Any] = {}
    again = settings.fit_on == "train_valid"
    if settings.pair and before:
        head = earlier_head(before)
        print(f"  what the pair fields are worth is as in {before.uri}")
    elif settings.pair:
        assert recall is not None, "checked with the configuration"
        if not again and not learned.exists():
            print(f"  fitted anew on what is before the late events of train, for {epochs} epochs:")
            early.mkdir(exist_ok=True)
            alone = {"start_from": None, "before_late": recall, "epochs": epochs}
            _train(config, early, task | alone, tracking)
        if not (learned / HEAD).exists():
            learned.mkdir(exist_ok=True)
            checkpoints = {
                "whole": _best_checkpoint(folder),
                "early": None if again else _best_checkpoint(early),
            }
            known = {"config": config, "inputs": dict(run.inputs)}
            _learn_head(config, known | checkpoints, learned)
        head, told = load_file(learned / HEAD), json.loads((learned / LEARNED).read_text())
        print(
            f"  what the pair fields are worth is learned on {told['of']} events of {told['lists']:,} users: "
            f"valid NDCG@10 of {told['measured_on']:,} users {told['ndcg@10']:.4f} with them, "
            f"{told['without']:.4f} without",
            flush=True,
        )
    if not again:
        return _Fitted(history, folder, head, told)
    parts = FIT_ON[settings.fit_on]
    print(f"  fitted anew on {' and '.join(parts)} for {epochs} epochs:")
    refit.mkdir(exist_ok=True)
    _train(config, refit, task | {"parts": parts, "epochs": epochs}, tracking)
    return _Fitted(history, refit, head, told)


def _learn_head(config: Config, task: dict[str, Any], folder: Path) -> None:
    """Write HEAD and LEARNED into a folder, in one Ray worker."""
    worker = ray.remote(_head_worker).options(
        num_gpus=min(1, gpus_of_cluster()), max_retries=config.deepfm.max_failures
    )
    try:
        ray.get(worker.remote(task, folder))
    except ray.exceptions.RayError as error:
        raise RetryableError(
            f"Learning what the pair fields are worth failed: {error}. If this is not the data's or the "
            f"settings' fault, run the job again."
        ) from error
    _require_accepted(folder)


def _head_worker(task: dict[str, Any], folder: Path) -> None:
    """What the Ray worker runs that learns the head."""
    quiet()
    import safetensors.torch
    import torch

    from recsys_dist.deepfm.head import learn

    gpu = torch.cuda.is_available() and bool(ray.get_gpu_ids())
    torch.set_num_threads(os.cpu_count() or 1)
    forget_refused(folder)  # of a driver that died
    with refusing(folder):
        head, told = learn(**task, device=torch.device("cuda" if gpu else "cpu"))
        write_json(folder / LEARNED, told)
        write_bytes(folder / HEAD, safetensors.torch.save(head))


def _train(config: Config, folder: Path, task: dict[str, Any], tracking: Tracking) -> None:
    """Run the loop on Ray Train until it is done, with its files in `folder`."""
    # Of a driver that died.
    shutil.rmtree(folder / RAY, ignore_errors=True)
    forget_refused(folder)
    gpus = gpus_of_cluster()
    workers = on_gpus(config.deepfm.num_workers, gpus) if gpus else config.deepfm.num_workers
    if workers != config.deepfm.num_workers:
        print(
            f"  {workers} workers in place of deepfm.num_workers={config.deepfm.num_workers}: each has a "
            f"GPU, and the cluster has {gpus}",
            flush=True,
        )
    stop = threading.Event()
    printer = threading.Thread(target=_print_progress, args=(folder, stop, tracking), daemon=True)
    trainer = TorchTrainer(
        _worker,
        train_loop_config=task | {"folder": folder},
        torch_config=TorchConfig(backend="nccl" if gpus else "gloo"),
        scaling_config=ScalingConfig(
            num_workers=workers,
            use_gpu=bool(gpus),
            elastic_resize_monitor_interval_s=config.deepfm.resize_seconds,
        ),
        run_config=RunConfig(
            name=RAY,
            storage_path=str(folder),
            failure_config=FailureConfig(max_failures=config.deepfm.max_failures),
            logging_config=LoggingConfig("ERROR"),
        ),
    )
    printer.start()
    try:
        trainer.fit()
    except TrainingFailedError as error:
        _require_accepted(folder)
        failures = config.deepfm.max_failures + 1
        raise RetryableError(
            f"The training failed {failures} times, the last time with: {error}. Its checkpoints are in "
            f"{folder}. If this is not the data's or the settings' fault, run the job again."
        ) from error
    finally:
        stop.set()
        printer.join()
    _require_accepted(folder)


def gpus_of_cluster() -> int:
    """How many GPUs Ray has."""
    return int(ray.cluster_resources().get("GPU", 0))


def on_gpus(workers: int | tuple[int, int], gpus: int) -> int | tuple[int, int]:
    """How many workers there are where each has one of so many GPUs.

    Args:
        workers: as in `deepfm.num_workers`.
        gpus: of the cluster, 1 or more.
    """
    if isinstance(workers, int):
        return min(workers, gpus)
    return min(workers[0], gpus), workers[1]


def _require_accepted(folder: Path) -> None:
    """Raise what a worker found wrong with settings or data."""
    wrong = refused(folder)
    if wrong:
        raise wrong from None


def quiet() -> None:
    """Keep the libraries of a worker from writing. Before torchrec is imported: Ray opens the root logger at
    INFO, and fbgemm and torch.fx write there."""
    for name in (None, "torch", "torch.fx"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch")


def _worker(task: dict[str, Any]) -> None:
    """What each Ray Train worker runs."""
    quiet()
    import torch

    from recsys_dist.deepfm.loop import Task, train

    device = ray.train.torch.get_device()
    context, folder = ray.train.get_context(), task["folder"]
    on_this_node = context.get_local_world_size()
    if device.type == "cpu":
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // on_this_node))
    if refused(folder):
        return  # those before have found it
    with refusing(folder, context.get_world_rank(), context.get_world_size()):
        train(Task(**task), device)


def _publish(config: Config, run: OpenRun, fitted: _Fitted) -> dict[str, Any]:
    """Move the chosen checkpoint to its place and write model/ from it."""
    import torch

    from recsys_dist.deepfm.checkpoint import load_weights
    from recsys_dist.deepfm.model import DeepFM, used_fields
    from recsys_dist.deepfm.not_finite import diverged
    from recsys_dist.deepfm.published import publish

    history, folder, line = fitted.history, fitted.folder, best(fitted.history)
    path = _best_checkpoint(folder)
    spec = used_fields(run.inputs["features"].spec(), config.deepfm)
    model = DeepFM(spec, config.deepfm, tables="meta")
    like, wrong = model.state_dict(), []

    def read(name: str) -> Any:
        tensor = fitted.head.get(name)
        if tensor is None:
            tensor = torch.empty(like[name].shape)
            load_weights(path, {name: tensor})
        # Nothing has looked at the last step of a refit, which has no part to measure with.
        if not tensor.isfinite().all():
            wrong.append(name)
        return tensor

    shapes = publish(run, spec, config.deepfm, read)
    if wrong:
        raise diverged(f"{path.name} has numbers that are not finite in {', '.join(wrong[:3])}", model)
    run.remove("checkpoint")  # of a driver that was killed before the commit
    run.filesystem.create_dir(f"{run.path}/checkpoint")
    pyarrow.fs.copy_files(str(path), f"{run.path}/checkpoint", destination_filesystem=run.filesystem)
    with run.filesystem.open_output_stream(f"{run.path}/{HISTORY}") as stream:
        stream.write("".join(f"{json.dumps(line)}\n" for line in history).encode())
    plan = json.loads((folder / PLAN).read_text())
    return {
        "metric": line["metric"],
        **{name: line[name] for name in MEASURED if name in line},
        **{name: of for name, of in fitted.told.items() if name in MEASURED},
        **({"head": fitted.told} if fitted.told else {}),
        **({"factors": _factors(run.inputs["als"])} if "als" in run.inputs else {}),
        "best_epoch": line["epoch"],
        "fit_on": config.deepfm.fit_on,
        "epochs": history[-1]["epoch"],
        "steps": history[-1]["step"],
        "attempts": history[-1]["attempt"] + 1,
        "examples_per_s": round(sum(line["examples_per_s"] for line in history) / len(history)),
        "pairs_per_s": round(sum(line["pairs_per_s"] for line in history) / len(history)),
        "parameters": sum(map(math.prod, shapes.values())),
        "plan": plan,
    }


def _print_progress(folder: Path, stop: threading.Event, tracking: Tracking) -> None:
    """Print data and plan, each evaluation and, between distant ones, where the training stands; tell MLflow.

    What a driver that died has printed is not printed again.
    """
    printed = max((line["step"] for name in (HISTORY, NOW) for line in lines(folder / name)), default=0)
    before = lines(folder / RESUMED)
    told = before[0]["attempt"] if before else -1
    planned = False
    while True:
        last = stop.wait(0.5)
        if not planned and (folder / PLAN).exists():
            planned = True
            for line in lines(folder / DATA):
                print("\n".join(f"  {text}" for text in line["told"]), flush=True)
            print(_plan_text(json.loads((folder / PLAN).read_text())), flush=True)
        for line in lines(folder / RESUMED):
            if line["attempt"] > told:
                told = line["attempt"]
                for remark in line["remarks"]:
                    print(f"  {remark}", flush=True)
                if told:
                    printed = line["step"]
                    how = f"goes on from step {printed:,}" if printed else "begins again"
                    print(f"  {how} on {line['workers']} workers", flush=True)
        for line in lines(folder / HISTORY):
            if line["step"] > printed:
                print(_evaluation_text(line), flush=True)
                tracking.epoch(line)
                printed = line["step"]
        for line in lines(folder / NOW):
            if line["step"] > printed:
                print(_now_text(line, lines(folder / HISTORY)), flush=True)
                printed = line["step"]
        if last:
            return


def _now_text(line: Mapping[str, Any], history: Sequence[Mapping[str, Any]]) -> str:
    """A line between two of the history, with what was measured last."""
    measured = _measured(history[-1]) if history else []
    before = f"  ({measured[0]} before)" if measured else ""
    return (
        f"     in {line['epoch']:>3}  step {line['step']:>7,}  loss {line['loss']:.4f}  "
        f"{line['examples_per_s']:>7,} examples/s{before}  left {_duration(line['seconds_left'])}"
    )


def _evaluation_text(line: Mapping[str, Any]) -> str:
    """A line of the history."""
    rates = f"{line['examples_per_s']:>7,} examples/s"
    if line["pairs_per_s"] > line["examples_per_s"]:
        rates += f"  {line['pairs_per_s']:>9,} pairs/s"
    measured = _measured(line)
    if measured:
        measured[0] = f"  valid {measured[0]}{' *' if line['best'] else ''}"
    return (
        f"  epoch {line['epoch']:>3}  step {line['step']:>7,}  loss {line['loss']:.4f}  "
        f"{rates}{'  '.join(measured)}  left {_duration(line['seconds_left'])}"
    )


def _measured(line: Mapping[str, Any]) -> list[str]:
    """What a line of the history has of the valid part."""
    return [f"{title} {line[name]:.4f}" for name, title in MEASURED.items() if name in line]


def _duration(seconds: int) -> str:
    minutes = round(seconds / 60)
    if minutes < 2:
        return f"{seconds} s"
    return f"{minutes // 60} h {minutes % 60} min" if minutes >= 60 else f"{minutes} min"


def _plan_text(plan: list[dict[str, Any]]) -> str:
    """The plan, a line a table, in columns."""
    rows = [
        (row["table"], f"{row['rows']:,}", str(row["dim"]), row["sharding"], row["ranks"]) for row in plan
    ]
    cells = [("table", "rows", "dim", "sharding", "workers")]
    cells += [(*row[:4], ",".join(str(rank) for rank in row[4])) for row in rows]
    widths = [max(len(line[column]) for line in cells) for column in range(5)]
    padded = [
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) for line in cells
    ]
    return "\n".join(f"  {line.rstrip()}" for line in padded)

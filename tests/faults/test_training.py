"""A worker or the driver of a training is killed: it goes on and ends as if nothing had happened."""

import contextlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from recsys_dist.config import REPOSITORY
from recsys_dist.config import load as load_config
from recsys_dist.deepfm.checkpoint import complete, load_weights
from recsys_dist.deepfm.model import DeepFM
from recsys_dist.deepfm.published import load
from recsys_dist.workspace import Workspace
from tests.deepfm.workers import run_workers, train_in
from tests.processes import DEADLINE_SECONDS, stopped_at_the_end, wait_for
from tests.synthetic import synthetic_config, synthetic_features

pytestmark = pytest.mark.long

SETTINGS = {
    "epochs": 2,
    "patience": 2,
    "batch_size": 8,
    "checkpoint_every_steps": 20,
    "hidden": [16, 8],
    "embedding_dim": 4,
}


DIES = """
import os, runpy, signal, sys
from recsys_dist import job, workspace

def die(*_):
    os.kill(os.getpid(), signal.SIGKILL)

{at} = die
runpy.run_path("jobs/train_deepfm.py", run_name="__main__")
"""


def gone(pid):
    """Whether the process is dead; a zombie is."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


def overrides(root, more=()):
    """The job's settings."""
    settings = SETTINGS | dict(more)
    return [f"storage.root={root}", *(f"deepfm.{name}={value}" for name, value in settings.items())]


@contextlib.contextmanager
def training(root, output, settings=(), variables=(), dies_at=None):
    """The job as a process; stopped at the end where it is still there.

    Args:
        dies_at: a function that kills the process instead of doing what it does.
    """
    script = ["-c", DIES.format(at=dies_at)] if dies_at else ["jobs/train_deepfm.py"]
    words = [sys.executable, *script]
    words += [word for override in overrides(root, settings) for word in ("--set", override)]
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    environment |= dict(variables)
    with output.open("a") as stream:
        process = subprocess.Popen(words, stdout=stream, stderr=stream, env=environment, cwd=REPOSITORY)
    with stopped_at_the_end(process):
        yield process


def under_way(root, process, output):
    """Wait for checkpoints up to step 40; the workers' process ids by rank."""

    def found():
        complete = list(root.glob("deepfm/*/training/step_*/sha256.json"))
        return max((int(path.parent.name[5:].split("-")[0]) for path in complete), default=0) >= 40

    wait_for(found, process, output)
    (folder,) = root.glob("deepfm/*/training")
    assert not list(root.glob("deepfm/*/manifest.json"))
    return {worker["rank"]: worker["pid"] for worker in json.loads((folder / "workers.json").read_text())}


def resumed(config, output, workers=2):
    """The finished run, after checking that its history goes on after step 40 as if nothing had been."""
    (run,) = Workspace(config).runs("deepfm")
    history = [json.loads(line) for line in Path(run.path, "history.jsonl").read_text().splitlines()]
    again = [line for line in history if line["attempt"] == 1]
    assert again
    assert {line["resumed_from"] for line in again} == {again[0]["resumed_from"]}
    assert 40 <= again[0]["resumed_from"] < again[0]["step"]
    assert [line["epoch"] for line in history] == list(range(1, SETTINGS["epochs"] + 1))
    assert run.manifest["figures"]["attempts"] == 2
    assert f"  goes on from step {again[0]['resumed_from']} on {workers} workers\n" in output.read_text()
    assert not Path(run.path, "training").exists()
    return run


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """The weights of a training that nothing disturbed."""
    root = tmp_path_factory.mktemp("undisturbed")
    config = load_config(None, overrides(root))
    features = synthetic_features(config)
    best = run_workers(2, train_in, root / "training", config, features, root / "training")[0]["best_step"]
    weights = DeepFM(features.spec(), config.deepfm).state_dict()
    load_weights(next(path for step, _, path in complete(root / "training") if step == best), weights)
    return weights


def require_equal(run, features, expected):
    """The published weights are these, bit for bit."""
    found = load(run, features.spec()).state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_a_worker_killed_in_the_middle_of_a_save_goes_on_from_the_checkpoint_before(tmp_path, undisturbed):
    """Steps go on while the checkpoint is written; what is left of it is refused by name. No more steps are
    lost than the settings allow, and the model is the one of a training that nothing disturbed.
    """
    config, output = synthetic_config(tmp_path), tmp_path / "output"
    features = synthetic_features(config)
    epoch = -(-features.spec().positives["train"] // SETTINGS["batch_size"])
    may_lose = SETTINGS["checkpoint_every_steps"]
    every = may_lose // 2
    last = (epoch - 1) // every * every  # of the first epoch
    assert 60 <= last < epoch
    with training(tmp_path, output) as process:
        folder = wait_for(lambda: next(tmp_path.glob("deepfm/*/training"), None), process, output)
        unfinished = folder / f"step_{last}-0"
        unfinished.mkdir()
        os.mkfifo(unfinished / ".metadata.tmp")  # whoever opens it to write waits for a reader
        # The epoch's end comes after the save began, which has not ended.
        wait_for(lambda: (folder / "history.jsonl").exists(), process, output)
        assert list(unfinished.glob("*.distcp"))
        assert not (unfinished / "sha256.json").exists()
        workers = {of["rank"]: of["pid"] for of in json.loads((folder / "workers.json").read_text())}
        os.kill(workers[0], signal.SIGKILL)
        wait_for(lambda: gone(workers[0]), process, output)
        assert process.wait(timeout=DEADLINE_SECONDS) == 0, output.read_text()
    assert f"checkpoint step_{last}-0 is refused: it was not finished" in output.read_text()
    run = resumed(config, output)
    history = Path(run.path, "history.jsonl").read_text().splitlines()
    assert {json.loads(line)["resumed_from"] for line in history} == {last - every}
    assert every < epoch - (last - every) <= may_lose
    require_equal(run, features, undisturbed)


def test_any_other_worker_may_be_killed_too(tmp_path, undisturbed):
    config, output = synthetic_config(tmp_path), tmp_path / "output"
    features = synthetic_features(config)
    with training(tmp_path, output) as process:
        workers = under_way(tmp_path, process, output)
        os.kill(workers[1], signal.SIGKILL)
        wait_for(lambda: gone(workers[1]), process, output)
        assert process.wait(timeout=DEADLINE_SECONDS) == 0, output.read_text()
    assert all(gone(pid) for pid in workers.values())
    require_equal(resumed(config, output), features, undisturbed)


def test_the_same_command_goes_on_after_its_driver_was_killed(tmp_path, undisturbed):
    """And ends with the very weights of a training that nothing disturbed."""
    config, output = synthetic_config(tmp_path), tmp_path / "output"
    features = synthetic_features(config)
    with training(tmp_path, output) as process:
        workers = under_way(tmp_path, process, output)
        process.kill()
        assert process.wait() == -signal.SIGKILL
    with training(tmp_path, output) as process:
        assert process.wait(timeout=DEADLINE_SECONDS) == 0, output.read_text()
    assert "deepfm: goes on with" in output.read_text()
    assert all(gone(pid) for pid in workers.values())
    require_equal(resumed(config, output), features, undisturbed)


def test_what_a_dead_driver_left_goes_on_with_fewer_workers_and_another_plan(tmp_path):
    """And with other checkpoints: what decides how a training is made is no other training."""
    config, output = synthetic_config(tmp_path), tmp_path / "output"
    features = synthetic_features(config)
    with training(tmp_path, output) as process:
        under_way(tmp_path, process, output)
        process.kill()
        assert process.wait() == -signal.SIGKILL
    changed = {"num_workers": 1, "sharding": "{item: data_parallel}", "checkpoint_every_steps": 30}
    with training(tmp_path, output, changed.items()) as process:
        assert process.wait(timeout=DEADLINE_SECONDS) == 0, output.read_text()
    assert "deepfm: goes on with" in output.read_text()
    load(resumed(config, output, workers=1), features.spec())


def test_a_driver_killed_before_or_after_the_commit_costs_no_step(tmp_path):
    config, output = synthetic_config(tmp_path), tmp_path / "output"
    features = synthetic_features(config)
    with training(tmp_path, output, dies_at="workspace.OpenRun.commit") as process:
        assert process.wait(timeout=DEADLINE_SECONDS) == -signal.SIGKILL
    (folder,) = tmp_path.glob("deepfm/*")
    assert (folder / "model").exists()
    assert Workspace(config).runs("deepfm") == []
    output.unlink()
    with training(tmp_path, output, dies_at="job.tidy") as process:
        assert process.wait(timeout=DEADLINE_SECONDS) == -signal.SIGKILL
    (run,) = Workspace(config).runs("deepfm")
    assert run.path == str(folder)
    assert f"deepfm: goes on with {run.uri}\n" in output.read_text()
    history = [json.loads(line) for line in (folder / "history.jsonl").read_text().splitlines()]
    assert [line["attempt"] for line in history] == [0] * SETTINGS["epochs"]
    assert not any(file["path"].startswith("training/") for file in run.manifest["files"])
    output.unlink()
    with training(tmp_path, output) as process:
        assert process.wait(timeout=DEADLINE_SECONDS) == 0, output.read_text()
    assert output.read_text() == f"deepfm: done before, {run.uri}\n"
    assert not (folder / "training").exists()
    load(run, features.spec())

"""A training worker is killed: the job goes on from a checkpoint and ends as if nothing had happened."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from recsys_dist.config import REPOSITORY
from recsys_dist.deepfm.model import load
from recsys_dist.workspace import Workspace
from tests.synthetic import synthetic_config, synthetic_features

SETTINGS = {
    "epochs": 2,
    "patience": 2,
    "batch_size": 8,
    "checkpoint_every_steps": 20,
    "hidden": [16, 8],
    "embedding_dim": 4,
    "row_wise_from": 40,
}
DEADLINE_SECONDS = 180


def wait_for(found, process, output):
    """What `found` returns as soon as it is true; fails when the job ended before."""
    end = time.monotonic() + DEADLINE_SECONDS
    while time.monotonic() < end:
        assert process.poll() is None, output.read_text()
        answer = found()
        if answer:
            return answer
        time.sleep(0.1)
    raise AssertionError(f"nothing within {DEADLINE_SECONDS} s: {output.read_text()}")


def gone(pid):
    """Whether the process is dead; a zombie is."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


def test_a_killed_worker_costs_the_steps_since_its_last_checkpoint(tmp_path):
    config = synthetic_config(tmp_path)
    features = synthetic_features(config)
    words = [sys.executable, str(REPOSITORY / "jobs/train_deepfm.py"), "--set", f"storage.root={tmp_path}"]
    words += [word for name, value in SETTINGS.items() for word in ("--set", f"deepfm.{name}={value}")]
    output = tmp_path / "output"
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    with output.open("w") as stream:
        process = subprocess.Popen(words, stdout=stream, stderr=stream, env=environment)
    try:

        def under_way():
            complete = list(tmp_path.glob("deepfm/*/training/step_*/.metadata"))
            return max((int(path.parent.name[5:].split("-")[0]) for path in complete), default=0) >= 40

        wait_for(under_way, process, output)
        (folder,) = tmp_path.glob("deepfm/*/training")
        workers = json.loads((folder / "workers.json").read_text())
        victim = next(worker["pid"] for worker in workers if worker["rank"] == 1)
        assert not list(tmp_path.glob("deepfm/*/manifest.json"))
        os.kill(victim, signal.SIGKILL)
        wait_for(lambda: gone(victim), process, output)
        assert process.wait(timeout=DEADLINE_SECONDS) == 0, output.read_text()
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGINT)
            process.wait(timeout=60)

    (run,) = Workspace(config).runs("deepfm")
    history = [json.loads(line) for line in Path(run.path, "history.jsonl").read_text().splitlines()]
    resumed = [line for line in history if line["attempt"] == 1]
    assert resumed
    assert {line["resumed_from"] for line in resumed} == {resumed[0]["resumed_from"]}
    assert 40 <= resumed[0]["resumed_from"] < resumed[0]["step"]
    assert [line["epoch"] for line in history] == list(range(1, SETTINGS["epochs"] + 1))
    assert run.manifest["figures"]["attempts"] == 2
    assert "a worker failed: went on from step" in output.read_text()
    assert not Path(run.path, "training").exists()
    load(run, features.spec())

"""train_deepfm.py in the three ways that its users start it."""

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from mlflow import MlflowClient

from recsys_dist.cluster import local_or_cluster
from recsys_dist.config import REPOSITORY
from recsys_dist.deepfm.checkpoint import load_weights, read_into
from recsys_dist.deepfm.published import load
from recsys_dist.errors import RetryableError
from recsys_dist.workspace import Workspace
from tests.processes import DEADLINE_SECONDS
from tests.synthetic import synthetic_config, synthetic_features

pytestmark = pytest.mark.long

BIN = Path(sys.executable).parent
FEW_STEPS = ["--set", "deepfm.epochs=2", "--set", "deepfm.hidden=[16]"]
ONE_EPOCH = ["--set", "deepfm.epochs=1"]
ROW_WISE = ["--set", "deepfm.sharding={item: row_wise}"]


def environment(**more):
    """This process' environment without any Ray cluster that it may know of."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    path = os.pathsep.join([str(BIN), os.environ["PATH"]])
    return kept | {"PATH": path, "RAY_USAGE_STATS_ENABLED": "0"} | more


def free_ports(number):
    sockets = [socket.socket() for _ in range(number)]
    for one in sockets:
        one.bind(("127.0.0.1", 0))
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports


class Head:
    """A Ray head with token authentication, started in `folder` on ports of its own."""

    def __init__(self, folder, scratch):
        # Below /tmp: a socket's path may have 107 characters only.
        self.scratch = scratch
        token = "0123456789abcdef" * 4
        (scratch / "token").write_text(token)
        (scratch / "token").chmod(0o600)
        port, dashboard, agent, runtime, client, *workers = free_ports(25)
        self.node = f"127.0.0.1:{port}"
        self.address = f"http://127.0.0.1:{dashboard}"
        self.anonymous = environment(RAY_TMPDIR=str(scratch))
        self.environment = self.anonymous | {
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": str(scratch / "token"),
            "RAY_prestart_worker_first_driver": "0",
        }
        words = [str(BIN / "ray"), "start", "--head", "--block", "--num-cpus=4", "--disable-usage-stats"]
        words += ["--node-ip-address=127.0.0.1", f"--port={port}", f"--dashboard-port={dashboard}"]
        words += [f"--dashboard-agent-listen-port={agent}", f"--runtime-env-agent-port={runtime}"]
        words += [f"--ray-client-server-port={client}", f"--worker-port-list={','.join(map(str, workers))}"]
        words += [f"--temp-dir={scratch}/ray", "--object-store-memory=100000000"]
        self.log = scratch / "head.log"
        with self.log.open("w") as stream:
            # Its own process group: all that it starts ends with it.
            self.process = subprocess.Popen(
                words, cwd=folder, env=self.environment, stdout=stream, stderr=stream, start_new_session=True
            )
        end = time.monotonic() + 120
        while self.ray("job", "list").returncode:
            assert self.process.poll() is None, self.log.read_text()
            assert time.monotonic() < end, self.log.read_text()
            time.sleep(0.5)

    def ray(self, *words, cwd="/", environment=None):
        return subprocess.run(
            [str(BIN / "ray"), *words],
            env=(environment or self.environment) | {"RAY_API_SERVER_ADDRESS": self.address},
            cwd=cwd,
            capture_output=True,
            text=True,
            check=False,
            timeout=240,
        )

    def train(self, root, *words):
        """The job as a process on this machine that connects to the cluster."""
        return subprocess.run(
            [
                sys.executable,
                str(REPOSITORY / "jobs/train_deepfm.py"),
                "--set",
                f"storage.root={root}",
                *words,
            ],
            env=self.environment | {"RAY_ADDRESS": self.node},
            capture_output=True,
            text=True,
            check=False,
            timeout=240,
        )

    def stop(self):
        # Not gently, which drains for 30 seconds. What is left of its processes ends when it is gone.
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait(timeout=30)
        end = time.monotonic() + 60
        while self._left():
            assert time.monotonic() < end, self._left()
            time.sleep(0.2)

    def _left(self):
        """Command lines of processes that name this head's folder."""
        left = []
        for path in Path("/proc").glob("[0-9]*/cmdline"):
            with contextlib.suppress(OSError):
                words = path.read_bytes().decode(errors="replace").replace("\0", " ")
                left += [words] if f"{self.scratch}/" in words else []
        return left


@pytest.fixture(scope="module")
def repository(tmp_path_factory):
    """A copy of the repository's files with a small features run in its default root."""
    copy = tmp_path_factory.mktemp("copy")
    names = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.splitlines()
    for name in names:
        if (REPOSITORY / name).is_file():
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(REPOSITORY / name, copy / name)
    synthetic_features(synthetic_config(copy / "runs"))
    return copy


@pytest.fixture(scope="module")
def head(repository, tmp_path_factory):
    scratch = Path("/tmp") / f"rj{os.getpid()}"
    scratch.mkdir(mode=0o700)
    started = Head(repository / "jobs", scratch)
    yield started
    started.stop()
    shutil.rmtree(scratch, ignore_errors=True)


def check_run(config):
    """The one deepfm run: complete, loadable, and without anything of Ray's."""
    workspace = Workspace(config)
    (run,) = workspace.runs("deepfm")
    assert {path.name for path in Path(run.path).iterdir()} == {
        "checkpoint",
        "history.jsonl",
        "key.json",
        "manifest.json",
        "model",
    }
    assert (Path(run.path) / "checkpoint/.metadata").exists()
    names = {path.name for path in Path(run.path, "model").iterdir()}
    assert names == {"model.json", "model.safetensors"}
    (features,) = workspace.runs("features")
    published = load(run, features.spec()).state_dict()
    saved = {name: torch.empty_like(of) for name, of in published.items()}
    load_weights(Path(run.path, "checkpoint"), saved)
    assert all(torch.equal(published[name], saved[name]) for name in saved)
    lines = [json.loads(line) for line in Path(run.path, "history.jsonl").read_text().splitlines()]
    figures = run.manifest["figures"]
    assert figures["ndcg@10"] == max(line["ndcg@10"] for line in lines)
    assert {rank for row in figures["plan"] for rank in row["ranks"]} == {0, 1}
    hashed = {entry["path"] for entry in run.manifest["files"] if "sha256" in entry}
    assert {"model/model.safetensors", "model/model.json"} < hashed
    return run


def test_plain_python_starts_a_ray_of_its_own(tmp_path):
    config = synthetic_config(tmp_path)
    synthetic_features(config)
    words = [sys.executable, str(REPOSITORY / "jobs/train_deepfm.py"), "--set", f"storage.root={tmp_path}"]
    words += [*FEW_STEPS, *ROW_WISE, "--set", "deepfm.fit_on=train_valid"]
    tracking = f"sqlite:///{tmp_path}/mlflow.db"
    words += ["--set", f"mlflow.tracking_uri={tracking}", "--set", "deepfm.start_from=latest"]
    done = subprocess.run(
        words, env=environment(), cwd="/", capture_output=True, text=True, check=False, timeout=240
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stderr == ""
    lines = done.stdout.splitlines()
    evaluations = [line for line in lines if line.startswith("  epoch ")]
    assert all(word in evaluations[0] for word in ("step", "loss", "examples/s", "pairs/s", "valid NDCG@10"))
    best = max(int(line.split()[1]) for line in evaluations if " *" in line)
    refit = [str(1 + epoch) for epoch in range(best)]
    assert [line.split()[1] for line in evaluations] == ["1", "2", *refit]
    assert not any("valid" in line for line in evaluations[2:])
    assert f"  fitted anew on train and valid for {best} epochs:" in lines
    assert ["table_item", "51", "20", "row_wise", "0,1"] in [line.split() for line in lines]
    run = check_run(config)
    assert lines[-1].endswith(run.uri)
    assert run.manifest["figures"]["fit_on"] == "train_valid"
    progress = {"step": 0}
    read_into(progress, f"{run.path}/checkpoint")
    refitted = [int(line.split()[3].replace(",", "")) for line in evaluations[2:]]
    assert progress["step"] == refitted[-1] > best * (refitted[0] - 1)

    again = subprocess.run(words, env=environment(), capture_output=True, text=True, check=False, timeout=60)
    assert again.stdout == f"deepfm: done before, {run.uri}\n"

    client = MlflowClient(tracking_uri=tracking)
    (told,) = client.search_runs([client.get_experiment_by_name("recsys_dist").experiment_id])
    assert told.info.status == "FINISHED"
    assert told.info.run_name == run.run_id
    ndcg = [of.value for of in client.get_metric_history(told.info.run_id, "ndcg at 10")]
    history = [json.loads(line) for line in Path(run.path, "history.jsonl").read_text().splitlines()]
    assert ndcg == [line["ndcg@10"] for line in history]

    def night(*settings):
        synthetic_features(config)
        more = ["--set", "mlflow.tracking_uri=null", "--set", "deepfm.fit_on=train", *ONE_EPOCH, *settings]
        return subprocess.run(
            [*words, *more], env=environment(), capture_output=True, text=True, check=False, timeout=240
        )

    # The next nights: not from a model that knows valid, but from one that knows train alone.
    refused = night()
    assert refused.returncode == 64, refused.stdout + refused.stderr
    assert f"deepfm.start_from: {run.uri} was fitted on train and valid, and what it has" in refused.stderr
    assert night("--set", "deepfm.start_from=null").returncode == 0
    before = Workspace(config).runs("deepfm")[-1]
    last = night()
    assert last.returncode == 0, last.stdout + last.stderr
    assert f"  starts from {before.uri}" in last.stdout.splitlines()
    assert "  takes over " in last.stdout
    losses = [
        json.loads(Path(of.path, "history.jsonl").read_text().split("\n")[0])["loss"]
        for of in (before, Workspace(config).runs("deepfm")[-1])
    ]
    assert losses[1] < losses[0]


def test_what_a_worker_finds_wrong_is_told_once_and_not_tried_again(head, tmp_path):
    config = synthetic_config(tmp_path)
    synthetic_features(config)
    done = head.train(tmp_path, *FEW_STEPS, "--set", "deepfm.learning_rate=1e30")
    assert done.returncode == 64, done.stdout + done.stderr
    assert done.stderr.startswith("error: After epoch 1 the model's predictions are not finite")
    assert "Lower deepfm.learning_rate=1e+30 or " in done.stderr
    (folder,) = tmp_path.glob("deepfm/*")
    assert (folder / "training" / "attempt").read_text() == "0"


def test_what_one_of_two_workers_finds_wrong_ends_both_at_once(tmp_path):
    """The other one waits for it, in an exchange that would last for half an hour."""
    features = synthetic_features(synthetic_config(tmp_path))
    train = [Path(path) for path in features.dataset("examples").files if "split=train" in path]
    table = pq.read_table(train[0], partitioning=None)
    indices = table["user"].to_numpy().copy()
    positive = np.flatnonzero(table["label"].to_numpy() == 1)[0]
    indices[positive] = 10**6
    place = table.schema.get_field_index("user")
    pq.write_table(table.set_column(place, table.schema.field(place), pa.array(indices)), train[0])
    words = [sys.executable, str(REPOSITORY / "jobs/train_deepfm.py"), "--set", f"storage.root={tmp_path}"]
    words += [*FEW_STEPS, "--set", "deepfm.num_workers=2"]
    done = subprocess.run(
        words, env=environment(), capture_output=True, text=True, check=False, timeout=DEADLINE_SECONDS
    )
    assert done.returncode == 65, done.stdout + done.stderr
    assert "error: user has indices from " in done.stderr
    (folder,) = tmp_path.glob("deepfm/*/training")
    assert len(list(folder.glob("refused-*.json"))) == 1
    assert (folder / "attempt").read_text() == "0"


def test_a_model_to_start_from_that_is_not_there_is_told_before_anything_is_begun(tmp_path):
    synthetic_features(synthetic_config(tmp_path))
    words = [sys.executable, str(REPOSITORY / "jobs/train_deepfm.py"), "--set", f"storage.root={tmp_path}"]
    words += ["--set", "deepfm.start_from=none_such"]
    # A Ray that nobody answers at, so that to start it would be another error.
    nowhere = environment(RAY_ADDRESS="127.0.0.1:1")
    done = subprocess.run(words, env=nowhere, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 64, done.stdout + done.stderr
    assert done.stderr.startswith("error: deepfm.start_from=none_such: no finished deepfm run under ")
    assert not (tmp_path / "deepfm").exists()


def test_submitted_with_its_working_directory(head, tmp_path):
    config = synthetic_config(tmp_path)
    synthetic_features(config)
    command = ["job", "submit", "--working-dir", ".", "--", "python", "jobs/train_deepfm.py"]
    command += ["--conf", "conf/default.yaml", *FEW_STEPS]

    refused = head.ray(*command, cwd=REPOSITORY, environment=head.anonymous)
    assert refused.returncode != 0
    assert "token authentication is enabled" in refused.stdout + refused.stderr
    with pytest.raises(urllib.error.HTTPError, match="401") as unauthorised:
        urllib.request.urlopen(urllib.request.Request(f"{head.address}/api/jobs/", b"{}"), timeout=30)
    unauthorised.value.close()

    relative = head.ray(*command, cwd=REPOSITORY)
    assert relative.returncode == 1
    assert "storage.root is the relative path 'runs'" in relative.stdout + relative.stderr

    done = head.ray(*command, "--set", f"storage.root={tmp_path}", cwd=REPOSITORY)
    assert done.returncode == 0, done.stdout + done.stderr
    check_run(config)


def test_submitted_literally_to_a_head_started_in_jobs(head, repository):
    done = head.ray("job", "submit", "--", "python", "train_deepfm.py")
    assert done.returncode == 0, done.stdout + done.stderr
    config = synthetic_config(repository / "runs")
    run = check_run(config)
    assert run.manifest["config"]["storage"]["root"] == "runs"


def test_a_cluster_with_too_few_cpus_is_named(head, tmp_path):
    config = synthetic_config(tmp_path)
    synthetic_features(config)
    done = head.train(tmp_path, "--set", "deepfm.num_workers=64", "--set", "deepfm.streams=64")
    assert done.returncode == 64, done.stdout + done.stderr
    assert "deepfm.num_workers asks for 64 workers, each with a CPU, and the Ray cluster at " in done.stderr
    (folder,) = (tmp_path / "deepfm").iterdir()
    assert json.loads((folder / "error.json").read_text())["class"] == "ConfigError"
    assert not (folder / "manifest.json").exists()


def test_a_cluster_that_does_not_answer(monkeypatch):
    (port,) = free_ports(1)
    monkeypatch.setenv("RAY_ADDRESS", f"127.0.0.1:{port}")
    named = f"RAY_ADDRESS=127.0.0.1:{port} cannot be used"
    with pytest.raises(RetryableError, match=named), local_or_cluster():
        pass

"""Scoring and publishing are killed, overtaken and out of disk: readers see the old lists or the new ones."""

import contextlib
import shutil
import signal
import subprocess
import sys
import time

import psutil
import pytest
import torch
from deltalake import DeltaTable

from recsys_dist.config import REPOSITORY, load
from recsys_dist.scoring import partitions, score
from recsys_dist.scoring.scored import PartitionScorer
from recsys_dist.workspace import Workspace
from tests.models import untrained_night
from tests.processes import DEADLINE_SECONDS, stopped_at_the_end, wait_for
from tests.synthetic import synthetic_config

pytestmark = pytest.mark.long

USERS = 240
SMALL = ("--set", "score.partition_users=1")
"""A partition a user, so that there is time to kill something between two of them."""

FAULTY = """
import os, pathlib, resource, runpy, signal, sys, time
from recsys_dist.scoring import partitions, score

real, here = score.publish, pathlib.Path(sys.argv.pop(1))

class Dies:
    # The lists, whose reader is killed when it has read, and Delta is writing, all of them.
    def __init__(self, lists):
        self.count_rows, self.lists = lists.count_rows, lists

    def to_batches(self):
        yield from self.lists.to_batches()
        (here / "fault").touch()
        os.kill(os.getpid(), signal.SIGKILL)

class Full(partitions.ScoringWorker):
    # Its disk is full when it has written some partitions.
    def score(self, part, users):
        if part == 4:
            (here / "fault").touch()
            resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))
        return super().score(part, users)

def publish(table, lists, *arguments):
    {fault}

score.publish = publish
runpy.run_path("jobs/score.py", run_name="__main__")
"""
FAULTS = {
    "before": "real(table, Dies(lists), *arguments)",
    "after": "real(table, lists, *arguments); (here / 'fault').touch(); os.kill(os.getpid(), signal.SIGKILL)",
    "full": "(here / 'fault').touch(); resource.setrlimit(resource.RLIMIT_FSIZE, (4000, 4000)); "
    "return real(table, lists, *arguments)",
    "worker": "return real(table, lists, *arguments)\n\npartitions.ScoringWorker = Full",
    "waits": """
    (here / "fault").touch()
    while not (here / "go").exists():
        time.sleep(0.05)
    return real(table, lists, *arguments)""",
}


@pytest.fixture(scope="module")
def night(tmp_path_factory):
    """A root with all that score.py reads."""
    root = tmp_path_factory.mktemp("night")
    config = synthetic_config(root)
    inputs = untrained_night(config, users=USERS, events=6)
    workspace = Workspace(config)
    run = workspace.new("evaluation", workspace.key("evaluation", config, inputs), inputs)
    run.commit(config, {"verdict": {"passed": True, "text": "as the test wants it"}})
    return root


@pytest.fixture(scope="module")
def published(night, tmp_path_factory):
    """A copy of it, with the lists of an earlier run: half as long."""
    root = scored_here(night, tmp_path_factory.mktemp("published") / "root", "score.k=5")
    assert lists(root)[1] == {(user, rank) for user in names() for rank in range(1, 6)}
    return root


@pytest.fixture
def root(published, tmp_path):
    return shutil.copytree(published, tmp_path / "root")


@pytest.fixture(scope="module")
def undisturbed(night, tmp_path_factory):
    """What the table has where nothing goes wrong, by the job's settings."""
    folder = tmp_path_factory.mktemp("undisturbed")
    return {
        settings: content(scored_here(night, folder / str(len(settings)), *settings[1::2]))
        for settings in ((), SMALL)
    }


def scored_here(night, root, *overrides):
    """A copy of the night, scored and published in this process, without Ray."""
    config = load(None, [f"storage.root={shutil.copytree(night, root)}", *overrides])
    workspace = Workspace(config)
    inputs = workspace.inputs("score")
    run = workspace.new("score", workspace.key("score", config, inputs), inputs)

    def scored(config, run, date, parts):
        scorer = PartitionScorer(config, run, date)
        return [scorer.score(*part) for part in parts]

    threads = torch.get_num_threads()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(partitions, "local_or_cluster", contextlib.nullcontext)
        patch.setattr(partitions, "_scored", scored)
        torch.set_num_threads(1)  # as a worker has
        run.commit(config, score.score(config, run))
    torch.set_num_threads(threads)
    return root


def names():
    return [f"u{user}" for user in range(1, USERS + 1)]


def start(root, *arguments, fault=None):
    """The job as a process, its output in <root>/../output."""
    script = ["-c", FAULTY.format(fault=FAULTS[fault]), str(root.parent)] if fault else ["jobs/score.py"]
    words = [sys.executable, *script, "--set", f"storage.root={root}", *arguments]
    with (root.parent / "output").open("a") as stream:
        return subprocess.Popen(words, stdout=stream, stderr=stream, cwd=REPOSITORY)


def finish(process, root=None, code=0):
    with stopped_at_the_end(process):
        assert process.wait(timeout=DEADLINE_SECONDS) == code, (
            (root.parent / "output").read_text() if root else ""
        )


def lists(root):
    """The score runs whose lists the table has, and its users and ranks."""
    rows = DeltaTable(root / "topk").to_pyarrow_table().to_pylist()
    assert len(rows) == len({(row["user_id"], row["rank"]) for row in rows})
    return {row["run_id"] for row in rows}, {(row["user_id"], row["rank"]) for row in rows}


def content(root):
    """The table without its run ids."""
    rows = DeltaTable(root / "topk").to_pyarrow_table().drop_columns(["run_id"])
    return rows.sort_by([("user_id", "ascending"), ("rank", "ascending")]).to_pylist()


def written(root):
    """The partitions of the newest score run: file to inode."""
    folder = max(root.glob("score/*"))
    return {file.name: file.stat().st_ino for file in folder.glob("lists/part-*.parquet")}


def complete(root, folders):
    """The newest run is finished, its lists are the table's, and there are so many score runs."""
    runs = Workspace(synthetic_config(root)).runs("score")
    assert lists(root)[0] == {runs[-1].run_id}
    assert len(list(root.glob("score/*"))) == folders
    names = {file["path"] for file in runs[-1].manifest["files"]}
    assert names == {"key.json", *(f"lists/{name}" for name in written(root))}


@pytest.mark.parametrize(("fault", "code"), [("before", -9), ("after", -9), ("full", 75)])
def test_a_fault_around_the_commit_shows_readers_the_old_or_the_new_lists(
    undisturbed, root, tmp_path, fault, code
):
    old, version = lists(root), DeltaTable(root / "topk").version()
    finish(start(root, fault=fault), root, code)
    assert (tmp_path / "fault").exists()
    output = (tmp_path / "output").read_text()
    assert ("File too large" in output) == (fault == "full"), output
    between = lists(root)
    if fault == "after":
        assert between[0].isdisjoint(old[0])
        assert between[1] == {(user, rank) for user in names() for rank in range(1, 11)}
    else:
        assert between == old
    assert DeltaTable(root / "topk").version() == version + (fault == "after")
    begun = written(root)
    finish(start(root), root)
    complete(root, folders=2)
    assert written(root) == begun  # nothing was scored again
    assert DeltaTable(root / "topk").version() == version + 1
    assert "score: goes on with" in (tmp_path / "output").read_text()
    assert content(root) == undisturbed[()]


def test_a_workers_full_disk_costs_what_was_not_written(undisturbed, root, tmp_path):
    old = lists(root)
    finish(start(root, *SMALL, fault="worker"), root, 75)
    assert (tmp_path / "fault").exists()
    output = (tmp_path / "output").read_text()
    assert "File too large" in output
    assert "Traceback" not in output
    assert lists(root) == old
    begun = written(root)
    assert 1 <= len(begun) < USERS
    finish(start(root, *SMALL), root)
    complete(root, folders=2)
    assert begun.items() <= written(root).items()
    assert content(root) == undisturbed[SMALL]


def test_of_two_runs_of_a_date_one_wins_and_the_other_exits_75(root, tmp_path):
    late = start(root, fault="waits")
    with stopped_at_the_end(late):
        wait_for(lambda: (tmp_path / "fault").exists(), late, tmp_path / "output")
        finish(start(root), root)
        winner = lists(root)
        (tmp_path / "go").touch()
        finish(late, root, 75)
    assert "another run published" in (tmp_path / "output").read_text()
    assert lists(root) == winner
    finish(start(root), root)
    assert "score: done before" in (tmp_path / "output").read_text()


def workers(process):
    """The processes that score."""
    found = []
    for child in psutil.Process(process.pid).children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            found += [child] if "ScoringWorker" in " ".join(child.cmdline()) else []
    return found


def some_written(root, process, tmp_path):
    """Wait until a part of the partitions is there."""
    folder = wait_for(
        lambda: [f for f in root.glob("score/*") if not (f / "manifest.json").exists()],
        process,
        tmp_path / "output",
    )[0]
    end = time.monotonic() + DEADLINE_SECONDS
    while len(list(folder.glob("lists/part-*.parquet"))) < 5:
        assert process.poll() is None
        assert time.monotonic() < end
        time.sleep(0.005)


@pytest.mark.parametrize("victim", ["worker", "driver"])
def test_a_kill_costs_only_the_partitions_that_were_not_finished(undisturbed, root, tmp_path, victim):
    process = start(root, *SMALL)
    with stopped_at_the_end(process):
        some_written(root, process, tmp_path)
        family = workers(process)
        assert family
        (family[0] if victim == "worker" else process).kill()
        begun = written(root)
        assert 5 <= len(begun) < USERS
        if victim == "worker":
            finish(process, root)
            assert "A worker died or was killed" in (tmp_path / "output").read_text()
        else:
            assert process.wait() == -signal.SIGKILL
            gone, alive = psutil.wait_procs(family, timeout=60)
            assert gone
            assert not alive
            begun = written(root)
            assert len(begun) < USERS
            finish(start(root, *SMALL), root)
            assert (
                f"score: {len(begun)} of {USERS} partitions are there already"
                in (tmp_path / "output").read_text()
            )
    complete(root, folders=2)
    after = written(root)
    assert len(after) == USERS
    assert begun.items() <= after.items()
    assert content(root) == undisturbed[SMALL]

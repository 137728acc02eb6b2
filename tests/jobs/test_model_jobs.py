"""evaluate.py and score.py as their users start them, on synthetic features and untrained models."""

import collections
import datetime as dt
import json
import shutil
import subprocess
import sys

import duckdb
import pytest
from deltalake import DeltaTable

from recsys_dist.config import REPOSITORY
from recsys_dist.scoring.publish import is_published
from recsys_dist.workspace import Workspace
from tests.models import published_night, untrained_night
from tests.processes import ray_head, run_here
from tests.synthetic import synthetic_config

SMALL = ("--set", "score.partition_users=25")
"""Several Ray tasks, each with its own file."""


def run_job(name, root, *arguments, code=0):
    """Run jobs/<name> as a process, check its exit code, return what it printed."""
    words = [sys.executable, str(REPOSITORY / "jobs" / name), "--set", f"storage.root={root}", *arguments]
    done = subprocess.run(words, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout + done.stderr


@pytest.fixture(scope="module", autouse=True)
def cluster():
    """All jobs of this file run on one: what starts a Ray of its own is tested with its faults."""
    with ray_head(cpus=1) as address, pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_ADDRESS", address)
        yield


@pytest.fixture(scope="module")
def night(tmp_path_factory):
    root = tmp_path_factory.mktemp("root")
    config = synthetic_config(root)
    runs = untrained_night(config)
    # The models are untrained: whether they beat popularity is chance, and not what is tested here.
    printed = run_job("evaluate.py", root, "--set", "evaluation.bootstrap=100")
    return root, config, runs, printed


def command(root, *arguments, code=0):
    """What score.py does with what is published."""
    return run_here("score.py", "--set", f"storage.root={root}", *arguments, code=code)


def passed_night(root, config):
    """Let the evaluation pass, whatever it found."""
    (run,) = Workspace(config).runs("evaluation")
    manifest = {**run.manifest, "figures": {**run.manifest["figures"]}}
    manifest["figures"]["verdict"] = {"passed": True, "text": "forced by the test"}
    with open(f"{run.path}/manifest.json", "w") as file:  # noqa: PTH123
        json.dump(manifest, file)


def test_metrics_can_be_recomputed_from_the_lists(night):
    _, config, runs, _ = night
    (run,) = Workspace(config).runs("evaluation")
    metrics = run.json("metrics.json")
    lists = run.table("lists").to_pylist()
    truth = {}
    for event in runs["features"].table("examples").to_pylist():
        if event["split"] == "test" and event["label"]:
            truth.setdefault(event["user"], set()).add(event["item"])
    assert metrics["users"] == len(truth)
    for model, figures in metrics["models"].items():
        recall = dict.fromkeys(truth, 0.0)
        for row in lists:
            if row["model"] == model and row["rank"] <= 10 and row["item"] in truth[row["user"]]:
                recall[row["user"]] += 1 / len(truth[row["user"]])
        assert figures["recall@10"]["value"] == pytest.approx(sum(recall.values()) / len(truth))
        assert figures["recall@10"]["low"] <= figures["recall@10"]["value"] <= figures["recall@10"]["high"]
    assert "<!doctype html>" in (run.filesystem.open_input_stream(f"{run.path}/report.html").read().decode())


def test_score_publishes_what_the_evaluation_passed(night):
    root, config, runs, _ = night
    (evaluation,) = Workspace(config).runs("evaluation")
    if not evaluation.manifest["figures"]["verdict"]["passed"]:
        refused = run_job("score.py", root, code=65)
        assert "did not pass" in refused
        assert not (root / "topk").exists()
        passed_night(root, config)
    run_job("score.py", root, *SMALL)
    (scored,) = Workspace(config).runs("score")
    figures = scored.manifest["figures"]
    spec = runs["features"].spec()
    assert figures["served"] == figures["users"] == spec.n_users == 60
    assert len([file for file in scored.manifest["files"] if file["path"].startswith("lists/")]) == 3
    table = DeltaTable(root / "topk")
    published = table.to_pyarrow_table()
    assert published.num_rows == figures["rows"]
    assert set(published["date"].to_pylist()) == {dt.date.fromisoformat(spec.date)}
    seen = {
        row["user_id"]: {f"i{item}" for item in row["seen"]}
        for row in runs["features"].table("users/as_of=date").to_pylist()
    }
    for row in published.to_pylist():
        assert row["item_id"] not in seen[row["user_id"]]
        assert row["sources"]
        assert len(row["source_scores"]) == len(row["sources"])
        assert (row["reason"]["kind"] == "history") == bool(row["reason"]["item_ids"])
        assert set(row["reason"]["item_ids"]) <= seen[row["user_id"]]

    dataset = table.to_pyarrow_dataset()  # noqa: F841 (DuckDB reads it by name)
    counted = duckdb.sql("select count(*), count(distinct user_id), max(rank) from dataset").fetchall()
    assert counted == [(figures["rows"], 60, 10)]

    again = run_job("score.py", root, *SMALL)
    assert "done before" in again
    assert DeltaTable(root / "topk").version() == 1  # 0 is the empty table

    shown = command(root, "--user", "u5")
    assert "Recommended" in shown
    assert "found by" in shown
    best = next(row for row in published.to_pylist() if row["user_id"] == "u5" and row["rank"] == 1)
    assert f" 1. Item {best['item_id'][1:]}" in shown
    assert "'nobody'" in command(root, "--user", "nobody", code=65)

    # An equal run counts as done only while its lists are what readers see.
    DeltaTable(root / "topk").restore(0)
    again = run_job("score.py", root, *SMALL)
    assert "done before" not in again
    assert DeltaTable(root / "topk").to_pyarrow_table().num_rows == figures["rows"]


def test_a_night_that_is_worse_than_the_one_published_last_ends_with_65(tmp_path):
    config = synthetic_config(tmp_path)
    untrained_night(config)
    settings = ("--set", "evaluation.must_beat=null", "--set", "evaluation.bootstrap=100")
    run_job("evaluate.py", tmp_path, *settings)
    (before,) = Workspace(config).runs("evaluation")
    metrics = before.json("metrics.json")
    metrics["models"]["two_stage"]["ndcg@10"] = {"value": 0.9, "low": 0.89, "high": 0.91}
    with open(f"{before.path}/metrics.json", "w") as file:  # noqa: PTH123
        json.dump(metrics, file)
    published_night(config, before, dt.date(2024, 1, 1))
    version = DeltaTable(tmp_path / "topk").version()
    # Lengths, resamplings and the declared fall itself are no other way to measure.
    settings = (
        "--set",
        "evaluation={must_beat: null, bootstrap: 150, k: [10, 15], may_fall: {ndcg@10: 0.01}}",
    )
    run_job("evaluate.py", tmp_path, *settings)
    refused = run_job("score.py", tmp_path, *settings, code=65)
    assert "did not pass: two_stage ndcg@10 is " in refused
    assert "; ndcg@10 fell from 0.9000 to " in refused
    assert DeltaTable(tmp_path / "topk").version() == version


def test_gates_users_and_commands(night):
    root, config, runs, _ = night
    passed_night(root, config)
    date = runs["features"].spec().date
    run_job("score.py", root, *SMALL)
    table = DeltaTable(root / "topk")
    version, everyone = table.version(), table.to_pyarrow_table().to_pylist()

    # All gates that fail are told at once, and the table is as it was.
    few = ["--set", "score.rules.at_most={genres: 1}", "--set", "score.gates.coverage=0.99"]
    refused = run_job("score.py", root, *few, code=65)
    assert "full: " in refused
    assert "coverage: " in refused
    assert DeltaTable(root / "topk").version() == version
    error = json.loads(max(root.glob("score/*/error.json")).read_text())
    assert error["exit_code"] == 65
    assert "coverage: " in error["error"]

    # What a worker finds wrong when it begins is told as it is, with its exit code.
    refused = run_job("score.py", root, "--set", f"score.rules.deny={root}/none", code=64)
    assert f"score.rules.deny={root}/none: there is no such file" in refused
    # Lists of another kind need an evaluation of theirs.
    refused = run_job("score.py", root, "--set", "score.candidates={popularity: 9}", code=65)
    assert "Run jobs/evaluate.py with the same settings first" in refused
    assert DeltaTable(root / "topk").version() == version

    # Some users get other lists; everybody else's stay.
    (root / "users.txt").write_text("u5\nnobody\nu7\n")
    some = ["--set", f"score.users={root}/users.txt", "--set", "score.k=4"]
    printed = run_job("score.py", root, *some)
    assert f"1 ids of {root}/users.txt are not known: nobody" in printed
    after = DeltaTable(root / "topk").to_pyarrow_table().to_pylist()
    lengths = collections.Counter(row["user_id"] for row in after)
    assert (lengths.pop("u5"), lengths.pop("u7")) == (4, 4)

    def others(rows):
        return sorted(str(row) for row in rows if row["user_id"] not in ("u5", "u7"))

    assert others(after) == others(everyone)
    assert Workspace(config).runs("score")[-1].manifest["figures"]["users"] == 2
    assert "done before" in run_job("score.py", root, *some)
    (root / "users.txt").write_text("u5\n")
    assert "done before" not in run_job("score.py", root, *some)

    printed = command(root, "--versions")
    assert f"{date}            4  " in printed
    assert ", 1 users" in printed
    command(root, "--export", date, str(root / "lists.jsonl"))
    exported = [json.loads(line) for line in (root / "lists.jsonl").read_text().splitlines()]
    assert len(exported) == len(after)
    assert "as version" in command(root, "--rollback", str(version))
    assert others(DeltaTable(root / "topk").to_pyarrow_table().to_pylist()) == others(everyone)
    assert not is_published(Workspace(config).runs("score")[-1])
    assert "0 files removed" in command(root, "--vacuum", "2")

    both = command(root, "--versions", "--vacuum", "7", code=64)
    assert "not allowed with argument --versions" in both
    assert "only with --vacuum" in command(root, "--recent", code=64)
    assert "--recent" in command(root, "--vacuum", "0.5", code=64)
    assert "there is no version 99" in command(root, "--rollback", "99", code=65)
    assert "expected a date" in command(root, "--export", "today", "x.csv", code=64)


def test_a_damaged_model_is_used_by_nobody(night, tmp_path):
    root, config, _, _ = night
    copy = shutil.copytree(root, tmp_path / "root")
    shutil.rmtree(copy / "topk", ignore_errors=True)
    (weights,) = copy.glob("deepfm/*/model/model.safetensors")
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    passed_night(
        copy, config.model_copy(update={"storage": config.storage.model_copy(update={"root": str(copy)})})
    )
    for job in ("score.py", "evaluate.py"):
        printed = run_job(job, copy, "--set", "evaluation.bootstrap=101", code=65)
        assert "model.safetensors is not what was committed: its sha256 is not that of" in printed
    same = ("--set", "deepfm.start_from=latest", "--set", "deepfm.embedding_dim=4")
    printed = run_job("train_deepfm.py", copy, *same, code=65)
    assert "train_deepfm.py --force" in printed
    assert not (copy / "topk").exists()


def test_a_stage_without_its_input_names_the_job_to_run(tmp_path):
    for name, first in (("train_deepfm.py", "featurize.py"), ("evaluate.py", "train_deepfm.py")):
        printed = run_job(name, tmp_path, code=65)
        assert f"Run jobs/{first} first" in printed
    assert "Run jobs/score.py first" in command(tmp_path, "--user", "1", code=65)


@pytest.mark.parametrize(
    "name",
    [
        *("featurize.py", "train_als.py", "recall.py", "train_deepfm.py", "evaluate.py", "score.py"),
        *("nightly.py", "tune.py"),
    ],
)
def test_help_is_complete_and_bad_usage_exits_64(name, tmp_path):
    printed = run_here(name, "--help")
    for word in (f"jobs/{name}", "--conf", "--set", "exit codes"):
        assert word in printed
    assert "unrecognized arguments: --nonsense" in run_here(name, "--nonsense", code=64)
    assert "nearest valid key: epochs" in run_job(name, tmp_path, "--set", "deepfm.epoch=1", code=64)


def test_root_that_cannot_be_written_exits_75(night, tmp_path):
    (tmp_path / "file").write_text("")
    printed = run_job("nightly.py", tmp_path / "file" / "root", "--conf", "conf/movielens_100k.yaml", code=75)
    assert "cannot be written" in printed

"""What every job does around its stage."""

import argparse
from pathlib import Path

import pytest

from recsys_dist import job
from recsys_dist.config import load
from recsys_dist.errors import ConfigError, RetryableError
from recsys_dist.workspace import OpenRun, Workspace


@pytest.fixture
def workspace(tmp_path):
    """With a features run, which the stage reads."""
    config = load(None, [f"storage.root={tmp_path}"])
    workspace = Workspace(config)
    workspace.new("features", {}, {}).commit(config, {})
    return workspace


def make(config, run):
    """Leaves what the same command goes on from."""
    run.training.mkdir(exist_ok=True)
    with (run.training / "begun").open("a") as file:
        file.write("x")
    run.write_json("model.json", {})
    return {"times": len((run.training / "begun").read_text())}


def start(workspace, settings=(), made=make, **how):
    """Make a run of the stage; the exit code."""
    overrides = [f"storage.root={workspace.uri}", *settings]
    arguments = argparse.Namespace(conf=None, overrides=overrides, force=False)
    return job.run_stage("deepfm", arguments, made, left_behind=lambda run: run.training.exists(), **how)


def killed_at(place, name, workspace):
    """Make a run of the stage, with a function that ends the process instead of doing what it does."""

    def die(*_):
        raise SystemError

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(place, name, die)
        with pytest.raises(SystemError):
            start(workspace)


def test_an_interrupted_job_says_that_it_can_go_on(capsys):
    def interrupt():
        raise KeyboardInterrupt

    assert job.guard(interrupt) == 130
    assert "the same command goes on" in capsys.readouterr().err


def test_what_a_run_is_gone_on_from_stays_until_the_commit_and_no_longer(workspace, capsys):
    killed_at(OpenRun, "commit", workspace)
    assert workspace.runs("deepfm") == []
    killed_at(job, "tidy", workspace)
    (run,) = workspace.runs("deepfm")
    assert f"deepfm: goes on with {run.uri}\n" in capsys.readouterr().out
    assert run.manifest["figures"] == {"times": 2}
    assert [file["path"] for file in run.manifest["files"]] == ["key.json", "model.json"]
    assert (Path(run.path) / "training/begun").exists()
    assert start(workspace) == 0
    assert capsys.readouterr().out == f"deepfm: done before, {run.uri}\n"
    assert {path.name for path in Path(run.path).iterdir()} == {"key.json", "model.json", "manifest.json"}


def test_what_cannot_be_gone_on_with_is_told_and_why(workspace, capsys):
    """Of settings that decide only how it is made, any value goes on."""
    killed_at(OpenRun, "commit", workspace)
    (left,) = Path(workspace.uri, "deepfm").iterdir()
    same = [
        "deepfm.num_workers=[1, 3]",
        "deepfm.checkpoint_every_minutes=2",
        "deepfm.sharding={item: row_wise}",
    ]
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(OpenRun, "commit", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            start(workspace, same)
    assert f"deepfm: goes on with {left}\n" in capsys.readouterr().out
    assert start(workspace, ["deepfm.epochs=3", "seed=7"]) == 0
    assert capsys.readouterr().out.startswith(
        f"deepfm: begins anew: {left}, which is not finished, was begun with other seed, deepfm.epochs\n"
    )
    assert len(workspace.runs("deepfm")) == 1


def test_an_error_is_no_end_of_a_run(workspace, capsys):
    """What was wrong may be mended outside of the settings: a node that is back, a file that is restored."""
    killed_at(OpenRun, "commit", workspace)

    def wrong(config, run):
        raise ConfigError("too few CPUs")

    assert start(workspace, made=wrong) == 64
    (left,) = Path(workspace.uri, "deepfm").iterdir()
    assert (left / "error.json").exists()
    capsys.readouterr()
    assert start(workspace, ["deepfm.num_workers=3"]) == 0
    assert f"deepfm: goes on with {left}\n" in capsys.readouterr().out
    assert not (left / "error.json").exists()


def test_a_run_that_is_older_than_a_finished_one_is_told_of(workspace, capsys):
    killed_at(OpenRun, "commit", workspace)
    (left,) = Path(workspace.uri, "deepfm").iterdir()
    newer = workspace.new("deepfm", {}, {}).commit(load(), {})
    assert start(workspace) == 0
    told = f"deepfm: begins anew: {left}, which is not finished, is older than {newer.run_id}, which the next"
    assert capsys.readouterr().out.startswith(told)


def test_a_run_is_made_by_one_process_at_a_time(workspace, capsys):
    run = workspace.new("deepfm", {}, {})
    with job.own(run), pytest.raises(RetryableError, match=f"{run.uri} is in use"), job.own(run):
        pass
    run.commit(load(), {})
    with pytest.raises(RetryableError, match=f"{run.uri} was finished by another process"), job.own(run):
        pass
    key = workspace.key("deepfm", load(None, [f"storage.root={workspace.uri}"]), workspace.inputs("deepfm"))
    run = workspace.new("deepfm", key, workspace.inputs("deepfm"))
    run.training.mkdir()
    with job.own(run):
        assert start(workspace) == 0
    assert "goes on" not in capsys.readouterr().out
    assert workspace.runs("deepfm")[-1].run_id > run.run_id


def test_a_folder_without_locks_is_named(workspace):
    run = workspace.new("deepfm", {}, {})
    Path(run.path, "driver.lock").mkdir()
    with pytest.raises(RetryableError, match=r"driver\.lock cannot be locked: "), job.own(run):
        pass


def test_what_could_not_succeed_is_not_begun(workspace, capsys):
    def check(config, inputs):
        assert list(inputs) == ["features"]
        raise ConfigError("in vain")

    assert start(workspace, check=check) == 64
    assert capsys.readouterr().err == "error: in vain\n"
    assert not Path(workspace.uri, "deepfm").exists()

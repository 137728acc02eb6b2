"""A search with real Ray: killed in the middle, gone on with, and what is left of it."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from recsys_dist.config import REPOSITORY, load
from recsys_dist.deepfm import tune
from recsys_dist.errors import ConfigError, DataError
from recsys_dist.workspace import Workspace
from tests.processes import DEADLINE_SECONDS, run_here, wait_for
from tests.synthetic import synthetic_config, synthetic_features

pytestmark = pytest.mark.long

SPACE = {
    "embedding_learning_rate": {"choice": ["1e-6", 0.1]},
    "dropout": {"uniform": [0, 0.1]},
    "label_smoothing": {"choice": [0.0, 0.1]},
}
SEED = 0
"""Draws a trial that learns, then one that does not, then one whose settings do not go together."""


def conf(folder, root, **search):
    """A conf file in which one trial after another is run, and what it says."""
    small = {"embedding_dim": 4, "hidden": [16, 8], "batch_size": 8, "negatives": 4}
    settings = {
        "seed": SEED,
        "storage": {"root": str(root)},
        "deepfm": small | {"epochs": 3, "patience": 3},
        "tune": {"space": SPACE, "trials": 3, "concurrent": 1, "reduction_factor": 2} | search,
    }
    path = folder / "conf.yaml"
    path.write_text(yaml.safe_dump(settings))
    return path, settings


OVERRIDE = "deepfm.weight_decay=[0.001, 0]"


def job(path, stream):
    words = [sys.executable, str(REPOSITORY / "jobs/tune.py"), "--conf", str(path), "--set", OVERRIDE]
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    return subprocess.Popen(words, stdout=stream, stderr=subprocess.STDOUT, env=environment)


def search(root, **settings):
    """In this process, up to where Ray would be started."""
    folder = root.parent
    path, asked = conf(folder, root, **settings)
    config = load(path)
    workspace = Workspace(config)
    inputs = workspace.inputs("tune")
    run = Workspace(config, "tune.root").new("tune", workspace.key("tune", config, inputs), inputs)
    return tune.make(config, run, asked)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("root") / "runs"
    synthetic_features(synthetic_config(root), events=10)
    return root


@pytest.fixture(scope="module")
def searched(root, tmp_path_factory):
    """Killed in its second trial and started again: conf file, run, rows, and what each start printed."""
    folder = tmp_path_factory.mktemp("search")
    path, _ = conf(folder, root)
    output = folder / "first", folder / "second"

    def in_the_second():
        sealed = Path(f"{root}-experiments").glob("tune/*/training/trial_2/step_*/sha256.json")
        return next((path.parents[2] for path in sealed), None)

    with output[0].open("w") as stream:
        process = job(path, stream)
        training = wait_for(in_the_second, process, output[0])
        process.kill()
        assert process.wait() == -signal.SIGKILL
    assert (training / "trial_1/ended.json").exists()
    assert not (training / "trial_2/ended.json").exists()
    with output[1].open("w") as stream:
        assert job(path, stream).wait(timeout=DEADLINE_SECONDS) == 0, output[1].read_text()
    (run,) = Workspace(load(path), "tune.root").runs("tune")
    rows = [json.loads(line) for line in Path(run.path, "trials.jsonl").read_text().splitlines()]
    return path, run, rows, [file.read_text() for file in output]


def test_the_best_conf_is_that_of_the_trial_with_the_best_metric(searched):
    path, run, rows, (_, printed) = searched
    learned, not_learned, _ = rows
    assert learned["ndcg@10"] == max(learned["history"] + not_learned["history"])
    assert learned["ndcg@10"] == learned["history"][learned["epoch"] - 1]
    assert run.manifest["figures"]["best_trial"] == 1
    best = Path(run.path, "best.yaml")
    assert load(best) == load(path).with_deepfm(learned["settings"])  # without what --set said
    assert f"\n# Searched with the following, which is not in here: --set '{OVERRIDE}'\n" in best.read_text()
    told = f"trial 1, NDCG@10 {learned['ndcg@10']:.4f} on valid in epoch {learned['epoch']}"
    assert best.read_text().startswith(
        f"# The best of 3 trials: {told}.\n# Search {run.run_id}, features run "
    )
    assert run.inputs["features"] in best.read_text()
    assert f"  the best: {told}: " in printed
    assert f"{run.uri}/best.yaml" in printed
    assert {path.name for path in Path(run.path).iterdir()} == {
        *("best.yaml", "key.json", "manifest.json", "trials.jsonl")
    }


def test_after_kill_9_finished_trials_are_not_repeated_and_others_go_on(searched):
    _, run, rows, (first, second) = searched
    assert "  trial   1  NDCG@10" in first
    assert "  trial   2  NDCG@10" not in first
    assert f"tune: goes on with {run.uri}\n" in second
    assert "  1 of them were finished before\n" in second
    assert "  trial   1  " not in second
    assert "  trial   2  NDCG@10" in second
    assert [row["attempts"] for row in rows[:2]] == [1, 2]


def test_asha_stops_what_falls_behind_and_remembers_the_trials_before_the_kill(searched):
    _, run, (learned, not_learned, _), (_, second) = searched
    assert (learned["epochs"], learned["stopped_early"]) == (3, False)
    # Alone it would have been the best: the scheduler of the second start was told of the first trial.
    assert not_learned["settings"]["embedding_learning_rate"] == 1e-6  # YAML's 1e-6 is a text
    assert (not_learned["epochs"], not_learned["stopped_early"]) == (2, True)
    assert run.manifest["figures"]["stopped_early"] == 1
    assert "2 epochs, stopped early" in second


def test_settings_that_do_not_go_together_are_a_failed_trial(searched):
    _, run, rows, (first, _) = searched
    assert rows[2]["class"] == "ConfigError"
    assert "label_smoothing belongs to objective logistic, found softmax" in rows[2]["error"]
    assert rows[2]["error"] in first
    assert run.manifest["figures"]["failed"] == 1


def test_a_finished_search_is_not_repeated_and_features_are_not_copied(searched, root):
    path, run, *_ = searched
    assert run_here("tune.py", "--conf", str(path), "--set", OVERRIDE) == f"tune: done before, {run.uri}\n"
    assert [folder.name for folder in Path(f"{root}-experiments").iterdir()] == ["tune"]
    assert [folder.name for folder in root.iterdir()] == ["features"]


def test_the_same_seed_draws_the_same_settings(root, tmp_path):
    space = {
        "dropout": {"uniform": [0, 0.5]},
        "learning_rate": {"loguniform": [1e-4, 1e-2]},
        "negatives": {"randint": [1, 9]},
        "hidden": {"choice": [[8], [16, 8]]},
    }
    config = load(conf(tmp_path, root, space=space, trials=20)[0])
    points = tune.draw(config)
    assert points == tune.draw(config)
    assert points[:5] == tune.draw(load(conf(tmp_path, root, space=space, trials=5)[0]))
    only = load(tmp_path / "conf.yaml", ["tune.space={dropout: {choice: [0]}}"])
    assert set(only.tune.space) == {"dropout"}
    assert points != tune.draw(config.model_copy(update={"seed": SEED + 1}))
    assert len({json.dumps(point) for point in points}) == 20
    for point in points:
        assert 0 <= point["dropout"] <= 0.5
        assert 1e-4 <= point["learning_rate"] <= 1e-2
        assert config.with_deepfm(point).deepfm.negatives in range(1, 9)
    few = load(conf(tmp_path, root, space={"hidden": space["hidden"]})[0])
    assert sorted(point["hidden"] for point in tune.draw(few)) == [[8], [16, 8]]


BAD = {
    "no key": ({"droput": {"choice": [0]}}, "space.droput is no key of deepfm; nearest valid key: dropout"),
    "not searched": ({"num_workers": {"choice": [1]}}, "space.num_workers is not to be searched; "),
    "no kind": (
        {"dropout": {"unifrom": [0, 0.5]}},
        "dropout.unifrom: unknown key; nearest valid key: uniform",
    ),
    "nothing": ({"dropout": {}}, "expected one of choice, uniform, loguniform, randint, found none"),
    "two": ({"dropout": {"choice": [0], "uniform": [0, 0.5]}}, "found choice and uniform"),
    "empty": ({"dropout": {"uniform": [0.5, 0]}}, "uniform [0.5, 0.0] is empty"),
    "not a list": (
        {"dropout": {"choice": 3}},
        "tune.space.dropout.choice: Input should be a valid tuple, found 3",
    ),
    "log of 0": ({"learning_rate": {"loguniform": [0, 1]}}, "loguniform.0: Input should be greater than 0"),
    "value": (
        {"embedding_dim": {"choice": [16, 15]}},
        "space.embedding_dim: Input should be a multiple of 4, found 15",
    ),
    "end": (
        {"dropout": {"uniform": [0, 1.5]}},
        "space.dropout: must be a number of 0 or more and less than 1, or a list of one an epoch, found 1.5",
    ),
    "all at once": (
        {"epoch": {"choice": [1]}, "model": {"choice": ["dfm"]}},
        "key: epochs; space.model: Input",
    ),
}


@pytest.mark.parametrize(("space", "text"), BAD.values(), ids=BAD)
def test_a_bad_space_is_refused_by_name(space, text, tmp_path):
    path, _ = conf(tmp_path, tmp_path, space=space)
    with pytest.raises(ConfigError) as refused:
        load(path)
    assert text in str(refused.value)


def test_a_search_of_nothing_and_of_what_cannot_be_compared_is_refused(root, tmp_path):
    with pytest.raises(ConfigError, match=r"tune\.space is empty"):
        search(root, space={})
    space = {"negatives": {"choice": [0, 4]}, "objective": {"choice": ["logistic"]}}
    with pytest.raises(ConfigError, match="auc and ndcg@10 of different trials cannot be compared"):
        search(root, space=space)
    with pytest.raises(DataError, match=r"Run jobs/featurize\.py first"):
        search(tmp_path / "other")


def test_where_every_trial_fails_the_first_cause_is_the_error(root, capsys):
    space = {"objective": {"choice": ["squared"]}, "dropout": {"uniform": [0, 0.5]}}
    with pytest.raises(
        ConfigError, match=r"All 3 trials failed, the first with: .*negatives must be 0, found 4"
    ):
        search(root, space=space, trials=3)
    assert capsys.readouterr().out.count("failed") == 3


def test_what_was_set_for_the_search_alone_is_named_in_the_best_conf_and_not_in_force(root, tmp_path):
    """Where all trials have ended and the driver was killed before its commit: no Ray is needed."""
    path, asked = conf(tmp_path, root, space={"dropout": {"uniform": [0, 0.5]}}, trials=2)
    overrides = [OVERRIDE, "deepfm.epochs=1"]
    config = load(path, overrides)
    workspace = Workspace(config)
    inputs = workspace.inputs("tune")
    run = Workspace(config, "tune.root").new("tune", workspace.key("tune", config, inputs), inputs)
    for number, point in enumerate(tune.draw(config), start=1):
        place = run.training / f"trial_{number}"
        place.mkdir(parents=True)
        row = {"trial": number, "settings": point, "ndcg@10": number / 10, "epoch": 1, "epochs": 1}
        (place / "ended.json").write_text(json.dumps(row | {"stopped_early": False}))
    figures = tune.make(config, run, asked, overrides)
    best = Path(run.path, "best.yaml")
    assert load(best) == load(path).with_deepfm(figures["settings"])
    words = f"--set '{OVERRIDE}' --set deepfm.epochs=1"
    assert f"\n# Searched with the following, which is not in here: {words}\n" in best.read_text()

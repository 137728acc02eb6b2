"""What a real MLflow, in a SQLite file, is told of a training."""

import sys

import pytest
from mlflow import MlflowClient

from recsys_dist.deepfm.tracking import Tracking
from recsys_dist.errors import ConfigError
from recsys_dist.workspace import Workspace
from tests.synthetic import synthetic_config, synthetic_features

LINE = {
    "epoch": 1,
    "step": 15,
    "loss": 0.5,
    "ndcg@10": 0.25,
    "best": True,
    "examples_per_s": 1000,
    "seconds_left": 3,
    "attempt": 0,
    "resumed_from": 0,
    "metric": "ndcg@10",
}


@pytest.fixture
def config(tmp_path):
    return synthetic_config(tmp_path)


@pytest.fixture
def run(config):
    features = synthetic_features(config)
    return Workspace(config).new("deepfm", {}, {"features": features})


def told_to(config, uri):
    return config.model_copy(update={"mlflow": config.mlflow.model_copy(update={"tracking_uri": uri})})


def interrupted(config, run):
    with Tracking(config, run) as tracking:
        tracking.epoch(LINE)
        raise KeyboardInterrupt


def test_a_training_is_one_run_of_mlflow(config, run, tmp_path):
    """Also where another driver has gone on with it."""
    config = told_to(config, f"sqlite:///{tmp_path}/mlflow.db")
    with pytest.raises(KeyboardInterrupt):
        interrupted(config, run)
    client = MlflowClient(tracking_uri=config.mlflow.tracking_uri)
    experiment = client.get_experiment_by_name("recsys_dist")
    assert [of.info.status for of in client.search_runs([experiment.experiment_id])] == ["FAILED"]
    with Tracking(config, run) as tracking:
        tracking.epoch(LINE | {"epoch": 2, "step": 30, "loss": 0.25})
        refit = {name: value for name, value in LINE.items() if name != "metric"}
        tracking.epoch(refit | {"loss": 0.125})
    (found,) = client.search_runs([experiment.experiment_id])
    assert found.info.status == "FINISHED"
    assert found.info.run_name == found.data.tags["recsys_dist.run_id"] == run.run_id
    assert found.data.tags["recsys_dist.features"] == run.inputs["features"].run_id
    assert found.data.tags["recsys_dist.uri"] == run.uri
    assert found.data.params["seed"] == "42"
    assert found.data.params["hidden"] == "[16, 8]"
    losses = client.get_metric_history(found.info.run_id, "loss")
    assert [(of.step, of.value) for of in losses] == [(15, 0.5), (30, 0.25)]
    names = {"epoch", "loss", "ndcg at 10", "examples_per_s"}
    assert set(found.data.metrics) == {prefix + name for name in names for prefix in ("", "refit ")}
    assert found.data.metrics["refit loss"] == 0.125


def test_an_mlflow_that_cannot_be_reached_costs_a_line(config, run, capsys):
    uri = "http://127.0.0.1:1"  # where nothing listens
    with Tracking(told_to(config, uri), run) as tracking:
        tracking.epoch(LINE)
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("  warning")]
    assert line.startswith(f"  warning: MLflow at {uri} is told no more: ")


def test_a_missing_package_is_named_before_the_training_begins(config, run, monkeypatch):
    monkeypatch.setitem(sys.modules, "mlflow", None)
    with pytest.raises(ConfigError, match=r"needs MLflow, which is not installed: pip install mlflow-skinny"):
        Tracking(told_to(config, "http://127.0.0.1:5000"), run)
    with Tracking(config, run) as tracking:  # without an address nothing is needed
        tracking.epoch(LINE)

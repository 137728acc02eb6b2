"""A node of the Ray cluster is killed, or one comes: an elastic training goes on with the workers that there
is room for.
"""

import json
import os
import signal
from pathlib import Path

import psutil
import pytest
from ray.cluster_utils import Cluster

from recsys_dist.deepfm.published import load
from recsys_dist.deepfm.reports import HISTORY, lines
from tests.faults import test_training
from tests.faults.test_training import (
    DEADLINE_SECONDS,
    SETTINGS,
    gone,
    require_equal,
    resumed,
    training,
    under_way,
    wait_for,
)
from tests.synthetic import synthetic_config, synthetic_features

pytestmark = pytest.mark.long
undisturbed = test_training.undisturbed


@pytest.fixture
def head():
    """A cluster of one node with one CPU."""
    nodes = Cluster(
        initialize_head=True,
        head_node_args={
            "num_cpus": 1,
            "include_dashboard": False,
            "object_store_memory": 100_000_000,
            "_system_config": {"health_check_period_ms": 1000, "health_check_failure_threshold": 3},
        },
    )
    try:
        yield nodes
    finally:
        nodes.shutdown()


def another_node(nodes):
    """With a CPU too."""
    return nodes.add_node(num_cpus=1, object_store_memory=100_000_000)


def kill_node(node, workers):
    """Kill all processes of a node, on which one of the workers is; return them."""
    raylet = psutil.Process(node.all_processes["raylet"][0].process.pid)
    family = [raylet, *raylet.children(recursive=True)]
    assert len(set(workers.values()) & {one.pid for one in family}) == 1
    for one in family:
        os.kill(one.pid, signal.SIGKILL)
    return family


def test_a_training_takes_up_workers_when_a_node_comes(head, tmp_path):
    config, output = synthetic_config(tmp_path), tmp_path / "output"
    synthetic_features(config)
    # It would take long: what is waited for comes before its end.
    settings = {"num_workers": "[1,2]", "resize_seconds": 1, "epochs": 1000, "patience": 1000}
    with training(tmp_path, output, settings, {"RAY_ADDRESS": head.address}) as process:
        assert set(under_way(tmp_path, process, output)) == {0}
        another_node(head)
        (folder,) = tmp_path.glob("deepfm/*/training")

        wait_for(lambda: "on 2 workers" in output.read_text(), process, output)
        assert len(json.loads((folder / "workers.json").read_text())) == 2
        history = wait_for(
            lambda: (found := lines(folder / HISTORY)) and found[-1]["attempt"] and found, process, output
        )
    (resumed_from,) = {line["resumed_from"] for line in history if line["attempt"]}
    assert resumed_from >= 40
    assert f"  goes on from step {resumed_from:,} on 2 workers\n" in output.read_text()
    assert [line["epoch"] for line in history] == list(range(1, len(history) + 1))


def test_a_training_outlives_a_node(head, tmp_path):
    nodes, other = head, another_node(head)
    config, output = synthetic_config(tmp_path), tmp_path / "output"
    features = synthetic_features(config)
    environment = {
        "RAY_ADDRESS": nodes.address,
        "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "5",
    }
    with training(tmp_path, output, {"num_workers": "[1,2]"}, environment) as process:
        workers = under_way(tmp_path, process, output)
        assert set(workers) == {0, 1}
        (folder,) = tmp_path.glob("deepfm/*/training")
        family = kill_node(other, workers)
        newest = max(int(path.parent.name[5:].split("-")[0]) for path in folder.glob("step_*/sha256.json"))
        left = wait_for(
            lambda: len(found := json.loads((folder / "workers.json").read_text())) == 1 and found,
            process,
            output,
        )
        assert all(gone(one.pid) for one in family)
        alive = {node["NodeID"]: node["Alive"] for node in nodes.global_state.node_table()}
        assert alive == {nodes.head_node.node_id: True, other.node_id: False}
        assert left[0]["pid"] not in workers.values()
        assert process.wait(timeout=DEADLINE_SECONDS) == 0, output.read_text()
    run = resumed(config, output, workers=1)
    *_, last = Path(run.path, "history.jsonl").read_text().splitlines()
    resumed_from = json.loads(last)["resumed_from"]
    assert resumed_from in (newest, newest + SETTINGS["checkpoint_every_steps"] // 2)
    load(run, features.spec())


def test_a_training_of_so_many_workers_waits_for_a_node_in_the_place_of_a_lost_one(
    head, tmp_path, undisturbed
):
    nodes, other = head, another_node(head)
    config, output = synthetic_config(tmp_path), tmp_path / "output"
    features = synthetic_features(config)
    with training(tmp_path, output, variables={"RAY_ADDRESS": nodes.address}) as process:
        workers = under_way(tmp_path, process, output)
        family = kill_node(other, workers)
        wait_for(lambda: all(gone(one.pid) for one in family), process, output)
        another_node(nodes)
        assert process.wait(timeout=DEADLINE_SECONDS) == 0, output.read_text()
    assert all(gone(pid) for pid in workers.values())
    require_equal(resumed(config, output), features, undisturbed)

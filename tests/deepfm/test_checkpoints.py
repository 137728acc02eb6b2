"""When checkpoints are written, and what becomes of one that cannot be."""

import json
import shutil

import pytest
import torch
from torch.multiprocessing import ProcessRaisedException

from recsys_dist.deepfm.checkpoint import complete, load_weights
from recsys_dist.deepfm.model import DeepFM
from tests.deepfm.workers import lost_at_worst, run_workers, told_of_epochs, train_catching_up, train_in
from tests.synthetic import synthetic_config, synthetic_features


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    """Without checkpoints by steps; all others are kept."""
    root = tmp_path_factory.mktemp("root")
    return synthetic_config(
        root, batch_size=100, epochs=2, checkpoint_every_steps=1000, checkpoints_kept=1000
    )


@pytest.fixture(scope="module")
def features(config):
    return synthetic_features(config)


def with_settings(config, **settings):
    return config.model_copy(update={"deepfm": config.deepfm.model_copy(update=settings)})


@pytest.mark.parametrize("minutes", [None, 1e-9, 1000.0])
def test_checkpoints_by_minutes(config, features, tmp_path, minutes):
    """After every step that begins so long after the last one; else at the end of an epoch."""
    changed = with_settings(config, checkpoint_every_minutes=minutes)
    last = run_workers(2, train_in, tmp_path, changed, features, tmp_path)[0]["step"]
    ends = [json.loads(line)["step"] for line in (tmp_path / "history.jsonl").read_text().splitlines()]
    steps = [step for step, _, _ in complete(tmp_path)]
    assert ends == [last // 2, last]
    assert steps == (list(range(1, last + 1)) if minutes == 1e-9 else ends)


def test_a_checkpoint_that_cannot_be_written_fails_the_training(config, features, tmp_path):
    """Though it is written in the background: with the next one at the latest."""
    (tmp_path / "step_2-0" / ".metadata.tmp").mkdir(parents=True)  # in the place of a file
    changed = with_settings(config, checkpoint_every_steps=4)
    with pytest.raises(ProcessRaisedException, match=r"(?s)OSError: checkpoint .*/step_2-0 could not be"):
        run_workers(2, train_in, tmp_path, changed, features, tmp_path)
    assert not complete(tmp_path)


def test_nothing_is_being_written_when_an_epoch_is_told(config, features, tmp_path):
    """So that who ends the training there, as a search does, may remove its checkpoints."""
    changed = with_settings(config, checkpoint_every_steps=6)
    assert run_workers(1, told_of_epochs, tmp_path, changed, features, tmp_path) == [[[], []]]


@pytest.mark.parametrize("most", [1, 2, 5, 8])
def test_no_more_steps_are_lost_than_the_settings_allow(config, features, tmp_path, most):
    """Also while a checkpoint is being written, which takes longer than the steps to the next one."""
    changed = with_settings(config, batch_size=40, epochs=1, checkpoint_every_steps=most)
    (lost,) = run_workers(1, lost_at_worst, tmp_path, changed, features, tmp_path)
    assert max(lost) == max(1, most // 2 * 2)


def test_table_decay_is_the_same_however_often_the_clock_asks_for_checkpoints(config, features, tmp_path):
    """Bit for bit: a training with checkpoints by the clock, one without, one that goes on in an epoch."""
    decaying = {"embedding_weight_decay": 0.5, "batch_size": 40}
    clock = with_settings(config, **decaying, checkpoint_every_minutes=1e-9)
    none = with_settings(config, **decaying)
    every, folder = 3, tmp_path / "clock"
    last = run_workers(1, train_catching_up, folder, clock, features, folder, every)[0]["step"]
    steps = [step for step, _, _ in complete(folder)]
    assert steps == sorted({*range(every, last + 1, every), last // 2, last})
    resumed = shutil.copytree(folder, tmp_path / "resumed")
    middle = next(step for step in steps if last // 2 < step < last)
    for step, _, path in complete(resumed):
        if step > middle:
            shutil.rmtree(path)
    run_workers(1, train_catching_up, resumed, none, features, resumed, every)
    assert json.loads((resumed / "resumed.json").read_text())["step"] == middle
    whole = tmp_path / "none"
    run_workers(1, train_catching_up, whole, none, features, whole, every)
    assert [step for step, _, _ in complete(whole)] == [last // 2, last]
    found = []
    for where in (folder, resumed, whole):
        found.append(DeepFM(features.spec(), none.deepfm).state_dict())
        load_weights(complete(where)[-1][2], found[-1])
    for other in found[1:]:
        assert all(torch.equal(found[0][name], other[name]) for name in other)

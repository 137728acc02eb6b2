"""When checkpoints are written, and what becomes of one that cannot be."""

import json

import pytest
from torch.multiprocessing import ProcessRaisedException

from recsys_dist.deepfm.checkpoint import complete
from tests.deepfm.workers import run_workers, told_of_epochs, train_in
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
    changed = with_settings(config, checkpoint_every_steps=2)
    with pytest.raises(ProcessRaisedException, match=r"(?s)OSError: checkpoint .*/step_2-0 could not be"):
        run_workers(2, train_in, tmp_path, changed, features, tmp_path)
    assert not complete(tmp_path)


def test_nothing_is_being_written_when_an_epoch_is_told(config, features, tmp_path):
    """So that who ends the training there, as a search does, may remove its checkpoints."""
    changed = with_settings(config, checkpoint_every_steps=3)
    assert run_workers(1, told_of_epochs, tmp_path, changed, features, tmp_path) == [[[], []]]

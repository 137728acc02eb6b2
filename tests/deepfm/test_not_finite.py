"""A loss that is not finite ends the training before anything has moved, and says where it comes from."""

import dataclasses
import shutil

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from torch.multiprocessing import ProcessRaisedException

from recsys_dist.deepfm.checkpoint import complete, load_weights
from recsys_dist.deepfm.examples import Examples, read_examples
from recsys_dist.deepfm.items import Items
from recsys_dist.deepfm.model import DeepFM
from tests.deepfm.workers import run_workers, train_in, train_until_error
from tests.synthetic import synthetic_config, synthetic_features

STEP = 3
"""The step, from 0, whose batch has the number that is not finite."""


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    root = tmp_path_factory.mktemp("root")
    return synthetic_config(root, batch_size=100, checkpoint_every_steps=1)


@pytest.fixture(scope="module")
def features(config):
    """With its train examples in two files."""
    run = synthetic_features(config)
    table = pq.read_table(f"{run.path}/examples/split=train", partitioning=None)
    for part, rows in enumerate((table[:300], table[300:])):
        pq.write_table(rows, f"{run.path}/examples/split=train/part-{part:05d}.parquet")
    return run


def example_of(config, features):
    """An example of the step's batch: its user and item, its file and the row in it."""
    examples = Examples(features, Items(features, features.spec()), config)
    number = int(examples.numbers(0, STEP, rank=0, world_size=1)[-1])
    read = read_examples(features, features.spec(), ["train"], config.deepfm).slice(number, 1).to_pylist()[0]
    for part in (0, 1):
        file = f"split=train/part-{part:05d}.parquet"
        rows = pq.read_table(f"{features.path}/examples/{file}", partitioning=None).to_pylist()
        for row, found in enumerate(rows):
            if (found["user"], found["item"]) == (read["user"], read["item"]):
                return read, file, row
    raise AssertionError("the example is in no file")


def plant(table, column, row, value):
    """The table with one value in the place of another."""
    values = table[column].to_pylist()
    values[row] = value
    return table.set_column(table.column_names.index(column), column, pa.array(values, table[column].type))


def train_and_fail(workers, folder, config, features, message):
    """Expect the error, and finite weights in the newest checkpoint; its step."""
    with pytest.raises(ProcessRaisedException, match=message):
        run_workers(workers, train_in, folder, config, features, folder)
    assert not (folder / "history.jsonl").exists()
    found = complete(folder)
    for _, _, path in found[-1:]:
        state = DeepFM(features.spec(), config.deepfm).state_dict()
        load_weights(path, state)
        assert all(tensor.isfinite().all() for tensor in state.values())
    return found[-1][0] if found else 0


@pytest.mark.parametrize("workers", [1, 2])
def test_a_number_that_is_not_finite_is_named_with_its_file_and_row(config, features, tmp_path, workers):
    _, file, row = example_of(config, features)
    copy = shutil.copytree(features.path, tmp_path / "features")
    table = pq.read_table(copy / "examples" / file, partitioning=None)
    pq.write_table(plant(table, "activity", row, np.nan), copy / "examples" / file)
    planted = dataclasses.replace(features, path=str(copy), uri=str(copy))
    message = (
        f"DataError: The loss of epoch 1, step {STEP + 1} is not finite because of its inputs, in 1 of the "
        f"batch's examples: {copy}/examples/{file} row {row} (activity). Correct them"
    )
    folder = tmp_path / "training"
    found = run_workers(workers, train_until_error, folder, config, planted, folder)[0]
    assert found["error"].startswith(message)
    step, _, path = complete(folder)[-1]
    assert step == STEP
    state = DeepFM(features.spec(), config.deepfm).state_dict()
    before = {name: tensor.clone() for name, tensor in state.items()}
    load_weights(path, state)
    for name, tensor in state.items():
        assert torch.equal(found["weights"][name], tensor), name  # nothing has moved since
    assert any(not torch.equal(before[name], tensor) for name, tensor in state.items())


def test_so_is_a_drawn_items(config, features, tmp_path):
    copy = shutil.copytree(features.path, tmp_path / "features")
    (file,) = (copy / "items").iterdir()
    pq.write_table(plant(pq.read_table(file), "price", 10, np.inf), file)
    planted = dataclasses.replace(features, path=str(copy), uri=str(copy))
    message = r"not finite because of its inputs, in \d+ of .* \(price of item 11\).*\. Correct them"
    train_and_fail(1, tmp_path / "training", config, planted, message)


@pytest.mark.parametrize("workers", [1, 2])
def test_a_diverged_training_says_which_rates_to_lower(config, features, tmp_path, workers):
    changed = config.model_copy(update={"deepfm": config.deepfm.model_copy(update={"learning_rate": 1e30})})
    message = (
        r"ConfigError: The loss of epoch 1, step 2 is not finite, though its inputs are, in "
        r"\d+ of the batch's examples: .*/examples/split=train/part-0000[01].parquet row \d+.*; and others. "
        r"The training diverged. Lower "
        r"deepfm.learning_rate=1e\+30 or"
    )
    assert train_and_fail(workers, tmp_path, changed, features, message) == 1


@pytest.mark.parametrize("objective", ["softmax", "logistic"])
def test_so_does_one_that_diverges_in_an_epochs_last_step(config, features, tmp_path, objective):
    """The loss of that step is finite still; what is measured after it is not."""
    changes = {
        "batch_size": 100_000,  # one step an epoch
        "checkpoint_every_steps": 100,
        "learning_rate": 1e37,
        "objective": objective,
        "negatives": 4 if objective == "softmax" else 0,
    }
    changed = config.model_copy(update={"deepfm": config.deepfm.model_copy(update=changes)})
    message = "ConfigError: After epoch 1 the model's predictions are not finite. .* Lower deepfm.learning"
    assert train_and_fail(1, tmp_path, changed, features, message) == 0

"""Parts of a published model."""

import json

import numpy as np
import pytest
import safetensors.torch
import torch

from recsys_dist.deepfm import published
from recsys_dist.deepfm.published import Weights
from recsys_dist.errors import DataError
from recsys_dist.workspace import Workspace
from tests.synthetic import synthetic_config


@pytest.fixture
def run(tmp_path):
    """A run with two tensors."""
    run = Workspace(synthetic_config(tmp_path)).new("deepfm", {}, {})
    run.filesystem.create_dir(f"{run.path}/model")
    numbers = torch.arange(300, dtype=torch.float32).view(100, 3)
    with run.filesystem.open_output_stream(f"{run.path}/{published.WEIGHTS}") as stream:
        stream.write(safetensors.torch.save({"small": torch.tensor([[1.5]]), "table": numbers}))
    return run


def test_tensors_and_rows_are_what_the_library_wrote(run, monkeypatch):
    weights = Weights(run)
    with run.filesystem.open_input_stream(f"{run.path}/{published.WEIGHTS}") as stream:
        expected = safetensors.torch.load(stream.read())
    assert set(weights.tensors) == set(expected)
    assert all(torch.equal(weights.whole(name), expected[name]) for name in expected)
    assert weights.bytes("table") == 1200
    reads = []
    real = Weights._read
    monkeypatch.setattr(
        Weights, "_read", lambda self, places: reads.extend(listed := list(places)) or real(self, listed)
    )
    for gap, begun in ((0, 5), (24, 3), (1000, 1)):
        monkeypatch.setattr(published, "GAP", gap)
        rows = np.array([0, 2, 3, 50, 99])
        reads.clear()
        assert torch.equal(weights.rows("table", rows), expected["table"][rows])
        assert len(reads) == begun
    assert weights.rows("table", np.array([], int)).shape == (0, 3)


@pytest.mark.parametrize("damage", ["cut", "text", "half", "empty"])
def test_a_damaged_file_is_refused_in_words(run, damage):
    with run.filesystem.open_input_stream(f"{run.path}/{published.WEIGHTS}") as stream:
        content = stream.read()
    changed = {"cut": content[:-1], "text": b"never mind what this says", "half": content[:30], "empty": b""}
    with run.filesystem.open_output_stream(f"{run.path}/{published.WEIGHTS}") as stream:
        stream.write(changed[damage])
    with pytest.raises(DataError, match=r"/model cannot be read: .*train again"):
        Weights(run)


def test_numbers_of_another_type_are_refused(run):
    header = json.dumps({"table": {"dtype": "F16", "shape": [1], "data_offsets": [0, 2]}}).encode()
    with run.filesystem.open_output_stream(f"{run.path}/{published.WEIGHTS}") as stream:
        stream.write(len(header).to_bytes(8, "little") + header + b"ab")
    with pytest.raises(DataError, match="type F16, expected F32"):
        Weights(run)

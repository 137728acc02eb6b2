"""The same training on a GPU: nccl, fused tables, the pipeline, checkpoints, bfloat16."""

import pytest
import torch

from recsys_dist.deepfm.checkpoint import complete, load_weights, problem_of
from recsys_dist.deepfm.model import DeepFM
from recsys_dist.deepfm.reports import lines
from tests.deepfm.workers import alone, decayed, one_step, restored, stepped, train_in
from tests.synthetic import synthetic_config, synthetic_features

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    root = tmp_path_factory.mktemp("root")
    return synthetic_config(root, init_scale=0.1, dropout=0.0, epochs=3, batch_size=100)


@pytest.fixture(scope="module")
def features(config):
    return synthetic_features(config)


def with_settings(config, **settings):
    return config.model_copy(update={"deepfm": config.deepfm.model_copy(update=settings)})


@pytest.mark.parametrize("sharding", ["row_wise", "table_wise", "data_parallel", "table_row_wise"])
@pytest.mark.parametrize("optimizer", ["rowwise_adagrad", "adagrad"])
def test_a_step_equals_the_processors(config, features, sharding, optimizer):
    def at(kind):
        kinds = dict.fromkeys(("user", "item", "recent", "genres"), kind)
        return with_settings(config, sharding=kinds, table_optimizer=optimizer)

    on_processors = "row_wise" if sharding == "table_row_wise" else sharding
    cpu = alone("gloo", one_step, at(on_processors), features)
    gpu = alone("nccl", one_step, at(sharding), features)
    plans = [{row["table"]: row["sharding"] for row in of["plan"]} for of in (cpu, gpu)]
    assert plans[0]["table_user"] == on_processors
    assert plans[1]["table_user"] == sharding
    assert plans[0].keys() == plans[1].keys()
    for part in ("start", "gradients", "after", "buffers"):
        torch.testing.assert_close(gpu[part], cpu[part], rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(gpu["logits"], cpu["logits"], rtol=1e-4, atol=1e-5)


def test_the_pipeline_equals_a_plain_loop(config, features):
    piped, plain = (alone("nccl", stepped, config, features, piped) for piped in (True, False))
    torch.testing.assert_close(piped, plain, rtol=1e-5, atol=1e-6)


def test_lazy_decay_equals_decay_of_all_rows(config, features):
    config = with_settings(config, embedding_weight_decay=0.5)
    found = alone("nccl", decayed, config, features)
    torch.testing.assert_close(found["lazy"], found["whole"], rtol=1e-5, atol=1e-6)
    assert any(found["behind"].values())


def test_training_goes_on_from_a_checkpoint_and_comes_to_the_processors_figures(config, features, tmp_path):
    cpu = alone("gloo", train_in, config, features, tmp_path / "on-cpu")
    whole = alone("nccl", train_in, config, features, tmp_path / "on-gpu")
    folder = tmp_path / "in-parts"
    alone("nccl", train_in, with_settings(config, epochs=1), features, folder)
    rest = alone("nccl", train_in, config, features, folder)
    assert [line["resumed_from"] for line in lines(folder / "history.jsonl")][-1] > 0
    assert abs(whole["best"] - cpu["best"]) < 2e-3
    torch.testing.assert_close(rest, whole, rtol=1e-3, atol=1e-3)
    path = complete(folder)[-1][2]
    assert problem_of(path) is None
    state = alone("nccl", restored, config, features, folder)
    weights = DeepFM(features.spec(), config.deepfm).state_dict()
    load_weights(path, weights)
    for name, tensor in weights.items():
        found = state["weights"][name] if name in state["weights"] else state["weights"][f"module.{name}"]
        torch.testing.assert_close(found, tensor)


def test_bfloat16_learns_as_well(config, features, tmp_path):
    plain = alone("nccl", train_in, config, features, tmp_path / "f32")
    config = with_settings(config, precision="bfloat16")
    half = alone("nccl", train_in, config, features, tmp_path / "f16")
    assert abs(half["best"] - plain["best"]) < 0.02

"""Items that are drawn once a step for all its examples."""

import numpy as np
import pytest
import torch
from torch import nn

from recsys_dist.config import DeepFM as Settings
from recsys_dist.deepfm.examples import Examples
from recsys_dist.deepfm.items import Items
from recsys_dist.deepfm.model import DeepFM, used_fields
from recsys_dist.deepfm.negatives import Negatives
from recsys_dist.errors import ConfigError
from tests.deepfm.workers import one_step, run_workers
from tests.synthetic import synthetic_config, synthetic_features

COUNTS = np.array([0, 5, 1, 30, 0, 8])
DAILY = "[trend, age]"
ALL = 10_000
SPLIT = [
    "{user: row_wise, item: table_wise, recent: data_parallel}",
    "{user: table_wise, item: data_parallel, recent: row_wise}",
    "{user: data_parallel, item: row_wise, recent: table_wise}",
]


def shared(root, number, **changes):
    settings = {"objective": "softmax", "negatives": number, "negatives_shared": True, "leave_out": DAILY}
    return synthetic_config(root, **(settings | {"init_scale": 0.1, "batch_size": 96} | changes))


@pytest.fixture(scope="module")
def features(tmp_path_factory):
    return synthetic_features(synthetic_config(tmp_path_factory.mktemp("root")))


def first_batch(config, features):
    spec = used_fields(features.spec(), config.deepfm)
    examples = Examples(features, Items(features, spec), config)
    return DeepFM(spec, config.deepfm, seed=3), examples, examples.batch(0, 0, rank=0, world_size=1)


@pytest.mark.parametrize("power", [0.0, 1.0])
def test_drawn_as_often_as_said_and_only_what_is_present(power):
    present = np.arange(1, 7) != 4
    weights = (1.0 + COUNTS) ** power * present
    negatives = Negatives(COUNTS, present, power)
    generator = np.random.default_rng(1)
    drawn = [negatives.draw_for_all(4, generator) for _ in range(10_000)]
    items = np.concatenate([found for found, _ in drawn])
    odds = np.concatenate([found for _, found in drawn])
    expected = weights / weights.sum()
    np.testing.assert_allclose(np.bincount(items, minlength=7)[1:] / len(items), expected, atol=0.01)
    np.testing.assert_allclose(np.exp(odds), expected[items - 1], rtol=1e-5)


@pytest.mark.parametrize("number", [5, ALL])
def test_all_items_come_once_each_where_as_many_are_asked_for(number):
    items, odds = Negatives(COUNTS, np.arange(1, 7) != 4, 1.0).draw_for_all(number, np.random.default_rng(0))
    assert items.tolist() == [1, 2, 3, 5, 6]
    np.testing.assert_allclose(np.exp(odds), 0.2, rtol=1e-6)


@pytest.mark.parametrize(
    "changes",
    [
        {"attention": "{recent: 2}", "batch_norm": True},
        {"model": "fm"},
        {
            "model": "fm",
            "encoder": "{recent: 2}",
            "encoder_dropout": 0,
            "leave_out": "[user, trend, age]",
            "sharding": "{}",
        },
    ],
)
def test_every_example_is_scored_with_its_own_item_and_the_drawn_ones(features, tmp_path, changes):
    model, _, batch = first_batch(shared(tmp_path, 7, **changes), features)
    model.eval()
    _, logits = model(batch)
    number = len(batch.user)
    assert logits.shape == (number, 8)
    assert len(batch.item) == number + 7
    users = model.user_side(batch.user)
    for row in (0, 5, number - 1):
        rows, user = torch.tensor([row, *range(number, number + 7)]), users.rows(row, row + 1)
        if not batch.user.starts:
            user = model.user_side(batch.user.take(torch.tensor([row])))
        torch.testing.assert_close(logits[row], model.logits(user, model.item_side(batch.item.take(rows))))


def test_batch_normalisation_sees_own_and_drawn_items_at_once(features, tmp_path):
    model, _, batch = first_batch(shared(tmp_path, 7, batch_norm=True), features)
    norm = model.layers[0]
    seen = []
    norm.register_forward_hook(lambda _, inputs, output: seen.append(inputs[0].detach()))
    model(batch)
    (hidden,) = seen
    assert hidden.shape[:2] == (len(batch.user), 8)
    counted = hidden[batch.weight > 0].flatten(0, 1)
    torch.testing.assert_close(norm.mean, 0.1 * counted.mean(0))


@pytest.mark.parametrize("outside", [False, True])
def test_with_all_items_the_loss_is_the_full_softmax(features, tmp_path, outside):
    """Over those that are present, or of these the ones that are not in the history."""
    model, examples, batch = first_batch(shared(tmp_path, ALL, negatives_outside_history=outside), features)
    present = examples.catalogue.present
    assert examples.drawn == present.sum() < len(present)
    loss, _ = model(batch)
    everything = torch.arange(1, len(present) + 1)
    with torch.no_grad():
        item = model.item_side(examples.catalogue.at(everything, torch.zeros(1, dtype=torch.int32)))
        logits = model.logits(model.user_side(batch.user).leading(-1, 1), item.leading(1, -1))
    logits[:, ~torch.from_numpy(present)] = -torch.inf
    own = batch.item.indices.to_dict()["item"].values()[: len(batch.user)].long()
    histories, left_out = batch.user.indices.to_dict()["recent"].to_dense(), 0
    for row, history in enumerate(histories):
        others = history[(history > 0) & (history != own[row])].long() - 1
        left_out += len(others)
        if outside:
            logits[row, others] = -torch.inf
    assert left_out
    each = nn.functional.cross_entropy(logits, own - 1, reduction="none")
    assert loss.item() == pytest.approx((each * batch.weight).sum().item(), rel=1e-5)


def test_draws_are_new_each_step_and_the_same_on_all_workers(features, tmp_path):
    _, examples, _ = first_batch(shared(tmp_path, 9), features)

    def drawn(step, rank, world_size):
        batch = examples.batch(0, step, rank, world_size)
        return batch.item.indices.to_dict()["item"].values()[len(batch.user) :].tolist()

    assert drawn(0, 0, 1) == drawn(0, 0, 3) == drawn(0, 2, 3)
    assert drawn(0, 0, 1) != drawn(1, 0, 1)


def test_a_positive_does_not_count_among_the_drawn_items(features, tmp_path):
    _, _, batch = first_batch(shared(tmp_path, 30), features)
    items = batch.item.indices.to_dict()["item"].values()
    own, drawn = items[: len(batch.user), None], items[len(batch.user) :]
    assert torch.equal(batch.log_probability.isinf(), own == drawn)
    assert batch.log_probability.isinf().any()


@pytest.mark.parametrize("workers", [1, 2, 3])
@pytest.mark.parametrize("number", [11, ALL])
def test_sharded_it_is_what_it_is_unsharded(features, tmp_path, workers, number):
    config = shared(tmp_path, number, sharding=SPLIT[workers - 1])
    spec = used_fields(features.spec(), config.deepfm)
    model = DeepFM(spec, config.deepfm, seed=config.seed)
    batch = Examples(features, Items(features, spec), config).batch(0, 0, rank=0, world_size=1)
    loss, logits = model(batch)
    loss.backward()
    answers = run_workers(workers, one_step, tmp_path, config, features)
    assert sum(answer["loss"] for answer in answers) / workers == pytest.approx(loss.item(), abs=1e-5)
    found = torch.cat([answer["logits"][answer["weight"] > 0] for answer in answers])
    torch.testing.assert_close(found, logits.detach()[batch.weight > 0])
    rate = config.deepfm.embedding_learning_rate
    for name, parameter in model.named_parameters():
        if name in answers[0]["gradients"]:
            torch.testing.assert_close(answers[0]["gradients"][name], parameter.grad, msg=name)
        elif name in answers[0]["after"] and answers[0]["after"][name] is not None:
            state = parameter.grad.square().mean(1, keepdim=True)
            moved = parameter.detach() - rate * parameter.grad / (state.sqrt() + 1e-8)
            torch.testing.assert_close(answers[0]["after"][name], moved, rtol=1e-3, atol=1e-5, msg=name)


def test_fields_that_change_by_day_are_refused(features, tmp_path):
    with pytest.raises(ConfigError, match=r"trend, age of the items change .*leave_out=\[trend, age\]"):
        first_batch(shared(tmp_path, 5, leave_out="[]"), features)


@pytest.mark.parametrize(("name", "model"), [("item", "fm"), ("colour", "fm"), ("user", "mf")])
def test_a_field_that_cannot_be_left_out_is_refused(features, tmp_path, name, model):
    config = shared(tmp_path, 5, leave_out=f"[{name}]", model=model)
    with pytest.raises(ConfigError, match=f"deepfm.leave_out: {name} is no field that can be left out"):
        used_fields(features.spec(), config.deepfm)


def test_something_of_the_user_is_left(features, tmp_path):
    names = "group, recent, genres_seen, hour, weekday"
    fields = used_fields(features.spec(), shared(tmp_path, 5, leave_out=f"[{names}]", sharding="{}").deepfm)
    assert "user" in [field.name for field in fields.fields]
    without = shared(tmp_path, 5, leave_out=f"[user, {names}]", sharding="{}")
    with pytest.raises(ConfigError, match="without user no field of users or of the context is left"):
        used_fields(features.spec(), without.deepfm)


@pytest.mark.parametrize("changes", [{"objective": "bpr"}, {"negatives_from": "batch"}])
def test_settings_that_do_not_fit_are_refused(changes):
    with pytest.raises(ValueError, match="negatives_shared is for objective softmax and negatives_from cat"):
        Settings(negatives_shared=True, **changes)

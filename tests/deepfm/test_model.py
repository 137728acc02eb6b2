import contextlib
import itertools
import json
from pathlib import Path

import pytest
import torch
from torch import nn

from recsys_dist.deepfm.batches import Batch, side_batch
from recsys_dist.deepfm.examples import Examples
from recsys_dist.deepfm.items import Items, days_of
from recsys_dist.deepfm.model import BLOCK, DeepFM, initial_rows, load, publish
from recsys_dist.errors import ConfigError, DataError
from recsys_dist.workspace import Workspace
from tests.synthetic import synthetic_config, synthetic_features

USERS = 7


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    return synthetic_config(tmp_path_factory.mktemp("root"), init_scale=0.3)


@pytest.fixture(scope="module")
def features(config):
    return synthetic_features(config)


@pytest.fixture(scope="module")
def model(config, features):
    return DeepFM(features.spec(), config.deepfm, seed=3).eval()


@pytest.fixture(scope="module")
def sides(features, model):
    """`USERS` train rows, with an empty history among them, and all items."""
    examples = features.table("examples").sort_by("timestamp")
    rows = examples.slice(0, USERS)
    assert min(len(bag) for bag in rows["recent"].to_pylist()) == 0
    items = Items(features, features.spec())
    every = torch.arange(1, len(items) + 1)
    days = torch.from_numpy(days_of(rows["timestamp"]))[:1]
    return side_batch(rows, model.user_fields), items.at(every, days)


def embedded(model, batch, fields, collection, values, row):
    """A row's embeddings [F, D + 1], one by one."""
    width = model.settings.embedding_dim + 1
    jagged, numbers, found = batch.indices.to_dict(), 0, []
    for field in fields:
        if field.type in ("value", "vector"):
            parts = [batch.values[row, numbers + n] * values[numbers + n] for n in range(field.cardinality)]
            found.append(torch.stack(parts).sum(0))
            numbers += field.cardinality
            continue
        start, stop = jagged[field.name].offsets()[row : row + 2].tolist()
        bag = jagged[field.name].values()[start:stop].long()
        vectors = collection.embedding_bags[f"table_{field.name}"].weight[bag][:, :width]
        if not len(bag):
            found.append(torch.zeros(width))
        else:
            found.append(vectors.mean(0) if field.pooling == "mean" else vectors.sum(0))
    return torch.stack(found)


def plain_logit(model, user, item, u, i):
    """DeepFM as the paper writes it: all pairs of fields, one Linear over the concatenation."""
    dim = model.settings.embedding_dim
    fields = torch.cat(
        [
            embedded(model, user, model.user_fields, model.user_tables, model.user_values, u),
            embedded(model, item, model.item_fields, model.item_tables, model.item_values, i),
        ]
    )
    first, factors = fields[:, dim].sum(), fields[:, :dim]
    second = sum(a @ b for a, b in itertools.combinations(factors, 2))
    joint = nn.Linear(factors.numel(), model.user_hidden.out_features)
    joint.weight.data = torch.cat([model.user_hidden.weight, model.item_hidden.weight], dim=1)
    joint.bias.data = model.user_hidden.bias.data
    return model.bias + first + second + model.layers(joint(factors.flatten()))[0]


@torch.no_grad()
def test_equals_the_papers_formula(model, sides):
    user, item = sides
    model.bias.fill_(0.1)
    model.user_hidden.bias.uniform_(-1, 1)
    logits = model.logits(model.user_side(user).leading(-1, 1), model.item_side(item).leading(1, -1))
    assert logits.shape == (USERS, len(item))
    for u in range(USERS):
        for i in range(0, len(item), 7):
            assert logits[u, i].item() == pytest.approx(plain_logit(model, user, item, u, i).item(), abs=1e-5)


@torch.no_grad()
def test_a_vector_is_one_field(model, features):
    """Its numbers have embeddings of their own, and together the place of one field in the MLP."""
    fields = {field.name: field for field in model.user_fields}
    assert model.user_values.shape == (
        sum(f.cardinality for f in fields.values() if f.type != "index" and f.type != "indices"),
        5,
    )
    assert model.user_hidden.in_features == len(fields) * model.settings.embedding_dim


@torch.no_grad()
def test_fm_and_mlp_add_up(model, sides):
    user, item = model.user_side(sides[0]).leading(-1, 1), model.item_side(sides[1]).leading(1, -1)
    torch.testing.assert_close(model.fm(user, item) + model.mlp(user, item), model.logits(user, item))


def test_forward_scores_each_positive_with_its_own_items(config, features, model):
    batch = Examples(features, Items(features, features.spec()), config).batch(
        epoch=0, step=0, rank=0, world_size=1
    )
    loss, logits = model(batch)
    width = 1 + config.deepfm.negatives
    for row in (0, 5):
        rows = torch.arange(row * width, (row + 1) * width)
        user = model.user_side(batch.user.take(torch.tensor([row])))
        torch.testing.assert_close(logits[row], model.logits(user, model.item_side(batch.item.take(rows))))
    target = torch.zeros_like(logits)
    target[:, 0] = 1
    expected = nn.functional.binary_cross_entropy_with_logits(logits, target)
    assert loss.item() == pytest.approx(expected.item(), abs=1e-6)


def test_rows_without_weight_do_not_count(config, features, model):
    batch = Examples(features, Items(features, features.spec()), config).batch(
        epoch=0, step=0, rank=0, world_size=1
    )
    half = torch.arange(len(batch.weight)) < 32
    loss, logits = model(Batch(batch.user, batch.item, batch.log_probability, half / 32))
    assert loss.item() == pytest.approx(
        model.loss(logits, batch.log_probability)[:32].mean().item(), abs=1e-6
    )


def test_softmax_estimates_the_full_softmax(config, features):
    """With every other item drawn once, uniformly, the estimate is the full softmax itself."""
    settings = config.deepfm.model_copy(update={"objective": "softmax"})
    model = DeepFM(features.spec(), settings)
    logits = torch.randn(5, 9)
    log_probability = torch.full((5, 8), 1 / 8).log()
    full = nn.functional.cross_entropy(logits, torch.zeros(5, dtype=torch.long), reduction="none")
    torch.testing.assert_close(model.loss(logits, log_probability), full)


def test_initial_rows_do_not_depend_on_the_cut():
    rows = 2 * BLOCK + 100
    whole = initial_rows(1, "table_item", 0, rows, dim=4, scale=0.1)
    for cut in (1, BLOCK - 1, BLOCK, rows // 2, rows - 1):
        parts = [initial_rows(1, "table_item", a, b, dim=4, scale=0.1) for a, b in ((0, cut), (cut, rows))]
        assert torch.equal(torch.cat(parts), whole)
    assert not whole[0].any()  # unknown
    assert not whole[:, 5:].any()  # padding
    assert len(whole[1:].unique(dim=0)) == rows - 1
    assert not torch.equal(whole, initial_rows(2, "table_item", 0, rows, dim=4, scale=0.1))
    assert not torch.equal(whole, initial_rows(1, "table_user", 0, rows, dim=4, scale=0.1))


def test_a_field_may_be_named_like_a_method_of_a_module(config, features):
    spec = features.spec()
    fields = tuple(f.model_copy(update={"name": "half"}) if f.name == "group" else f for f in spec.fields)
    assert DeepFM(spec.model_copy(update={"fields": fields}), config.deepfm).user_tables is not None


@pytest.fixture(scope="module")
def published(config, features, model):
    workspace, inputs = Workspace(config), {"features": features}
    run = workspace.new("deepfm", workspace.key("deepfm", config, inputs), inputs)
    publish(run, features.spec(), config.deepfm, model.state_dict())
    return run.commit(config, {})


@torch.no_grad()
def test_a_published_model_gives_equal_logits(published, features, model, sides):
    again = load(published, features.spec())
    assert not again.training
    expected = model.logits(model.user_side(sides[0]), model.item_side(sides[1]).rows(0, USERS))
    found = again.logits(again.user_side(sides[0]), again.item_side(sides[1]).rows(0, USERS))
    assert torch.equal(found, expected)


def test_a_published_model_holds_no_pickle(published):
    files = {path.name: path.read_bytes() for path in Path(published.path, "model").iterdir()}
    assert set(files) == {"model.safetensors", "model.json"}
    length = int.from_bytes(files["model.safetensors"][:8], "little")
    assert "bias" in json.loads(files["model.safetensors"][8 : 8 + length])
    assert json.loads(files["model.json"])["model"] == "deepfm"


def test_a_model_of_other_fields_is_refused(published, features):
    spec = features.spec()
    with pytest.raises(DataError, match=r"was trained on the fields user, item, .* weekday"):
        load(published, spec.model_copy(update={"fields": spec.fields[:-1]}))


def test_a_model_whose_indices_mean_something_else_is_refused(published, features):
    spec = features.spec()
    genres = spec.vocabularies["genres"]
    other = genres.model_copy(update={"fingerprint": "other"})
    grown = other.model_copy(update={"ancestors": ((genres.size, genres.fingerprint),)})
    for found, fits in ((other, False), (grown, True)):
        changed = spec.model_copy(update={"vocabularies": spec.vocabularies | {"genres": found}})
        with contextlib.nullcontext() if fits else pytest.raises(ConfigError, match="vocabulary genres"):
            load(published, changed)


def test_a_damaged_model_is_refused(published, features, tmp_path):
    damaged = type(published)(published.filesystem, str(tmp_path), f"file://{tmp_path}", published.manifest)
    (tmp_path / "model").mkdir()
    for path in Path(published.path, "model").iterdir():
        content = path.read_bytes()
        kept = content if path.suffix == ".json" else content[: len(content) // 2]
        (tmp_path / "model" / path.name).write_bytes(kept)
    with pytest.raises(DataError, match="cannot be read"):
        load(damaged, features.spec())

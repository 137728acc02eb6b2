import contextlib
import dataclasses
import itertools
import json
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import nn

from recsys_dist.config import DeepFM as DeepFMSettings
from recsys_dist.deepfm.batches import Batch, side_batch
from recsys_dist.deepfm.examples import Examples
from recsys_dist.deepfm.items import Items, days_of
from recsys_dist.deepfm.model import BLOCK, DeepFM, initial_rows, used_fields
from recsys_dist.deepfm.published import load, publish
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
    width = model.dim + 1
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
    """Each model as its paper writes it: all pairs of fields, one Linear over the concatenation."""
    dim, kind = model.dim, model.settings.model
    fields = torch.cat(
        [
            embedded(model, user, model.user_fields, model.user_tables, model.user_values, u),
            embedded(model, item, model.item_fields, model.item_tables, model.item_values, i),
        ]
    )
    first, factors = fields[:, dim].sum(), fields[:, :dim]
    logit = torch.zeros(())
    if kind != "dnn":
        logit = logit + model.bias + first
    if kind == "mf":
        assert len(factors) == 2
        logit = logit + factors[0] @ factors[1]
    if kind in ("fm", "deepfm"):
        logit = logit + sum(a @ b for a, b in itertools.combinations(factors, 2))
    if kind in ("dnn", "deepfm"):
        joint = nn.Linear(factors.numel(), model.user_hidden.out_features)
        joint.weight.data = torch.cat([model.user_hidden.weight, model.item_hidden.weight], dim=1)
        joint.bias.data = model.user_hidden.bias.data
        logit = logit + model.layers(joint(factors.flatten()))[0]
    return logit


@pytest.mark.parametrize("kind", ["lr", "fm", "mf", "dnn", "deepfm"])
@torch.no_grad()
def test_equals_the_papers_formula(config, features, sides, kind):
    settings = config.deepfm.model_copy(update={"model": kind})
    spec = used_fields(features.spec(), settings)
    model = DeepFM(spec, settings, seed=3).eval()
    model.start_at(0.1)
    if model.deep:
        model.user_hidden.bias.uniform_(-1, 1)
    if kind == "mf":
        items, rows = Items(features, spec), features.table("examples").sort_by("timestamp").slice(0, USERS)
        sides = side_batch(rows, model.user_fields), items.at(torch.arange(1, len(items) + 1), torch.zeros(1))
    user, item = sides
    logits = model.logits(model.user_side(user).leading(-1, 1), model.item_side(item).leading(1, -1))
    assert logits.shape == (USERS, len(item))
    assert len(logits.unique()) > USERS
    for u in range(USERS):
        for i in range(0, len(item), 7):
            expected = plain_logit(model, user, item, u, i).item()
            assert logits[u, i].item() == pytest.approx(expected, rel=1e-5, abs=1e-6)
    assert set(dict(model.named_parameters())) >= ({"bias"} if kind != "dnn" else {"layers.2.weight"})


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
    real = batch.weight > 0
    expected = nn.functional.binary_cross_entropy_with_logits(logits[real], target[real])
    assert loss.item() == pytest.approx(expected.item(), abs=1e-6)


def test_rows_without_weight_do_not_count(config, features, model):
    batch = Examples(features, Items(features, features.spec()), config).batch(
        epoch=0, step=0, rank=0, world_size=1
    )
    half = torch.arange(len(batch.weight)) < 32
    loss, logits = model(dataclasses.replace(batch, weight=half / 32))
    assert loss.item() == pytest.approx(model.loss(logits, batch)[:32].mean().item(), abs=1e-6)


def losses(config, features, logits, objective, label=None, drawn=None, **changes):
    changes |= {"objective": objective, "negatives": logits.shape[1] - 1}
    model = DeepFM(features.spec(), config.deepfm.model_copy(update=changes))
    nothing = torch.empty(0)
    batch = Batch(nothing, nothing, drawn, nothing, torch.ones(len(logits)) if label is None else label)
    return model.loss(logits, batch)


def test_softmax_estimates_the_full_softmax(config, features):
    """With every other item drawn once, uniformly, the estimate is the full softmax itself."""
    logits = torch.randn(5, 9)
    found = losses(config, features, logits, "softmax", drawn=torch.full((5, 8), 1 / 8).log())
    full = nn.functional.cross_entropy(logits, torch.zeros(5, dtype=torch.long), reduction="none")
    torch.testing.assert_close(found, full)


def test_bpr(config, features):
    logits = torch.randn(4, 3)
    probability = 1 / (1 + (logits[:, 1:] - logits[:, :1]).exp())
    torch.testing.assert_close(losses(config, features, logits, "bpr"), -probability.log().mean(1))


def test_labels_and_their_smoothing(config, features):
    logits, label = torch.randn(6, 1), torch.tensor([1.0, 0, 1, 0, 0, 1])
    p = torch.sigmoid(logits[:, 0])
    for smoothing in (0.0, 0.2):
        target = torch.where(label == 1, 1 - smoothing / 2, smoothing / 2)
        expected = -(target * p.log() + (1 - target) * (1 - p).log())
        found = losses(config, features, logits, "logistic", label, label_smoothing=smoothing)
        torch.testing.assert_close(found, expected)


def test_squared_error(config, features):
    logits, value = torch.randn(6, 1), torch.rand(6) * 5
    torch.testing.assert_close(
        losses(config, features, logits, "squared", value), (logits[:, 0] - value) ** 2
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"objective": "bpr", "negatives": 0}, "objective bpr needs drawn items"),
        ({"objective": "squared", "negatives": 4}, "negatives must be 0, found 4"),
        ({"label_smoothing": 0.1, "objective": "softmax"}, "label_smoothing belongs to objective logistic"),
    ],
)
def test_objectives_that_do_not_fit(changes, message):
    with pytest.raises(ValueError, match=message):
        DeepFMSettings(**changes)


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
    publish(run, features.spec(), config.deepfm, model.state_dict().__getitem__)
    return run.commit(config, {})


@torch.no_grad()
def test_a_published_model_gives_equal_logits(published, features, model, sides):
    again = load(published, features.spec())
    assert not again.training
    expected = model.logits(model.user_side(sides[0]), model.item_side(sides[1]).rows(0, USERS))
    found = again.logits(again.user_side(sides[0]), again.item_side(sides[1]).rows(0, USERS))
    assert torch.equal(found, expected)


def test_a_published_model_is_what_the_library_reads(published, model):
    found = safetensors.torch.load_file(f"{published.path}/model/model.safetensors")
    expected = model.state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


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
    told = tmp_path / "model/model.json"
    for text in ("{", "{}", None):
        told.write_text(text) if text else told.unlink()
        with pytest.raises(DataError, match=r"model/model\.json cannot be read, or is of another version"):
            load(damaged, features.spec())

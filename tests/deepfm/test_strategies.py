"""What the settings of the model and its training do, against the same thing written out."""

import dataclasses
import itertools
import shutil

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from recsys_dist.config import DeepFM as DeepFMSettings
from recsys_dist.config import in_epoch
from recsys_dist.deepfm.batches import side_batch
from recsys_dist.deepfm.examples import Examples
from recsys_dist.deepfm.items import Items
from recsys_dist.deepfm.layers import BatchNorm, Convolution, Dropout, Encoder, linear, recency
from recsys_dist.deepfm.model import DeepFM, used_fields
from recsys_dist.deepfm.steps import has_bfloat16
from recsys_dist.errors import ConfigError, DataError
from tests.deepfm.workers import decayed, fused, one_step, run_workers
from tests.synthetic import synthetic_config, synthetic_features

EVERYTHING = {
    "batch_norm": True,
    "convolution": (3, 2),
    "recency": {"genres_seen": 2.0},
    "attention": {"recent": 3.0},
}


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    return synthetic_config(tmp_path_factory.mktemp("root"), init_scale=0.3, batch_size=100)


@pytest.fixture(scope="module")
def features(config):
    return synthetic_features(config)


def changed(config, **changes):
    return config.model_copy(update={"deepfm": config.deepfm.model_copy(update=changes)})


def first_batch(config, features):
    spec = used_fields(features.spec(), config.deepfm)
    return Examples(features, Items(features, spec), config).batch(0, 0, rank=0, world_size=1)


@pytest.mark.parametrize("workers", [1, 2, 3])
@pytest.mark.parametrize("history", ["attention", "encoder"])
def test_all_of_it_on_several_workers_equals_the_unsharded_model(
    config, features, tmp_path, workers, history
):
    """100 examples on 3 workers: two rows only fill the batch, which must not show anywhere."""
    sharding = {"user": "row_wise", "item": "table_wise", "recent": "row_wise", "group": "data_parallel"}
    changes = EVERYTHING | {"attention": {}, history: {"recent": 2}, "encoder_dropout": 0.0}
    config = changed(config, **changes, sharding=sharding | {"genres": "data_parallel"})
    model = DeepFM(used_fields(features.spec(), config.deepfm), config.deepfm, seed=config.seed)
    loss, _ = model(first_batch(config, features))
    loss.backward()
    answers = run_workers(workers, one_step, tmp_path, config, features)
    assert sum(answer["loss"] for answer in answers) / workers == pytest.approx(loss.item(), rel=1e-5)
    kinds = {row["table"].removeprefix("table_"): row["sharding"] for row in answers[0]["plan"]}
    assert config.deepfm.sharding.items() <= kinds.items()
    state_of = fused(answers)
    for name, parameter in model.named_parameters():
        if ".embedding_bags." not in name:
            for answer in answers:
                torch.testing.assert_close(
                    answer["gradients"][name], parameter.grad, rtol=1e-4, atol=1e-6, msg=name
                )
            continue
        accumulated = parameter.grad.square().mean(1)
        found = state_of[name]
        torch.testing.assert_close(found, accumulated, rtol=1e-3, atol=1e-10, msg=name)
    for name, buffer in model.named_buffers():
        for answer in answers:
            torch.testing.assert_close(answer["buffers"][name], buffer, rtol=1e-4, atol=1e-6, msg=name)


@torch.no_grad()
def test_recency_and_attention_written_out(config, features):
    settings = config.deepfm.model_copy(update={name: EVERYTHING[name] for name in ("recency", "attention")})
    spec = used_fields(features.spec(), settings)
    model, plain = DeepFM(spec, settings, seed=3).eval(), DeepFM(features.spec(), config.deepfm).eval()
    rows = features.table("examples").sort_by("timestamp")
    rows = pa.concat_tables([rows.slice(0, 5), rows.slice(len(rows) - 35)])
    lengths = {len(bag) for bag in rows["recent"].to_pylist()}
    assert {0, 5} <= lengths
    batch = side_batch(rows, model.user_fields)
    items = Items(features, spec)
    every = torch.arange(1, len(items) + 1)
    item = model.item_side(items.at(every, torch.zeros(1)))
    user = model.user_side(batch)
    # Everything but the sequences from a model without them.
    shared = plain.state_dict()
    own = model.state_dict()
    plain.load_state_dict({name: own.get(name, shared[name]) for name in shared})
    bags = side_batch(rows, plain.user_fields)
    columns = plain._columns(plain.user_tables(bags.indices), bags, plain.user_fields, plain.user_values)
    dim = model.dim
    for name, decay in (("recent", 3.0), ("genres_seen", 2.0)):
        table = model.table(name)
        for row, bag in enumerate(rows[name].to_pylist()):
            bag = bag[-5:]  # genres_seen has several values an item
            factors = [np.exp(-age / decay) for age in reversed(range(len(bag)))]
            columns[name][row] = sum(
                (f * table[i, : dim + 1] for f, i in zip(factors, bag, strict=True)), torch.zeros(dim + 1)
            ) / max(sum(factors), 1)
    expected = model._side(
        [columns[field.name] for field in model.user_fields], model.user_convolution, model.user_hidden
    )
    for name in ("first", "sum", "pair", "hidden"):
        torch.testing.assert_close(getattr(user, name), getattr(expected, name), msg=name)
    logits = model.logits(user.leading(-1, 1), item.leading(1, -1))
    candidates = model.item_tables.embedding_bags["table_item"].weight[1:, :dim]
    for u, bag in enumerate(rows["recent"].to_pylist()):
        for i in range(0, len(items), 11):
            query, history = candidates[i], model.table("recent")[bag, :dim]
            ages = torch.arange(len(bag)).flip(0)
            scores = torch.exp(history @ query / dim**0.5 - ages / 3.0)
            pooled = (scores / (scores.sum() + 1)) @ history  # what is left goes to nothing
            x = user.hidden[u] + item.hidden[i]
            x = x + model.attention.projection(torch.cat([pooled, pooled * query]))
            other = model.fm(user.rows(u, u + 1), item.rows(i, i + 1))[0]
            assert logits[u, i].item() == pytest.approx(
                (other + model.layers(x)[0]).item(), rel=1e-5, abs=1e-6
            )


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_dropout_leaves_out_a_share_and_keeps_the_mean(p):
    layer = Dropout(p)
    x = torch.randn(999, 41, requires_grad=True)  # of 64 bits at a time the last are not all used
    torch.manual_seed(3)
    found = layer(x)
    out = found == 0
    assert out.float().mean().item() == pytest.approx(p, abs=0.01)
    # Neighbours, rows and what a draw gives four of are independent of each other.
    for shift in (1, 2, 3, 41):
        both = out.flatten()[shift:] & out.flatten()[:-shift]
        assert both.float().mean().item() == pytest.approx(p * p, abs=0.01)
    for lane in range(4):
        assert out.flatten()[lane::4].float().mean().item() == pytest.approx(p, abs=0.015)
    torch.testing.assert_close(found[~out], x[~out] / (1 - p), rtol=1e-4, atol=0)
    found.sum().backward()
    torch.testing.assert_close(x.grad, found.detach() / x.detach(), rtol=1e-4, atol=1e-6)
    torch.manual_seed(3)
    assert torch.equal(layer(x), found), "a resumed training repeats it"
    assert not torch.equal(layer(x), found)
    assert layer.eval()(x) is x
    assert Dropout(0.0)(x).equal(x)
    assert Dropout(1.0)(x).eq(0).all()
    assert layer.train()(torch.empty(0, 3)).shape == (0, 3)
    assert layer(x.bfloat16()).dtype == torch.bfloat16
    assert layer(torch.full((9, 9), torch.nan)).isnan().all(), "what is not finite must be seen"


@pytest.mark.parametrize(("rows", "inputs", "outputs"), [((0,), 3, 2), ((1,), 33, 1), ((3, 700), 256, 128)])
def test_a_linear_layer_for_which_nothing_is_derived(rows, inputs, outputs):
    torch.manual_seed(0)
    layer, x = nn.Linear(inputs, outputs), torch.randn(*rows, inputs)
    plain = layer(x)
    assert linear(layer, x).requires_grad
    with torch.no_grad():
        torch.testing.assert_close(linear(layer, x), plain, rtol=1e-5, atol=1e-5)
        strided = torch.randn(*rows, 2 * inputs)[..., ::2]
        torch.testing.assert_close(linear(layer, strided), layer(strided), rtol=1e-5, atol=1e-5)
        if rows[0]:
            x[0] = torch.nan
            found = torch.relu(linear(layer, x))
            assert found[0].isnan().all(), "a score that is none must not become one"
            assert not found[1:].isnan().any()
        with torch.autocast("cpu", torch.bfloat16):
            assert linear(layer, x).dtype == torch.bfloat16
        assert linear(layer.double(), x.double()).dtype == torch.float64


def test_batch_norm_is_that_of_torch_over_the_rows_that_count():
    torch.manual_seed(0)
    x = torch.randn(20, 3, 4) * 2 + 1
    counted = torch.arange(20).unsqueeze(1) < 17
    mine, theirs = BatchNorm(4), nn.BatchNorm1d(4)
    for _ in range(2):
        found = mine(x, counted)
        torch.testing.assert_close(found[:17].flatten(0, 1), theirs(x[:17].flatten(0, 1)))
    torch.testing.assert_close(mine.mean, theirs.running_mean)
    torch.testing.assert_close(mine.variance, theirs.running_var)
    assert not torch.equal(mine.mean, torch.zeros(4))
    torch.testing.assert_close(mine.eval()(x[0]), theirs.eval()(x[0]))


def test_batch_norm_far_from_0_and_without_a_counted_row():
    layer = BatchNorm(1)
    layer.mean.fill_(1000.0)
    x = torch.randn(4096, 1, generator=torch.Generator().manual_seed(0)) + 1001
    assert layer(x).std().item() == pytest.approx(1, rel=1e-3)
    before = layer.mean.item(), layer.variance.item()
    layer(x, torch.zeros(4096, dtype=torch.bool))
    assert (layer.mean.item(), layer.variance.item()) == before


def test_a_convolution_sees_neighbouring_fields():
    torch.manual_seed(0)
    layer, x = Convolution(5, 4, (2,), 3), torch.randn(6, 5, 4)
    kernel, bias = layer.layers[0].weight[:, 0, :, 0], layer.layers[0].bias
    padded = F.pad(x, (0, 0, 1, 1))
    made = torch.stack([torch.einsum("nrd,cr->ncd", padded[:, f : f + 3], kernel) for f in range(5)], 2)
    made = torch.tanh(made + bias[:, None, None])
    pooled = torch.stack([made[:, :, 0:2].amax(2), made[:, :, 2:4].amax(2), made[:, :, 4]], 2)
    torch.testing.assert_close(layer(x), pooled.flatten(1))
    assert layer.width == pooled[0].numel()


def test_recency_weights():
    age = torch.tensor([[2, 1, 0, -1], [-1, -2, -3, -4]])
    expected = np.exp([-1.0, -0.5, 0]) / np.exp([-1.0, -0.5, 0]).sum()
    np.testing.assert_allclose(recency(age, 2.0), [[*expected, 0], [0, 0, 0, 0]], rtol=1e-6)


def encoder(last, blocks):
    torch.manual_seed(0)
    found = Encoder(last, blocks, 8, 2, 0.3).eval()
    for parameter in found.parameters():
        torch.nn.init.normal_(parameter)
    return found


def there(lengths, last):
    return torch.arange(last) < torch.tensor(lengths)[:, None]


@torch.no_grad()
def test_an_encoder_is_the_last_place_of_torchs_transformer():
    """With what lies in between as its mask; empty histories have nothing to say."""
    mine, lengths = encoder(6, 2), [6, 0, 1, 4]
    history = torch.randn(4, 6, 8)
    apart = torch.arange(6)[:, None] - torch.arange(6)
    reach = 3  # of each of two blocks: together no more than 6 items
    layers = []
    for block in mine.blocks:
        layer = nn.TransformerEncoderLayer(8, 2, 16, 0.3, "gelu", batch_first=True, norm_first=True)
        names = {
            "self_attn.in_proj_weight": block.attention.weight,
            "self_attn.in_proj_bias": block.attention.bias,
            "self_attn.out_proj.weight": block.attended.weight,
            "self_attn.out_proj.bias": block.attended.bias,
        }
        parts = {
            "linear1": block.feed_forward[0],
            "linear2": block.feed_forward[2],
            "norm1": block.attention_norm,
            "norm2": block.forward_norm,
        }
        names |= {f"{part}.{name}": t for part, of in parts.items() for name, t in of.state_dict().items()}
        layer.load_state_dict(names)
        mask = torch.full((2, 6, 6), -torch.inf)
        for distance in range(reach):
            mask[:, apart == distance] = block.distance[:, distance, None]
        layers.append((layer.train(), mask))  # not the fast path of eval, which takes no such mask
        for part in layer.modules():
            if isinstance(part, nn.Dropout):
                part.p = 0.0
        layer.self_attn.dropout = 0.0
    found = mine(history, there(lengths, 6))
    for row, length in enumerate(lengths):
        if not length:
            assert not found[row].any()
            continue
        x = history[row : row + 1, :length]
        for layer, mask in layers:
            x = layer(x, src_mask=mask[:, :length, :length])
        expected = mine.output(mine.norm(x[0, -1]))
        torch.testing.assert_close(found[row], expected, rtol=1e-4, atol=1e-4)
    assert mine(history[:0], there(lengths, 6)[:0]).shape == (0, 8)
    mine.train()
    assert not torch.equal(mine(history, there(lengths, 6))[0], mine(history, there(lengths, 6))[0])


@torch.no_grad()
def test_an_encoder_lacks_what_an_item_would_have_brought():
    lengths, mine = [5, 0, 1, 3], encoder(5, 2)
    history = torch.randn(4, 5, 8)
    shares = mine.shares(history, there(lengths, 5))
    for row, length in enumerate(lengths):
        own = history[row : row + 1]
        for place in range(length):
            without = torch.cat([own[:, :place], own[:, place + 1 :]], dim=1)
            lost = mine(own, there([length], 5)) - mine(without, there([length - 1], 4))
            torch.testing.assert_close(shares[row, place], lost[0], rtol=1e-4, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("blocks", [1, 2, 4])
def test_histories_that_go_on_are_encoded_once(config, features, blocks):
    """To the same end, also where the oldest items have dropped out; and there are far fewer lookups."""
    settings = config.deepfm.model_copy(update={"encoder": {"recent": blocks}, "init_scale": 1.0})
    model = DeepFM(used_fields(features.spec(), settings), settings, seed=3).eval()
    table = (
        features.table("examples").sort_by([("user", "ascending"), ("timestamp", "ascending")]).slice(0, 200)
    )
    joined, each = (side_batch(table, model.user_fields, way) for way in (True, False))
    assert not each.starts
    assert {0, 5} <= {len(bag) for bag in table["recent"].to_pylist()}
    for name in ("first", "sum", "pair", "hidden"):
        own, other = (getattr(model.user_side(side), name) for side in (joined, each))
        torch.testing.assert_close(own, other, rtol=1e-5, atol=1e-5, msg=name)
    assert model.encoder("recent")(torch.randn(1, 5, 4), there([5], 5)).any()
    assert 1 < joined.starts["recent"].sum() < 40
    assert len(joined.sequences.values()) < 0.5 * len(each.sequences.values())


def test_an_epoch_in_runs_has_every_example_once(config, features):
    config = changed(config, encoder={"recent": 1}, encoder_run=7)
    examples = Examples(features, Items(features, used_fields(features.spec(), config.deepfm)), config)
    numbers = [examples.numbers(1, step, 0, 1)[: examples.rows(step)] for step in range(examples.steps)]
    found = np.concatenate(numbers)
    np.testing.assert_array_equal(np.sort(found), np.arange(examples.total.rows))
    assert 0.5 < (np.diff(found) == 1).mean() < 0.95


@pytest.mark.parametrize(
    ("optimizer", "item"), [("rowwise_adagrad", "table_wise"), ("adagrad", "column_wise")]
)
def test_lazy_decay_equals_that_of_the_whole_table_at_every_step(config, features, tmp_path, optimizer, item):
    """Seven steps on two workers, with rates and decays that change; and it is lazy."""
    changes = {"embedding_weight_decay": (0.5, 0.1), "warmup_steps": 5, "attention": {"recent": 3.0}}
    changes["sharding"] = {"user": "row_wise", "group": "data_parallel", "item": item}
    changes["table_optimizer"] = optimizer
    answers = run_workers(2, decayed, tmp_path, changed(config, **changes), features)
    for name, found in answers[0]["lazy"].items():
        torch.testing.assert_close(found, answers[0]["whole"][name], rtol=1e-5, atol=1e-7, msg=name)
        assert not torch.allclose(found, answers[0]["none"][name], rtol=1e-3), name
    behind = [name for name, rows in answers[0]["behind"].items() if rows]
    assert any("table_item" in name for name in behind)


def test_examples_count_by_their_values(config, features):
    plain = changed(config, negatives=0)
    weighted, spec = changed(plain, sample_weight="value"), features.spec()
    items, model = Items(features, spec), DeepFM(spec, config.deepfm, seed=3)
    values = features.table("examples", filter=pc.field("split") == "train")["value"].to_numpy()
    assert set(values.tolist()) == {3.0, 5.0}
    examples = Examples(features, items, weighted)
    loss = sum(model(examples.batch(0, 0, rank, 2))[0] for rank in (0, 1)) / 2
    batch = Examples(features, items, plain).batch(0, 0, 0, 1)
    each = model.loss(model(batch)[1], batch)
    expected = (each * (3 + 2 * batch.label) * batch.weight).sum() / values.mean()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert loss.item() != pytest.approx((each * batch.weight).sum().item(), rel=1e-3)


@pytest.mark.parametrize(("bad", "found"), [(-1.0, "1 are"), (None, "0 are"), (np.nan, "1 are")])
def test_values_that_are_no_weights(config, features, tmp_path, bad, found):
    shutil.copytree(features.path, tmp_path / "run")
    for number, file in enumerate(sorted((tmp_path / "run/examples/split=train").iterdir())):
        table = pq.read_table(file, partitioning=None)
        values = np.zeros(len(table), np.float32) if bad is None else table["value"].to_numpy().copy()
        if bad is not None and not number:
            values[0] = bad
        place = table.schema.get_field_index("value")
        pq.write_table(table.set_column(place, table.schema.field(place), pa.array(values)), file)
    broken = dataclasses.replace(features, path=str(tmp_path / "run"))
    settings = changed(config, sample_weight="value", negatives=0)
    with pytest.raises(DataError, match=f"sample_weight=value: of the .* examples' values {found} below 0"):
        Examples(broken, Items(features, features.spec()), settings)


def test_a_value_that_is_not_finite_cannot_be_learned(config, features, tmp_path):
    shutil.copytree(features.path, tmp_path / "run")
    file = sorted((tmp_path / "run/examples/split=train").iterdir())[0]
    table = pq.read_table(file, partitioning=None)
    values = table["value"].to_numpy().copy()
    values[7] = np.inf
    place = table.schema.get_field_index("value")
    pq.write_table(table.set_column(place, table.schema.field(place), pa.array(values)), file)
    broken = dataclasses.replace(features, path=str(tmp_path / "run"))
    with pytest.raises(
        DataError, match=rf"1 of the \d+ examples have .* the first one .*{file.name} row 7\."
    ):
        Examples(broken, Items(features, features.spec()), changed(config, objective="squared", negatives=0))


@pytest.mark.skipif(not has_bfloat16(torch.device("cpu")), reason="the processor has no bfloat16")
def test_bfloat16_is_used_in_the_mlp_alone(config, features):
    config = changed(config, **EVERYTHING)
    model = DeepFM(used_fields(features.spec(), config.deepfm), config.deepfm, seed=3).eval()
    batch = first_batch(config, features)
    kinds = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            module.register_forward_hook(lambda *a, name=name: kinds.update({name: a[2].dtype}))
    with torch.autocast("cpu", torch.bfloat16):
        loss, logits = model(batch)
    assert set(kinds.values()) == {torch.bfloat16}
    assert {
        f"layers.{place}" for place, of in enumerate(model.layers) if isinstance(of, nn.Linear)
    } < kinds.keys()
    expected_loss, expected = model(batch)
    assert (loss.dtype, logits.dtype) == (torch.float32, torch.float32)
    assert loss.item() == pytest.approx(expected_loss.item(), rel=0.02)
    assert not torch.equal(logits, expected)
    user, item = model.user_side(batch.user), model.item_side(batch.item)
    pairs = user.leading(-1, 1), item.leading(len(batch.user), -1)
    exact = model.fm(*pairs)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(model.fm(*pairs), exact)


def test_numbers_by_epoch(config, features):
    assert [in_epoch((0.5, 0.3), epoch) for epoch in range(4)] == [0.5, 0.3, 0.3, 0.3]
    assert in_epoch(0.2, 7) == 0.2
    settings = config.deepfm.model_copy(update={"dropout": (0.5, 0.25)})
    model = DeepFM(features.spec(), settings)
    found = []
    for epoch in range(3):
        model.begin_epoch(epoch)
        found.append({module.p for module in model.modules() if isinstance(module, nn.Dropout)})
    assert found == [{0.5}, {0.25}, {0.25}]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dropout": (0.5, 1.0)}, "must be a number of 0 or more and less than 1, or a list of one an epoch"),
        ({"l1": ()}, "must be a number of 0 or more, or a list of one an epoch"),
        ({"embedding_weight_decay": 20.0}, r"embedding_weight_decay must be below 1, found 0.05 \* 20"),
        ({"convolution": (2,), "convolution_reach": 2}, "convolution_reach must be odd, found 2"),
        ({"model": "fm", "batch_norm": True}, "batch_norm belongs to the MLP, which model fm does not have"),
        ({"model": "lr", "attention": {"recent": 3}}, "attention belongs to the MLP"),
        ({"model": "mf", "encoder": {"recent": 3}}, "encoder belongs to embeddings of histories"),
        ({"encoder": {"recent": 3}, "encoder_heads": 3}, "a divisor of embedding_dim, which is 16, found 3"),
        ({"encoder": {"recent": 3}, "recency": {"recent": 3}}, "recent has two"),
    ],
)
def test_settings_that_do_not_fit(changes, message):
    with pytest.raises(ValueError, match=message):
        DeepFMSettings(**changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"recency": {"group": 2.0}}, "recency: group is no history; those are recent, genres_seen"),
        ({"attention": {"genres_seen": 2.0}}, "genres_seen is no history of items; those are recent"),
        ({"encoder": {"genres_seen": 2.0}}, "genres_seen is no history of items; those are recent"),
    ],
)
def test_fields_that_do_not_fit(config, features, changes, message):
    with pytest.raises(ConfigError, match=message):
        used_fields(features.spec(), config.deepfm.model_copy(update=changes))


def test_every_setting_learns(config, features):
    """Each strategy on its own, for a few steps of plain gradient descent: the loss falls."""
    for name, value in EVERYTHING.items():
        changed_config = changed(config, **{name: value})
        model = DeepFM(used_fields(features.spec(), changed_config.deepfm), changed_config.deepfm, seed=3)
        batch = first_batch(changed_config, features)
        optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
        losses = []
        for _ in range(8):
            loss, _ = model(batch)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        assert all(after < before for before, after in itertools.pairwise(losses)), (name, losses)

import dataclasses
import math

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest
import torch

from recsys_dist.config import DeepFM as Settings
from recsys_dist.config import load as load_config
from recsys_dist.deepfm import checkpoint, train
from recsys_dist.deepfm import pairs as module
from recsys_dist.deepfm.checkpoint import load_weights
from recsys_dist.deepfm.examples import Examples
from recsys_dist.deepfm.items import Items
from recsys_dist.deepfm.model import PAIR_HEAD, DeepFM, used_fields
from recsys_dist.deepfm.pairs import Pairs, pair_specs
from recsys_dist.deepfm.published import load
from recsys_dist.deepfm.reports import best, lines
from recsys_dist.errors import ConfigError, DataError
from recsys_dist.recall import related
from recsys_dist.schema import LATE, RELATED
from recsys_dist.workspace import Workspace
from tests.deepfm.workers import run_workers, train_in
from tests.models import random_recall
from tests.synthetic import GROUPS, synthetic_config, synthetic_features

PAIR = (
    "[{name: next, measure: next_items, recency: 2}, {name: near, measure: neighbors}, "
    "{name: since, measure: since}]"
)


@pytest.fixture(scope="module")
def night(tmp_path_factory):
    config = synthetic_config(tmp_path_factory.mktemp("root"), pair=PAIR)
    features = synthetic_features(config)
    return config, features, random_recall(config, features)


@pytest.fixture(scope="module")
def items(night):
    config, features, _ = night
    return Items(features, used_fields(features.spec(), config.deepfm))


def small_recall(config, features):
    """Item 1 speaks for 3 (weight 2) and 4 (weight 1), item 2 for 4 (weight 3); neighbours: 2 for 3."""
    run = Workspace(config).new("recall", {"small": 1}, {"features": features})
    tables = {
        "next_items": [(1, 3, 2.0), (1, 4, 1.0), (2, 4, 3.0)],
        "neighbors/measure=pearson": [(2, 3, 0.5)],
    }
    for name, rows in tables.items():
        columns = dict(zip(RELATED.names, zip(*rows, strict=True), strict=True))
        run.write_table(name, pa.table(columns).cast(RELATED))
    return run.commit(config, {})


def test_values_by_hand(night, items):
    config, features, _ = night
    share = {"name": "alike", "measure": "share", "attribute": "genres"}
    asked = [*config.deepfm.model_dump()["pair"], share]
    fields = pair_specs(Settings(pair=asked))
    pairs = Pairs(fields, items, small_recall(config, features))
    history = pa.chunked_array([pa.array([[1, 2], [2, 1], [], [7, 1]], pa.list_(pa.int32()))])
    asked_items = torch.tensor([[3, 4, 5]]).expand(4, -1)
    known, following, near, since, alike = pairs.of(history, asked_items).unbind(2)
    assert (known == 1).all()
    old = math.exp(-1 / 2)
    log1p = math.log1p
    expected = [
        [log1p(2 * old / 2), log1p((old + 3) / 2), 0],
        [log1p(2 / 2), log1p((1 + 3 * old) / 2), 0],
        [0, 0, 0],
        [log1p(2 / 2), log1p(1 / 2), 0],
    ]
    torch.testing.assert_close(following, torch.tensor(expected))
    recency = config.recall.neighbors_recency
    torch.testing.assert_close(near[:2, 0], torch.log1p(torch.tensor([1, math.exp(-1 / recency)])))
    assert near[2:].eq(0).all()
    # 3 is after item 1, 4 after both, 5 after none.
    assert since.tolist() == [[0.5, 1, 0], [1, 1, 0], [0, 0, 0], [1, 1, 0]]
    # The group of an item is its first genre; every third item has one more.
    genres = {item: {item % GROUPS} | ({"third"} if item % 3 == 0 else set()) for item in range(1, 8)}
    for row, liked in enumerate(history.to_pylist()):
        for column, item in enumerate((3, 4, 5)):
            shares = [sum(genre in genres[of] for of in liked) / max(1, len(liked)) for genre in genres[item]]
            assert alike[row, column].item() == pytest.approx(np.mean(shares))


def test_scores_of_linear_models_keep_their_sign(night, items):
    config, features, _ = night
    run = Workspace(config).new("recall", {"linear": 1}, {"features": features})
    columns = {"item": [1, 1, 2], "other": [3, 4, 4], "weight": [2.0, -3.0, 1.0]}
    run.write_table("linear/model=transitions", pa.table(columns).cast(RELATED))
    fields = pair_specs(Settings(pair=[{"name": "linear", "measure": "transitions", "recency": 2}]))
    pairs = Pairs(fields, items, run.commit(config, {}))
    history = pa.chunked_array([pa.array([[1, 2]], pa.list_(pa.int32()))])
    _, found = pairs.of(history, torch.tensor([[3, 4, 5]])).unbind(2)
    old = math.exp(-1 / 2)
    torch.testing.assert_close(found, torch.tensor([[2 * old / 2, (1 - 3 * old) / 2, 0]]))


@pytest.mark.parametrize("square", [0, related.SQUARE])
def test_some_items_have_the_values_that_they_have_among_all(night, items, monkeypatch, square):
    """Whether they are looked up one by one or taken from those of all."""
    _, features, recall = night
    monkeypatch.setattr(related, "SQUARE", square)
    pairs = Pairs(items.spec.side("pair"), items, recall)
    history = features.table("users/as_of=test")["recent"]
    every = pairs.of_all(history)
    assert every.shape == (len(history), len(items) + 1, 4)
    assert every[:, 0, 1:].eq(0).all()
    chosen = torch.randint(0, len(items) + 1, (len(history), 9), generator=torch.Generator().manual_seed(1))
    monkeypatch.setattr(module, "ROOM", 3 * len(items))
    found = pairs.of(history, chosen)
    assert torch.equal(found, every[torch.arange(len(history))[:, None], chosen])
    assert len(set(found.flatten().tolist())) > 500


def test_examples_learn_from_tables_of_what_is_earlier(night, items):
    config, features, recall = night
    examples = Examples(features, items, config, ("train",), recall)
    late = Pairs(items.spec.side("pair"), items, recall, f"{LATE}/")
    moments = {row["user"]: row["late_from"] for row in recall.table(f"{LATE}/late_from").to_pylist()}
    states = {row["user"]: row for row in recall.table(f"{LATE}/users").to_pylist()}
    kinds, older = {"early": 0, "late": 0}, 0
    for step in range(examples.steps):
        batch = examples.batch(0, step, 0, 1)
        table = features.table("examples", filter=pc.field("label") == 1)
        by_number = table.filter(pc.field("split") == "train")
        taken = batch.item.indices["item"].values().view(len(batch.user), -1).long()
        users = batch.user.indices["user"].values().tolist()
        for row in range(len(batch.user)):
            if not batch.weight[row]:
                continue
            item = int(taken[row, 0])
            of = by_number.filter((pc.field("user") == users[row]) & (pc.field("item") == item)).to_pylist()[
                0
            ]
            is_late = users[row] in moments and of["timestamp"] >= moments[users[row]]
            kind = "late" if is_late else "early"
            kinds[kind] += 1
            recent = of["recent"]
            if is_late:  # as of when late events began
                recent = states[users[row]]["recent"]
                older += recent != of["recent"]
            assert batch.user.indices["recent"].lengths()[row] == len(recent)
            history = pa.chunked_array([pa.array([recent], pa.list_(pa.int32()))])
            expected = late.of(history, taken[row : row + 1])[0] if is_late else torch.zeros(())
            assert torch.equal(batch.pair[row], expected.expand(batch.pair[row].shape))
    assert min(kinds.values()) > 20, kinds
    assert older > 20


def test_a_table_that_knows_late_events_is_refused(night, items):
    """The planted leak: tables counted from the whole train part in the place of the earlier ones."""
    config, features, recall = night
    leaking = recall.__class__(
        recall.filesystem,
        recall.path,
        recall.uri,
        recall.manifest | {"figures": {"late": {"known": features.spec().positives["train"]}}},
    )
    with pytest.raises(DataError, match=r"was counted from .* earlier than its users' late ones"):
        Examples(features, items, config, ("train",), leaking)


def test_a_recall_run_without_them_is_refused(night, items):
    config, features, _ = night
    recall = small_recall(config, features)
    with pytest.raises(ConfigError, match=r"before=late/neighbors.*recall\.late above 0"):
        Examples(features, items, config, ("train",), recall)


@pytest.mark.parametrize("kind", ["lr", "fm", "dnn", "deepfm"])
def test_an_mlp_of_them_and_the_logit_is_added_where_they_are_known(night, items, kind):
    config, features, recall = night
    settings = config.deepfm.model_copy(update={"model": kind, "init_scale": 0.5, "pair_hidden": (5, 4)})
    model = DeepFM(used_fields(features.spec(), settings), settings, seed=5).eval()
    plain = settings.model_copy(update={"pair": ()})
    without = DeepFM(used_fields(features.spec(), plain), plain, seed=5).eval()
    without.load_state_dict({n: w for n, w in model.state_dict().items() if not n.startswith("pair_head.")})
    batch = Examples(features, items, config, ("train",), recall).batch(0, 0, 0, 1)
    user = model.user_side(batch.user).leading(-1, 1)
    item = model.item_side(batch.item).leading(len(batch.user), -1)
    logit = without.logits(user, item)
    torch.testing.assert_close(model.logits(user, item, pair=batch.pair), logit)  # at first it adds nothing
    with torch.no_grad():
        for number, parameter in enumerate(model.pair_head.parameters()):
            parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number)))
        model.pair_head.norm.mean.fill_(0.5)
        model.pair_head.norm.variance.fill_(4)
    head = {name: w.detach() for name, w in model.pair_head.named_parameters()}
    x = torch.cat([batch.pair, logit.detach()[..., None]], -1)
    x = (x - 0.5) / 2 * head["norm.weight"] + head["norm.bias"]
    for layer in (0, 2, 4):
        x = x @ head[f"layers.{layer}.weight"].T + head[f"layers.{layer}.bias"]
        x = x.relu() if layer < 4 else x
    known = batch.pair[..., 0] > 0
    assert 0 < known.sum() < known.numel()
    expected = logit + torch.where(known, x[..., 0], 0)
    found = model.logits(user, item, pair=batch.pair)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="3 pair fields, and no values"):
        model.logits(user, item)


def test_late_examples_move_no_embedding_and_the_others_not_the_head(night, items):
    """What the head learns it learns beside embeddings that do not know the event."""
    config, features, recall = night
    batch = Examples(features, items, config, ("train",), recall).batch(0, 0, 0, 1)
    late = batch.pair[:, 0, 0] > 0
    for rows in (late, ~late):
        model = DeepFM(used_fields(features.spec(), config.deepfm), config.deepfm, seed=5).train()
        loss, _ = model(dataclasses.replace(batch, weight=batch.weight * rows))
        loss.backward()
        moved = {
            name
            for name, parameter in model.named_parameters()
            if parameter.grad is not None and parameter.grad.abs().sum() > 0
        }
        assert moved
        assert {name.startswith("pair_head.") for name in moved} == {bool((rows == late).all())}


def test_training_with_them_is_the_same_on_two_workers(night, tmp_path):
    config, features, recall = night
    done = [
        run_workers(
            workers,
            train_in,
            tmp_path / str(workers),
            config,
            features,
            tmp_path / f"f{workers}",
            None,
            recall,
        )[0]
        for workers in (1, 2)
    ]
    assert done[0]["step"] == done[1]["step"] > 0
    assert done[0]["best"] == pytest.approx(done[1]["best"], abs=1e-3)


@pytest.mark.parametrize("fit_on", ["train", "train_valid"])
def test_the_head_of_the_first_fit_is_published_with_embeddings_that_know_all(
    night, tmp_path, monkeypatch, fit_on
):
    config, features, recall = night
    changed = {"fit_on": fit_on, "negatives_from": "next_items", "epochs": 2}
    config = config.model_copy(update={"deepfm": config.deepfm.model_copy(update=changed)})
    run = Workspace(config).new("deepfm", {"fit_on": fit_on}, {"features": features, "recall": recall})
    run.training.mkdir(parents=True)
    fits = []

    def fit(_, folder, task, tracking):
        fits.append((task["config"].deepfm, folder, task.get("refit_epochs"), task["recall"]))
        few = task["config"], features, folder, task.get("refit_epochs"), task["recall"]
        run_workers(1, train_in, tmp_path / str(len(fits)), *few)

    monkeypatch.setattr(train, "_train", fit)
    fitted = train._fit(config, run, None, None)
    (first, folder, epochs, read), (second, again, refit_epochs, nothing) = fits
    assert (len(first.pair), epochs, read) == (3, None, recall)
    assert (second.pair, second.negatives_from, nothing) == ((), "catalogue", None)
    assert refit_epochs == best(lines(folder / "history.jsonl"))["epoch"]
    told = {of: (path / "data.json").read_text() for of, path in (("first", folder), ("second", again))}
    assert "train: " in told["first"]
    assert ("train and valid: " if fit_on == "train_valid" else "train: ") in told["second"]
    train._publish(config, run, fitted)
    model = load(run.commit(config, {}), features.spec())
    state, parts = model.state_dict(), {folder: {}, again: {}}
    for name, tensor in state.items():
        parts[folder if name.startswith(PAIR_HEAD) else again][name] = torch.empty_like(tensor)
    for of, tensors in parts.items():
        load_weights(train._best_checkpoint(of), tensors)
        for name, tensor in tensors.items():
            assert torch.equal(state[name], tensor), name
    assert any(tensor.abs().sum() for tensor in parts[folder].values())
    before = {name: torch.empty_like(tensor) for name, tensor in parts[again].items()}
    load_weights(train._best_checkpoint(folder), before)
    assert any(not torch.equal(before[name], tensor) for name, tensor in parts[again].items())

    def spoilt(path, tensors):
        load_weights(path, tensors)
        next(iter(tensors.values())).fill_(torch.nan)

    monkeypatch.setattr(checkpoint, "load_weights", spoilt)
    with pytest.raises(ConfigError, match=r"numbers that are not finite in .* The training diverged\."):
        train._publish(config, run, fitted)


LATE_SET = "recall.late=0.1"


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["deepfm.pair=[{name: a, measure: share}]"], "measure share, and no other, needs an attribute"),
        (["deepfm.pair=[{name: a, measure: since, recency: 1}]"], "pair a: measure since has no recency"),
        (["deepfm.pair=[{name: a, measure: since}]"], r"recall\.late=0\.2"),
        (["deepfm.pair=[{name: a, measure: ease}]", LATE_SET], r"measure ease needs recall\.linear=\[ease\]"),
        (["deepfm.pair=[{name: recent, measure: since}]", LATE_SET], "names used twice: recent"),
        (
            ["deepfm.pair=[{name: a, measure: share, attribute: genre}]", LATE_SET],
            "'genre' is no categorical field of side item",
        ),
        (["deepfm.pair=[{name: a, measure: since}]", LATE_SET, "deepfm.schedule=plateau"], "goes by valid"),
        (["deepfm.pair=[{name: a, measure: since}]", LATE_SET, "fields=[]"], "history of liked items"),
        (["deepfm.pair=[{name: a, measure: since}]", LATE_SET, "deepfm.model=mf"], "mf has no histories"),
    ],
)
def test_what_cannot_be_is_refused_by_name(overrides, message):
    with pytest.raises(ConfigError, match=message):
        load_config(None, overrides)

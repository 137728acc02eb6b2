import math
from collections import Counter

import numpy as np
import pyarrow as pa
import pytest
import torch

from recsys_dist.config import DeepFM as Settings
from recsys_dist.config import load as load_config
from recsys_dist.deepfm import pairs as module
from recsys_dist.deepfm.examples import Examples
from recsys_dist.deepfm.items import Items
from recsys_dist.deepfm.model import PAIR_HEAD, DeepFM, used_fields
from recsys_dist.deepfm.pairs import Pairs, pair_specs
from recsys_dist.errors import ConfigError
from recsys_dist.recall import related
from recsys_dist.schema import FACTORS, LATE, RELATED
from recsys_dist.workspace import Workspace
from tests.models import PAIR
from tests.synthetic import GROUPS

RANKS = (
    "[{name: place, measure: next_items, recency: 2, rank: true}, "
    "{name: next, measure: next_items, recency: 2}, {name: far, measure: neighbors, rank: true}]"
)


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


def users_with(*histories):
    """Rows of users/ with these histories, the users ascending from 1."""
    history = pa.array(histories, pa.list_(pa.int32()))
    return pa.table({"user": pa.array(range(1, len(history) + 1), pa.int32()), "recent": history})


def test_values_by_hand(night, items):
    config, features, _ = night
    share = {"name": "alike", "measure": "share", "attribute": "genres"}
    asked = [*config.deepfm.model_dump()["pair"][:3], share]
    fields = pair_specs(Settings(pair=asked))
    pairs = Pairs(fields, items, {"recall": small_recall(config, features)})
    users = users_with([1, 2], [2, 1], [], [7, 1])
    asked_items = torch.tensor([[3, 4, 5]]).expand(4, -1)
    following, near, since, alike = pairs.of(users, asked_items).unbind(2)
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
    for row, liked in enumerate(users["recent"].to_pylist()):
        for column, item in enumerate((3, 4, 5)):
            shares = [sum(genre in genres[of] for of in liked) / max(1, len(liked)) for genre in genres[item]]
            assert alike[row, column].item() == pytest.approx(np.mean(shares))


def test_days_since_an_item_after_which_this_one_comes(night, items):
    config, features, _ = night
    fields = pair_specs(Settings(pair=[{"name": "days", "measure": "days_since"}]))
    pairs = Pairs(fields, items, {"recall": small_recall(config, features)})
    assert pairs.columns == ["user", "recent", "latest_age"]
    with pytest.raises(ConfigError, match=r"latest_age of users/, .* jobs/featurize\.py"):
        pairs.of(users_with([1]), torch.tensor([[3]]))
    # The last: fewer ages than items, of which the first two are as old as the third.
    ages = pa.array([[48, 12], [72, 24], [], [36], [6]], pa.list_(pa.int32()))
    users = users_with([1, 2], [2, 1], [], [1], [2, 1, 7]).append_column("latest_age", ages)
    found = pairs.of(users, torch.tensor([[3, 4, 5, 0]]).expand(5, -1)).squeeze(2)
    three, four = [1 / 3, 1 / 2, 0, 1 / 2.5, 1 / 1.25], [1 / 1.5, 1 / 2, 0, 1 / 2.5, 1 / 1.25]
    zero = [0.0] * 5
    torch.testing.assert_close(found.T, torch.tensor([three, four, zero, zero]))
    torch.testing.assert_close(pairs.of_all(users)[:, 3:6, 0].T, torch.tensor([three, four, zero]))


def test_content_is_the_cosine_with_what_was_liked(night, items):
    config, features, _ = night
    asked = [{"name": n, "measure": "content", "recency": 2, "rank": n == "place"} for n in ("like", "place")]
    pairs = Pairs(pair_specs(Settings(pair=asked)), items, {"recall": small_recall(config, features)})
    users = users_with([1, 2], [], [6])
    every = pairs.of_all(users)
    # Each item has its group as genre, every third one more; and its other categorical fields.
    names = items.spec.attributes(None, "recall.content")
    assert "genres" in names
    having = Counter()
    own = []
    for item in range(len(items) + 1):
        found = {
            (name, int(value)) for name in names for value in items.values(name)[item].flatten() if value
        }
        own.append(found)
        having.update(found)
    weight = {value: math.log((1 + len(items)) / (1 + n)) for value, n in having.items()}
    norm = [math.sqrt(sum(weight[value] ** 2 for value in of)) or 1.0 for of in own]
    for row, history in enumerate(users["recent"].to_pylist()):
        expected = [
            sum(
                math.exp(-(len(history) - 1 - place) / 2)
                * sum(weight[value] ** 2 for value in own[item] & own[liked])
                / (norm[item] * norm[liked])
                for place, liked in enumerate(history)
            )
            for item in range(len(items) + 1)
        ]
        expected[0] = 0.0
        torch.testing.assert_close(every[row, :, 0], torch.tensor(expected), rtol=1e-5, atol=1e-6)
    assert every[2, 6, 0].item() == pytest.approx(1)
    assert every[2, 6, 1] == 0, "log of the first place"
    some = torch.tensor([[3, 0, 9]]).expand(3, -1)
    assert torch.equal(pairs.of(users, some), every[:, [3, 0, 9]])


def test_scores_of_linear_models_keep_their_sign(night, items):
    config, features, _ = night
    run = Workspace(config).new("recall", {"linear": 1}, {"features": features})
    columns = {"item": [1, 1, 2], "other": [3, 4, 4], "weight": [2.0, -3.0, 1.0]}
    run.write_table("linear/model=transitions", pa.table(columns).cast(RELATED))
    fields = pair_specs(Settings(pair=[{"name": "linear", "measure": "transitions", "recency": 2}]))
    pairs = Pairs(fields, items, {"recall": run.commit(config, {})})
    users = users_with([1, 2])
    found = pairs.of(users, torch.tensor([[3, 4, 5]])).squeeze(2)
    old = math.exp(-1 / 2)
    torch.testing.assert_close(found, torch.tensor([[2 * old / 2, (1 - 3 * old) / 2, 0]]))


def test_a_rank_counts_the_items_with_a_greater_score(night, items):
    config, features, _ = night
    fields = pair_specs(load_config(None, ["recall.late=0.2", f"deepfm.pair={RANKS}"]).deepfm)
    pairs = Pairs(fields, items, {"recall": small_recall(config, features)})
    users = users_with([1, 2], [1], [])
    place, following, far = pairs.of(users, torch.tensor([[3, 4, 5, 0]]).expand(3, -1)).exp().unbind(2)
    # 4 is before 3 for who had 2 last, 3 before 4 for who had 1 alone; then come all that nothing speaks for.
    assert place.round().tolist() == [[2, 1, 3, 1], [1, 2, 3, 1], [1, 1, 1, 1]]
    assert far.round().tolist() == [[1, 2, 2, 1], [1, 1, 1, 1], [1, 1, 1, 1]]
    without = Pairs(fields[1:2], items, {"recall": small_recall(config, features)})
    every = torch.arange(len(items) + 1).expand(3, -1)
    torch.testing.assert_close(without.of(users, every), pairs.of(users, every)[..., 1:2])
    assert (following.log()[0, :2] > 0).all()


def small_als(config, features):
    """Factors of users 1 and 3 and items 3 and 4; before late events others."""
    run = Workspace(config).new("als", {"small": 1}, {"features": features})
    for folder, sign in (("", 1.0), (f"{LATE}/", -1.0)):
        for name, rows in (
            ("user_factors", {1: [1.0, 2.0], 3: [3.0, 0.0]}),
            ("item_factors", {3: [1.0, 1.0], 4: [sign, 0.5]}),
        ):
            columns = {"index": list(rows), "vector": list(rows.values())}
            run.write_table(f"{folder}{name}", pa.table(columns, schema=FACTORS))
    return run.commit(config, {})


@pytest.mark.parametrize("few", [0, module.FEW])
@pytest.mark.parametrize("most", [None, 0])
def test_als_is_the_inner_product_of_the_factors(night, items, monkeypatch, most, few):
    """Where they are held, and where they are read for the users; of some items, or of all."""
    monkeypatch.setattr(module, "FEW", few)
    config, features, _ = night
    fields = pair_specs(
        Settings(pair=[{"name": n, "measure": "als", "rank": n == "place"} for n in ("als", "place")])
    )
    inputs = {"recall": small_recall(config, features), "als": small_als(config, features)}
    users = users_with([], [1], [1, 2])
    asked = torch.tensor([[4, 5, 3, 0]]).expand(3, -1)
    for knows, fourth in (("all", [2, 0, 3]), ("early", [0, 0, -3])):
        pairs = Pairs(fields, items, inputs, knows, most=most)
        found, place = pairs.of(users, asked).unbind(2)
        assert found.tolist() == [[fourth[0], 0, 3, 0], [0, 0, 0, 0], [fourth[2], 0, 3, 0]]
        assert torch.equal(pairs.of_all(users)[torch.arange(3)[:, None], asked, 0], found)
    assert place.exp().round().tolist()[2] == [len(items), 2, 1, 1]
    with pytest.raises(ConfigError, match=r"has no user_factors, .* with als\.earlier=true"):
        Pairs(fields, items, inputs | {"als": Workspace(config).new("als", {}, {}).commit(config, {})})


@pytest.mark.parametrize("asked", [PAIR, RANKS])
@pytest.mark.parametrize("square", [0, related.SQUARE])
def test_some_items_have_the_values_that_they_have_among_all(night, items, monkeypatch, square, asked):
    """Whether they are looked up one by one or taken from those of all."""
    _, features, recall = night
    monkeypatch.setattr(related, "SQUARE", square)
    fields = pair_specs(load_config(None, ["recall.late=0.2", f"deepfm.pair={asked}"]).deepfm)
    pairs = Pairs(fields, items, {"recall": recall})
    users = features.table("users/as_of=test")
    every = pairs.of_all(users)
    assert every.shape == (len(users), len(items) + 1, len(fields))
    assert every[:, 0].eq(0).all()
    chosen = torch.randint(0, len(items) + 1, (len(users), 9), generator=torch.Generator().manual_seed(1))
    monkeypatch.setattr(module, "ROOM", 3 * len(items))
    found = pairs.of(users, chosen)
    assert torch.equal(found, every[torch.arange(len(users))[:, None], chosen])
    assert len(set(found.flatten().tolist())) > 500


def test_a_recall_run_without_their_tables_is_refused(night, items):
    _, _, recall = night
    fields = pair_specs(Settings(pair=[{"name": "linear", "measure": "ease"}]))
    with pytest.raises(ConfigError, match=r"has no linear/model=ease, .* models in recall\.linear"):
        Pairs(fields, items, {"recall": recall})


@pytest.mark.parametrize("kind", ["lr", "fm", "dnn", "deepfm"])
def test_an_mlp_of_them_and_the_logit_is_added(night, items, kind):
    config, features, recall = night
    settings = config.deepfm.model_copy(update={"model": kind, "init_scale": 0.5, "pair_hidden": (5, 4)})
    model = DeepFM(used_fields(features.spec(), settings), settings, seed=5).eval()
    plain = settings.model_copy(update={"pair": ()})
    without = DeepFM(used_fields(features.spec(), plain), plain, seed=5).eval()
    without.load_state_dict({n: w for n, w in model.state_dict().items() if not n.startswith(PAIR_HEAD)})
    batch = Examples(features, items, config).batch(0, 0, 0, 1)
    user = model.user_side(batch.user).leading(-1, 1)
    item = model.item_side(batch.item).leading(len(batch.user), -1)
    users = features.table("users/as_of=test").slice(0, len(batch.user))
    pair = Pairs(model.pair_fields, items, {"recall": recall}).of(
        users, batch.item.indices["item"].values().view(len(batch.user), -1).long()
    )
    logit = without.logits(user, item)
    assert torch.equal(model.logits(user, item, pair=pair), logit)  # at first it adds nothing
    with torch.no_grad():
        for number, tensor in enumerate(model.pair_head.state_dict().values()):
            tensor.copy_(torch.randn(tensor.shape, generator=torch.Generator().manual_seed(number)))
        model.pair_head.deviation.abs_()
    head = model.pair_head.state_dict()
    inputs = (torch.cat([pair, logit[..., None]], -1) - head["mean"]) / head["deviation"]
    x = inputs
    for layer in (0, 2, 4):
        x = x @ head[f"layers.{layer}.weight"].T + head[f"layers.{layer}.bias"]
        x = x.relu() if layer < 4 else x
    expected = logit + (inputs @ head["linear.weight"].T + x)[..., 0]
    found = model.logits(user, item, pair=pair)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert (found - logit).abs().min() > 0
    with pytest.raises(ValueError, match="4 pair fields, and no values"):
        model.logits(user, item)


LATE_SET = "recall.late=0.1"
WITHOUT_DRAWN = ["deepfm.negatives=0", "deepfm.objective=logistic"]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["deepfm.pair=[{name: a, measure: share}]"], "measure share, and no other, needs an attribute"),
        (["deepfm.pair=[{name: a, measure: since, recency: 1}]"], "pair a: measure since has no recency"),
        (["deepfm.pair=[{name: a, measure: share, attribute: b, rank: true}]"], "share has no rank"),
        (["deepfm.pair=[{name: a, measure: since}]"], r"recall\.late=0\.2"),
        (["deepfm.pair=[{name: a, measure: ease}]", LATE_SET], r"measure ease needs recall\.linear=\[ease\]"),
        (["deepfm.pair=[{name: a, measure: als}]", LATE_SET], r"als needs als\.earlier=true, .* found false"),
        (
            ["deepfm.pair=[{name: a, measure: als}]", LATE_SET, "als.earlier=true", "als.fit_on=train_valid"],
            r"als\.fit_on=train as deepfm\.fit_on is, found true and train_valid",
        ),
        (["deepfm.pair=[{name: a, measure: als, recency: 1}]"], "pair a: measure als has no recency"),
        (["als.earlier=true"], r"als\.earlier needs late events, for example recall\.late=0\.2"),
        (["deepfm.pair=[{name: recent, measure: since}]", LATE_SET], "names used twice: recent"),
        (
            ["deepfm.pair=[{name: a, measure: share, attribute: genre}]", LATE_SET],
            "'genre' is no categorical field of side item",
        ),
        (["deepfm.pair=[{name: a, measure: since}]", LATE_SET, "deepfm.schedule=plateau"], "goes by valid"),
        (["deepfm.pair=[{name: a, measure: since}]", LATE_SET, *WITHOUT_DRAWN], "for models that rank"),
        (["deepfm.pair=[{name: a, measure: since}]", LATE_SET, "fields=[]"], "history of liked items"),
        (["deepfm.pair=[{name: a, measure: since}]", LATE_SET, "deepfm.model=mf"], "mf has no histories"),
    ],
)
def test_what_cannot_be_is_refused_by_name(overrides, message):
    with pytest.raises(ConfigError, match=message):
        load_config(None, overrides)

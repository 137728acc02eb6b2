"""The rules of a list, against plain Python that fills it place by place."""

import numpy as np
import pytest
import torch

from recsys_dist.config import load
from recsys_dist.deepfm.items import Items
from recsys_dist.errors import ConfigError, DataError
from recsys_dist.recall.inner_product import Lists
from recsys_dist.scoring.rules import Rules
from tests.synthetic import synthetic_config, synthetic_features

B, C, K = 40, 30, 8


@pytest.fixture(scope="module")
def items(tmp_path_factory):
    features = synthetic_features(synthetic_config(tmp_path_factory.mktemp("root")))
    return Items(features, features.spec())


@pytest.fixture(scope="module")
def candidates(items):
    made = np.random.default_rng(0)
    chosen = np.stack([made.permutation(len(items))[:C] + 1 for _ in range(B)])
    scores = -np.sort(-made.normal(size=(B, C)).astype(np.float32).round(1), axis=1)
    scores[3, 5:], chosen[3, 5:] = -np.inf, 0  # a user with five candidates
    scores[4], chosen[4] = -np.inf, 0  # and one with none
    return Lists(torch.from_numpy(chosen), torch.from_numpy(scores))


@pytest.fixture(scope="module")
def vectors(items):
    return torch.from_numpy(np.random.default_rng(1).normal(size=(len(items) + 1, 6)).astype(np.float32))


def rules(items, seed=0, **settings):
    overrides = [f"score.rules.{name}={value}" for name, value in settings.items()]
    return Rules(load(None, overrides).score.rules, items, seed)


def chosen(items, candidates, vectors, seed=0, k=K, **settings):
    users = torch.arange(B) + 7
    return rules(items, seed, **settings).choose(candidates, k, users, vectors)


def expected(items, candidates, vectors, user, at_most=(), diversity=0.0, least_score=-np.inf):
    """One user's list, place by place."""
    genres = [[], *items.table["genres"].to_pylist()]
    found = [c for c in range(C) if candidates.items[user, c] and candidates.scores[user, c] >= least_score]
    known = [float(s) for s in candidates.scores[user] if s > -np.inf]
    unit = [(s - known[-1]) / (known[0] - known[-1]) for s in known] if known else []
    cosine = torch.nn.functional.cosine_similarity(vectors[:, None], vectors[None], dim=2)
    places = []
    while len(places) < K:
        listed = [int(candidates.items[user, p]) for p in places]
        counts = {g: sum(g in genres[i] for i in listed) for i in listed for g in genres[i]}
        free = [
            c
            for c in found
            if c not in places
            and all(counts.get(g, 0) < most for most in at_most for g in genres[candidates.items[user, c]])
        ]
        if not free:
            break

        def worth(c, listed=listed):
            like = max([0.0, *(float(cosine[candidates.items[user, c], i]) for i in listed)])
            return (1 - diversity) * unit[c] - diversity * like

        places.append(max(free, key=lambda c: (round(worth(c), 6), -c)))
    return places


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"least_score": 0.2},
        {"at_most": "{genres: 2}"},
        {"diversity": 0.4},
        {"at_most": "{genres: 3}", "diversity": 0.6, "least_score": -0.5},
    ],
)
def test_lists_are_filled_place_by_place(items, candidates, vectors, settings):
    found = chosen(items, candidates, vectors, **settings)
    plain = {name: value for name, value in settings.items() if name != "at_most"}
    if "at_most" in settings:
        plain["at_most"] = [int(settings["at_most"][-2])]
    changed = 0
    for user in range(B):
        own = [p for p in found.places[user].tolist() if p >= 0]
        assert own == expected(items, candidates, vectors, user, **plain)
        changed += own != list(range(len(own))) or len(own) < K
    assert changed > (2 if settings else 1) or not settings
    assert torch.equal(found.propensity, (found.places >= 0).float())
    assert not found.explored.any()


def test_what_chance_chooses_has_the_odds_that_are_told(items, candidates, vectors):
    """Over many seeds: the first place of two, and the second given the first."""
    user, draws = 0, 3000
    first, second = np.zeros(C), np.zeros(C)
    told = np.zeros(C)
    for seed in range(draws):
        few = Lists(candidates.items[user : user + 1], candidates.scores[user : user + 1])
        made = rules(items, seed, explore=2, temperature=0.8)
        found = made.choose(few, K, torch.tensor([user]), vectors)
        assert found.places[0, : K - 2].tolist() == list(range(K - 2))
        assert found.explored[0].tolist() == [False] * (K - 2) + [True] * 2
        a, b = found.places[0, K - 2 :].tolist()
        first[a] += 1
        second[b] += 1
        told[a] = found.propensity[0, K - 2]
    weights = np.exp(candidates.scores[user].numpy().astype(float) / 0.8)
    weights[: K - 2] = 0
    odds = weights / weights.sum()
    np.testing.assert_allclose(told[told > 0], odds[told > 0], rtol=1e-4)
    assert np.abs(first / draws - odds).max() < 4 * 0.5 / np.sqrt(draws)
    assert not second[: K - 2].any()
    assert (second > 0).sum() > 5


def test_a_list_that_ends_early_explores_too(items, candidates, vectors):
    """User 3 has five candidates, user 4 none; of two that remain above a floor both are drawn."""
    found = chosen(items, candidates, vectors, explore=2, temperature=1)
    assert found.explored[3].tolist() == [False] * 3 + [True] * 2 + [False] * (K - 5)
    assert found.places[3, :3].tolist() == [0, 1, 2]
    assert set(found.places[3, 3:5].tolist()) == {3, 4}
    assert found.places[3, 5:].eq(-1).all()
    first, second = found.propensity[3, 3:5].tolist()
    weights = candidates.scores[3, 3:5].exp()
    assert first == pytest.approx(float(weights[found.places[3, 3] - 3] / weights.sum()), rel=1e-5)
    assert second == 1
    assert found.places[4].eq(-1).all()
    assert not found.explored[4].any()
    floor = float(candidates.scores[3, 1])
    few = chosen(items, candidates, vectors, explore=3, least_score=floor)
    n = int((candidates.scores[3] >= floor).sum())
    assert few.explored[3].tolist() == [place < n for place in range(K)]
    assert n <= 3


def test_a_draw_depends_on_seed_and_user_alone(items, candidates, vectors):
    together = chosen(items, candidates, vectors, seed=5, explore=3)
    for user in (0, 11, 39):
        alone = rules(items, 5, explore=3).choose(
            Lists(candidates.items[user : user + 1], candidates.scores[user : user + 1]),
            K,
            torch.tensor([user + 7]),
            vectors,
        )
        assert torch.equal(alone.places[0], together.places[user])
    other = chosen(items, candidates, vectors, seed=6, explore=3)
    assert not torch.equal(other.places, together.places)
    for row, user in enumerate(together.places.tolist()):
        listed = [place for place in user if place >= 0]
        assert len(set(listed)) == len(listed), row


def test_what_is_drawn_obeys_the_rules_too(items, candidates, vectors):
    found = chosen(items, candidates, vectors, explore=4, at_most="{genres: 2}", least_score=-0.3)
    genres = [[], *items.table["genres"].to_pylist()]
    for user, places in enumerate(found.places.tolist()):
        listed = [int(candidates.items[user, p]) for p in places if p >= 0]
        counted = [g for item in listed for g in genres[item]]
        assert all(counted.count(g) <= 2 for g in counted)
        assert all(candidates.scores[user, p] >= -0.3 for p in places if p >= 0)
    assert found.explored.any()


def test_allowed_and_denied_items(items, tmp_path):
    ids = items.table["item_id"].to_pylist()
    (tmp_path / "allow").write_text("\n".join(ids[:9]) + "\nno-such-item\n\n")
    (tmp_path / "deny").write_text(f"  {ids[2]}  \n{ids[30]}\n")
    made = rules(items, allow=tmp_path / "allow", deny=tmp_path / "deny")
    assert made.allowed_I.nonzero().flatten().tolist() == [1, 2, 4, 5, 6, 7, 8, 9]
    only_denied = rules(items, deny=tmp_path / "deny").allowed_I[1:]
    assert (~only_denied).nonzero().flatten().tolist() == [2, 30]


def test_what_cannot_be_meant_is_refused(items, tmp_path):
    (tmp_path / "ids").write_text("nobody\nknows\n")
    with pytest.raises(DataError, match="none of its 2 ids"):
        rules(items, deny=tmp_path / "ids")
    with pytest.raises(ConfigError, match=r"score.rules.allow=.*/none: there is no such file"):
        rules(items, allow=tmp_path / "none")
    with pytest.raises(ConfigError, match="at_most: price is no categorical field of the items; there are"):
        rules(items, at_most="{price: 1}")
    with pytest.raises(ConfigError, match="explore=11 is more than the k=10"):
        rules(items, explore=11)

"""Vectors of attributes against plain Python, and what cannot be meant."""

import math

import numpy as np
import pytest
import torch

from recsys_dist.config import Proposals, load
from recsys_dist.errors import ConfigError
from recsys_dist.recall import content
from recsys_dist.recall.content import ItemVectors
from recsys_dist.schema import FeatureSpec
from recsys_dist.scoring.models import load_models
from tests.models import untrained_night
from tests.synthetic import synthetic_config

FIELDS = "fields=[{name: genres, side: item, kind: categorical, column: g, delimiter: '|'}]"


def vectors_of(attributes):
    """[I] dictionaries: (attribute, value) to its part of the item's vector."""
    items = [
        {(a, int(v)) for a, values in enumerate(attributes) for v in values[item] if v}
        for item in range(len(attributes[0]))
    ]
    n = len(items) - 1
    found = []
    for own in items:
        parts = {value: math.log((1 + n) / (1 + sum(value in other for other in items))) for value in own}
        length = math.sqrt(sum(part**2 for part in parts.values())) or 1
        found.append({value: part / length for value, part in parts.items()})
    return found


def test_vectors_by_hand():
    """Items 1 and 2 share a value that all have but 4, 1 and 3 one that is theirs alone; 4 has nothing."""
    genres = torch.tensor([[0, 0], [1, 2], [1, 0], [1, 2], [0, 0]])
    common, rare = math.log(5 / 4), math.log(5 / 3)
    length = math.hypot(common, rare)
    scores = ItemVectors([genres]).scores(torch.tensor([[1, 2], [4, 0]]), torch.tensor([[0.5, 1], [1, 0]]))
    half = common / length
    expected = torch.tensor([[0, 0.5 + half, 1 + half / 2, 0.5 + half, 0], [0, 0, 0, 0, 0]])
    torch.testing.assert_close(scores, expected)
    assert scores[0, 1] == scores[0, 3]


@pytest.mark.parametrize("seed", range(4))
def test_scores_are_those_of_plain_python_however_many_users_at_once(seed, monkeypatch):
    random = np.random.default_rng(seed)
    attributes = [random.integers(0, top, (31, width)) for top, width in ((3, 1), (9, 4), (200, 2))]
    for values in attributes:
        values[0] = 0
    history, share = random.integers(0, 31, (20, 6)), random.random((20, 6)).astype(np.float32)
    vectors = vectors_of(attributes)
    expected = [
        [
            sum(
                float(weight)
                * sum(part * vectors[item].get(value, 0) for value, part in vectors[own].items())
                for own, weight in zip(of, weights, strict=True)
            )
            for item in range(31)
        ]
        for of, weights in zip(history, share, strict=True)
    ]
    made = ItemVectors([torch.from_numpy(values) for values in attributes])
    arguments = torch.from_numpy(history), torch.from_numpy(share)
    together = made.scores(*arguments)
    np.testing.assert_allclose(together.numpy(), expected, rtol=1e-5, atol=1e-6)
    monkeypatch.setattr(content, "ROOM", 600)
    assert torch.equal(made.scores(*arguments), together)


@pytest.mark.parametrize("values", [torch.zeros(6, 1, dtype=torch.int64), torch.tensor([[0], *[[1]] * 5])])
def test_values_that_nobody_or_everybody_has_say_nothing(values):
    scores = ItemVectors([values]).scores(torch.tensor([[1, 2], [0, 0]]), torch.ones(2, 2))
    assert torch.equal(scores, torch.zeros(2, 6))


def test_what_cannot_be_meant_is_refused_before_anything_runs():
    with pytest.raises(ConfigError, match=r"recall\.content: 'gernes' is no .* nearest valid key: genres"):
        load(None, [FIELDS, "recall.content=[gernes]"])
    with pytest.raises(ConfigError, match=r"score\.candidates: content goes by categorical fields"):
        load(None, ["score.candidates={content: 5}"])
    config = load(None, [FIELDS, "recall.content=[genres]", "score.candidates={content: 5}"])
    assert config.recall.content == ("genres",)


def test_items_without_attributes_have_no_such_source(tmp_path, monkeypatch):
    config = synthetic_config(tmp_path)
    runs = untrained_night(config)
    with pytest.raises(ConfigError, match=r"recall\.content: price is no categorical .* there are genres"):
        runs["features"].spec().attributes(["price"], "recall.content")
    score = config.score.model_copy(update={"candidates": {"content": Proposals(quota=5)}})
    assert set(load_models(runs, score).two_stage.sources) == {"content"}
    monkeypatch.setattr(FeatureSpec, "attributes", lambda *_: ())
    assert "content" not in load_models(runs, config.score).all()
    with pytest.raises(ConfigError, match=r"no content, since .* has no categorical field of side item"):
        load_models(runs, score)

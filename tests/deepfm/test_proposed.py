import numpy as np
import pyarrow as pa
import pytest
import torch

from recsys_dist.deepfm import proposed as module
from recsys_dist.deepfm.negatives import Distribution
from recsys_dist.deepfm.proposed import Proposed
from recsys_dist.recall.related import RelatedItems, latest_of
from recsys_dist.schema import RELATED

ITEMS = np.array([1, 2, 3, 4, 6])  # 5 may not be drawn
WEIGHTS = np.array([1.0, 1, 2, 3, 1])
TABLE = [(1, 2, 3.0), (1, 3, 1.0), (1, 5, 4.0), (2, 4, 1.0), (2, 6, 1.0), (4, 5, 2.0)]
RECENCY = 2.0
DRAWS = 20_000


@pytest.fixture(scope="module")
def proposed():
    columns = dict(zip(RELATED.names, zip(*TABLE, strict=True), strict=True))
    return Proposed(Distribution(ITEMS, WEIGHTS), RelatedItems(pa.table(columns).cast(RELATED), 6), RECENCY)


def odds(history, left_out):
    """By the definition: the probability of each item from 0 to 6."""
    found = np.zeros(7)
    found[ITEMS] = WEIGHTS / WEIGHTS.sum()
    speakers = {1: {2: 0.75, 3: 0.25}, 2: {4: 0.5, 6: 0.5}}
    shares = {
        place: np.exp(-(len(history) - 1 - place) / RECENCY)
        for place, h in enumerate(history)
        if h in speakers
    }
    if shares:
        found /= 2
        for place, share in shares.items():
            for other, weight in speakers[history[place]].items():
                found[other] += share / sum(shares.values()) * weight / 2
    found[left_out] = 0
    return found / found.sum()


@pytest.mark.parametrize("history", [[1], [1, 2], [2, 1, 4], [4], [], [3, 2, 2]])
@pytest.mark.parametrize("left_out", [[4], [2, 0, 2, 6, 5], [4, 2, 3]])
def test_drawn_as_often_as_said_and_nothing_that_is_left_out(proposed, monkeypatch, history, left_out):
    column = pa.chunked_array([pa.array([history] * DRAWS, pa.list_(pa.int32()))])
    monkeypatch.setattr(module, "ROOM", 7 * 999)
    out = np.repeat([left_out], DRAWS, axis=0)
    items, log_probability = proposed.draw(out, 3, np.random.default_rng(1), *latest_of(column))
    expected = odds(history, left_out)
    np.testing.assert_allclose(np.bincount(items.ravel(), minlength=7) / items.size, expected, atol=0.01)
    np.testing.assert_allclose(np.exp(log_probability), expected[items], rtol=1e-5)


def test_what_leaves_nothing_leaves_all_but_the_positive(proposed):
    column = pa.chunked_array([pa.array([[1]] * 2, pa.list_(pa.int32()))])
    out = np.array([[3, 1, 2, 4, 6], [3, 0, 0, 0, 0]])
    items, log_probability = proposed.draw(out, 50, np.random.default_rng(1), *latest_of(column))
    assert set(items.ravel().tolist()) == {1, 2, 4, 6}
    np.testing.assert_allclose(np.exp(log_probability), odds([1], [3])[items], rtol=1e-5)


def test_a_row_s_odds_do_not_depend_on_the_others(proposed):
    histories = [[1, 2], [], [2], [4, 1]]
    column = pa.chunked_array([pa.array(histories, pa.list_(pa.int32()))])
    out = np.array([[4], [1], [3], [2]])
    items, log_probability = proposed.draw(out, 20, np.random.default_rng(2), *latest_of(column))
    for row, history in enumerate(histories):
        np.testing.assert_allclose(
            np.exp(log_probability[row]), odds(history, out[row])[items[row]], rtol=1e-5
        )
    assert not (torch.from_numpy(items) == torch.from_numpy(out)).any()

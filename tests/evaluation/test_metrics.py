"""Metrics against fractions worked out by hand."""

from math import log2

import numpy as np
import pytest

from recsys_dist.evaluation.metrics import METRICS, coverage, novelty
from recsys_dist.evaluation.significance import bootstrap, coverage_interval

# Three users, lists of four: hits at ranks 1 and 3 of two relevant items, at rank 2 of six, none of one.
HITS = np.array([[1, 0, 1, 0], [0, 1, 0, 0], [0, 0, 0, 0]], dtype=bool)
RELEVANT = np.array([2, 6, 1])
EXPECTED = {
    "precision": [2 / 4, 1 / 4, 0],
    "recall": [2 / 2, 1 / 6, 0],
    "hit_rate": [1, 1, 0],
    "mrr": [1, 1 / 2, 0],
    "map": [(1 + 2 / 3) / 2, (1 / 2) / 4, 0],
    "ndcg": [
        (1 + 1 / log2(4)) / (1 + 1 / log2(3)),
        (1 / log2(3)) / (1 + 1 / log2(3) + 1 / log2(4) + 1 / log2(5)),
        0,
    ],
}


@pytest.mark.parametrize("name", METRICS)
def test_by_hand(name):
    np.testing.assert_allclose(METRICS[name](HITS, RELEVANT), EXPECTED[name], rtol=1e-12)


def test_a_perfect_list_scores_one():
    for name, metric in METRICS.items():
        expected = 1.0 if name != "precision" else 2 / 3
        assert metric(np.array([[True, True, False]]), np.array([2]))[0] == pytest.approx(expected)


def test_coverage_and_novelty():
    listed, train = np.array([2, 1, 0, 0]), np.array([4, 2, 2, 0])
    assert coverage(listed) == 1 / 2
    assert novelty(listed, train) == pytest.approx((2 * 1 + 1 * 2) / 3)


def test_bootstrap_interval_covers_the_mean_and_narrows_with_users():
    generator = np.random.default_rng(0)
    widths = []
    for users in (100, 10_000):
        values = generator.random((users, 1))
        ((low, high),) = bootstrap(values, 500, seed=1)
        assert low < values.mean() < high
        # A uniform variable has variance 1/12.
        assert high - low == pytest.approx(2 * 1.96 * (1 / 12 / users) ** 0.5, rel=0.2)
        widths.append(high - low)
    assert widths[1] < widths[0] / 5


def test_bootstrap_is_deterministic():
    values = np.random.default_rng(0).random((50, 2))
    assert np.array_equal(bootstrap(values, 200, seed=7), bootstrap(values, 200, seed=7))


def test_coverage_interval_has_no_width_when_everyone_gets_the_same():
    low, high = coverage_interval(np.array([50, 50, 0, 0]), users=50)
    assert (low, high) == (0.5, 0.5)
    low, high = coverage_interval(np.array([50, 1, 1, 0]), users=50)
    assert low < 3 / 4 < high

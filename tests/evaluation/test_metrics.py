"""Metrics against fractions worked out by hand."""

from math import log2

import numpy as np
import pytest

from recsys_dist.evaluation.metrics import METRICS, auc, coverage, grouped_auc, logloss, novelty
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


def auc_of_pairs(labels, scores):
    """Every pair of a positive and a negative, one by one; None where there is none."""
    pairs = [
        (score > other) + (score == other) / 2
        for label, score in zip(labels, scores, strict=True)
        for other_label, other in zip(labels, scores, strict=True)
        if label > other_label
    ]
    return sum(pairs) / len(pairs) if pairs else None


def test_auc_by_hand():
    # Pairs: .9 > .5, .9 > .1, .5 = .5 (one half), .5 > .1.
    assert auc(np.array([1.0, 1, 0, 0]), np.array([0.9, 0.5, 0.5, 0.1])) == 3.5 / 4
    assert auc(np.array([0.0, 1]), np.array([2.0, 1.0])) == 0
    # Two users of three and two rows; the third has no negative.
    labels, users = np.array([1.0, 0, 0, 0, 1, 1]), np.array([7, 7, 7, 2, 2, 5])
    scores = np.array([0.4, 0.4, 0.1, 0.3, 0.2, 0.9])
    assert grouped_auc(labels, scores, users) == pytest.approx((3 * 0.75 + 2 * 0) / 5)
    assert np.isnan(grouped_auc(np.ones(3), scores[:3], users[:3]))


def test_auc_agrees_with_all_pairs_also_where_scores_are_equal():
    random = np.random.default_rng(0)
    labels, scores = random.integers(0, 2, 300).astype(float), random.integers(0, 12, 300) / 7
    users = random.integers(-3, 40, 300)
    assert auc(labels, scores) == pytest.approx(auc_of_pairs(labels, scores), abs=1e-12)
    found = [(auc_of_pairs(labels[users == u], scores[users == u]), (users == u).sum()) for u in set(users)]
    known = [(value, rows) for value, rows in found if value is not None]
    assert 5 < len(known) < len(found)
    expected = sum(value * rows for value, rows in known) / sum(rows for _, rows in known)
    assert grouped_auc(labels, scores, users) == pytest.approx(expected, abs=1e-12)


def test_logloss_by_hand():
    logits = np.array([0.0, np.log(3), -1000])
    assert logloss(np.array([1.0, 0, 0]), logits) == pytest.approx((np.log(2) + np.log(4) + 0) / 3)
    assert logloss(np.array([1.0]), logits[2:]) == 1000

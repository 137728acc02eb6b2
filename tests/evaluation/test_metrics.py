"""Metrics against fractions worked out by hand."""

from math import log2
from statistics import NormalDist

import numpy as np
import pytest

from recsys_dist.evaluation.metrics import (
    METRICS,
    auc,
    calibration,
    coverage,
    diversity,
    gini,
    grouped_auc,
    logloss,
    mse,
    novelty,
    recommendation_popularity,
    rmse,
    serendipity,
)
from recsys_dist.evaluation.significance import (
    bootstrap,
    coverage_interval,
    fallen,
    may_be_chance,
    randomisation,
)

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


def test_serendipity_is_of_what_is_hit_and_not_among_the_most_popular():
    expected = np.array([[1, 0, 0, 0], [0, 1, 0, 1], [0, 0, 0, 0]], dtype=bool)
    assert serendipity(HITS, expected).tolist() == [1 / 4, 0, 0]


def test_popularity_is_the_mean_of_what_is_listed():
    train = np.array([[4, 2, 0, 0], [3, 3, 3, 3], [0, 0, 0, 0]])
    assert recommendation_popularity(train, np.array([2, 4, 0])).tolist() == [3, 3, 0]


def test_diversity_of_a_list_of_one_is_0():
    assert diversity(np.array([0.25, np.nan])).tolist() == [0.75, 0]


def test_gini():
    assert gini(np.array([3, 3, 3])) == 0
    assert gini(np.array([0, 0, 0, 8])) == 3 / 4
    # Of all pairs of items the mean distance, 2 x (1 + 2 + 1) / 9, over twice the mean, 4.
    assert gini(np.array([1, 2, 3])) == pytest.approx((2 * (1 + 2 + 1) / 9) / 4)
    assert gini(np.zeros(3, int)) == 0


def test_calibration():
    logits = np.log([3.0, 1.0, 1 / 3])  # probabilities 3/4, 1/2, 1/4
    assert calibration(np.array([1, 0, 0]), logits) == pytest.approx(3 / 2)
    assert calibration(np.array([1, 1, 1]), logits) == pytest.approx(1 / 2)
    assert calibration(np.zeros(3), logits) == float("inf")


def test_randomisation_of_few_users_is_the_share_of_all_ways_to_swap():
    """Of the 16 ways to swap in 1, 2, 3, 4 the sum is 10 or more, either way, in two."""
    assert randomisation(np.array([1.0, 2, 3, 4]), 20_000, seed=1) == pytest.approx(2 / 16, abs=0.01)
    assert randomisation(np.array([0.0, 0, 1, 2, 3, 4]), 20_000, seed=1) == pytest.approx(2 / 16, abs=0.01)
    assert randomisation(np.array([1.0, -1, 1, -1]), 500, seed=1) == 1
    assert randomisation(np.zeros(5), 100, seed=1) == 1


def test_randomisation_agrees_with_the_t_test_on_many_users():
    differences = np.random.default_rng(3).normal(0.05, 1, 2000)
    t = differences.mean() / (differences.std(ddof=1) / 2000**0.5)
    normal = 2 * (1 - NormalDist().cdf(abs(t)))
    assert randomisation(differences, 5000, seed=2) == pytest.approx(normal, abs=0.02)


def test_what_has_fallen_and_what_of_it_may_be_chance():
    fell, chance = fallen((0.30, 0.28, 0.32), (0.20, 0.17, 0.23))
    assert fell == pytest.approx(0.10)
    assert chance == pytest.approx((0.02**2 + 0.03**2) ** 0.5)


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


def test_errors_of_values_by_hand():
    values, predicted = np.array([4, 2, 5], np.float32), np.array([3.5, 2, 3], np.float32)
    assert mse(values, predicted) == pytest.approx((1 / 4 + 0 + 4) / 3)
    assert rmse(values, predicted) == pytest.approx(((1 / 4 + 4) / 3) ** 0.5)
    # Of large numbers too: in float32 their difference would be 0.
    assert mse(np.array([2.0**24], np.float64), np.array([2**24 + 1], np.float64)) == 1


def test_logloss_by_hand():
    logits = np.array([0.0, np.log(3), -1000])
    assert logloss(np.array([1.0, 0, 0]), logits) == pytest.approx((np.log(2) + np.log(4) + 0) / 3)
    assert logloss(np.array([1.0]), logits[2:]) == 1000


def test_what_may_be_chance():
    assert [may_be_chance(p) for p in (0.001, 0.0499, 0.05, 1)] == [False, False, True, True]

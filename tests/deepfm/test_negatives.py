import numpy as np
import pytest

from recsys_dist.deepfm.negatives import Negatives
from recsys_dist.errors import DataError

COUNTS = np.array([0, 5, 1, 30, 0, 8])
ALL = np.ones(6, bool)


@pytest.mark.parametrize("absent", [[], [1], [6], [2, 3, 6]])
@pytest.mark.parametrize("power", [0.0, 0.5, 1.0])
def test_drawn_as_often_as_said_and_never_the_positive_or_an_absent_item(power, absent):
    present = ~np.isin(np.arange(1, 7), absent)
    negatives = Negatives(COUNTS, present, power)
    weights = (1.0 + COUNTS) ** power * present
    for positive in range(1, len(COUNTS) + 1):
        positives = np.full(20_000, positive)
        items, log_probability = negatives.draw(positives, 5, np.random.default_rng(positive))
        assert items.min() >= 1
        assert items.max() <= len(COUNTS)
        assert not np.isin(items, [positive, *absent]).any()
        expected = np.where(np.arange(1, 7) == positive, 0, weights)
        expected = expected / expected.sum()
        np.testing.assert_allclose(
            np.bincount(items.ravel(), minlength=7)[1:] / items.size, expected, atol=0.01
        )
        np.testing.assert_allclose(np.exp(log_probability), expected[items - 1], rtol=1e-5)


def test_two_items_leave_no_choice():
    items, log_probability = Negatives(np.array([3, 1]), ALL[:2], 1.0).draw(
        np.array([1, 2]), 4, np.random.default_rng(0)
    )
    assert items.tolist() == [[2] * 4, [1] * 4]
    np.testing.assert_allclose(log_probability, 0, atol=1e-6)


@pytest.mark.parametrize("present", [[True], [False, True, False]])
def test_one_item_is_refused(present):
    with pytest.raises(DataError, match="items 1 may be listed"):
        Negatives(np.full(len(present), 3), np.array(present), 0.0)


@pytest.mark.parametrize("power", [0.0, 1.0])
def test_nothing_of_the_history_is_drawn(power):
    """Neither what occurs twice in it, nor what is absent, nor the positive itself changes other odds."""
    present = ~np.isin(np.arange(1, 7), [6])
    negatives = Negatives(COUNTS, present, power)
    history = np.array([[4, 0, 4, 6, 1, 2]])
    items, log_probability = negatives.draw(
        np.full(20_000, 2), 5, np.random.default_rng(1), np.repeat(history, 20_000, axis=0)
    )
    expected = np.where(np.isin(np.arange(1, 7), [3, 5]), (1.0 + COUNTS) ** power, 0)
    expected = expected / expected.sum()
    np.testing.assert_allclose(np.bincount(items.ravel(), minlength=7)[1:] / items.size, expected, atol=0.01)
    np.testing.assert_allclose(np.exp(log_probability), expected[items - 1], rtol=1e-5)


def test_a_history_of_everything_leaves_all_but_the_positive():
    negatives = Negatives(COUNTS, ALL, 0.0)
    history = np.array([[1, 2, 3, 4, 5, 6], [1, 2, 3, 4, 5, 0]])
    items, log_probability = negatives.draw(np.array([2, 2]), 2000, np.random.default_rng(0), history)
    assert set(items[0].tolist()) == {1, 3, 4, 5, 6}
    assert set(items[1].tolist()) == {6}
    np.testing.assert_allclose(np.exp(log_probability), [[0.2] * 2000, [1.0] * 2000], rtol=1e-6)


def test_in_a_batch_its_other_positives_are_drawn():
    negatives = Negatives(COUNTS, ALL, 0.0, in_batch=True)
    positives = np.array([2, 4, 4, 4, 6] * 2000)
    items, log_probability = negatives.draw(positives, 4, np.random.default_rng(0))
    assert set(items.ravel().tolist()) == {2, 4, 6}
    assert not (items == positives[:, None]).any()
    of_two = items[positives == 2]
    assert (of_two == 4).mean() == pytest.approx(3 / 4, abs=0.01)
    # How often an item is met is how often it is positive in the whole train part: 5, 30 and 8 of 44.
    expected = COUNTS[items - 1] / 44 / (1 - COUNTS[positives - 1] / 44)[:, None]
    np.testing.assert_allclose(np.exp(log_probability), expected, rtol=1e-5)
    # Who has had item 4 draws from what is left without it.
    history = np.where(positives == 2, 4, 0)[:, None]
    items, log_probability = negatives.draw(positives, 4, np.random.default_rng(0), np.repeat(history, 2, 1))
    assert set(items[positives == 2].ravel().tolist()) == {6}
    np.testing.assert_allclose(np.exp(log_probability[positives == 2]), 8 / (44 - 5 - 30), rtol=1e-5)
    alone, _ = negatives.draw(np.full(9, 4), 50, np.random.default_rng(0))
    assert set(alone.ravel().tolist()) == {1, 2, 3, 5, 6}

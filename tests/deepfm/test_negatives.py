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
    with pytest.raises(DataError, match="there is 1 item"):
        Negatives(np.full(len(present), 3), np.array(present), 0.0)

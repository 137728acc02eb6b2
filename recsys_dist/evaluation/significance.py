"""How sure a figure is: 95% intervals over users, and whether two models differ.

Legend: U users, M metrics, R resamplings.
"""

import math

import numpy as np
from numpy.typing import NDArray

CHANCE = 0.05
"""From this p on a difference may be chance."""
Interval = tuple[float, float, float]
"""A figure, and the ends of its 95% interval."""


def bootstrap(values_UM: NDArray[np.float64], resamplings: int, seed: int) -> NDArray[np.float64]:
    """Percentile bootstrap of the mean over users (Efron 1979).

    Args:
        values_UM: [U, M] each user's metrics.
        resamplings: R.
        seed: of the draws; the same users and seed give the same draws for every model.

    Returns:
        [M, 2]: the 2.5% and 97.5% quantiles of the mean.
    """
    generator = np.random.default_rng(seed)
    n = len(values_UM)
    # A resampling is how often each user was drawn; one at a time, so that memory stays with the users.
    means_RM = np.stack(
        [np.bincount(generator.integers(0, n, n), minlength=n) @ values_UM / n for _ in range(resamplings)]
    )
    return np.quantile(means_RM, [0.025, 0.975], axis=0).T


def randomisation(difference_U: NDArray[np.float64], resamplings: int, seed: int) -> float:
    """How often two models that are equally good would differ in the mean at least as much: the two-sided p
    of Fisher's paired randomisation test, the one to prefer for means over users (Smucker, Allan, Carterette
    2007).

    Args:
        difference_U: [U] one model's metric less the other's, of the same users.
        resamplings: R; each swaps the models for half of the users, drawn at random.
        seed: of the draws.

    Returns:
        (1 + swaps that differ as much) / (1 + R), which is above 0 (Phipson and Smyth 2010).
    """
    generator = np.random.default_rng(seed)
    moved_U = difference_U[difference_U != 0]  # the others stay the same however they are swapped
    found = abs(moved_U.sum()) * (1 - 1e-12)  # equal sums in another order of summands
    as_much = sum(
        abs(generator.choice((-1.0, 1.0), len(moved_U)) @ moved_U) >= found for _ in range(resamplings)
    )
    return float((1 + as_much) / (1 + resamplings))


def may_be_chance(p: float) -> bool:
    """Is a difference with this p not significant?"""
    return p >= CHANCE


def fallen(before: Interval, now: Interval) -> tuple[float, float]:
    """How much a metric has fallen from one night to the next, and what of it may be chance: 1.96 standard
    errors of the difference of two means over different users, each error taken from its 95% interval.

    Args:
        before: the figure and its interval.
        now: the same, tonight.
    """
    errors = [(high - low) / (2 * 1.96) for _, low, high in (before, now)]
    return before[0] - now[0], 1.96 * math.hypot(*errors)


def coverage_interval(listed_I: NDArray[np.int64], users: int) -> tuple[float, float]:
    """95% interval of catalogue coverage when other users of the same kind had been served.

    An item in m of U lists is missing from a resampling of the users with probability (1 - m/U)^U. The
    number of items present has the variance of independent items; the interval is value +- 1.96 of its
    standard deviation. A plain bootstrap would be centred too low: a resampling has fewer distinct users.
    """
    present_I = 1 - (1 - np.minimum(listed_I / max(users, 1), 1)) ** users
    deviation = float(np.sqrt((present_I * (1 - present_I)).sum())) / len(listed_I)
    value = float((listed_I > 0).mean())
    return max(0.0, value - 1.96 * deviation), min(1.0, value + 1.96 * deviation)

"""How sure a figure is: 95% intervals over users.

Legend: U users, M metrics, R resamplings.
"""

import numpy as np
from numpy.typing import NDArray


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

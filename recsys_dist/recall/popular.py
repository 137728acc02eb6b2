"""Which items are the most popular, by numbers of events.

Legend: I items.
"""

import numpy as np
from numpy.typing import NDArray


def popularity_places(counts_I: NDArray[np.int64]) -> NDArray[np.int64]:
    """[I] places from 1, that of the item with the most events; of equal ones the lesser index comes first.

    Args:
        counts_I: [I] events of each item.
    """
    places_I = np.empty(len(counts_I), np.int64)
    places_I[np.argsort(-counts_I, kind="stable")] = np.arange(1, len(counts_I) + 1)
    return places_I


def head_items(counts_I: NDArray[np.int64], share: float) -> NDArray[np.bool_]:
    """[I]: is the item one of the fewest most popular ones that together have a share of all events?

    Args:
        counts_I: [I] events of each item; without any there is no head.
        share: above 0 and below 1.
    """
    held = np.cumsum(np.sort(counts_I)[::-1])
    if not held[-1]:
        return np.zeros(len(counts_I), bool)
    n = int(np.searchsorted(held, share * held[-1])) + 1
    return popularity_places(counts_I) <= n

"""Metrics of rankings and of predictions: one small function each.

Rankings are measured from who was hit where.

Legend: U users, K list length, I items. `hits_UK` [U, K] bool: the item at that place is relevant (a short
list ends in False). `relevant_U` [U] int: how many distinct relevant items the user has, at least 1. Every
user with a relevant item counts, one without a list with 0. A function of users returns [U] float64; the
figure is its mean.
"""

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

Hits = NDArray[np.bool_]
Counts = NDArray[np.int64]
Values = NDArray[np.float64]


def precision(hits_UK: Hits, relevant_U: Counts) -> Values:
    """hits / K (Herlocker et al. 2004); a list shorter than K is still divided by K."""
    return np.asarray(hits_UK.mean(axis=1))


def recall(hits_UK: Hits, relevant_U: Counts) -> Values:
    """hits / relevant (Herlocker et al. 2004)."""
    return np.asarray(hits_UK.sum(axis=1) / relevant_U)


def hit_rate(hits_UK: Hits, relevant_U: Counts) -> Values:
    """1 where at least one item is hit (Deshpande and Karypis 2004)."""
    return np.asarray(hits_UK.any(axis=1), np.float64)


def mrr(hits_UK: Hits, relevant_U: Counts) -> Values:
    """1 / rank of the first hit, 0 without one (Voorhees 1999)."""
    first_U = hits_UK.argmax(axis=1)
    return np.where(hits_UK.any(axis=1), 1 / (first_U + 1), 0.0)


def average_precision(hits_UK: Hits, relevant_U: Counts) -> Values:
    """Sum of precision@rank over the hits, divided by min(K, relevant), as Spark and RePlay do.

    trec_eval and ranx divide by `relevant`; the two differ for users with more than K relevant items.
    """
    ranks_K = np.arange(1, hits_UK.shape[1] + 1)
    precisions_UK = np.cumsum(hits_UK, axis=1) / ranks_K
    return _summed(precisions_UK * hits_UK) / np.minimum(relevant_U, hits_UK.shape[1])


def ndcg(hits_UK: Hits, relevant_U: Counts) -> Values:
    """DCG / ideal DCG with gain 1 and discount 1 / log2(rank + 1) (Järvelin and Kekäläinen 2002).

    The ideal list has min(K, relevant) hits at its top.
    """
    discount_K = discounts(hits_UK.shape[1])
    ideal_K = np.cumsum(discount_K)
    return _summed(hits_UK * discount_K) / ideal_K[np.minimum(relevant_U, hits_UK.shape[1]) - 1]


def discounts(k: int) -> Values:
    """[k]: 1 / log2(rank + 1)."""
    return np.asarray(1 / np.log2(np.arange(2, k + 2)))


def _summed(values_UK: Values) -> Values:
    """[U]: each row's sum, added up from the first place to the last, as Spark does it: numpy's own sum takes
    another order, and the last digit depends on it.
    """
    return np.asarray(np.cumsum(values_UK, axis=1)[:, -1])


METRICS: dict[str, Callable[[Hits, Counts], Values]] = {
    "ndcg": ndcg,
    "recall": recall,
    "precision": precision,
    "map": average_precision,
    "mrr": mrr,
    "hit_rate": hit_rate,
}
"""Name in metrics.json (before the @) to function."""


def serendipity(hits_UK: Hits, expected_UK: Hits) -> Values:
    """Share of the K places that hold what is relevant and was not to be expected, which is what the K most
    popular items are (Ge et al. 2010, with popularity as the primitive model of Murakami et al. 2008).

    Args:
        hits_UK: see above.
        expected_UK: bool: is the item at that place one of the K most popular?
    """
    return np.asarray((hits_UK & ~expected_UK).mean(axis=1))


def recommendation_popularity(train_UK: Counts, lengths_U: Counts) -> Values:
    """Mean number of train events of a list's items, 0 for a user without a list (ARP: Yin et al. 2012).

    Args:
        train_UK: [U, K] train events of the item at that place, 0 where a list ended before.
        lengths_U: [U] items of each list.
    """
    return np.asarray(train_UK.sum(axis=1) / np.maximum(lengths_U, 1), np.float64)


def diversity(likeness_U: Values) -> Values:
    """1 - the mean cosine of the attributes of two items of a list (intra-list diversity: Ziegler et al.
    2005); 0 for a list of fewer than two items.

    Args:
        likeness_U: [U] that mean, NaN for a list of fewer than two items.
    """
    return np.nan_to_num(1 - likeness_U)


def gini(listed_I: NDArray[np.int64]) -> float:
    """Gini coefficient of how often the catalogue's items are listed: 0 where all are listed equally often,
    near 1 where a few make all lists (Fleder and Hosanagar 2009). 0 where nothing is listed.

    Args:
        listed_I: [I] number of lists that each item of the catalogue is in.
    """
    n, total = len(listed_I), int(listed_I.sum())
    if not total:
        return 0.0
    ascending_I = np.sort(listed_I)
    return float((2 * np.arange(1, n + 1) - n - 1) @ ascending_I / (n * total))


def coverage(listed_I: NDArray[np.int64]) -> float:
    """Share of the catalogue that is in at least one list (Ge et al. 2010).

    Args:
        listed_I: [I] number of lists that each item of the catalogue is in.
    """
    return float((listed_I > 0).mean())


def novelty(listed_I: NDArray[np.int64], train_I: NDArray[np.int64]) -> float:
    """Mean self-information of a listed item in bits, -log2(share of train events) (Zhou et al. 2010).

    Args:
        listed_I: [I] number of lists that each item of the catalogue is in.
        train_I: [I] its number of train events; an item without one counts as having half an event.
    """
    information_I = -np.log2(np.maximum(train_I, 0.5) / max(train_I.sum(), 1))
    return float((listed_I * information_I).sum() / max(listed_I.sum(), 1))


def auc(labels_N: Values, scores_N: Values) -> float:
    """The share of pairs of a positive and a negative in which the positive's score is greater; equal scores
    count one half (Hanley and McNeil 1982, by the ranks' sum of Mann and Whitney 1947).

    Args:
        labels_N: [N] 0 or 1, of both at least one.
        scores_N: [N] in any order-preserving unit.
    """
    return float(_auc(labels_N, scores_N, np.zeros(len(labels_N), np.int64))[0][0])


def grouped_auc(labels_N: Values, scores_N: Values, groups_N: Counts) -> float:
    """GAUC: the mean over groups, such as users, of their AUC, weighted by their number of rows; groups whose
    labels are all equal are left out (Zhu et al. 2017, DIN). NaN where no group is left.

    Args:
        labels_N: [N] 0 or 1.
        scores_N: [N].
        groups_N: [N] the group of each row, any whole numbers.
    """
    found_G, rows_G = _auc(labels_N, scores_N, groups_N)
    both_G = ~np.isnan(found_G)
    if not both_G.any():
        return float("nan")
    return float(np.average(found_G[both_G], weights=rows_G[both_G]))


def logloss(labels_N: Values, logits_N: Values) -> float:
    """The mean of -log of the probability given to the true label, of logits: of label y and logit z it is
    log(1 + e^z) - y z (Good 1952, the logarithmic score).
    """
    logits_N = np.asarray(logits_N, np.float64)
    return float(np.mean(np.logaddexp(0, logits_N) - labels_N * logits_N))


def calibration(labels_N: Values, logits_N: Values) -> float:
    """The mean predicted probability over the share of positive labels: 1 where neither is too high (He et
    al. 2014, "Practical lessons from predicting clicks on ads at Facebook"). Infinite without a positive.
    """
    predicted = float(np.mean(1 / (1 + np.exp(-np.asarray(logits_N, np.float64)))))
    positive = float(np.mean(labels_N))
    return predicted / positive if positive else float("inf")


def mse(values_N: Values, predicted_N: Values) -> float:
    """The mean of (predicted - true)^2 over examples, in the square of the values' unit (Gauss 1821).

    Args:
        values_N: [N] the true values.
        predicted_N: [N].
    """
    return float(np.mean(np.subtract(predicted_N, values_N, dtype=np.float64) ** 2))


def rmse(values_N: Values, predicted_N: Values) -> float:
    """The square root of `mse`, in the values' unit."""
    return mse(values_N, predicted_N) ** 0.5


def _auc(labels_N: Values, scores_N: Values, groups_N: Counts) -> tuple[Values, Counts]:
    """Of each group, in ascending order, the AUC (NaN where all labels are equal) and the number of rows."""
    order = np.argsort(scores_N)
    group_N = groups_N.astype(np.int64) - int(groups_N.min())
    if group_N.any():
        # One sort of whole numbers after that of the scores: several times as fast as a sort by two keys.
        if int(group_N.max()) >= 2**62 // len(group_N):
            group_N = np.unique(groups_N, return_inverse=True)[1]
        order = order[np.argsort(group_N[order] * len(order) + np.arange(len(order)))]
    positive_N, scores_N, groups_N = labels_N[order] > 0.5, scores_N[order], groups_N[order]
    starts_G = np.flatnonzero(np.append(True, groups_N[1:] != groups_N[:-1]))
    rows_G = np.diff(np.append(starts_G, len(groups_N)))
    new_N = np.append(True, (scores_N[1:] != scores_N[:-1]) | (groups_N[1:] != groups_N[:-1]))
    # Rows of one group and score share the mean of their places.
    first_T = np.flatnonzero(new_N)
    size_T = np.diff(np.append(first_T, len(new_N)))
    place_N = np.repeat(first_T + (size_T + 1) / 2, size_T)
    rank_N = place_N - np.repeat(starts_G, rows_G)
    positives_G = np.add.reduceat(positive_N, starts_G, dtype=np.int64)
    sums_G = np.add.reduceat(rank_N * positive_N, starts_G)
    pairs_G = positives_G * (rows_G - positives_G)
    with np.errstate(invalid="ignore", divide="ignore"):
        found_G = (sums_G - positives_G * (positives_G + 1) / 2) / pairs_G
    return np.where(pairs_G > 0, found_G, np.nan), rows_G

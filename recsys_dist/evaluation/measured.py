"""One model's lists, measured: what each user has of them, and how often each item is listed.

Legend: U users, K list length, I items (index 0 is unknown).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from recsys_dist.config import Config
from recsys_dist.deepfm.items import Items
from recsys_dist.evaluation.metrics import (
    METRICS,
    Counts,
    Hits,
    Values,
    coverage,
    diversity,
    gini,
    novelty,
    recommendation_popularity,
    serendipity,
)
from recsys_dist.evaluation.significance import bootstrap, coverage_interval
from recsys_dist.recall.content import ItemVectors
from recsys_dist.recall.popular import head_items, popularity_places
from recsys_dist.schema import UNKNOWN

Figures = dict[str, dict[str, float]]
"""Name with @k to `value` and, where there is an interval, `low` and `high`."""


class Catalogue:
    """What lists are measured by beside who was hit.

    Args:
        items: of the features run.
        head_share: see `evaluation.head_share`.
    """

    def __init__(self, items: Items, head_share: float) -> None:
        self.present = items.present
        self.counts_I = np.append([0], items.counts)
        """Positive train events."""
        self.places_I = np.append([len(self.counts_I)], popularity_places(items.counts))
        """Of the items by popularity, from 1; the unknown item is the last."""
        head_I = np.append([False], head_items(items.counts, head_share))
        self.segments = {"head": head_I, "tail": ~head_I}
        names = items.spec.attributes(None, "recall.content")
        self.vectors = ItemVectors([items.values(name) for name in names]) if names else None
        """None where items have no attributes; there is no diversity then."""


@dataclass(frozen=True)
class Measured:
    """See the top."""

    of_users: dict[str, Values]
    """Every metric of single lists, by its name with @k: [U]."""
    of_segments: dict[str, dict[str, Values]]
    """Segment of items to METRICS where only its items are relevant, [U]; what they are for a user without a
    relevant item there means nothing."""
    listed: dict[int, Counts]
    """List length to [I], the number of lists that each item is in."""


def measure(lengths: Sequence[int], items_UK: Counts, truth: Counts, catalogue: Catalogue) -> Measured:
    """Measure lists at several lengths.

    Args:
        lengths: each at most K.
        items_UK: [U, K] int64; a list that is too short ends in item 0.
        truth: [N, 2] of `held_out`: every user has a relevant item.
        catalogue: of the same features run.
    """
    users, width = len(items_UK), len(catalogue.counts_I)
    wanted = truth[:, 0] * width + truth[:, 1]
    hits_UK = np.isin(np.arange(users)[:, None] * width + items_UK, wanted)
    of_users = _ranked(lengths, hits_UK, np.bincount(truth[:, 0], minlength=users))
    for k in lengths:
        listed_UK = items_UK[:, :k]
        lengths_U = (listed_UK != UNKNOWN).sum(axis=1)
        of_users[f"serendipity@{k}"] = serendipity(hits_UK[:, :k], catalogue.places_I[listed_UK] <= k)
        popularity = recommendation_popularity(catalogue.counts_I[listed_UK], lengths_U)
        of_users[f"popularity@{k}"] = popularity
        if catalogue.vectors:
            likeness_U = catalogue.vectors.likeness(torch.from_numpy(listed_UK)).numpy()
            of_users[f"diversity@{k}"] = diversity(likeness_U)
    of_segments = {
        name: _ranked(
            lengths, hits_UK & inside_I[items_UK], np.maximum(relevant_in(truth, inside_I, users), 1)
        )
        for name, inside_I in catalogue.segments.items()
    }
    listed = {k: np.bincount(items_UK[:, :k].ravel(), minlength=width) for k in lengths}
    return Measured(of_users, of_segments, listed)


def _ranked(lengths: Sequence[int], hits_UK: Hits, relevant_U: Counts) -> dict[str, Values]:
    return {f"{name}@{k}": of(hits_UK[:, :k], relevant_U) for name, of in METRICS.items() for k in lengths}


def relevant_in(truth: Counts, inside_I: Hits, users: int) -> Counts:
    """[U]: how many relevant items of a segment each user has.

    Args:
        truth: [N, 2] of `held_out`.
        inside_I: [I] bool, the segment.
        users: U.
    """
    return np.bincount(truth[inside_I[truth[:, 1]], 0], minlength=users)


def with_intervals(values: dict[str, Values], config: Config) -> Figures:
    """The mean over users of each metric and its bootstrapped interval.

    Args:
        values: name to [U], at least one user.
        config: `evaluation.bootstrap` and `seed` are used.
    """
    intervals = bootstrap(np.stack(list(values.values()), axis=1), config.evaluation.bootstrap, config.seed)
    return {
        name: {"value": float(of.mean()), "low": float(low), "high": float(high)}
        for (name, of), (low, high) in zip(values.items(), intervals, strict=True)
    }


def figures(config: Config, measured: Measured, users: int, catalogue: Catalogue) -> Figures:
    """Every metric of one model over all users, and of its lists together."""
    found = with_intervals(measured.of_users, config)
    for k, listed_I in measured.listed.items():
        present_I = listed_I[1:][catalogue.present]
        low, high = coverage_interval(present_I, users)
        found[f"coverage@{k}"] = {"value": coverage(present_I), "low": low, "high": high}
        found[f"novelty@{k}"] = {"value": novelty(listed_I[1:], catalogue.counts_I[1:])}
        found[f"gini@{k}"] = {"value": gini(present_I)}
    return found


class BySegment:
    """Models measured on parts of the users and of the items, as metrics.json has it.

    Args:
        users: name to [U] bool of `user_segments`.
        truth: [N, 2] of `held_out`.
        catalogue: has the items' segments.
    """

    def __init__(self, users: dict[str, Hits], truth: Counts, catalogue: Catalogue) -> None:
        self._parts = [("users", name, rows_U) for name, rows_U in users.items()]
        n = len(next(iter(users.values())))
        for name, inside_I in catalogue.segments.items():
            self._parts.append(("items", name, relevant_in(truth, inside_I, n) > 0))
        self._models: dict[str, dict[str, Figures]] = {name: {} for _, name, _ in self._parts}

    def add(self, model: str, measured: Measured, config: Config) -> None:
        """Take up one model: of users all metrics of single lists, of items METRICS."""
        for side, name, rows_U in self._parts:
            if rows_U.any():
                values = measured.of_users if side == "users" else measured.of_segments[name]
                inside = {metric: of[rows_U] for metric, of in values.items()}
                self._models[name][model] = with_intervals(inside, config)

    def found(self) -> list[dict[str, object]]:
        """Side, segment, number of users, and the models' figures; segments without users are left out."""
        return [
            {"side": side, "segment": name, "users": int(rows_U.sum()), "models": self._models[name]}
            for side, name, rows_U in self._parts
            if rows_U.any()
        ]

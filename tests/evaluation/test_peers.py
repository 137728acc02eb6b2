"""The metrics beside those of ranx, ir_measures and RecTools, on random lists whose ties are broken by us."""

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

from recsys_dist.evaluation.metrics import METRICS, coverage, novelty, recommendation_popularity
from recsys_dist.recall.inner_product import top_k

PYTHON = Path(sys.prefix) / "ranking" / "bin" / "python"
"""Their own environment, which `make test` sets up: RecTools needs an older numpy."""
USERS, ITEMS, LENGTHS = 80, 60, (1, 5, 10)


@pytest.fixture(scope="module")
def lists():
    """[U, K] lists of few different scores, some too short, some empty; [U, I] what is relevant, of some
    users more than K items; and pairs of a user and an item before, in which every item occurs.
    """
    random = np.random.default_rng(5)
    scores = torch.from_numpy(random.integers(0, 6, (USERS, ITEMS + 1)) / 4).float()
    assert len(scores[0].unique()) < 10 == LENGTHS[-1]
    # The last users can be listed 0 to 9 items.
    excluded = np.arange(ITEMS + 1) > np.arange(USERS - 1, -1, -1)[:, None]
    found = top_k(scores, LENGTHS[-1], tuple(torch.from_numpy(of) for of in np.nonzero(excluded)))
    relevant = random.random((USERS, ITEMS + 1)) < random.choice([0.02, 0.1, 0.4], USERS)[:, None]
    relevant[:, 0] = False
    relevant[np.arange(USERS), random.integers(1, ITEMS + 1, USERS)] = True
    pairs = {(user, item) for user, item in enumerate(random.permutation(ITEMS) + 1)}
    pairs |= set(zip(random.integers(0, USERS, 300), (random.integers(1, 8, 300) ** 2), strict=True))
    return found.items.numpy(), relevant, sorted((int(user), int(item)) for user, item in pairs)


@pytest.fixture(scope="module")
def peers(lists):
    """Library to metric to a number a user."""
    items_UK, relevant_UI, pairs = lists
    asked = {
        "k": LENGTHS,
        "lists": {
            str(user): [item for item in items.tolist() if item] for user, items in enumerate(items_UK)
        },
        "relevant": {str(user): np.flatnonzero(of).tolist() for user, of in enumerate(relevant_UI)},
        "train": [(str(user), item) for user, item in pairs],
    }
    line = [str(PYTHON), "-P", str(Path(__file__).with_name("peer_metrics.py"))]
    done = subprocess.run(line, check=True, input=json.dumps(asked), stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout)


def ours(lists, name, k):
    items_UK, relevant_UI, _ = lists
    hits_UK = np.take_along_axis(relevant_UI, items_UK, axis=1)
    return METRICS[name](hits_UK[:, :k], relevant_UI.sum(axis=1))


def test_the_lists_are_hard(lists):
    items_UK, relevant_UI, _ = lists
    lengths = (items_UK > 0).sum(axis=1)
    assert set(lengths) == set(range(11))
    wanted = relevant_UI.sum(axis=1)
    assert wanted.min() == 1 < 10 < wanted.max()
    assert (relevant_UI[np.arange(USERS), items_UK[:, 0]]).any()


@pytest.mark.parametrize("k", LENGTHS)
@pytest.mark.parametrize("name", ["precision", "recall", "hit_rate", "mrr", "ndcg"])
@pytest.mark.parametrize("library", ["ranx", "ir_measures", "rectools"])
def test_all_agree(lists, peers, library, name, k):
    """Precision of a short list is divided by k; a user without a list has 0; the ideal list of NDCG has
    min(k, relevant) hits.
    """
    np.testing.assert_allclose(peers[library][f"{name}@{k}"], ours(lists, name, k), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("k", LENGTHS)
@pytest.mark.parametrize("library", ["ranx", "ir_measures", "rectools"])
def test_average_precision_is_divided_by_all_relevant_items_there(lists, peers, library, k):
    """Ours is divided by min(k, relevant), so that a perfect list has 1 whatever k is."""
    wanted = lists[1].sum(axis=1)
    theirs = np.array(peers[library][f"map@{k}"]) * wanted / np.minimum(k, wanted)
    np.testing.assert_allclose(theirs, ours(lists, "map", k), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("k", LENGTHS)
def test_rectools_agrees_about_what_is_listed(lists, peers, k):
    """Popularity alike. Its self-information is of the share of users who had the item and averaged by user;
    ours of the share of events, over all that is listed.
    """
    items_UK, _, pairs = lists
    listed_UK = items_UK[:, :k]
    count = Counter(item for _, item in pairs)
    train_I = np.array([count[item] for item in range(ITEMS + 1)])
    lengths_U = (listed_UK > 0).sum(axis=1)
    found = recommendation_popularity(train_I[listed_UK], lengths_U)
    np.testing.assert_allclose(peers["rectools"][f"popularity@{k}"], found, rtol=1e-9)
    listed_I = np.bincount(listed_UK.ravel(), minlength=ITEMS + 1)[1:]
    assert peers["rectools"]["coverage"][str(k)] == pytest.approx(coverage(listed_I))
    users = len({user for user, _ in pairs})
    mean = np.average(peers["rectools"][f"information@{k}"], weights=lengths_U)
    assert mean + np.log2(len(pairs) / users) == pytest.approx(novelty(listed_I, train_I[1:]))

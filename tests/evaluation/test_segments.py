"""Who is new, light or heavy, and what is head or tail, by hand."""

import datetime as dt
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.dataset
import pytest

from recsys_dist.config import load
from recsys_dist.errors import ConfigError
from recsys_dist.evaluation.segments import known_events, user_segments
from recsys_dist.recall.popular import head_items, popularity_places
from recsys_dist.schema import TIMESTAMP


def test_known_is_what_is_strictly_before_the_first_event_of_the_test_part():
    start = dt.datetime(2024, 1, 1, tzinfo=dt.UTC)
    rows = [
        (1, 0, "train"),
        (1, 1, "train"),
        (1, 2, "valid"),
        (1, 2, "test"),
        (1, 9, "test"),
        (3, 5, "test"),
        (3, 6, "train"),  # a column of the log may say so
        (4, 1, "train"),
        (4, 2, "test"),
        (2, 1, "train"),
    ]
    users, days, splits = zip(*rows, strict=True)
    moments = pa.array([start + dt.timedelta(days=day) for day in days], TIMESTAMP)
    examples = pa.table({"user": pa.array(users, pa.int32()), "timestamp": moments, "split": splits})
    features = SimpleNamespace(
        spec=lambda: SimpleNamespace(n_users=4), dataset=lambda name: pyarrow.dataset.dataset(examples)
    )
    assert known_events(features, pa.table({"user": [4, 1, 3]})).tolist() == [1, 2, 0]


@pytest.mark.parametrize(
    ("known", "told"),
    [
        ([0, 1, 2, 3], ["new", "light", "light", "heavy"]),
        ([5, 5, 9, 0, 5], ["light", "light", "heavy", "new", "light"]),
        ([1, 4], ["light", "heavy"]),  # the median is 2.5
        ([7, 7], ["light", "light"]),
        ([0, 0], ["new", "new"]),
    ],
)
def test_a_user_with_as_many_events_as_the_median_is_light(known, told):
    found = user_segments(np.array(known))
    assert list(found) == ["new", "light", "heavy"]
    assert [[name for name in found if found[name][user]] for user in range(len(known))] == [
        [name] for name in told
    ]


def test_equally_popular_items_stand_in_the_order_of_their_indices():
    assert popularity_places(np.array([3, 7, 3, 0])).tolist() == [2, 1, 3, 4]


@pytest.mark.parametrize(
    ("share", "head"),
    [
        (0.5, [False, True, False, False, False]),  # 10 of 20
        (0.51, [True, True, False, False, False]),
        (0.7, [True, True, False, False, False]),
        (0.9, [True, True, True, False, False]),
        (0.99, [True, True, True, True, False]),
    ],
)
def test_the_head_is_the_fewest_items_that_have_the_share(share, head):
    assert head_items(np.array([4, 10, 4, 2, 0]), share).tolist() == head


def test_without_events_there_is_no_head():
    assert not head_items(np.zeros(3, int), 0.5).any()


@pytest.mark.parametrize("share", [0, 1])
def test_a_head_of_nothing_or_of_everything_is_refused(share):
    with pytest.raises(ConfigError, match=r"evaluation\.head_share.*(greater|less) than"):
        load(None, [f"evaluation.head_share={share}"])

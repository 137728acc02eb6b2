"""Parts of the users and of the items that models are also measured on by themselves.

Legend: U users, I items.
"""

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from recsys_dist.schema import TIMESTAMP
from recsys_dist.workspace import Run

SEGMENTS = {
    "new": "users without an event before their test part",
    "light": "of the other users those with at most as many events before it as their median user",
    "heavy": "of the other users those with more",
    "head": "the fewest most popular items that have {share:g} of the positive train events (of equally "
    "popular items the ones with the lesser index), measured on the relevant items among them",
    "tail": "all other items, measured on the relevant items among them",
}
"""Segment in metrics.json to what it holds."""


def known_events(features: Run, users: pa.Table) -> NDArray[np.int64]:
    """How many events of each user are strictly earlier than his first event of the test part: [U].

    Args:
        features: the features run.
        users: with `user`, all of whom have an event in the test part.
    """
    size = features.spec().n_users + 1
    first = np.full(size, np.iinfo(np.int64).max)
    known = np.zeros(size, np.int64)
    examples = features.dataset("examples")
    columns = ["user", "timestamp"]
    for batch in examples.to_batches(columns=columns, filter=pc.field("split") == "test"):
        np.minimum.at(first, batch["user"].to_numpy(), _micros(batch))
    for batch in examples.to_batches(columns=columns):
        of = batch["user"].to_numpy()
        np.add.at(known, of[_micros(batch) < first[of]], 1)
    return known[users["user"].to_numpy()]


def _micros(batch: pa.RecordBatch) -> NDArray[np.int64]:
    return np.asarray(batch["timestamp"].cast(TIMESTAMP).cast(pa.int64()))


def user_segments(known_U: NDArray[np.int64]) -> dict[str, NDArray[np.bool_]]:
    """Who is new, light or heavy, [U] each: without a known event, with at most as many as the median of the
    others, with more. Of an even number of users the median is the mean of the two in the middle.

    Args:
        known_U: [U] of `known_events`.
    """
    new_U = known_U == 0
    median = np.median(known_U[~new_U]) if not new_U.all() else 0
    light_U = ~new_U & (known_U <= median)
    return {"new": new_U, "light": light_U, "heavy": ~new_U & ~light_U}


def told(share: float) -> dict[str, str]:
    """SEGMENTS with the share of the head."""
    return {name: text.format(share=share) for name, text in SEGMENTS.items()}

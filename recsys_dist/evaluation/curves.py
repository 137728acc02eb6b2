"""What the lists are made of: curves of coverage and popularity, and the shares of the sources.

Legend: I items, K list length.
"""

from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray


@dataclass(frozen=True)
class SourceShare:
    """What a source has to do with lists that were made from several."""

    name: str
    places: float
    """The share of the lists' places whose item it proposed."""
    alone: float
    """The share of the places whose item no other source proposed."""
    hits: float
    """The share of the places whose item it proposed and the user liked."""


def of_model(lists: pa.Table, model: str, k: int) -> pa.Table:
    """The rows of one model's lists down to rank k."""
    return lists.filter(pc.and_(pc.equal(lists["model"], model), pc.less_equal(lists["rank"], k)))


def coverage_by_length(lists: pa.Table, present_I: NDArray[np.bool_], k: int) -> NDArray[np.float64]:
    """[K] the share of the catalogue that is in at least one list, if lists had the length 1 to K.

    Args:
        lists: of one model, schema LISTS.
        present_I: is an item, from index 1, a part of the catalogue?
        k: K.
    """
    first_I = np.full(len(present_I) + 1, k + 1)
    np.minimum.at(first_I, lists["item"].to_numpy(), lists["rank"].to_numpy())
    found = np.bincount(first_I[1:][present_I], minlength=k + 2)[1 : k + 1]
    return np.cumsum(found) / max(int(present_I.sum()), 1)


def share_of_popular(listed_I: NDArray[np.int64], counts_I: NDArray[np.int64]) -> NDArray[np.float64]:
    """[I + 1] the share of all places that the 0, 1, ... I most popular items have.

    Args:
        listed_I: places that each item has.
        counts_I: training events of each item, by which they are ordered; of equal ones the first.
    """
    order = np.argsort(-counts_I, kind="stable")
    return np.append(0.0, np.cumsum(listed_I[order]) / max(int(listed_I.sum()), 1))


def source_shares(lists: pa.Table, hits: NDArray[np.bool_]) -> list[SourceShare]:
    """The shares of every source of these rows, the greatest first; none where the model has no sources.

    Args:
        lists: N rows of one model, schema LISTS.
        hits: [N] did the user like the item later?
    """
    sources = lists["sources"].combine_chunks()
    rows = pc.list_parent_indices(sources).to_numpy()
    names = np.asarray(pc.list_flatten(sources).to_pylist(), dtype=object)
    of_row = np.bincount(rows, minlength=len(lists))
    shares = [
        SourceShare(
            str(name),
            float((names == name).sum() / len(lists)),
            float(((names == name) & (of_row[rows] == 1)).sum() / len(lists)),
            float(hits[rows[names == name]].sum() / len(lists)),
        )
        for name in dict.fromkeys(names.tolist())
    ]
    return sorted(shares, key=lambda share: -share.places)

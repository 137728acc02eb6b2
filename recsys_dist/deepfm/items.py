"""The catalogue in memory: any item's fields as of any day, and which items may be listed on it.

Legend: N rows asked for, B days, I items (index 0 is unknown), R rows of item_days/.
"""

import datetime as dt

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from recsys_dist.deepfm.batches import INDEXED, SideBatch, side_batch
from recsys_dist.errors import DataError
from recsys_dist.schema import DAY, TIMESTAMP, FeatureSpec, FieldSpec, padded
from recsys_dist.workspace import Run

EPOCH = dt.date(1970, 1, 1)


class Items:
    """items/ and item_days/ of a features run.

    Args:
        run: the features run.
        spec: its fields.

    Raises:
        DataError: items/ does not have every item once, or an item has no row in item_days/.
    """

    def __init__(self, run: Run, spec: FeatureSpec) -> None:
        self.spec = spec
        self.table: pa.Table = run.table("items").sort_by("item")
        """items/, item i in row i - 1."""
        found = self.table["item"].to_numpy()
        if not np.array_equal(found, np.arange(1, spec.n_items + 1)):
            raise DataError(
                f"{run.uri}/items has {len(found)} rows, expected the items 1 to {spec.n_items}, each once. "
                f"Run jobs/featurize.py --force."
            )
        self.counts: np.ndarray = self.table["count"].to_numpy()
        """[I - 1] positive train events of the items from 1 on."""
        self.present: np.ndarray = self.table["present"].to_numpy()
        """[I - 1] bool: in this run's log or items table."""
        # Active on the days from `first` to before `end`.
        self._first = _days_from(self.table["active_from"], np.iinfo(np.int32).min)
        self._end = _days_from(self.table["active_to"], np.iinfo(np.int32).max)
        static = tuple(field for field in spec.side("item") if not field.daily)
        self._static = _with_unknown(self.table, static)
        if spec.daily:
            rows = run.table("item_days", columns=spec.item_days_schema().names)
            rows = rows.sort_by([("item", "ascending"), ("day", "ascending")])
            items = rows["item"].to_numpy()
            if not np.array_equal(np.unique(items), found):
                raise DataError(
                    f"{run.uri}/item_days has rows of {len(np.unique(items))} items, expected some of each "
                    f"of the items 1 to {spec.n_items}. Run jobs/featurize.py --force."
                )
            self._daily = _with_unknown(rows, spec.daily)
            items = torch.as_tensor(np.append([0], items).astype(np.int64))
            days = torch.as_tensor(np.append([0], rows["day"].cast(pa.int32()).to_numpy()).astype(np.int64))
            self._keys = _key(items, days)
            self._row = torch.searchsorted(items, torch.arange(spec.n_items + 1))
            self._order = _number_order(static + spec.daily, spec.side("item"))

    def __len__(self) -> int:
        """Number of items, the unknown one not counted."""
        return self.spec.n_items

    def values(self, name: str) -> Tensor:
        """[I, V] int64: the indices of the items' values of a categorical field, the unknown item first, 0
        where there is none.
        """
        column = self.table[name]
        if self.spec.field(name).type == "indices":
            width = max((len(values) for values in column.to_pylist()), default=0)
            values = padded(column, max(width, 1))
        else:
            values = column.to_numpy()[:, None]
        return torch.as_tensor(np.pad(values.astype(np.int64), ((1, 0), (0, 0))))

    def at(self, items: Tensor, days: Tensor) -> SideBatch:
        """The item fields as of the start of days: N rows, in the spec's order.

        A daily field has the value of the item's latest row of that day or before, or else of its first row.

        Args:
            items: [N] int64, from 0 (unknown, as are all its fields).
            days: [N] or [1] int32, days since 1970 (UTC); without daily fields it does not matter.
        """
        static = self._static.take(items)
        if not self.spec.daily:
            return static
        latest = torch.searchsorted(self._keys, _key(items, days.to(torch.int64)), right=True) - 1
        daily = self._daily.take(torch.maximum(latest, self._row[items]))
        bags = static.indices.to_dict() | daily.indices.to_dict()
        indexed = [field.name for field in self.spec.side("item") if field.type in INDEXED]
        return SideBatch(
            KeyedJaggedTensor.from_jt_dict({name: bags[name] for name in indexed}),
            torch.cat([static.values, daily.values], dim=1)[:, self._order],
        )

    def listable(self, days: Tensor) -> Tensor:
        """Which items may be in a list of a day: [B, I] bool, or [1, I] where it is the same for all days.

        Those that are present and active at the start of the day.

        Args:
            days: [B] int32, days since 1970 (UTC).
        """
        distinct, inverse = np.unique(days.numpy(force=True), return_inverse=True)
        active = (self._first <= distinct[:, None]) & (distinct[:, None] < self._end) & self.present
        listable = torch.as_tensor(np.pad(active, ((0, 0), (1, 0))))
        return listable if len(distinct) == 1 else listable[torch.as_tensor(inverse)]


def days_of(timestamps: pa.ChunkedArray) -> np.ndarray:
    """The days [N] int32 since 1970 (UTC) that moments are in."""
    micros = timestamps.cast(TIMESTAMP).cast(pa.int64()).to_numpy()
    return np.floor_divide(micros, DAY).astype(np.int32)


def weekdays(days: np.ndarray) -> np.ndarray:
    """The weekdays [N], 0 (Monday) to 6, of days since 1970."""
    return (days + EPOCH.weekday()) % 7


def day_number(date: dt.date) -> int:
    """A date as days since 1970."""
    return (date - EPOCH).days


def _days_from(timestamps: pa.ChunkedArray, missing: int) -> np.ndarray:
    """The first day [N] that begins at the moment or after it; `missing` where there is none."""
    micros = timestamps.cast(TIMESTAMP).cast(pa.int64())
    days = -np.floor_divide(-micros.fill_null(0).to_numpy(), DAY)
    return np.where(micros.is_valid().to_numpy(), days, missing)


def _with_unknown(rows: pa.Table, fields: tuple[FieldSpec, ...]) -> SideBatch:
    """The rows' fields after a row of an unknown item."""
    schema = pa.schema([(field.name, field.arrow_type) for field in fields])
    unknown = pa.Table.from_pylist([dict.fromkeys(schema.names)], schema)
    # Not concat_tables at once: the files' columns may be declared as never null.
    return side_batch(pa.concat_tables([unknown, rows.select(schema.names).cast(schema)]), fields)


def _key(items: Tensor, days: Tensor) -> Tensor:
    """One number that sorts by item, then by day, which may be negative."""
    return (items << 32) + days + (1 << 31)


def _number_order(found: tuple[FieldSpec, ...], wanted: tuple[FieldSpec, ...]) -> Tensor:
    """Where the numbers of the fields `wanted` stand in the values of the same fields, ordered as `found`."""
    place: dict[str, list[int]] = {}
    stop = 0
    for field in found:
        if field.type not in INDEXED:
            place[field.name] = list(range(stop, stop + field.cardinality))
            stop += field.cardinality
    return torch.tensor(
        [number for field in wanted for number in place.get(field.name, [])], dtype=torch.int64
    )

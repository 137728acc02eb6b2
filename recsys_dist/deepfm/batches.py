"""Arrow columns as the tensors that DeepFM reads.

Legend: N rows, V numbers of a row (a value field is one, a vector field as many as its length), L greatest
length of a history, B examples, J items drawn for each.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from torch import Tensor
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor
from torchrec.streamable import Pipelineable

from recsys_dist.errors import DataError
from recsys_dist.schema import UNKNOWN, FieldSpec

INDEXED = ("index", "indices")
"""Types of the fields whose embeddings are looked up in a table; the other fields have numbers."""
SEQUENCES = ("recency", "attention", "encoder")
"""Poolings for which each item of a history is looked up on its own."""


def tabled(fields: Sequence[FieldSpec], sequence: bool = False) -> list[FieldSpec]:
    """The fields with a table that are looked up as a bag, or as a sequence."""
    return [f for f in fields if f.type in INDEXED and (f.pooling in SEQUENCES) == sequence]


@dataclass
class SideBatch(Pipelineable):
    """N rows of one side's fields."""

    indices: KeyedJaggedTensor
    """Keys: the fields of `tabled` in the spec's order; int32 values."""
    values: Tensor
    """[N, V] float32: the fields of type `value` and `vector` in the spec's order, side by side."""
    sequences: KeyedJaggedTensor | None = None
    """Keys: the fields that are looked up as sequences; N * L bags, a row's items first, one in each."""
    starts: dict[str, Tensor] = dataclasses.field(default_factory=dict)
    """Field with an encoder to [N] bool: does the row have its whole history, or only the items that come
    after that of the row before? Of a field that is not there, all rows have all."""

    def __len__(self) -> int:
        return int(self.values.shape[0])

    def take(self, rows: Tensor) -> "SideBatch":
        """The rows at these positions, in this order; positions may repeat.

        Args:
            rows: [M] int64.
        """
        assert not self.starts, "rows that lean on others"
        sequences = None
        if self.sequences is not None:
            length = self.sequences.stride() // len(self)
            places = (rows.unsqueeze(1) * length + torch.arange(length, device=rows.device)).flatten()
            sequences = _take(self.sequences, places)
        return SideBatch(_take(self.indices, rows), self.values[rows], sequences)

    def to(self, device: torch.device, non_blocking: bool = False) -> "SideBatch":
        """The same on a device."""
        return SideBatch(
            self.indices.to(device, non_blocking=non_blocking),
            self.values.to(device, non_blocking=non_blocking),
            None if self.sequences is None else self.sequences.to(device, non_blocking=non_blocking),
            {name: of.to(device, non_blocking=non_blocking) for name, of in self.starts.items()},
        )

    def pin_memory(self) -> "SideBatch":
        """The same in memory from which a GPU can copy while it computes."""
        sequences = None if self.sequences is None else self.sequences.pin_memory()
        starts = {name: of.pin_memory() for name, of in self.starts.items()}
        return SideBatch(self.indices.pin_memory(), self.values.pin_memory(), sequences, starts)

    def record_stream(self, stream: torch.Stream) -> None:
        """Keep the memory until the stream has used it (CUDA)."""
        self.indices.record_stream(stream)
        self.values.record_stream(stream)
        if self.sequences is not None:
            self.sequences.record_stream(stream)
        for of in self.starts.values():
            of.record_stream(stream)


@dataclass
class Batch(Pipelineable):
    """A training step's share of one worker: B examples, each with J drawn items."""

    user: SideBatch
    """B rows."""
    item: SideBatch
    """B * (1 + J) rows: each example's item, followed by the drawn ones. Where these are drawn once for all
    examples, B + J rows: the examples' items, followed by those."""
    log_probability: Tensor
    """[B, J] float32: log of the probability with which each item was drawn; infinite where an item does not
    count for the example."""
    weight: Tensor
    """[B] float32: each example's weight in the loss; 0 for a row that only fills the batch."""
    label: Tensor
    """[B] float32: 1 for a positive, 0 else; with objective squared the value."""

    def to(self, device: torch.device, non_blocking: bool = False) -> "Batch":
        """The same on a device."""
        return Batch(
            self.user.to(device, non_blocking),
            self.item.to(device, non_blocking),
            self.log_probability.to(device, non_blocking=non_blocking),
            self.weight.to(device, non_blocking=non_blocking),
            self.label.to(device, non_blocking=non_blocking),
        )

    def pin_memory(self) -> "Batch":
        """See SideBatch."""
        return Batch(
            self.user.pin_memory(),
            self.item.pin_memory(),
            self.log_probability.pin_memory(),
            self.weight.pin_memory(),
            self.label.pin_memory(),
        )

    def record_stream(self, stream: torch.Stream) -> None:
        """Keep the memory until the stream has used it (CUDA)."""
        for part in (self.user, self.item, self.log_probability, self.weight, self.label):
            part.record_stream(stream)


def side_batch(
    columns: pa.Table | Mapping[str, pa.Array], fields: tuple[FieldSpec, ...], joined: bool = False
) -> SideBatch:
    """Turn the columns of one side into tensors.

    Missing indices and null elements count as unknown, a missing value as 0 (the mean of what was
    standardised), a null list as an empty one, a null vector as zeros.

    Args:
        columns: holds a column for each field; other columns are ignored.
        fields: of one side, in the spec's order.
        joined: of a history with an encoder that goes on where that of the row before ended, only what is new
            is looked up.

    Raises:
        DataError: a column is missing, an index is outside its field's table, or a vector has another length.
    """
    names = columns.column_names if isinstance(columns, pa.Table) else list(columns)
    missing = [field.name for field in fields if field.name not in names]
    if missing:
        raise DataError(
            f"The model's fields {', '.join(missing)} are not among the columns {', '.join(names)}. "
            f"Use the features run that the model was trained on."
        )
    arrays = {field.name: _array(columns[field.name]) for field in fields}
    numbers = [_numbers(arrays[field.name], field) for field in fields if field.type not in INDEXED]
    nothing = np.empty((len(arrays[fields[0].name]), 0), np.float32)
    bags = {field.name: _indices(arrays[field.name], field) for field in fields if field.type in INDEXED}
    sequences, starts = tabled(fields, sequence=True), {}
    for field in sequences if joined else ():
        if field.pooling == "encoder":
            values, lengths, starts_N = _continued(*bags[field.name], field.last or 1)
            bags[field.name], starts[field.name] = (values, lengths), torch.as_tensor(starts_N)
    return SideBatch(
        _jagged(bags, tabled(fields)),
        torch.as_tensor(np.concatenate([nothing, *numbers], axis=1)),
        _jagged(bags, sequences, max(field.last or 1 for field in sequences)) if sequences else None,
        starts,
    )


def _continued(
    values: np.ndarray, lengths: np.ndarray, last: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of histories what is new in each beside that of the row before.

    Args:
        values: [sum of lengths].
        lengths: [N], none above `last`.
        last: of a longer history the oldest items are left out.

    Returns:
        the new values; their numbers [N]; and [N] bool: which rows have all of theirs, because theirs does
        not begin as that of the row before goes on.
    """
    later = _later(lengths)
    histories = np.full((len(lengths), last), -1, values.dtype)
    histories[np.repeat(np.arange(len(lengths)), lengths), last - 1 - later] = values
    new, starts = lengths.copy(), np.ones(len(lengths), bool)
    rows = np.arange(1, len(lengths))
    for number in range(last):
        same = (histories[rows, : last - number] == histories[rows - 1, number:]).all(1)
        new[rows[same]], starts[rows[same]] = number, False
        rows = rows[~same]
    return values[later < np.repeat(new, lengths)], new, starts


def _later(lengths: np.ndarray) -> np.ndarray:
    """[sum of lengths] how many values of its bag come after each."""
    ends = np.repeat(lengths.cumsum(), lengths)
    return ends - np.arange(1, len(ends) + 1)


def _jagged(
    bags: Mapping[str, Sequence[np.ndarray]], fields: Sequence[FieldSpec], positions: int | None = None
) -> KeyedJaggedTensor:
    """A bag a row and field; with `positions`, of its last so many values a bag each, the others empty."""
    none = np.empty(0, np.int32)
    values, lengths = (
        np.concatenate([none, *(bags[field.name][part] for field in fields)]) for part in (0, 1)
    )
    if positions is not None:
        values = values[_later(lengths) < positions]
        lengths = (np.arange(positions) < lengths[:, None]).astype(np.int32).ravel()
    return KeyedJaggedTensor(
        keys=[field.name for field in fields],
        values=torch.as_tensor(values),
        lengths=torch.as_tensor(lengths),
    )


def _take(jagged: KeyedJaggedTensor, rows: Tensor) -> KeyedJaggedTensor:
    """These rows of every key."""
    keys, offsets = jagged.keys(), jagged.offsets()
    starts = torch.arange(len(keys), device=rows.device).unsqueeze(1) * jagged.stride()
    bags = (starts + rows).flatten()
    begins = offsets[bags].to(torch.int64)
    lengths = offsets[bags + 1] - begins
    ends = lengths.cumsum(0)
    shift = torch.repeat_interleave(begins - ends + lengths, lengths)
    taken = jagged.values()[shift + torch.arange(shift.numel(), device=rows.device)]
    return KeyedJaggedTensor(keys=keys, values=taken, lengths=lengths.to(torch.int32))


def _array(column: pa.Array | pa.ChunkedArray) -> pa.Array:
    if not isinstance(column, pa.ChunkedArray):
        return column
    return column.chunk(0) if column.num_chunks == 1 else column.combine_chunks()


def _indices(column: pa.Array, field: FieldSpec) -> tuple[np.ndarray, np.ndarray]:
    """The values [sum of lengths] and lengths [N] of a field's bags, both int32."""
    if field.type == "indices":
        lengths = pc.fill_null(pc.list_value_length(column), 0).to_numpy(zero_copy_only=False)
        column = column.flatten()  # leaves out what lies outside a slice or under a null
    else:
        lengths = np.ones(len(column), dtype=np.int32)
    values = pc.fill_null(column, UNKNOWN).to_numpy(zero_copy_only=False).astype(np.int32)
    if len(values) and not 0 <= values.min() <= values.max() < field.cardinality:
        raise DataError(
            f"{field.name} has indices from {values.min()} to {values.max()}, and its table has "
            f"{field.cardinality} rows. Use the features run that the model was trained on; in a training, "
            f"make it anew: jobs/featurize.py --force."
        )
    return values, lengths.astype(np.int32)


def _numbers(column: pa.Array, field: FieldSpec) -> np.ndarray:
    """A field's numbers, float32: [N, 1] of a value, [N, cardinality] of a vector."""
    if field.type == "value":
        return pc.fill_null(column, 0).to_numpy(zero_copy_only=False).astype(np.float32)[:, None]
    known = column.is_valid().to_numpy(zero_copy_only=False)
    lengths = pc.list_value_length(column).filter(column.is_valid()).to_numpy(zero_copy_only=False)
    if (lengths != field.cardinality).any():
        wrong = int(lengths[lengths != field.cardinality][0])
        raise DataError(
            f"{field.name} has a vector of {wrong} numbers, and the model expects {field.cardinality}. Use "
            f"the features run that the model was trained on."
        )
    numbers = np.zeros((len(column), field.cardinality), np.float32)
    flat = pc.fill_null(column.flatten(), 0).to_numpy(zero_copy_only=False)
    numbers[known] = flat.reshape(-1, field.cardinality)
    return numbers

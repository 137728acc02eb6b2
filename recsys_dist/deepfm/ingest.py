"""The examples' Parquet files, read in a shuffled order of which every worker reads its own parts.

An epoch is the row groups in a seeded order, one after the other, cut into a fixed number of streams of equal
length. A stream shuffles its rows chunk by chunk; a step takes the next rows of every stream. So the rows of
a step depend on nothing but seed, epoch and step, each row comes once an epoch, and a worker only opens the
row groups that its streams lie in.

Legend: R row groups, N rows, S streams, T steps of an epoch.
"""

import bisect
import functools
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset
import torch.distributed as dist

from recsys_dist.errors import DataError

CHUNK = 1 << 16
"""Rows that are shuffled together, at least: row groups are not read in parts."""


class Keep(Protocol):
    """Which rows are let through, where a filter's expression cannot say it."""

    columns: tuple[str, ...]
    """What it goes by."""

    def __call__(self, table: pa.Table) -> np.ndarray:
        """[N] bool of these rows, by those columns."""
        ...


class RowGroups:
    """The row groups of a data set, and of each the rows that a filter lets through.

    Args:
        dataset: of Parquet files.
        columns: what is read.
        wanted: the filter.
        cache_bytes: row groups are kept in memory, those that were used last, up to so many bytes.
        keep: of the rows that the filter lets through; None: all.

    Raises:
        DataError: a file is missing, or damaged; also when it is read.
    """

    def __init__(
        self,
        dataset: pa.dataset.Dataset,
        columns: Sequence[str],
        wanted: pc.Expression,
        cache_bytes: int,
        keep: Keep | None = None,
    ) -> None:
        self._schema, self._columns, self._wanted = dataset.schema, list(columns), wanted
        self._keep = keep
        files = sorted(dataset.get_fragments(filter=wanted), key=lambda file: file.path)
        self._groups = []
        for file in files:
            with _readable(file.path):
                self._groups += file.split_by_row_group()
        self._cache: OrderedDict[int, pa.Table] = OrderedDict()
        self._room = cache_bytes
        self.empty: pa.Table = pa.schema([self._schema.field(name) for name in columns]).empty_table()
        """No rows."""

    def __len__(self) -> int:
        return len(self._groups)

    def read(self, number: int) -> pa.Table:
        """The rows of a row group."""
        if number in self._cache:
            self._cache.move_to_end(number)
            return self._cache[number]
        table = self._read(number, self._columns)
        self._cache[number] = table
        self._room -= table.nbytes
        while self._room < 0:
            self._room += self._cache.popitem(last=False)[1].nbytes
        return table

    def each(self, of: Callable[[pa.Table], Any], columns: Sequence[str]) -> list[Any]:
        """`of` these columns of every row group, in order. Collective: each worker reads its share."""
        rank, world_size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        own = [of(self._read(n, columns)) for n in range(rank, len(self), world_size)]
        shares: list[Any] = [own]
        if world_size > 1:
            shares = [None] * world_size
            dist.all_gather_object(shares, own)
        return [shares[n % world_size][n // world_size] for n in range(len(self))]

    def place(self, number: int, row: int) -> str:
        """The file, and the row in it, of a row that the filter lets through; both count from 0."""
        group = self._groups[number]
        mask = group.to_table(schema=self._schema, columns={"wanted": self._wanted})["wanted"]
        rows = np.flatnonzero(mask.to_numpy())
        if self._keep:
            rows = rows[self._keep(self._wanted_rows(number, self._keep.columns))]
        before = range(group.row_groups[0].id)
        first = sum(group.metadata.row_group(earlier).num_rows for earlier in before)
        return f"{group.path} row {first + int(rows[row])}"

    def _read(self, number: int, columns: Sequence[str]) -> pa.Table:
        if not self._keep:
            return self._wanted_rows(number, columns)
        table = self._wanted_rows(number, tuple(dict.fromkeys((*columns, *self._keep.columns))))
        return table.filter(pa.array(self._keep(table))).select(list(columns))

    def _wanted_rows(self, number: int, columns: Sequence[str]) -> pa.Table:
        group = self._groups[number]
        with _readable(group.path):
            return group.to_table(schema=self._schema, columns=list(columns), filter=self._wanted)


@contextmanager
def _readable(path: str) -> Iterator[None]:
    """Raise a DataError where a file is not there, or not what was written."""
    try:
        yield
    except (OSError, pa.ArrowInvalid) as error:
        # Arrow's own complaints are OSErrors without a number.
        if getattr(error, "errno", None) is not None and not isinstance(error, FileNotFoundError):
            raise
        why = " ".join(str(error).split())
        raise DataError(
            f"{path} cannot be read: {why} Restore it, or make the run again: jobs/featurize.py --force."
        ) from None


class Chunk(NamedTuple):
    """Rows of a stream that are shuffled together."""

    start: int
    """The first one's place in the stream."""
    pieces: list[tuple[int, int, int]]
    """Where they are: a row group, the first of its rows, and that after the last."""


class Order:
    """Which rows an epoch's steps take.

    Args:
        rows: [R] of each row group.
        streams: S; there are fewer where a step or all row groups have fewer rows.
        batch_size: rows of a step at most.
        seed: of the order of row groups and rows.
        together: so many rows, one after the other, stay together.
    """

    def __init__(
        self, rows: Sequence[int], streams: int, batch_size: int, seed: int, together: int = 1
    ) -> None:
        total = sum(rows)
        self.together = together
        self.row_groups, self.seed = list(rows), seed
        self.streams = min(streams, batch_size, total)
        self.cuts = [stream * total // self.streams for stream in range(self.streams + 1)]
        """[S + 1] where the streams begin, and the last one ends."""
        longest = -(-total // self.streams)
        self.steps = -(-longest // (batch_size // self.streams))
        """T."""
        self.most = -(-longest // self.steps)
        """Rows that a step takes of a stream at most."""

    def taken(self, stream: int, step: int) -> tuple[int, int]:
        """The first of the rows that a step takes of a stream, counted within it, and that after them."""
        length = self.cuts[stream + 1] - self.cuts[stream]
        return step * length // self.steps, (step + 1) * length // self.steps

    def size(self, step: int) -> int:
        """Rows of a step."""
        taken = (self.taken(stream, step) for stream in range(self.streams))
        return sum(stop - start for start, stop in taken)

    def chunks(self, epoch: int) -> list[list[Chunk]]:
        """[S] the chunks of every stream, in order."""
        groups = np.random.default_rng([self.seed, epoch]).permutation(len(self.row_groups))
        found: list[list[Chunk]] = [[] for _ in self.cuts[1:]]
        stream = begin = 0
        for group in groups.tolist():
            end = begin + self.row_groups[group]
            while begin < end:
                while self.cuts[stream + 1] <= begin:
                    stream += 1
                chunks, place = found[stream], begin - self.cuts[stream]
                if not chunks or place - chunks[-1].start >= CHUNK:
                    chunks.append(Chunk(place, []))
                stop = min(end, self.cuts[stream + 1])
                first = begin - (end - self.row_groups[group])
                chunks[-1].pieces.append((group, first, first + stop - begin))
                begin = stop
        return found


class Shuffled:
    """The rows of the streams that a worker reads.

    Args:
        groups: the row groups.
        order: of the same row groups.
    """

    def __init__(self, groups: RowGroups, order: Order) -> None:
        self.groups, self.order = groups, order
        self._plan = functools.lru_cache(maxsize=2)(order.chunks)
        self._made: dict[int, tuple[int, Chunk, pa.Table]] = {}

    def take(self, epoch: int, step: int, stream: int) -> pa.Table:
        """What a step takes of a stream."""
        parts = [
            self._shuffled(epoch, stream, chunk).slice(first, last - first)
            for chunk, first, last in self._slices(epoch, step, stream)
        ]
        return pa.concat_tables(parts) if parts else self.groups.empty

    def numbers(self, epoch: int, step: int, stream: int) -> np.ndarray:
        """The numbers, among all rows, of what a step takes of a stream."""
        begins = np.cumsum([0, *self.order.row_groups])
        parts = [np.empty(0, np.int64)]
        for chunk, first, last in self._slices(epoch, step, stream):
            rows = np.concatenate([begins[group] + np.arange(*ends) for group, *ends in chunk.pieces])
            parts.append(rows[self._permutation(epoch, stream, chunk, len(rows))][first:last])
        return np.concatenate(parts)

    def place(self, number: int) -> str:
        """The file, and the row in it, of a numbered row."""
        ends = np.cumsum(self.order.row_groups)
        group = int(np.searchsorted(ends, number, side="right"))
        return self.groups.place(group, number - int(ends[group]) + self.order.row_groups[group])

    def _slices(self, epoch: int, step: int, stream: int) -> Iterator[tuple[Chunk, int, int]]:
        """Where a step's rows of a stream are: a chunk, the first of its rows, and that after the last."""
        start, stop = self.order.taken(stream, step)
        chunks = self._plan(epoch)[stream]
        while start < stop:
            after = bisect.bisect_right(chunks, start, key=lambda chunk: chunk.start)
            chunk, end = chunks[after - 1], chunks[after].start if after < len(chunks) else stop
            yield chunk, start - chunk.start, min(stop, end) - chunk.start
            start = min(stop, end)

    def _permutation(self, epoch: int, stream: int, chunk: Chunk, rows: int) -> np.ndarray:
        generator = np.random.default_rng([self.order.seed, epoch, stream, chunk.start])
        together = self.order.together
        runs = generator.permutation(-(-rows // together))
        order = (runs[:, None] * together + np.arange(together)).ravel()
        return order[order < rows]

    def padded(self, parts: Sequence[pa.Table], rows: int) -> pa.Table:
        """All parts, and after them copies of a row, so that there are so many."""
        there = [part for part in parts if len(part)]
        missing = rows - sum(len(part) for part in there)
        if missing:
            group = next(group for group, count in enumerate(self.order.row_groups) if count)
            row = (there[0] if there else self.groups.read(group)).slice(0, 1)
            there.append(row.take(pa.array(np.zeros(missing, np.int64))))
        return pa.concat_tables(there)

    def _shuffled(self, epoch: int, stream: int, chunk: Chunk) -> pa.Table:
        """A chunk's rows; those of each stream's latest are kept."""
        made = self._made.get(stream)
        if made is None or (made[0], made[1].start) != (epoch, chunk.start):
            table = pa.concat_tables(
                self.groups.read(group).slice(first, last - first) for group, first, last in chunk.pieces
            ).combine_chunks()
            order = self._permutation(epoch, stream, chunk, len(table))
            made = epoch, chunk, table.take(pa.array(order))
            self._made[stream] = made
        return made[2]

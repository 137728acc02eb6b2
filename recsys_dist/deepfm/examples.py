"""The examples as batches: same seed, same batches, for any number of workers.

They are the positives, each with drawn items, or, where nothing is drawn, all examples with their labels.

Legend: B examples of a worker's share, J items drawn for each.
"""

import functools
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch

from recsys_dist import config
from recsys_dist.config import Config
from recsys_dist.deepfm.batches import Batch, side_batch
from recsys_dist.deepfm.ingest import Keep, Order, RowGroups, Shuffled
from recsys_dist.deepfm.items import Items, days_of
from recsys_dist.deepfm.negatives import Negatives
from recsys_dist.errors import ConfigError, DataError
from recsys_dist.schema import FeatureSpec, padded
from recsys_dist.workspace import Run


def wanted(parts: Sequence[str], settings: config.DeepFM) -> pc.Expression:
    """Which examples of some parts the model learns from: the positives, or all where nothing is drawn."""
    chosen = pc.field("split").isin(list(parts))
    return chosen & (pc.field("label") == 1) if settings.negatives else chosen


def nothing(run: Run, spec: FeatureSpec, parts: Sequence[str], settings: config.DeepFM) -> DataError:
    """What to say where there is no such example."""
    kind = "positive example" if settings.negatives else "example"
    return DataError(
        f"{run.uri} has no {kind} in split={'+'.join(parts)}, of "
        f"{sum(spec.rows.get(part, 0) for part in parts)} examples. Check label.positive_when and "
        f"split.fractions, and run jobs/featurize.py again."
    )


def read_examples(run: Run, spec: FeatureSpec, parts: Sequence[str], settings: config.DeepFM) -> pa.Table:
    """All of them in memory.

    Raises:
        DataError: there is none.
    """
    columns = spec.examples_schema().names
    table = run.table("examples", columns=columns, filter=wanted(parts, settings))
    if not len(table):
        raise nothing(run, spec, parts, settings)
    return table


def targets(table: pa.Table, settings: config.DeepFM) -> np.ndarray:
    """[N] float32: what the model is to say of each example, its label or its value."""
    return table["value" if settings.objective == "squared" else "label"].to_numpy().astype(np.float32)


class Counted(NamedTuple):
    """What is to be known of the examples before they are read."""

    rows: int
    targets: float
    """Sum of the targets."""
    squares: float
    """Sum of their squares."""
    values: float
    """Sum of the values."""
    bad: int
    """Values that are no weight: below 0, or not finite."""
    unknown: int
    """Targets that are not finite."""


class Examples:
    """The examples' batches of every epoch and step.

    The items, drawn ones like the examples' own, have their fields as of the day of the event. What a step
    consists of does not depend on the number of workers: each takes the rows of its streams, and draws for
    each stream from a generator of its own.

    Args:
        run: the features run.
        catalogue: its items.
        config: seed, batch size and how items are drawn.
        parts: whose examples they are.
        keep: which of these; None: all.

    Raises:
        DataError: there is none, a target is not finite, or values are asked to be weights and are not.
    """

    def __init__(
        self,
        run: Run,
        catalogue: Items,
        config: Config,
        parts: Sequence[str] = ("train",),
        keep: Keep | None = None,
    ) -> None:
        settings = config.deepfm
        self.run = run
        self.config = config
        self.parts = parts
        self.catalogue = catalogue
        self.fields = catalogue.spec.side("user", "context")
        columns = catalogue.spec.examples_schema().names
        room = settings.cache_megabytes << 20
        groups = RowGroups(run.dataset("examples"), columns, wanted(parts, settings), room, keep)
        counted = groups.each(functools.partial(_count, settings=settings), ["label", "value"])
        self.total = Counted(
            *(sum(column) for column in zip(Counted(0, 0, 0, 0, 0, 0), *counted, strict=True))
        )
        if not self.total.rows:
            raise nothing(run, catalogue.spec, parts, settings)
        if settings.sample_weight and (self.total.bad or not self.total.values):
            raise DataError(
                f"deepfm.sample_weight=value: of the {self.total.rows} examples' values {self.total.bad} are "
                f"below 0, missing or not finite, and the sum is {self.total.values:g}; expected are numbers "
                f"from 0 on, not all 0. Give the events a value, or leave sample_weight out."
            )
        together = settings.encoder_run if settings.encoder else 1
        rows = [of.rows for of in counted]
        self.order = Order(rows, settings.streams, settings.batch_size, config.seed, together)
        self.shuffled = Shuffled(groups, self.order)
        if self.total.unknown:
            group = next(group for group, of in enumerate(counted) if of.unknown)
            row = int(np.flatnonzero(~np.isfinite(targets(groups.read(group), settings)))[0])
            place = groups.place(group, row).replace(run.path, run.uri)
            raise DataError(
                f"{self.total.unknown} of the {self.total.rows} examples have a label or value that is not "
                f"finite, the first one {place}. Correct the log and run jobs/featurize.py."
            )
        mean = self.total.targets / self.total.rows
        if settings.objective == "squared" and self.total.squares / self.total.rows <= mean**2 * (1 + 1e-12):
            raise DataError(
                f"{run.uri}: all {self.total.rows} examples in split={'+'.join(parts)} have the "
                f"value {mean:g}, so there is nothing to learn. Name the log's column in "
                f"data.events.columns.value, or learn something else than objective=squared."
            )
        self.negatives = None
        if settings.negatives:
            self.negatives = Negatives(
                catalogue.counts,
                catalogue.present,
                settings.negatives_power,
                settings.negatives_from == "batch",
            )
        self.history = None
        if settings.negatives_outside_history:
            histories = [f for f in catalogue.spec.fields if f.kind == "history" and f.of == "item"]
            if not histories:
                why = "model mf reads none" if settings.model == "mf" else "no field that it reads is one"
                raise ConfigError(
                    f"deepfm.negatives_outside_history=true is about a history of items, and {why}. Set it "
                    f"to false, or give the model a field such as {{name: recent, kind: history, of: item}}."
                )
            self.history = max(histories, key=lambda field: field.last or 0)
        daily = [field.name for field in catalogue.spec.daily]
        if settings.negatives_shared and daily:
            raise ConfigError(
                f"deepfm.negatives_shared=true: {', '.join(daily)} of the items change from day to day, and "
                f"the examples that share drawn ones are of many days. Let the model do without: "
                f"--set 'deepfm.leave_out=[{', '.join(daily)}]'"
            )

    @property
    def average(self) -> float:
        """The constant that predicts the examples best: their mean value, or the log odds of their labels; 0
        beside drawn items, which are as many as the settings say.
        """
        if self.negatives:
            return 0.0
        mean = self.total.targets / self.total.rows
        if self.config.deepfm.objective == "squared":
            return mean
        half = 0.5 / self.total.rows  # finite also where all labels are equal
        return float(np.log(max(mean, half) / max(1 - mean, half)))

    @property
    def steps(self) -> int:
        """Steps in an epoch."""
        return self.order.steps

    @property
    def drawn(self) -> int:
        """Items beside each example."""
        number = self.config.deepfm.negatives
        if self.negatives and self.config.deepfm.negatives_shared:
            return min(number, len(self.negatives.catalogue.items))
        return number

    def rows(self, step: int) -> int:
        """Examples in a step of an epoch."""
        return self.order.size(step)

    def told(self) -> str:
        """How many they are, in a line."""
        kind = "positive examples" if self.negatives else "examples"
        return f"{' and '.join(self.parts)}: {self.total.rows:,} {kind}, {self.steps:,} steps an epoch"

    def batch(self, epoch: int, step: int, rank: int, world_size: int) -> Batch:
        """One worker's share of a step.

        All shares have the same size; rows that only fill one weigh nothing. The others weigh so that the
        workers' mean loss is the mean over the whole step's examples.

        Args:
            epoch: from 0.
            step: within the epoch, from 0.
            rank: the worker.
            world_size: number of workers.
        """
        settings, seed = self.config.deepfm, self.config.seed
        own, share = self._share(rank, world_size)
        parts = [self.shuffled.take(epoch, step, stream) for stream in own]
        table = self.shuffled.padded(parts, share)
        real = np.arange(share) < sum(map(len, parts))
        positives, days = table["item"].to_numpy().astype(np.int64), days_of(table["timestamp"])
        if self.negatives and settings.negatives_shared:
            # Of the step, not of a stream, so that all workers draw the same.
            generator = np.random.default_rng([seed, epoch, step, self.order.streams])
            drawn, odds = self.negatives.draw_for_all(settings.negatives, generator)
            log_probability = np.where(self._left_out(table, positives, drawn), np.inf, odds)
            looked_up = np.concatenate([positives, drawn]), days[:1]  # they are the same on all days
        else:
            items = np.zeros((share, 1 + settings.negatives), np.int64)
            items[:, 0] = positives
            log_probability = np.zeros((share, settings.negatives), np.float32)
            if self.negatives and real.any():
                parts_drawn = [
                    self._draw(part, self.negatives, [seed, epoch, step, stream])
                    for stream, part in zip(own, parts, strict=True)
                ]
                items[real, 1:] = np.concatenate([found for found, _ in parts_drawn])
                log_probability[real] = np.concatenate([found for _, found in parts_drawn])
            looked_up = items.ravel(), np.repeat(days, items.shape[1])
        weight = real * (world_size / self.rows(step))
        if settings.sample_weight:
            weight = weight * table["value"].to_numpy() / (self.total.values / self.total.rows)
        return Batch(
            user=side_batch(table, self.fields, joined=True),
            item=self.catalogue.at(*map(torch.from_numpy, looked_up)),
            log_probability=torch.from_numpy(log_probability.astype(np.float32, copy=False)),
            weight=torch.from_numpy(weight.astype(np.float32)),
            label=torch.from_numpy(targets(table, settings)),
        )

    def numbers(self, epoch: int, step: int, rank: int, world_size: int) -> np.ndarray:
        """[B] which examples one worker's share of a step holds, fillers included."""
        own, share = self._share(rank, world_size)
        parts = [self.shuffled.numbers(epoch, step, stream) for stream in own]
        found = np.concatenate([*parts, np.empty(0, np.int64)])
        return np.pad(found, (0, share - len(found)), constant_values=found[0] if len(found) else 0)

    def places(self, numbers: Sequence[int]) -> list[str]:
        """File and row in it, from 0, of examples: reads the files again, nothing remembers it."""
        return [self.shuffled.place(number).replace(self.run.path, self.run.uri) for number in numbers]

    def _share(self, rank: int, world_size: int) -> tuple[range, int]:
        """The streams of a worker, and the rows of its share."""
        streams = self.order.streams
        own = range(rank * streams // world_size, (rank + 1) * streams // world_size)
        return own, -(-streams // world_size) * self.order.most

    def _draw(
        self, rows: pa.Table, negatives: Negatives, seed: Sequence[int]
    ) -> tuple[np.ndarray, np.ndarray]:
        """Negatives.draw for a stream's rows."""
        number, generator = self.config.deepfm.negatives, np.random.default_rng(seed)
        return negatives.draw(rows["item"].to_numpy(), number, generator, self._known(rows))

    def _known(self, rows: pa.Table) -> np.ndarray | None:
        """[B, H] items that are not drawn beside the positives, where there are any."""
        return padded(rows[self.history.name], self.history.last or 1) if self.history else None

    def _left_out(self, rows: pa.Table, positives: np.ndarray, drawn: np.ndarray) -> np.ndarray:
        """[B, J] bool: which of the items drawn for all do not count for an example."""
        history = self._known(rows)
        of_row = positives[:, None] if history is None else np.column_stack([positives, history])
        order = np.argsort(drawn, kind="stable")
        first, last = (np.searchsorted(drawn[order], of_row.ravel(), side) for side in ("left", "right"))
        number = last - first
        place = np.repeat(first - (number.cumsum() - number), number) + np.arange(number.sum())
        found = np.zeros((len(positives), len(drawn)), bool)
        found[np.repeat(np.arange(of_row.size) // of_row.shape[1], number), order[place]] = True
        return found


def _count(table: pa.Table, settings: config.DeepFM) -> Counted:
    values = table["value"].to_numpy().astype(np.float64)
    bad = ~(np.isfinite(values) & (values >= 0))
    of = targets(table, settings).astype(np.float64)
    unknown = int((~np.isfinite(of)).sum())
    sums = float(of.sum()), float(np.square(of).sum())
    return Counted(len(table), *sums, float(values[~bad].sum()), int(bad.sum()), unknown)


class Ahead:
    """One worker's batches in order; the next ones are made while this one trains."""

    DEPTH = 4
    """Batches that are ready or being made: the first one of a chunk takes longer than the others."""

    def __init__(self, examples: Examples, rank: int, world_size: int, pin: bool = False) -> None:
        """Take `pin` for a GPU: memory from which it can copy while it computes."""
        self.examples, self.rank, self.world_size, self.pin = examples, rank, world_size, pin
        # One thread: the step needs the others.
        self.pool = ThreadPoolExecutor(1, "next-batch", torch.set_num_threads, (1,))

    def from_step(self, first: int, stop: int) -> Iterator[Batch]:
        """The batches of the steps from `first` to before `stop`, counted over all epochs."""
        begun: deque[Future[Batch]] = deque()
        for step in range(first, stop):
            while len(begun) <= self.DEPTH and step + len(begun) < stop:
                begun.append(self.pool.submit(self._make, step + len(begun)))
            yield begun.popleft().result()

    def _make(self, step: int) -> Batch:
        batch = self.examples.batch(*divmod(step, self.examples.steps), self.rank, self.world_size)
        return batch.pin_memory() if self.pin else batch

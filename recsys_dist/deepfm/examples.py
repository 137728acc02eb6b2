"""The examples as batches: same seed, same batches, for any number of workers.

They are the positives, each with drawn items, or, where nothing is drawn, all examples with their labels.

Legend: B examples of a worker's share, J items drawn for each.
"""

import functools
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch

from recsys_dist import config
from recsys_dist.config import Config
from recsys_dist.deepfm.batches import Batch, side_batch
from recsys_dist.deepfm.items import Items, days_of
from recsys_dist.deepfm.negatives import Negatives
from recsys_dist.errors import DataError
from recsys_dist.schema import FeatureSpec
from recsys_dist.workspace import Run


def read_examples(run: Run, spec: FeatureSpec, parts: Sequence[str], settings: config.DeepFM) -> pa.Table:
    """The examples of some parts that the model learns from: the positives, or all where nothing is drawn.

    Raises:
        DataError: there is none.
    """
    wanted = pc.field("split").isin(list(parts))
    if settings.negatives:
        wanted &= pc.field("label") == 1
    table = run.table("examples", columns=spec.examples_schema().names, filter=wanted)
    if not len(table):
        kind = "positive example" if settings.negatives else "example"
        raise DataError(
            f"{run.uri} has no {kind} in split={'+'.join(parts)}, of "
            f"{sum(spec.rows.get(part, 0) for part in parts)} examples. Check label.positive_when and "
            f"split.fractions, and run jobs/featurize.py again."
        )
    return table


def targets(table: pa.Table, settings: config.DeepFM) -> np.ndarray:
    """[N] float32: what the model is to say of each example, its label or its value."""
    return table["value" if settings.objective == "squared" else "label"].to_numpy().astype(np.float32)


def weights(table: pa.Table, settings: config.DeepFM) -> np.ndarray:
    """[N] float32, of mean 1: how much each example counts.

    Raises:
        DataError: a value is below 0 or none, or all are 0.
    """
    if not settings.sample_weight:
        return np.ones(len(table), np.float32)
    found = table["value"].to_numpy().astype(np.float64)
    if not (np.isfinite(found).all() and found.min() >= 0 and found.max() > 0):
        raise DataError(
            f"deepfm.sample_weight=value: the examples' values are {found.min():g} to {found.max():g}; "
            f"expected are numbers from 0 on, not all 0. Give the events a value, or leave sample_weight out."
        )
    return (found / found.mean()).astype(np.float32)


class Examples:
    """The examples, in memory, and the batches of every epoch and step.

    The items, drawn ones like the examples' own, have their fields as of the day of the event. Each worker
    holds all examples and draws the whole step's items, of which it uses its share, so that a batch does not
    depend on the number of workers.

    Args:
        run: the features run.
        catalogue: its items.
        config: seed, batch size and how items are drawn.
        parts: whose examples they are.
    """

    def __init__(self, run: Run, catalogue: Items, config: Config, parts: Sequence[str] = ("train",)) -> None:
        table = read_examples(run, catalogue.spec, parts, config.deepfm)
        self.config = config
        self.catalogue = catalogue
        self.user = side_batch(table, catalogue.spec.side("user", "context"))
        self.items = table["item"].to_numpy()
        self.days = days_of(table["timestamp"])
        self.targets = targets(table, config.deepfm)
        self.weights = weights(table, config.deepfm)
        self._order = functools.lru_cache(maxsize=1)(self._order_of)
        self.negatives = None
        if config.deepfm.negatives:
            self.negatives = Negatives(catalogue.counts, catalogue.present, config.deepfm.negatives_power)

    @property
    def average(self) -> float:
        """The constant that predicts the examples best: their mean value, or the log odds of their labels; 0
        beside drawn items, which are as many as the settings say.
        """
        if self.negatives:
            return 0.0
        mean = float(self.targets.mean(dtype=np.float64))
        if self.config.deepfm.objective == "squared":
            return mean
        half = 0.5 / len(self.targets)  # finite also where all labels are equal
        return float(np.log(max(mean, half) / max(1 - mean, half)))

    @property
    def steps(self) -> int:
        """Steps in an epoch."""
        return -(-len(self.items) // self.config.deepfm.batch_size)

    def rows(self, step: int) -> int:
        """Examples in a step of an epoch."""
        size = self.config.deepfm.batch_size
        return min(size, len(self.items) - step * size)

    def batch(self, epoch: int, step: int, rank: int, world_size: int) -> Batch:
        """One worker's share of a step.

        All shares have the same size; rows that only fill the last one weigh nothing. The others weigh so
        that the workers' mean loss is the mean over the whole step's examples.

        Args:
            epoch: from 0.
            step: within the epoch, from 0.
            rank: the worker.
            world_size: number of workers.
        """
        settings = self.config.deepfm
        seed = self.config.seed
        rows = self._order(epoch)[step * settings.batch_size : (step + 1) * settings.batch_size]
        generator = np.random.default_rng([seed, epoch, step])
        if self.negatives:
            drawn, log_probability = self.negatives.draw(self.items[rows], settings.negatives, generator)
        else:
            drawn, log_probability = np.empty((len(rows), 0), np.int64), np.empty((len(rows), 0), np.float32)
        share = -(-settings.batch_size // world_size)
        mine = np.arange(rank * share, (rank + 1) * share)
        real = mine < len(rows)
        mine = np.where(real, mine, 0)
        item = np.concatenate([self.items[rows[mine], None], drawn[mine]], axis=1)
        weight = np.where(real, self.weights[rows[mine]] * world_size / len(rows), 0).astype(np.float32)
        return Batch(
            user=self.user.take(torch.from_numpy(rows[mine])),
            item=self.catalogue.at(
                torch.from_numpy(item.astype(np.int64).ravel()),
                torch.from_numpy(np.repeat(self.days[rows[mine]], item.shape[1])),
            ),
            log_probability=torch.from_numpy(log_probability[mine]),
            weight=torch.from_numpy(weight),
            label=torch.from_numpy(self.targets[rows[mine]]),
        )

    def _order_of(self, epoch: int) -> np.ndarray:
        return np.random.default_rng([self.config.seed, epoch]).permutation(len(self.items))


class Ahead:
    """One worker's batches in order; the next one is made while this one trains."""

    def __init__(self, examples: Examples, rank: int, world_size: int) -> None:
        self.examples, self.rank, self.world_size = examples, rank, world_size
        self.pool = ThreadPoolExecutor(1, thread_name_prefix="next-batch")
        self.next: tuple[tuple[int, int], Future[Batch]] | None = None

    def get(self, epoch: int, step: int) -> Batch:
        """The batch of a step, and begin with that after it."""
        if self.next is None or self.next[0] != (epoch, step):
            self.next = self._begin(epoch, step)
        batch = self.next[1].result()
        steps = self.examples.steps
        self.next = self._begin(epoch + (step + 1) // steps, (step + 1) % steps)
        return batch

    def _begin(self, epoch: int, step: int) -> tuple[tuple[int, int], Future[Batch]]:
        return (epoch, step), self.pool.submit(self.examples.batch, epoch, step, self.rank, self.world_size)

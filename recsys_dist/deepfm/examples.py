"""The positives of the train part as batches: same seed, same batches, for any number of workers.

Legend: B positives of a worker's share, J items drawn for each.
"""

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch

from recsys_dist.config import Config
from recsys_dist.deepfm.batches import Batch, SideBatch, side_batch
from recsys_dist.deepfm.negatives import Negatives
from recsys_dist.errors import DataError
from recsys_dist.schema import FeatureSpec
from recsys_dist.workspace import Run


def positives(run: Run, spec: FeatureSpec, split: str) -> pa.Table:
    """The positive examples of a part.

    Raises:
        DataError: there is none.
    """
    table = run.table(
        "examples",
        columns=spec.examples_schema().names,
        filter=(pc.field("split") == split) & (pc.field("label") == 1),
    )
    if not len(table):
        raise DataError(
            f"{run.uri} has no positive example in split={split}, of {spec.rows.get(split, 0)} examples. "
            f"Check label.positive_when and split.fractions, and run jobs/featurize.py again."
        )
    return table


def item_batch(run: Run, spec: FeatureSpec) -> tuple[SideBatch, np.ndarray]:
    """All items' fields, item i in row i - 1, and their positive train events [n_items]."""
    table = run.table("items").sort_by("item")
    found = table["item"].to_numpy()
    if not np.array_equal(found, np.arange(1, spec.n_items + 1)):
        raise DataError(
            f"{run.uri}/items has {len(found)} rows, expected the items 1 to {spec.n_items}, each once. "
            f"Run jobs/featurize.py --force."
        )
    return side_batch(table, spec.side("item")), table["count"].to_numpy()


class Examples:
    """The positives, in memory, and the batches of every epoch and step.

    Each worker holds them all and draws the whole step's items, of which it uses its share, so that a batch
    does not depend on the number of workers.
    """

    def __init__(self, run: Run, spec: FeatureSpec, config: Config) -> None:
        table = positives(run, spec, "train")
        self.config = config
        self.user = side_batch(table, spec.side("user", "context"))
        self.items = table["item"].to_numpy()
        self.item, counts = item_batch(run, spec)
        self.negatives = Negatives(counts, config.deepfm.negatives_power)

    @property
    def steps(self) -> int:
        """Steps in an epoch."""
        return -(-len(self.items) // self.config.deepfm.batch_size)

    def rows(self, step: int) -> int:
        """Positives in a step of an epoch."""
        size = self.config.deepfm.batch_size
        return min(size, len(self.items) - step * size)

    def batch(self, epoch: int, step: int, rank: int, world_size: int) -> Batch:
        """One worker's share of a step.

        All shares have the same size; rows that only fill the last one weigh nothing. The others weigh so
        that the workers' mean loss is the mean over the whole step's positives.

        Args:
            epoch: from 0.
            step: within the epoch, from 0.
            rank: the worker.
            world_size: number of workers.
        """
        settings = self.config.deepfm
        seed = self.config.seed
        order = np.random.default_rng([seed, epoch]).permutation(len(self.items))
        rows = order[step * settings.batch_size : (step + 1) * settings.batch_size]
        generator = np.random.default_rng([seed, epoch, step])
        drawn, log_probability = self.negatives.draw(self.items[rows], settings.negatives, generator)
        share = -(-settings.batch_size // world_size)
        mine = np.arange(rank * share, (rank + 1) * share)
        real = mine < len(rows)
        mine = np.where(real, mine, 0)
        item = np.concatenate([self.items[rows[mine], None], drawn[mine]], axis=1)
        weight = np.where(real, world_size / len(rows), 0).astype(np.float32)
        return Batch(
            user=self.user.take(torch.from_numpy(rows[mine])),
            item=self.item.take(torch.from_numpy(item.astype(np.int64).ravel() - 1)),
            log_probability=torch.from_numpy(log_probability[mine]),
            weight=torch.from_numpy(weight),
        )

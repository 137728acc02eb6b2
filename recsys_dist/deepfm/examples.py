"""The positives of the train part as batches: same seed, same batches, for any number of workers.

Legend: B positives of a worker's share, J items drawn for each.
"""

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch

from recsys_dist.config import Config
from recsys_dist.deepfm.batches import Batch, side_batch
from recsys_dist.deepfm.items import Items, days_of
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


class Examples:
    """The positives, in memory, and the batches of every epoch and step.

    The items, drawn ones like positives, have their fields as of the day of the positive event. Each worker
    holds all positives and draws the whole step's items, of which it uses its share, so that a batch does not
    depend on the number of workers.

    Args:
        run: the features run.
        catalogue: its items.
        config: seed, batch size and how items are drawn.
    """

    def __init__(self, run: Run, catalogue: Items, config: Config) -> None:
        table = positives(run, catalogue.spec, "train")
        self.config = config
        self.catalogue = catalogue
        self.user = side_batch(table, catalogue.spec.side("user", "context"))
        self.items = table["item"].to_numpy()
        self.days = days_of(table["timestamp"])
        self.negatives = Negatives(catalogue.counts, catalogue.present, config.deepfm.negatives_power)

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
            item=self.catalogue.at(
                torch.from_numpy(item.astype(np.int64).ravel()),
                torch.from_numpy(np.repeat(self.days[rows[mine]], item.shape[1])),
            ),
            log_probability=torch.from_numpy(log_probability[mine]),
            weight=torch.from_numpy(weight),
        )

"""What to say of a loss that is not finite: the rows of the files that it comes from."""

from collections import defaultdict
from typing import Any

import torch.distributed as dist
from torch import Tensor

from recsys_dist.deepfm.batches import INDEXED, Batch
from recsys_dist.deepfm.examples import Examples
from recsys_dist.deepfm.model import DeepFM
from recsys_dist.errors import ConfigError, DataError, RecsysError

SHOWN = 3
"""Rows that are named."""


def complaint(
    model: DeepFM, examples: Examples, batch: Batch, logits: Tensor, epoch: int, step: int
) -> RecsysError:
    """A DataError where a number of the batch is not finite, else a ConfigError: the model has diverged.

    The same on all workers. Collective.

    Args:
        model: the unsharded one, whose loss it is.
        examples: where the batch comes from.
        batch: this worker's share.
        logits: of it.
        epoch: from 0.
        step: within the epoch, from 0.
    """
    numbers = examples.numbers(epoch, step, dist.get_rank(), dist.get_world_size()).tolist()
    inputs = {numbers[row]: sorted(names) for row, names in _bad_inputs(model, batch).items()}
    losses = model.loss(logits.detach(), batch)
    shares: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(shares, (inputs, [numbers[row] for row in _bad_rows(losses)]))
    inputs = {number: names for share, _ in shares for number, names in share.items()}
    rows = sorted(inputs or {number for _, share in shares for number in share})
    where = [
        f"{place} ({', '.join(inputs[number][:SHOWN])})" if inputs else place
        for number, place in zip(rows, examples.places(rows[:SHOWN]), strict=False)
    ]
    loss = f"The loss of epoch {epoch + 1}, step {step + 1} is not finite"
    more = "; and others" if len(rows) > SHOWN else ""
    listed = f"in {len(rows)} of the batch's examples: {'; '.join(where)}{more}"
    if inputs:
        return DataError(f"{loss} because of its inputs, {listed}. Correct them and run jobs/featurize.py.")
    return diverged(f"{loss}, though its inputs are, {listed}", model)


def diverged(what: str, model: DeepFM) -> ConfigError:
    """What to do about a model that is no longer finite though its inputs are."""
    settings = model.settings
    return ConfigError(
        f"{what}. The training diverged. Lower deepfm.learning_rate={settings.learning_rate} or "
        f"deepfm.embedding_learning_rate={settings.embedding_learning_rate}."
    )


def _bad_inputs(model: DeepFM, batch: Batch) -> dict[int, set[str]]:
    """The rows of the batch with numbers that are not finite, and which these are."""
    found: dict[int, set[str]] = defaultdict(set)
    for fields, side in ((model.user_fields, batch.user), (model.item_fields, batch.item)):
        names = [f.name for f in fields if f.type not in INDEXED for _ in range(f.cardinality)]
        for row, column in (~side.values.isfinite()).nonzero().tolist():
            item = f" of item {side.indices['item'].values()[row]}" if side is batch.item else ""
            # Items that are drawn for all examples are told of the first.
            shared = model.settings.negatives_shared and side is batch.item
            example = row * (row < len(batch.user)) if shared else row * len(batch.user) // len(side)
            found[example].add(names[column] + item)
    return found


def _bad_rows(values: Tensor) -> list[int]:
    rows: list[int] = (~values.isfinite()).nonzero().flatten().tolist()
    return rows

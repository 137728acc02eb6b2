"""Training steps in torchrec's pipeline: while a batch is computed, the next one's indices are on their way
to the workers that hold their rows, and on a GPU the one after it is copied. On CPU the steps are, bit for
bit, those of a plain loop.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.distributed.train_pipeline import TrainPipelineSparseDist

from recsys_dist.deepfm.batches import Batch
from recsys_dist.deepfm.optimizer import Optimizers


class Steps:
    """What moves the model, a batch at a time.

    Args:
        model: sharded.
        optimizers: of it.
        device: of this worker.
        judge: called with the loss, the logits and the batch after the forward pass, before anything moves;
            what it returns is what a step returns.
    """

    def __init__(
        self,
        model: DistributedModelParallel,
        optimizers: Optimizers,
        device: torch.device,
        judge: Callable[[Tensor, Tensor, Batch], Any],
    ) -> None:
        self.model, self.optimizers = model, optimizers
        bfloat16 = optimizers.settings.precision == "bfloat16" and has_bfloat16(device)

        def forward(batch: Batch) -> tuple[Tensor, Any]:
            with torch.autocast(device.type, torch.bfloat16, enabled=bfloat16):
                loss, logits = model(batch)
            return loss, judge(loss, logits, batch)

        self.pipeline = TrainPipelineSparseDist(model, optimizers, device, custom_model_fwd=forward)

    def step(self, batches: Iterator[Batch], factor: float = 1.0, epoch: int = 0) -> Any:
        """Train on the next batch; up to two more are taken from the iterator, for the steps after it.

        Args:
            batches: always the same iterator.
            factor: of the learning rates.
            epoch: from 0.
        """
        self.optimizers.begin(factor, epoch)
        return self.pipeline.progress(batches)

    def pause(self) -> None:
        """Before the model is used for anything else than a step."""
        self.pipeline.detach()


def has_bfloat16(device: torch.device) -> bool:
    """Can the processor or GPU multiply matrices in bfloat16?"""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.ops.mkldnn._is_mkldnn_bf16_supported()

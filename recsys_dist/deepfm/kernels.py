"""FBGEMM's groups of tables, in which lookup, backward pass and the tables' optimizer are one."""

from collections.abc import Iterator

import torch
from fbgemm_gpu.split_embedding_configs import EmbOptimType
from fbgemm_gpu.split_table_batched_embeddings_ops_training import (
    SplitTableBatchedEmbeddingBagsCodegen,
    WeightDecayMode,
)
from torchrec.distributed.embeddingbag import ShardedEmbeddingBagCollection
from torchrec.distributed.model_parallel import DistributedModelParallel


def fused(model: DistributedModelParallel) -> Iterator[SplitTableBatchedEmbeddingBagsCodegen]:
    """The groups of tables that this worker holds parts of, in an order that does not change."""
    for module in model.modules():
        if isinstance(module, ShardedEmbeddingBagCollection):
            for lookup in module._lookups:  # nothing else leads to the kernels
                for kernel in lookup.modules():
                    if isinstance(kernel, SplitTableBatchedEmbeddingBagsCodegen):
                        yield kernel


def choose(model: DistributedModelParallel) -> None:
    """Let row-wise Adagrad on a processor be computed by the faster one of FBGEMM's two ways. After sharding.

    The one that it takes by itself is generated machine code that mixes SSE with AVX instructions: on Intel
    processors since Ice Lake each change costs some 100 cycles, six times a row. The other one counts also
    how often a row was seen, for penalties that are off here, and so the weights come out the same; it needs
    8 bytes more a row. On 2 cores, of 26 tables with 10 million rows, 13 ms a step instead of 50.
    """
    for kernel in fused(model):
        if kernel.use_cpu and kernel.optimizer == EmbOptimType.EXACT_ROWWISE_ADAGRAD:
            for counted in ("prev_iter", "row_counter"):
                setattr(kernel, f"{counted}_host", torch.zeros_like(kernel.momentum1_host))
                setattr(kernel, f"{counted}_offsets", kernel.momentum1_offsets)
                setattr(kernel, f"{counted}_placements", kernel.momentum1_placements)
            counting = WeightDecayMode.COUNTER.value  # with CounterWeightDecayMode.NONE, the default
            kernel.optimizer_args = kernel.optimizer_args._replace(regularization_mode=counting)
            kernel._used_rowwise_adagrad_with_counter = True

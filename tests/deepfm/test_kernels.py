import pytest
import torch
from fbgemm_gpu.split_embedding_configs import EmbOptimType
from fbgemm_gpu.split_table_batched_embeddings_ops_common import EmbeddingLocation, PoolingMode
from fbgemm_gpu.split_table_batched_embeddings_ops_training import (
    ComputeDevice,
    SplitTableBatchedEmbeddingBagsCodegen,
)

from recsys_dist.deepfm import kernels

ROWS, DIM, BATCH = (300, 7), 20, 64


@pytest.fixture
def both():
    """The same tables twice."""
    spec = [(rows, DIM, EmbeddingLocation.HOST, ComputeDevice.CPU) for rows in ROWS]
    settings = {"optimizer": EmbOptimType.EXACT_ROWWISE_ADAGRAD, "learning_rate": 0.05, "eps": 1e-8}
    two = [
        SplitTableBatchedEmbeddingBagsCodegen(
            spec, pooling_mode=PoolingMode.SUM, device=torch.device("cpu"), **settings
        )
        for _ in range(2)
    ]
    generator = torch.Generator().manual_seed(1)
    for table in range(len(ROWS)):
        start = torch.randn(ROWS[table], DIM, generator=generator)
        for kernel in two:
            kernel.split_embedding_weights()[table].detach().copy_(start)
    return two


def test_the_chosen_way_of_rowwise_adagrad_gives_the_same_weights_and_state(both, monkeypatch):
    given, chosen = both
    monkeypatch.setattr(kernels, "fused", lambda model: [chosen])
    kernels.choose(None)
    assert given.row_counter_host.numel() == 1  # not used: the other way
    generator = torch.Generator().manual_seed(2)
    for rate in (0.05, 0.05, 0.2, 0.01):
        lengths = torch.randint(0, 4, (len(ROWS), BATCH), generator=generator)
        offsets = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.flatten().cumsum(0)])
        indices = torch.cat(
            [
                torch.randint(0, rows, (int(of.sum()),), generator=generator)
                for rows, of in zip(ROWS, lengths, strict=True)
            ]
        )
        gradient = torch.randn(BATCH, len(ROWS) * DIM, generator=generator)
        for kernel in both:
            kernel.set_learning_rate(rate)
            kernel(indices, offsets).backward(gradient)
    assert chosen.row_counter_host.any()
    for table in range(len(ROWS)):
        torch.testing.assert_close(
            chosen.split_embedding_weights()[table], given.split_embedding_weights()[table]
        )
    torch.testing.assert_close(chosen.momentum1_host, given.momentum1_host)

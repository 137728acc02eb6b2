"""Decoupled weight decay of the tables that touches a row only when it is looked up, and yet equals decay of
the whole table before every step: a weight is multiplied by the factors of all steps that its row has missed.
"""

import math
from typing import Any

import torch
from fbgemm_gpu.split_table_batched_embeddings_ops_training import SplitTableBatchedEmbeddingBagsCodegen
from torch import Tensor
from torchrec.distributed.model_parallel import DistributedModelParallel

from recsys_dist.deepfm.kernels import fused


class TableDecay:
    """The decay of the fused tables, of the rows that this worker holds.

    Rows that were not looked up are behind until `catch_up`, after which nothing is to be remembered: a
    checkpoint holds no trace of when a row was last seen.

    Args:
        model: sharded.
    """

    def __init__(self, model: DistributedModelParallel) -> None:
        self.device = model.device
        self.rows: list[list[Tensor]] = []
        """Of each group of tables the weights [rows, D]."""
        self.seen: list[list[Tensor]] = []
        """Of each row the number of factors that it has been multiplied by."""
        self.logs: list[float] = [0.0]
        """Logarithm of the product of the first n factors since `catch_up`."""
        self.missing = torch.ones(1, device=self.device)
        """What a row lacks that has been multiplied by the first n factors: the product of the others."""
        for number, tables in enumerate(fused(model)):
            self.rows.append([weights.detach() for weights in tables.split_embedding_weights()])
            self.seen.append([w.new_zeros(len(w), dtype=torch.int32) for w in self.rows[-1]])
            tables.register_forward_pre_hook(self._hook(number), with_kwargs=True)

    def begin(self, factor: float) -> None:
        """From the coming step on every weight is multiplied by one more factor."""
        self.logs.append(self.logs[-1] + math.log(factor))
        logs = torch.tensor(self.logs, dtype=torch.float64)
        self.missing = torch.exp(logs[-1] - logs).float().to(self.device)

    @torch.no_grad()
    def catch_up(self) -> None:
        """Bring all rows to where they should be, before the tables are saved or used."""
        for tables, counts in zip(self.rows, self.seen, strict=True):
            for weights, seen in zip(tables, counts, strict=True):
                weights.mul_(self.missing[seen].unsqueeze(1))
                seen.zero_()
        self.logs, self.missing = [0.0], torch.ones(1, device=self.device)

    def _hook(self, number: int) -> Any:
        """What runs before a group of tables is looked up."""

        @torch.no_grad()
        def hook(tables: SplitTableBatchedEmbeddingBagsCodegen, _: Any, inputs: dict[str, Any]) -> None:
            if len(self.logs) == 1:
                return
            offsets, features = inputs["offsets"], tables.feature_table_map
            bounds = offsets[:: (len(offsets) - 1) // len(features)].tolist()
            for feature, table in enumerate(features):
                rows = inputs["indices"][bounds[feature] : bounds[feature + 1]]
                weights, seen = self.rows[number][table], self.seen[number][table]
                # A row that occurs several times is written several times, with the same values.
                weights[rows] = weights[rows] * self.missing[seen[rows]].unsqueeze(1)
                seen[rows] = len(self.logs) - 1

        return hook

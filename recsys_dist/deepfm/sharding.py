"""Where each table lives: large ones cut by rows over all workers, small ones whole on one worker each,
unless the settings say otherwise.
"""

import itertools
from collections.abc import Iterator
from typing import Any

import torch
from torch.distributed._shard.sharded_tensor import ShardedTensor
from torchrec.distributed.embeddingbag import EmbeddingBagCollectionSharder
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.distributed.sharding_plan import construct_module_sharding_plan, row_wise, table_wise
from torchrec.distributed.types import ShardingEnv, ShardingPlan

from recsys_dist import config
from recsys_dist.deepfm.batches import INDEXED
from recsys_dist.deepfm.model import DeepFM, initial_rows
from recsys_dist.deepfm.optimizer import fuse
from recsys_dist.errors import ConfigError


def make_plan(
    model: DeepFM, world_size: int, device: torch.device
) -> tuple[ShardingPlan, list[dict[str, Any]]]:
    """TorchRec's plan, and the same as rows for people: name, rows, dim, sharding, ranks.

    Raises:
        ConfigError: `sharding` names a field that has no table.
    """
    tables = [f.name for f in model.spec.fields if f.type in INDEXED]
    strange = [name for name in model.settings.sharding if name not in tables]
    if strange:
        raise ConfigError(
            f"deepfm.sharding: {', '.join(strange)} has no table; fields with one are {', '.join(tables)}"
        )
    sharder = EmbeddingBagCollectionSharder()
    turns = itertools.cycle(range(world_size))
    plan, described = {}, []
    for name, collection in model.collections.items():
        by_table = {}
        for table in collection.embedding_bag_configs():
            default = "row_wise" if table.num_embeddings >= model.settings.row_wise_from else "table_wise"
            chosen = model.settings.sharding.get(table.feature_names[0], default)
            large = chosen == "row_wise"
            ranks = list(range(world_size)) if large else [next(turns)]
            by_table[table.name] = row_wise() if large else table_wise(rank=ranks[0])
            described.append(
                {
                    "table": table.name,
                    "rows": table.num_embeddings,
                    "dim": table.embedding_dim,
                    "sharding": chosen,
                    "ranks": ranks,
                }
            )
        plan[name] = construct_module_sharding_plan(
            collection,
            by_table,
            sharder=sharder,
            local_size=world_size,
            world_size=world_size,
            device_type=device.type,
        )
    return ShardingPlan(plan), described


def shard(
    model: DeepFM, process_group: torch.distributed.ProcessGroup, device: torch.device, seed: int
) -> tuple[DistributedModelParallel, list[dict[str, Any]]]:
    """The model with its tables sharded over the process group, each row as the seed says.

    Args:
        model: with its tables on the meta device.
        process_group: of all workers.
        device: of this worker.
        seed: of the initial values.
    """
    fuse(model)  # before the plan, which chooses the kernels by it
    plan, described = make_plan(model, process_group.size(), device)
    sharded = DistributedModelParallel(
        model,
        env=ShardingEnv.from_process_group(process_group),
        device=device,
        plan=plan,
        sharders=[EmbeddingBagCollectionSharder()],
    )
    _initialise(sharded, model.dim, model.settings, seed)
    return sharded, described


@torch.no_grad()
def _initialise(model: DistributedModelParallel, dim: int, settings: config.DeepFM, seed: int) -> None:
    for name, tensor in model.state_dict().items():
        if not isinstance(tensor, ShardedTensor):
            continue
        table = name.split(".")[-2]
        for start, rows in held_rows(tensor):
            rows.copy_(initial_rows(seed, table, start, start + len(rows), dim, settings.init_scale))


def held_rows(tensor: torch.Tensor | ShardedTensor) -> Iterator[tuple[int, torch.Tensor]]:
    """The parts of a table that this worker holds: the first row's number, and the rows."""
    if not isinstance(tensor, ShardedTensor):
        yield 0, tensor
        return
    for part in tensor.local_shards():
        yield part.metadata.shard_offsets[0], part.tensor

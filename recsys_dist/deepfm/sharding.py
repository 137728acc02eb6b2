"""Where each table lives: cut by rows over all workers, whole on one, or whole on every one, as TorchRec's
planner finds cheapest, unless the settings say otherwise.
"""

import os
from collections.abc import Iterator
from typing import Any

import torch
from torch.distributed._shard.sharded_tensor import ShardedTensor
from torchrec.distributed.embeddingbag import EmbeddingBagCollectionSharder
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.distributed.planner import EmbeddingShardingPlanner, Topology
from torchrec.distributed.planner.types import ParameterConstraints, PlannerError
from torchrec.distributed.types import ShardingEnv, ShardingPlan

from recsys_dist import config
from recsys_dist.deepfm.batches import INDEXED
from recsys_dist.deepfm.kernels import choose
from recsys_dist.deepfm.model import PADDING, TABLES, DeepFM, initial_rows
from recsys_dist.deepfm.optimizer import fuse
from recsys_dist.errors import ConfigError

OFFERED = ["row_wise", "table_wise", "data_parallel"]
"""What the planner chooses from: what every optimizer can have."""
ON_PROCESSORS = [*OFFERED, "column_wise", "table_column_wise"]
ON_GPUS = [*ON_PROCESSORS, "table_row_wise", "grid_shard"]


class Sharder(EmbeddingBagCollectionSharder):
    """Offers the planner what works on CPU too, where torchrec keeps row_wise from it."""

    def sharding_types(self, compute_device_type: str) -> list[str]:
        """See torchrec."""
        return ON_GPUS if compute_device_type == "cuda" else ON_PROCESSORS


def make_plan(
    model: DeepFM, process_group: torch.distributed.ProcessGroup, device: torch.device
) -> tuple[ShardingPlan, list[dict[str, Any]]]:
    """TorchRec's plan, and the same as rows for people: name, rows, dim, sharding, ranks. Collective.

    Raises:
        ConfigError: the tables do not fit into the memory.
    """
    settings, world_size = model.settings, process_group.size()
    offered = Sharder().sharding_types(device.type)
    strange = {name: kind for name, kind in settings.sharding.items() if kind not in offered}
    if strange:
        raise ConfigError(
            f"deepfm.sharding={strange} is for GPUs, and the workers compute on processors: "
            f"{', '.join(offered)} are for these."
        )
    constraints = {}
    beside = settings.negatives / (settings.batch_size if settings.negatives_shared else 1)
    for name, field in ((field.name, field) for field in model.spec.fields if field.type in INDEXED):
        chosen = [settings.sharding[name]] if name in settings.sharding else OFFERED
        constraints[f"table_{name}"] = ParameterConstraints(
            # One worker has nothing to choose: whole on it is what costs least.
            sharding_types=chosen if world_size > 1 or len(chosen) == 1 else ["table_wise"],
            pooling_factors=[float(field.last or 1)],
            num_poolings=[1.0 + beside if field.side == "item" else 1.0],
            min_partition=_width(model.dim + PADDING, world_size),
        )
    local = int(os.environ.get("LOCAL_WORLD_SIZE", world_size))
    cuda = device.type == "cuda"
    topology = Topology(
        world_size=world_size,
        local_world_size=local if world_size % local == 0 else world_size,
        compute_device=device.type,
        hbm_cap=torch.cuda.get_device_properties(device).total_memory if cuda else None,
        ddr_cap=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // local,
    )
    planner = EmbeddingShardingPlanner(
        topology, batch_size=-(-settings.batch_size // world_size), constraints=constraints, debug=False
    )
    try:
        plan = planner.collective_plan(model, [Sharder()], process_group)
    except PlannerError as error:
        raise ConfigError(
            f"deepfm.sharding: TorchRec finds no plan for the tables on {world_size} workers: {error}. Use "
            f"more workers, a smaller embedding_dim, or another sharding than {settings.sharding or OFFERED}."
        ) from None
    described = [
        {
            "table": table.name,
            "rows": table.num_embeddings,
            "dim": table.embedding_dim,
            "sharding": plan.plan[name][table.name].sharding_type,
            "ranks": plan.plan[name][table.name].ranks,
        }
        for name, collection in model.collections.items()
        for table in collection.embedding_bag_configs()
    ]
    return plan, described


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
    plan, described = make_plan(model, process_group, device)
    sharded = DistributedModelParallel(
        model,
        env=ShardingEnv.from_process_group(process_group),
        device=device,
        plan=plan,
        sharders=[Sharder()],
    )
    choose(sharded)
    _initialise(sharded, model.dim, model.settings, seed)
    return sharded, described


@torch.no_grad()
def _initialise(model: DistributedModelParallel, dim: int, settings: config.DeepFM, seed: int) -> None:
    for name, tensor in model.state_dict().items():
        if TABLES in name:
            table = name.split(".")[-2]
            for place, part in held_parts(tensor):
                start, stop = place[0].start, place[0].stop
                part.copy_(initial_rows(seed, table, start, stop, dim, settings.init_scale)[:, place[1]])


def held_parts(
    tensor: torch.Tensor | ShardedTensor,
) -> Iterator[tuple[tuple[slice, ...], torch.Tensor]]:
    """The parts of a table, or of its optimizer's state, that this worker holds: where in the whole each is,
    a slice a dimension, and its numbers.
    """
    if not isinstance(tensor, ShardedTensor):
        yield tuple(slice(0, size) for size in tensor.shape), tensor
        return
    for part in tensor.local_shards():
        of = part.metadata
        ends = zip(of.shard_offsets, of.shard_sizes, strict=True)
        yield tuple(slice(start, start + size) for start, size in ends), part.tensor


def _width(columns: int, workers: int) -> int:
    """Of a part of a table that is cut by columns: the greatest that divides them, is a multiple of 4, which
    the kernels need, and leaves every worker one; 4 where there is none.
    """
    fitting = [w for w in range(4, columns, 4) if columns % w == 0 and w * workers <= columns]
    return max(fitting, default=4)

"""Training on 1 or 2 processes without Ray, for the tests beside this file."""

import io
import logging
import math
import multiprocessing
import statistics
import time
import warnings
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing
from torch.distributed._shard.sharded_tensor import ShardedTensor


def run_workers(world_size: int, action: Any, folder: Path, *arguments: Any) -> list[Any]:
    """Call `action(*arguments)` in `world_size` processes that form a gloo group; what each returned."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"group-{world_size}").unlink(
        missing_ok=True
    )  # of a folder that was copied: addresses of the dead
    # Forks of a process that has imported everything, and done nothing else.
    multiprocessing.set_forkserver_preload(["recsys_dist.deepfm.loop"])
    torch.multiprocessing.start_processes(
        _start, (world_size, action, folder, arguments), nprocs=world_size, start_method="forkserver"
    )
    return [torch.load(folder / f"answer-{rank}", weights_only=True) for rank in range(world_size)]


def alone(backend: str, action: Any, *arguments: Any) -> Any:
    """What `action(*arguments)` returns in this process, with a group of its own, brought to the processor: a
    fork of a process that has imported fbgemm for GPUs cannot use one.
    """
    if backend == "nccl":
        torch.cuda.set_device(0)
    dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    try:
        answer = io.BytesIO()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.save(action(*arguments), answer)
    finally:
        dist.destroy_process_group()
    answer.seek(0)
    return torch.load(answer, weights_only=True, map_location="cpu")


def device_of_group() -> torch.device:
    """Of this process: a GPU where the group is one of GPUs."""
    return torch.device("cuda", dist.get_rank()) if dist.get_backend() == "nccl" else torch.device("cpu")


def one_step(config: Any, features: Any, epoch: int = 0) -> dict[str, Any]:
    """Shard, take the first step, and return what changed. Tables come whole from rank 0, None elsewhere.

    Args:
        epoch: whose penalties it has.
    """
    from recsys_dist.deepfm.examples import Examples
    from recsys_dist.deepfm.items import Items
    from recsys_dist.deepfm.optimizer import rate_factor

    rank, world_size = dist.get_rank(), dist.get_world_size()
    model, sharded, optimizers, plan = _sharded(config, features)
    optimizers.begin(rate_factor(config.deepfm, 0, 100, 0), epoch)
    answer: dict[str, Any] = {"plan": plan, "start": _whole(sharded.state_dict()), "shards": {}}
    for name, tensor in sharded.state_dict().items():
        if isinstance(tensor, ShardedTensor):
            answer["shards"][name] = {
                "all": [
                    [part.shard_offsets[0], part.shard_sizes[0], part.placement.rank()]
                    for part in tensor.metadata().shards_metadata
                ],
                "held": [
                    [part.metadata.shard_offsets[0], part.tensor.shape[0]] for part in tensor.local_shards()
                ],
            }
    batch = Examples(features, Items(features, model.spec), config).batch(0, 0, rank, world_size)
    batch = batch.to(device_of_group())
    loss, logits = sharded(batch)
    loss.backward()
    answer |= {"loss": loss.item(), "logits": logits.detach(), "weight": batch.weight}
    parameters = dict(sharded.named_parameters())
    answer["gradients"] = {name: parameters[name].grad.clone() for name in optimizers.dense.params}
    optimizers.step()
    answer["after"] = _whole(sharded.state_dict())
    answer["fused"] = _fused(optimizers)
    answer["buffers"] = {name: buffer.clone() for name, buffer in sharded.named_buffers()}
    return answer


def decayed(config: Any, features: Any) -> dict[str, Any]:
    """The tables after seven steps: with the lazy decay, with one of all rows before every step, and with
    none; and how many rows were behind at the end. Whole from rank 0.
    """
    from recsys_dist.config import in_epoch
    from recsys_dist.deepfm.examples import Examples
    from recsys_dist.deepfm.items import Items
    from recsys_dist.deepfm.model import used_fields
    from recsys_dist.deepfm.optimizer import rate_factor
    from recsys_dist.deepfm.sharding import held_parts

    spec = used_fields(features.spec(), config.deepfm)
    examples = Examples(features, Items(features, spec), config)
    answer: dict[str, Any] = {}
    for way in ("lazy", "whole", "none"):
        settings = config.deepfm
        if way != "lazy":
            settings = settings.model_copy(update={"embedding_weight_decay": 0.0})
        _, sharded, optimizers, _ = _sharded(config.model_copy(update={"deepfm": settings}), features)
        tables = {name: t for name, t in sharded.state_dict().items() if ".embedding_bags." in name}
        for step in range(7):
            epoch, factor = step // 4, rate_factor(settings, step, 100, 0)
            if way == "whole":
                rate = factor * settings.embedding_learning_rate
                decay = in_epoch(config.deepfm.embedding_weight_decay, epoch)
                for table in tables.values():
                    for _, part in held_parts(table):
                        part.detach().mul_(1 - rate * decay)
            optimizers.begin(factor, epoch)
            optimizers.zero_grad()
            batch = examples.batch(0, step, dist.get_rank(), dist.get_world_size())
            loss, _ = sharded(batch.to(device_of_group()))
            loss.backward()
            optimizers.step()
        before = _whole(tables)
        optimizers.finish()
        answer[way] = {name: table for name, table in _whole(tables).items() if table is not None}
        if way == "lazy":
            answer["behind"] = {
                name: int((before[name] != table).any(1).sum()) for name, table in answer[way].items()
            }
    return answer


def stepped(config: Any, features: Any, piped: bool) -> dict[str, Any]:
    """The weights after six steps with a validation in the middle, in the pipeline or in a plain loop."""
    from recsys_dist.deepfm.examples import Ahead, Examples
    from recsys_dist.deepfm.items import Items
    from recsys_dist.deepfm.steps import Steps
    from recsys_dist.deepfm.validation import Ranking

    device = device_of_group()
    model, sharded, optimizers, _ = _sharded(config, features)
    items = Items(features, model.spec)
    ahead = Ahead(Examples(features, items, config), dist.get_rank(), dist.get_world_size())
    batches, losses, metric = ahead.from_step(0, 6), [], 0.0
    steps = Steps(sharded, optimizers, device, lambda loss, *_: loss.item()) if piped else None
    for number in range(6):
        torch.manual_seed(number)
        if steps:
            losses.append(steps.step(batches))
        else:
            optimizers.begin(1.0)
            optimizers.zero_grad()
            loss, _ = sharded(next(batches).to(device))
            loss.backward()
            optimizers.step()
            losses.append(loss.item())
        if number == 2:
            if steps:
                steps.pause()
            metric = Ranking(features, items, config).ndcg(model, device)
    return {"losses": losses, "metric": metric, "weights": _whole(sharded.state_dict())}


def planned(config: Any, features: Any, users: int) -> list[dict[str, Any]]:
    """The plan if there were so many users."""
    from recsys_dist.deepfm.model import DeepFM
    from recsys_dist.deepfm.optimizer import fuse
    from recsys_dist.deepfm.sharding import make_plan

    spec = features.spec()
    fields = [f.model_copy(update={"cardinality": users}) if f.name == "user" else f for f in spec.fields]
    spec = spec.model_copy(update={"fields": tuple(fields)})
    model = DeepFM(spec, config.deepfm, tables="meta")
    fuse(model)
    return make_plan(model, dist.group.WORLD, device_of_group())[1]


def started_from(config: Any, features: Any, run: Any) -> dict[str, Any]:
    """The sharded model's weights, and the own parts of the tables' optimizer, taken over from a run."""
    from recsys_dist.deepfm.start_from import take_over

    model, sharded, optimizers, _ = _sharded(config, features)
    take_over(sharded.state_dict(), model.spec, run, optimizers.of_tables())
    return {"weights": _whole(sharded.state_dict()), "fused": _fused(optimizers)}


def validated(config: Any, features: Any) -> float:
    """The validation metric of the initial model, whole in each process."""
    from recsys_dist.deepfm.items import Items
    from recsys_dist.deepfm.model import DeepFM
    from recsys_dist.deepfm.validation import Ranking

    items = Items(features, features.spec())
    model = DeepFM(items.spec, config.deepfm.model_copy(update={"init_scale": 0.5}))
    return Ranking(features, items, config).ndcg(model, device_of_group())


def train_in(config: Any, features: Any, folder: Path, more: dict[str, Any] | None = None) -> dict[str, Any]:
    """The whole loop, of a Task with these other arguments."""
    from recsys_dist.deepfm.loop import Task, train

    folder.mkdir(exist_ok=True)
    return asdict(train(Task(config, features, folder, **(more or {})), device_of_group()))


def train_telling_factors(config: Any, features: Any, folder: Path) -> dict[str, Any]:
    """The whole loop, and what each step's rates were multiplied with."""
    from recsys_dist.deepfm import loop

    factors: list[float] = []

    class Kept(loop.Steps):
        def step(self, batches: Any, factor: float = 1.0, epoch: int = 0) -> Any:
            factors.append(factor)
            return super().step(batches, factor, epoch)

    loop.Steps = Kept
    return train_in(config, features, folder) | {"factors": factors}


def train_until_error(config: Any, features: Any, folder: Path) -> dict[str, Any]:
    """The whole loop, which fails: with what, and the weights that it leaves behind in memory."""
    from recsys_dist.deepfm import loop
    from recsys_dist.errors import RecsysError

    models: list[Any] = []

    class Kept(loop.Steps):
        def __init__(self, model: Any, *arguments: Any) -> None:
            models.append(model)
            super().__init__(model, *arguments)

    loop.Steps = Kept
    try:
        train_in(config, features, folder)
    except RecsysError as error:
        return {"error": f"{type(error).__name__}: {error}", "weights": _whole(models[0].state_dict())}
    raise AssertionError("the training did not fail")


def train_catching_up(config: Any, features: Any, folder: Path, every: int) -> dict[str, Any]:
    """The whole loop, in which decayed rows catch up after every so many steps."""
    from recsys_dist.deepfm import loop

    loop.CATCH_UP_STEPS = every
    return train_in(config, features, folder)


def lost_at_worst(config: Any, features: Any, folder: Path) -> list[int]:
    """After each step, how many would be done again if everything died then; a seal takes ten steps' time."""
    from recsys_dist.deepfm import checkpoint
    from recsys_dist.deepfm.loop import Task, train
    from recsys_dist.deepfm.steps import Steps

    lost: list[int] = []
    seal, step, seconds = checkpoint._seal, Steps.step, []

    def slow(*arguments: Any) -> None:
        time.sleep(10 * statistics.median(seconds))
        seal(*arguments)

    def timed(*arguments: Any) -> Any:
        begin = time.monotonic()
        result = step(*arguments)
        seconds.append(time.monotonic() - begin)
        newest = max((done for done, _, _ in checkpoint.complete(folder)), default=0)
        lost.append(len(lost) + 1 - newest)
        return result

    checkpoint._seal, Steps.step = slow, timed
    train(Task(config, features, folder), device_of_group())
    return lost


def told_of_epochs(config: Any, features: Any, folder: Path) -> list[list[str]]:
    """The checkpoints that are not complete when an epoch is told, an epoch each; a seal takes a while."""
    from recsys_dist.deepfm import checkpoint
    from recsys_dist.deepfm.loop import Task, train

    found, seal = [], checkpoint._seal

    def slow(*arguments: Any) -> None:
        time.sleep(0.3)
        seal(*arguments)

    def on_epoch(line: dict[str, Any]) -> None:
        names = {path.name for _, _, path in checkpoint.found(folder)}
        assert f"step_{line['step']}-0" in names
        found.append(sorted(names - {path.name for _, _, path in checkpoint.complete(folder)}))

    checkpoint._seal = slow
    train(Task(config, features, folder, on_epoch=on_epoch), device_of_group())
    return found


def restored(config: Any, features: Any, folder: Path) -> dict[str, Any]:
    """What the newest checkpoint brings back: weights, and the state of either optimizer."""
    from recsys_dist.deepfm.checkpoint import Checkpoints, newest

    _, sharded, optimizers, plan = _sharded(config, features)
    path, _ = newest(folder)
    assert path
    Checkpoints(folder, 1, 1, device_of_group()).load(sharded, optimizers, path)
    states = optimizers.dense.state_dict()["state"]
    return {
        "plan": plan,
        "weights": _whole(sharded.state_dict()),
        "fused": _fused(optimizers),
        "dense": {f"{name} {key}": found.clone() for name in states for key, found in states[name].items()},
    }


def _start(rank: int, world_size: int, action: Any, folder: Path, arguments: tuple[Any, ...]) -> None:
    for name in (None, "torch", "torch.fx"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    method = f"file://{folder}/group-{world_size}"
    dist.init_process_group("gloo", init_method=method, rank=rank, world_size=world_size)
    torch.save(action(*arguments), folder / f"answer-{rank}")
    dist.barrier()
    dist.destroy_process_group()


def _sharded(config: Any, features: Any) -> tuple[Any, Any, Any, list[dict[str, Any]]]:
    """A model with its initial weights, the same sharded over the group, its optimizers, and the plan."""
    from recsys_dist.deepfm.model import DeepFM, used_fields
    from recsys_dist.deepfm.optimizer import Optimizers
    from recsys_dist.deepfm.sharding import shard

    spec = used_fields(features.spec(), config.deepfm)
    model = DeepFM(spec, config.deepfm, device=device_of_group(), tables="meta", seed=config.seed)
    sharded, plan = shard(model, dist.group.WORLD, device_of_group(), config.seed)
    return model, sharded, Optimizers(sharded, config.deepfm), plan


def _fused(optimizers: Any) -> dict[str, list[Any]]:
    """The state of the tables' optimizer, first row, first column and values: only of what this process
    holds, and of what all hold the first one's.
    """
    from recsys_dist.deepfm.sharding import held_parts

    return {
        name: [
            [place[0].start, place[1].start if len(place) > 1 else 0, part.clone()]
            for place, part in held_parts(state)
        ]
        for name, found in optimizers.of_tables().items()
        for state in found.values()
        if isinstance(state, ShardedTensor) or dist.get_rank() == 0
    }


def fused(answers: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """The tables' optimizer state, put together from what the workers answered."""
    parts: dict[str, list[Any]] = {}
    for answer in answers:
        for name, held in answer["fused"].items():
            parts[name] = parts.get(name, []) + held
    found = {}
    for name, held in parts.items():
        shape = [max(row + len(part) for row, _, part in held)]
        if held[0][2].dim() == 2:
            shape.append(max(column + part.shape[1] for _, column, part in held))
        assert sum(part.numel() for *_, part in held) == math.prod(shape)
        found[name] = torch.empty(shape)
        for row, column, part in held:
            place = (slice(row, row + len(part)), slice(column, column + part.shape[-1]))
            found[name][place[: part.dim()]] = part.cpu()
    return found


def _whole(state: dict[str, Any]) -> dict[str, torch.Tensor | None]:
    """Sharded tensors gathered on rank 0, others copied."""
    whole: dict[str, torch.Tensor | None] = {}
    for name, tensor in state.items():
        if isinstance(tensor, ShardedTensor):
            out = torch.empty(tensor.size(), device=device_of_group()) if dist.get_rank() == 0 else None
            tensor.gather(dst=0, out=out)
            whole[name] = out
        else:
            whole[name] = tensor.detach().clone()
    return whole

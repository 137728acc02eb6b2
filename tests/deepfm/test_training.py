import dataclasses
import json
import re
import shutil

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
import torch
import torch.distributed as dist
from torch.multiprocessing import ProcessRaisedException

from recsys_dist.config import DeepFM as DeepFMSettings
from recsys_dist.config import in_epoch
from recsys_dist.deepfm.batches import side_batch
from recsys_dist.deepfm.checkpoint import complete, load_weights, newest
from recsys_dist.deepfm.examples import Ahead, Examples
from recsys_dist.deepfm.items import Items
from recsys_dist.deepfm.model import DeepFM, used_fields
from recsys_dist.deepfm.optimizer import rate_factor
from recsys_dist.deepfm.reports import best, lines
from recsys_dist.deepfm.train import _Fitted, _publish, on_gpus
from recsys_dist.deepfm.validation import Predicting, Ranking
from recsys_dist.errors import ConfigError, DataError
from recsys_dist.workspace import Workspace
from tests.deepfm.workers import (
    fused,
    one_step,
    planned,
    restored,
    run_workers,
    stepped,
    train_in,
    train_telling_factors,
    validated,
)
from tests.synthetic import (
    items_as_of,
    listable,
    synthetic_config,
    synthetic_features,
    without_daily,
)

LARGE = {"table_user", "table_item", "table_recent"}
SHARDING = (
    "{user: row_wise, item: row_wise, recent: row_wise, group: table_wise, genres: table_wise, "
    "genres_seen: table_wise, age: table_wise, hour: table_wise, weekday: table_wise}"
)


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    return synthetic_config(
        tmp_path_factory.mktemp("root"),
        init_scale=0.1,
        dropout=0.1,
        epochs=3,
        batch_size=100,
        checkpoint_every_steps=4,
        sharding=SHARDING,
    )


@pytest.fixture(scope="module")
def features(config):
    return synthetic_features(config)


@pytest.fixture(scope="module")
def plain(config):
    """Without dropout, which differs between workers."""
    return config.model_copy(update={"deepfm": config.deepfm.model_copy(update={"dropout": 0.0})})


@pytest.fixture(scope="module")
def two(plain, features, tmp_path_factory):
    return run_workers(2, one_step, tmp_path_factory.mktemp("two"), plain, features)


@pytest.fixture(scope="module")
def one(plain, features, tmp_path_factory):
    return run_workers(1, one_step, tmp_path_factory.mktemp("one"), plain, features)


@pytest.fixture(scope="module")
def unsharded(plain, features):
    """The plain model after its first backward, and that step's batch."""
    spec = features.spec()
    model = DeepFM(spec, plain.deepfm, seed=plain.seed)
    start = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    batch = Examples(features, Items(features, spec), plain).batch(0, 0, rank=0, world_size=1)
    loss, logits = model(batch)
    loss.backward()
    return model, start, loss.item(), logits.detach()[batch.weight > 0]


def test_tables_are_really_sharded(two, features):
    spec = features.spec()
    rows = {f"table_{f.name}": f.cardinality for f in spec.fields if f.type in ("index", "indices")}
    assert {name.split(".")[-2] for name in two[0]["shards"]} == set(rows)
    owners = []
    for name, shards in two[0]["shards"].items():
        table = name.split(".")[-2]
        assert sum(size for _, size, _ in shards["all"]) == rows[table]
        assert {rank for *_, rank in shards["all"]} == {0, 1} if table in LARGE else len(shards["all"]) == 1
        for rank in (0, 1):  # each process holds its part, and nothing else
            mine = [[offset, size] for offset, size, owner in shards["all"] if owner == rank]
            assert two[rank]["shards"][name]["held"] == mine
        owners += [owner for *_, owner in shards["all"] if table not in LARGE]
    assert set(owners) == {0, 1}
    assert {row["table"] for row in two[0]["plan"] if row["sharding"] == "row_wise"} == LARGE


def test_start_is_bit_equal_for_any_world_size(one, two, unsharded):
    _, start, *_ = unsharded
    for answer in (one[0], two[0]):
        assert set(answer["start"]) == set(start)
        for name, tensor in start.items():
            assert torch.equal(answer["start"][name], tensor), name


@pytest.fixture(
    scope="module",
    params=[
        (1, {"user": "row_wise", "item": "table_wise", "recent": "data_parallel", "genres": "table_wise"}),
        (2, {"user": "table_wise", "item": "data_parallel", "recent": "row_wise", "genres": "row_wise"}),
        (3, {"user": "data_parallel", "item": "row_wise", "recent": "table_wise", "genres": "data_parallel"}),
    ],
    ids=lambda param: f"{param[0]} workers",
)
def answers(request, plain, features, tmp_path_factory):
    """Of `one_step` on 1 to 3 workers, with tables split in every way."""
    workers, sharding = request.param
    config = plain.model_copy(update={"deepfm": plain.deepfm.model_copy(update={"sharding": sharding})})
    found = run_workers(workers, one_step, tmp_path_factory.mktemp("answers"), config, features)
    kinds = {row["table"].removeprefix("table_"): row["sharding"] for row in found[0]["plan"]}
    assert len(found) == workers
    assert sharding.items() <= kinds.items()
    return found


def test_forward_and_gradients_equal_the_unsharded_models(answers, unsharded):
    model, _, loss, logits = unsharded
    assert sum(answer["loss"] for answer in answers) / len(answers) == pytest.approx(loss, abs=1e-6)
    found = torch.cat([answer["logits"][answer["weight"] > 0] for answer in answers])
    torch.testing.assert_close(found, logits)
    for answer in answers:
        assert "user_hidden.weight" in answer["gradients"]
        for name, gradient in answer["gradients"].items():
            torch.testing.assert_close(gradient, dict(model.named_parameters())[name].grad, msg=name)


@pytest.mark.parametrize("kind", ["lr", "mf", "dnn"])
def test_the_other_models_are_sharded_as_well(kind, plain, features, tmp_path):
    """One loss, logits and gradients on two workers and unsharded; values, by mf: ratings factorised."""
    chosen = {"model": kind} | ({"objective": "squared", "negatives": 0} if kind == "mf" else {})
    chosen |= {"sharding": {"item": "row_wise"} | ({} if kind == "mf" else {"genres": "data_parallel"})}
    config = plain.model_copy(update={"deepfm": plain.deepfm.model_copy(update=chosen)})
    answers = run_workers(2, one_step, tmp_path, config, features)
    spec = used_fields(features.spec(), config.deepfm)
    examples = Examples(features, Items(features, spec), config)
    model = DeepFM(spec, config.deepfm, seed=config.seed)
    batch = examples.batch(0, 0, rank=0, world_size=1)
    loss, logits = model(batch)
    loss.backward()
    assert sum(answer["loss"] for answer in answers) / 2 == pytest.approx(loss.item(), rel=1e-5)
    found = torch.cat([answer["logits"][answer["weight"] > 0] for answer in answers])
    torch.testing.assert_close(found, logits.detach()[batch.weight > 0])
    dense = {name for name, _ in model.named_parameters() if ".embedding_bags." not in name}
    for answer in answers:
        assert answer["gradients"].keys() == dense
        for name, gradient in answer["gradients"].items():
            torch.testing.assert_close(gradient, dict(model.named_parameters())[name].grad, msg=name)


def test_a_step_equals_the_unsharded_models(answers, unsharded, plain):
    """Row-wise Adagrad (one accumulator a row, of the mean squared gradient) and Adam, written out."""
    model, start, *_ = unsharded
    settings, state_of = plain.deepfm, fused(answers)
    for name, parameter in model.named_parameters():
        gradient = parameter.grad
        if ".embedding_bags." in name:
            accumulated = gradient.square().mean(1)
            found = state_of[name]
            torch.testing.assert_close(found, accumulated, rtol=1e-4, atol=1e-12, msg=name)
            moved = start[name] - settings.embedding_learning_rate * gradient / (
                accumulated.sqrt()[:, None] + 1e-8
            )
            assert (moved != start[name]).any()
        else:
            moved = start[name] - settings.learning_rate * gradient / (gradient.abs() + 1e-8)
        torch.testing.assert_close(answers[0]["after"][name], moved, rtol=1e-4, atol=1e-5, msg=name)


OPTIMIZERS = {
    "adagrad, adam": {
        "table_optimizer": "adagrad",
        "dense_optimizer": "adam",
        "weight_decay": 0.01,
        "l1": 0.003,
        "warmup_steps": 4,
    },
    "sgd, adagrad": {"table_optimizer": "sgd", "dense_optimizer": "adagrad", "clip_norm": 1e-3},
    "adagrad, adamw": {"table_optimizer": "adagrad", "dense_optimizer": "adamw", "weight_decay": 5.0},
    "sgd, adam in the second epoch": {
        "table_optimizer": "sgd",
        "dense_optimizer": "adam",
        "weight_decay": (5.0, 0.01),
        "l1": (1.0, 0.003),
    },
}


OTHER_WAY = {
    "item": "table_wise",
    "group": "row_wise",
    "genres": "data_parallel",
    "recent": "data_parallel",
    "user": "row_wise",
}
BY_COLUMNS = {
    "item": "column_wise",
    "group": "table_column_wise",
    "genres": "column_wise",
    "recent": "column_wise",
    "user": "row_wise",
}


@pytest.mark.parametrize(
    ("kind", "sharding", "workers"),
    [
        *((kind, OTHER_WAY, 2) for kind in OPTIMIZERS),
        *(("adagrad, adam", BY_COLUMNS, workers) for workers in (1, 2, 3)),
        ("sgd, adagrad", BY_COLUMNS, 2),
    ],
)
def test_a_step_of_the_other_optimizers(kind, sharding, workers, unsharded, plain, features, tmp_path):
    """Written out, with the tables split the other way round, or by columns."""
    settings = plain.deepfm.model_copy(update={**OPTIMIZERS[kind], "sharding": sharding})
    config = plain.model_copy(update={"deepfm": settings})
    epoch = int("second epoch" in kind)
    answers = run_workers(workers, one_step, tmp_path, config, features, epoch)
    l1, weight_decay = in_epoch(settings.l1, epoch), in_epoch(settings.weight_decay, epoch)
    found = {row["table"].removeprefix("table_"): row["sharding"] for row in answers[0]["plan"]}
    assert sharding.items() <= found.items()
    model, start, *_ = unsharded
    factor = 1 / 4 if settings.warmup_steps else 1
    dense = {name: p.grad for name, p in model.named_parameters() if ".embedding_bags." not in name}
    norm = torch.cat([gradient.flatten() for gradient in dense.values()]).norm()
    assert norm > 1e-3
    for name, parameter in model.named_parameters():
        gradient, rate, before = parameter.grad, factor * settings.embedding_learning_rate, start[name]
        if name not in dense:
            step = gradient / (gradient.abs() + 1e-8) if settings.table_optimizer == "adagrad" else gradient
        else:
            rate = factor * settings.learning_rate
            gradient = gradient + l1 * start[name].sign()
            if settings.clip_norm:
                gradient = gradient * settings.clip_norm / norm
            if settings.dense_optimizer == "adamw":  # decoupled: Loshchilov, Hutter 2019
                before = before * (1 - rate * weight_decay)
            else:
                gradient = gradient + weight_decay * start[name]
            step = gradient / (gradient.abs() + (1e-10 if settings.dense_optimizer == "adagrad" else 1e-8))
        moved = before - rate * step
        assert (moved != start[name]).any()
        torch.testing.assert_close(answers[0]["after"][name], moved, rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize("history", [{"attention": {"recent": 3.0}}, {"encoder": {"recent": 2}}])
def test_steps_in_the_pipeline_are_those_of_a_plain_loop(config, features, tmp_path, history):
    """Bit for bit, with everything that has a forward pass of its own, on two workers."""
    changes = history | {"batch_norm": True, "embedding_weight_decay": 0.1}
    everything = config.model_copy(update={"deepfm": config.deepfm.model_copy(update=changes)})
    plain, piped = (
        run_workers(2, stepped, tmp_path / str(way), everything, features, way)[0] for way in (False, True)
    )
    assert piped["losses"] == plain["losses"]
    assert piped["metric"] == plain["metric"] > 0
    for name, weights in plain["weights"].items():
        assert torch.equal(piped["weights"][name], weights), name


def test_rates_are_reduced_where_the_metric_does_not_rise(config, features, tmp_path):
    """Each time by plateau_factor, also where a training goes on from a checkpoint."""
    still = {
        "schedule": "plateau",
        "plateau_factor": 0.5,
        "patience": 9,
        "learning_rate": 1e-12,
        "embedding_learning_rate": 1e-12,
    }

    def trained(epochs):
        settings = config.deepfm.model_copy(update=still | {"epochs": epochs})
        changed = config.model_copy(update={"deepfm": settings})
        return run_workers(1, train_telling_factors, tmp_path, changed, features, tmp_path)[0]

    two, four = trained(2), trained(4)
    steps = two["step"] // 2
    assert two["factors"] == [1.0] * 2 * steps  # the first epoch's is better than none
    assert four["factors"] == [0.5] * steps + [0.25] * steps
    assert (two["reductions"], four["reductions"]) == (1, 3)


def test_rates_over_time():
    settings = DeepFMSettings(warmup_steps=10)
    assert [rate_factor(settings, step, 100, 3) for step in (0, 4, 9, 50)] == [0.1, 0.5, 1, 1]
    cosine = settings.model_copy(update={"schedule": "cosine", "warmup_steps": 0})
    assert [rate_factor(cosine, step, 100, 0) for step in (0, 50, 100)] == pytest.approx([1, 0.5, 0])
    plateau = settings.model_copy(update={"schedule": "plateau", "plateau_factor": 0.5})
    assert rate_factor(plateau, 50, 100, 3) == 0.125


def test_a_field_without_a_table_cannot_be_sharded(plain, features):
    settings = plain.deepfm.model_copy(update={"sharding": {"activity": "row_wise"}})
    with pytest.raises(
        ConfigError, match=r"deepfm.sharding: activity has no table; fields with one are user, "
    ):
        used_fields(features.spec(), settings)


def test_tables_that_do_not_fit_are_refused(plain, features, tmp_path):
    with pytest.raises(ProcessRaisedException, match="TorchRec finds no plan for the tables on 1 workers"):
        run_workers(1, planned, tmp_path, plain, features, 10**12)


def test_what_only_gpus_have_is_refused(plain, features, tmp_path):
    kinds = plain.deepfm.model_copy(update={"sharding": {"user": "table_row_wise"}})
    config = plain.model_copy(update={"deepfm": kinds})
    with pytest.raises(ProcessRaisedException, match=r"'user': 'table_row_wise'.* is for GPUs"):
        run_workers(1, planned, tmp_path, config, features, 10)


@pytest.mark.parametrize(
    ("workers", "gpus", "expected"),
    [(2, 1, 1), (2, 8, 2), ((1, 4), 2, (1, 4)), ((2, 4), 1, (1, 4)), ((2, 4), 2, (2, 4))],
)
def test_where_there_are_gpus_each_worker_has_one(workers, gpus, expected):
    assert on_gpus(workers, gpus) == expected


def test_the_planner_decides_where_the_settings_do_not(plain, features, tmp_path):
    """Large tables are not copied to every worker; all workers know the same plan."""
    free = plain.model_copy(update={"deepfm": plain.deepfm.model_copy(update={"sharding": {}})})
    plans = run_workers(2, planned, tmp_path, free, features, 10**7)
    assert plans[0] == plans[1]
    kinds = {row["table"]: row["sharding"] for row in plans[0]}
    assert kinds["table_user"] in ("row_wise", "table_wise")
    assert set(kinds.values()) <= {"row_wise", "table_wise", "data_parallel"}
    assert len(kinds) == len(SHARDING.split(","))


def test_workers_shares_make_up_the_step(plain, features):
    examples = Examples(features, Items(features, features.spec()), plain)
    for step in (0, examples.steps - 1):
        whole = examples.batch(1, step, rank=0, world_size=1)
        parts = [examples.batch(1, step, rank, world_size=3) for rank in range(3)]
        assert len({len(part.weight) for part in parts}) == 1
        real = torch.cat([part.weight for part in parts]) > 0
        assert int(real.sum()) == examples.rows(step) == int((whole.weight > 0).sum())
        users = torch.cat([part.user.indices.to_dict()["user"].values() for part in parts])[real]
        assert torch.equal(users, whole.user.indices.to_dict()["user"].values()[whole.weight > 0])
        weights = torch.cat([part.weight for part in parts])
        assert weights.sum().item() / 3 == pytest.approx(1)
    assert {examples.rows(step) for step in range(examples.steps)} <= set(range(80, 101))
    again = examples.batch(1, 0, rank=0, world_size=1)
    other = examples.batch(1, 1, rank=0, world_size=1)
    assert torch.equal(again.log_probability, examples.batch(1, 0, 0, 1).log_probability)
    assert not torch.equal(again.item.indices.values(), other.item.indices.values())


def test_workers_without_a_row_in_a_step_take_it_with_the_others(plain, features, tmp_path):
    """Steps of two examples on three workers: the same losses as on one."""
    few = plain.model_copy(update={"deepfm": plain.deepfm.model_copy(update={"batch_size": 2, "epochs": 1})})
    small = synthetic_features(synthetic_config(tmp_path / "root"), users=20, items=12, events=11)
    examples = Examples(small, Items(small, small.spec()), few)
    shares = [examples.batch(0, 0, rank, world_size=3).weight for rank in range(3)]
    assert sorted(int((share > 0).sum()) for share in shares) == [0, 1, 1]
    losses = []
    for workers in (1, 3):
        folder = tmp_path / str(workers)
        run_workers(workers, train_in, folder, few, small, folder)
        (line,) = lines(folder / "history.jsonl")
        assert line["step"] == examples.steps > 10
        losses.append(line["loss"])
    assert losses[1] == pytest.approx(losses[0], abs=1e-4)


def test_an_epoch_visits_every_positive_once(plain, features):
    examples = Examples(features, Items(features, features.spec()), plain)
    width = 1 + plain.deepfm.negatives
    visited = []
    for step in range(examples.steps):
        batch = examples.batch(0, step, rank=0, world_size=1)
        items = batch.item.indices.to_dict()["item"].values().view(-1, width)
        assert not (items[:, 1:] == items[:, :1]).any()
        users = batch.user.indices.to_dict()["user"].values()
        visited += torch.stack([users, items[:, 0]], 1)[batch.weight > 0].tolist()
    rows = features.table("examples").to_pylist()
    assert sorted(visited) == sorted(
        [row["user"], row["item"]] for row in rows if row["split"] == "train" and row["label"]
    )


@pytest.fixture(scope="module")
def whole_training(config, features, tmp_path_factory):
    """A training in one go on two workers: its folder and progress."""
    folder = tmp_path_factory.mktemp("whole")
    return folder, run_workers(2, train_in, folder, config, features, folder)[0]


def weights(features, config, path):
    state = DeepFM(features.spec(), config.deepfm).state_dict()
    load_weights(path, state)
    return state


def damage(checkpoint, how):
    """Damage a checkpoint; a pattern of what is then said of it."""
    file = max(checkpoint.glob("*.distcp"), key=lambda path: path.stat().st_size)
    content = bytearray(file.read_bytes())
    if how == "flipped":
        content[len(content) // 2] ^= 1
        file.write_bytes(content)
        return f"{file.name} is not what was saved, its sha256 differs"
    if how == "truncated":
        file.write_bytes(content[:-1])
        return rf"{file.name} has {len(content) - 1} bytes, expected {len(content)}"
    if how == "missing":
        file.unlink()
        return f"{file.name} is missing"
    seal = checkpoint / "sha256.json"
    if how == "sealed in vain":
        seal.write_text("{}")
        return "sha256.json does not name all files"
    if how == "seal emptied":  # as after a power cut
        seal.write_text("")
        return "sha256.json cannot be read"
    seal.unlink()  # as if killed while it was written
    return "it was not finished"


@pytest.mark.parametrize(
    "how", ["flipped", "truncated", "missing", "not finished", "sealed in vain", "seal emptied"]
)
def test_a_damaged_checkpoint_is_refused_by_name(whole_training, tmp_path, how):
    copy = shutil.copytree(whole_training[0], tmp_path / "copy")
    *_, (_, _, before), (_, _, last) = complete(copy)
    problem = damage(last, how)
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/here", rank=0, world_size=1)
    try:
        path, (refused,) = newest(copy)
        assert path == before
        assert re.fullmatch(f"checkpoint {last.name} is refused: {problem}", refused)
        for _, _, other in complete(copy):
            damage(other, "truncated")
        path, refused = newest(copy)
        assert path is None
        assert len(refused) >= 2
    finally:
        dist.destroy_process_group()


def test_a_damaged_checkpoint_is_not_published(whole_training, config, features, tmp_path):
    """The best one, though a newer one is whole."""
    copy = shutil.copytree(whole_training[0], tmp_path / "copy")
    history = lines(copy / "history.jsonl")
    step = best(history)["step"]
    (path,) = (path for found, _, path in complete(copy) if found == step)
    damage(path, "flipped")
    run = Workspace(config).new("deepfm", {}, {"features": features})
    with pytest.raises(DataError, match=f"checkpoint .*{path.name} is refused: .* its sha256 differs"):
        _publish(config, run, _Fitted(history, copy))


@pytest.mark.parametrize("workers", [2, 1])
def test_a_resumed_training_goes_on_as_if_nothing_had_been(
    whole_training, config, plain, features, tmp_path, workers
):
    """From a checkpoint within an epoch: bit-equal on two workers; on one it goes on from the same place."""
    folder, progress = whole_training
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    *_, (left, _, _), (_, _, last) = complete(copy)
    assert 0 < left < progress["step"]
    problem = damage(last, "flipped" if workers == 2 else "not finished")
    assert run_workers(workers, train_in, copy, config, features, copy)[0]["step"] == progress["step"]
    lines, expected = (
        [json.loads(line) for line in (place / "history.jsonl").read_text().splitlines()]
        for place in (copy, folder)
    )
    assert [line["step"] for line in lines] == [line["step"] for line in expected]
    assert lines[-1]["resumed_from"] == left
    assert lines[-1]["attempt"] == 1
    (refused,) = json.loads((copy / "resumed.json").read_text())["remarks"]
    assert re.fullmatch(f"checkpoint {last.name} is refused: {problem}", refused)
    last = next(path for step, attempt, path in complete(copy) if step == progress["step"] and attempt == 1)
    state = weights(features, config, last)
    original = weights(features, config, complete(folder)[-1][2])
    if workers == 2:
        assert all(torch.equal(state[name], original[name]) for name in original)
        assert lines[-1]["ndcg@10"] == expected[-1]["ndcg@10"]


@pytest.mark.parametrize("workers", [1, 2, 3])
def test_a_checkpoint_is_the_same_under_another_plan(whole_training, config, features, tmp_path, workers):
    """Weights and optimizer states bit for bit, of two workers' checkpoint."""
    folder, _ = whole_training
    sharding = {"item": "table_wise", "group": "row_wise", "recent": "data_parallel"}
    other = config.deepfm.model_copy(update={"sharding": sharding})
    changed = config.model_copy(update={"deepfm": other})
    before = run_workers(2, restored, tmp_path / "before", config, features, folder)
    after = run_workers(workers, restored, tmp_path / "after", changed, features, folder)
    kinds = [{row["table"]: row["sharding"] for row in answers[0]["plan"]} for answers in (before, after)]
    assert sum(kinds[0][table] != kinds[1][table] for table in kinds[0]) >= 3
    saved = weights(features, config, complete(folder)[-1][2])
    for name in saved:
        assert torch.equal(after[0]["weights"][name], saved[name]), name
    for found, expected in (
        (fused(after), fused(before)),
        *((one["dense"], before[0]["dense"]) for one in after),
    ):
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], expected[name]) for name in expected)
        assert any(found[name].any() for name in expected)


def test_an_accumulator_a_weight_goes_to_any_number_of_workers(config, features, tmp_path):
    """That of plain Adagrad, which is as large as its table."""
    settings = config.deepfm.model_copy(update={"table_optimizer": "adagrad", "epochs": 1})
    config = config.model_copy(update={"deepfm": settings})
    folder = tmp_path / "training"
    run_workers(2, train_in, folder, config, features, folder)
    kinds = {"item": "table_wise", "recent": "data_parallel", "user": "column_wise"}
    changed = config.model_copy(update={"deepfm": settings.model_copy(update={"sharding": kinds})})
    before = fused(run_workers(2, restored, tmp_path / "before", config, features, folder))
    after = fused(run_workers(3, restored, tmp_path / "after", changed, features, folder))
    assert before.keys() == after.keys()
    rows = {f.name: f.cardinality for f in features.spec().fields}
    for name, state in before.items():
        assert torch.equal(after[name], state), name
        assert state.shape == (rows[name.split(".")[-2].removeprefix("table_")], settings.embedding_dim + 4)
    assert any(state.any() for state in before.values())


def test_only_the_newest_two_and_the_best_checkpoint_are_kept(whole_training):
    folder, progress = whole_training
    steps = [step for step, _, _ in complete(folder)]
    assert progress["step"] == steps[-1]
    assert progress["best_step"] in steps
    assert len(steps) <= 3


def test_training_stops_when_the_metric_no_longer_improves(config, features, tmp_path):
    patient = config.deepfm.model_copy(
        update={"epochs": 50, "patience": 2, "learning_rate": 0.5, "embedding_learning_rate": 1.0}
    )
    changed = config.model_copy(update={"deepfm": patient})
    progress = run_workers(1, train_in, tmp_path, changed, features, tmp_path)[0]
    lines = [json.loads(line) for line in (tmp_path / "history.jsonl").read_text().splitlines()]
    metrics = [line["ndcg@10"] for line in lines]
    best = int(np.argmax(metrics))
    assert len(lines) == best + 1 + patient.patience < 50
    assert progress["best_step"] == lines[best]["step"]
    assert [line["best"] for line in lines][best:] == [True, False, False]
    # What is kept as the best is the model of that evaluation, not the last one.
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/here", rank=0, world_size=1)
    try:
        spec, validation = features.spec(), Ranking(features, Items(features, features.spec()), changed)
        for line, path in ((lines[best], progress["best_step"]), (lines[-1], progress["step"])):
            model = DeepFM(spec, patient)
            found = next(place for step, _, place in complete(tmp_path) if step == path)
            model.load_state_dict(weights(features, changed, found))
            assert validation.ndcg(model, torch.device("cpu")) == pytest.approx(line["ndcg@10"], abs=1e-5)
    finally:
        dist.destroy_process_group()
    assert metrics[best] != metrics[-1]


@pytest.mark.parametrize("parts", [("train",), ("train", "valid")])
def test_a_fit_of_given_epochs_learns_from_the_given_parts_and_measures_nothing(
    config, features, tmp_path, parts
):
    small = config.model_copy(update={"deepfm": config.deepfm.model_copy(update={"batch_size": 40})})
    more = {"parts": parts, "epochs": 2}
    progress = run_workers(1, train_in, tmp_path, small, features, tmp_path, more)[0]
    lines = [json.loads(line) for line in (tmp_path / "history.jsonl").read_text().splitlines()]
    assert [line["epoch"] for line in lines] == [1, 2]
    assert not any("metric" in line for line in lines)
    items = Items(features, features.spec())
    steps = {of: Examples(features, items, small, of).steps for of in (("train",), ("train", "valid"))}
    assert steps["train", "valid"] > steps["train",]
    assert progress["step"] == progress["best_step"] == 2 * steps[parts]


def test_the_next_batch_is_the_one_that_is_asked_for(plain, features):
    """Also after a jump, as when a training is resumed."""
    examples = Examples(features, Items(features, features.spec()), plain)
    ahead = Ahead(examples, 0, 1)
    for first, stop in ((0, examples.steps + 2), (3, 5)):
        found = list(ahead.from_step(first, stop))
        assert len(found) == stop - first
        for step, batch in enumerate(found, first):
            expected = examples.batch(*divmod(step, examples.steps), 0, 1)
            assert torch.equal(batch.item.indices.values(), expected.item.indices.values())
            assert torch.equal(batch.user.indices.values(), expected.user.indices.values())


@pytest.mark.parametrize(
    ("filter_seen", "few", "daily"),
    [
        ("all", False, True),
        ("none", False, True),
        ("all", True, True),
        ("none", True, False),
        ("all", False, False),
    ],
)
def test_validation_agrees_with_ndcg_written_out(config, features, tmp_path, filter_seen, few, daily):
    """Also where fewer than ten items are left to rank."""
    if few:
        config = synthetic_config(tmp_path / "few")
        features = synthetic_features(config, users=20, items=12, events=11)
    score = config.score.model_copy(update={"filter_seen": filter_seen})
    config = config.model_copy(update={"score": score})
    spec = features.spec() if daily else without_daily(features.spec())
    model = DeepFM(spec, config.deepfm.model_copy(update={"init_scale": 0.5})).eval()
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/here", rank=0, world_size=1)
    try:
        validation = Ranking(features, Items(features, spec), config)
        found = validation.ndcg(model, torch.device("cpu"))
    finally:
        dist.destroy_process_group()
    rows = [row for row in features.table("examples").to_pylist() if row["split"] == "valid"]
    states = {row["user"]: row for row in features.table("users/as_of=valid").to_pylist()}
    truth, first, weekdays = {}, {}, {}
    for row in sorted(rows, key=lambda row: row["timestamp"]):
        if row["label"]:
            truth.setdefault(row["user"], set()).add(row["item"])
            first.setdefault(row["user"], int(row["timestamp"].timestamp() // 86_400))
            weekdays.setdefault(row["user"], row["weekday"])
    users = validation.users.user.indices.to_dict()["user"].values().tolist()
    assert sorted(users) == sorted(truth)
    assert few or len({frozenset(listable(features, day)) for day in first.values()}) > 1
    with torch.no_grad():
        sides = {
            day: model.item_side(side_batch(items_as_of(features, day), model.item_fields))
            for day in set(first.values())
        }
        user_side = model.user_side(validation.users.user)
        logits = [
            model.logits(user_side.rows(row, row + 1), sides[first[user]]) for row, user in enumerate(users)
        ]
    total = 0.0
    for row, user in enumerate(users):
        ranked = [int(i) + 1 for i in logits[row].argsort(descending=True)]
        allowed = listable(features, first[user]) - set(states[user]["seen"] if filter_seen == "all" else [])
        ranked = [item for item in ranked if item in allowed][:10]
        gain = sum(1 / np.log2(place + 2) for place, item in enumerate(ranked) if item in truth[user])
        total += gain / sum(1 / np.log2(place + 2) for place in range(min(10, len(truth[user]))))
    assert found == pytest.approx(total / len(users), abs=1e-6)
    indices = validation.users.user.indices.to_dict()
    assert set(indices["hour"].values().tolist()) == {spec.hour + 1}
    assert indices["weekday"].values().tolist() == [weekdays[user] for user in users]


def test_validation_is_the_same_for_any_number_of_workers(config, features, tmp_path):
    (one,) = run_workers(1, validated, tmp_path / "one", config, features)
    assert run_workers(2, validated, tmp_path / "two", config, features) == [pytest.approx(one, abs=1e-6)] * 2


@torch.no_grad()
def test_positives_and_drawn_items_have_the_fields_of_the_positives_day(plain, features):
    spec = features.spec()
    examples = Examples(features, Items(features, spec), plain)
    days = {
        (row["user"], row["item"]): int(row["timestamp"].timestamp() // 86_400)
        for row in features.table("examples").to_pylist()
    }
    width = 1 + plain.deepfm.negatives
    found = {}
    for step in range(examples.steps):
        batch = examples.batch(0, step, rank=0, world_size=1)
        users = batch.user.indices.to_dict()["user"].values().tolist()
        bags = batch.item.indices.to_dict()
        items = bags["item"].values().view(-1, width).tolist()
        ages = bags["age"].values().view(-1, width).tolist()
        trends = batch.item.values[:, [f.name for f in spec.side("item") if f.type == "value"].index("trend")]
        rows = zip(users, items, ages, trends.view(-1, width).tolist(), batch.weight.tolist(), strict=True)
        for user, row, age, trend, weight in rows:
            for item, *values in zip(row, age, trend, strict=True) if weight else ():
                found.setdefault(days[user, row[0]], set()).add((item, *values))
    assert len(found) > 3
    for day, drawn in found.items():
        rows = items_as_of(features, day).to_pylist()
        expected = {row["item"]: (row["age"], row["trend"]) for row in rows}
        assert drawn == {(item, *expected[item]) for item, *_ in drawn}
        assert {item for item, *_ in drawn} <= {row["item"] for row in rows if row["present"]}


@pytest.mark.parametrize("source", ["catalogue", "batch"])
def test_no_item_of_the_examples_own_history_is_drawn(plain, features, source):
    changes = {"negatives_outside_history": True, "negatives_from": source}
    spec = features.spec()
    items = Items(features, spec)
    met = {}
    for outside in (True, False):
        settings = plain.deepfm.model_copy(update=changes | {"negatives_outside_history": outside})
        examples = Examples(features, items, plain.model_copy(update={"deepfm": settings}))
        width = 1 + settings.negatives
        met[outside] = 0
        for step in range(examples.steps):
            batch = examples.batch(0, step, rank=0, world_size=1)
            drawn = batch.item.indices.to_dict()["item"].values().view(-1, width)[:, 1:].tolist()
            histories = batch.user.indices.to_dict()["recent"].to_dense()
            for row, history in zip(drawn, histories, strict=True):
                met[outside] += len(set(row) & set(history.tolist()))
    assert met[True] == 0 < met[False]


def test_without_a_history_there_is_nothing_to_leave_out(plain, features):
    spec = features.spec()
    spec = spec.model_copy(update={"fields": tuple(f for f in spec.fields if f.kind != "history")})
    settings = plain.deepfm.model_copy(update={"negatives_outside_history": True})
    with pytest.raises(ConfigError, match="is about a history of items, and no field that it reads is one"):
        Examples(features, Items(features, spec), plain.model_copy(update={"deepfm": settings}))


@pytest.fixture(scope="module")
def labelled(config):
    """Nothing is drawn: every example is learned with its own label."""
    changes = {"negatives": 0, "objective": "logistic", "dropout": 0.0, "epochs": 2}
    return config.model_copy(update={"deepfm": config.deepfm.model_copy(update=changes)})


def test_every_example_is_learned_with_its_label(labelled, features):
    examples = Examples(features, Items(features, features.spec()), labelled)
    found = []
    for step in range(examples.steps):
        batch = examples.batch(0, step, rank=0, world_size=1)
        keys = (batch.user.indices.to_dict()["user"], batch.item.indices.to_dict()["item"])
        columns = [*(key.values() for key in keys), batch.label]
        assert batch.log_probability.shape == (len(batch.label), 0)
        found += torch.stack(columns, 1)[batch.weight > 0].tolist()
    rows = [row for row in features.table("examples").to_pylist() if row["split"] == "train"]
    assert {row["label"] for row in rows} == {0, 1}
    assert sorted(found) == sorted([row["user"], row["item"], row["label"]] for row in rows)
    share = sum(row["label"] for row in rows) / len(rows)
    assert examples.average == pytest.approx(np.log(share / (1 - share)))


@pytest.mark.parametrize("objective", ["logistic", "squared"])
def test_predictions_are_measured_alike_by_any_number_of_workers(labelled, features, tmp_path, objective):
    """And the model has learned."""
    settings = labelled.deepfm.model_copy(update={"objective": objective, "epochs": 4})
    config = labelled.model_copy(update={"deepfm": settings})
    lines = {}
    for workers in (1, 2):
        folder = tmp_path / str(workers)
        run_workers(workers, train_in, folder, config, features, folder)
        lines[workers] = [json.loads(line) for line in (folder / "history.jsonl").read_text().splitlines()]
    names = ("auc", "gauc", "logloss", "calibration") if objective == "logistic" else ("rmse", "mse")
    for one, two in zip(lines[1], lines[2], strict=True):
        assert one["metric"] == two["metric"] == names[0]
        assert [one[name] for name in names] == pytest.approx([two[name] for name in names], abs=2e-4)
    merits = [line[names[0]] for line in lines[1]]
    best = max(merits) if objective == "logistic" else min(merits)
    assert next(line for line in reversed(lines[1]) if line["best"])[names[0]] == best
    # What was learned: the train part's own labels or values, better than any constant says them.
    folder = tmp_path / "1"
    model = DeepFM(features.spec(), settings)
    model.load_state_dict(weights(features, config, complete(folder)[-1][2]))
    dist.init_process_group("gloo", init_method=f"file://{folder}/here", rank=0, world_size=1)
    try:
        found = Predicting(features, Items(features, features.spec()), config, split="train").figures(
            model, torch.device("cpu")
        )
    finally:
        dist.destroy_process_group()
    rows = [row for row in features.table("examples").to_pylist() if row["split"] == "train"]
    if objective == "logistic":
        share = np.mean([row["label"] for row in rows])
        assert found["auc"] > 0.9
        assert found["logloss"] < 0.8 * -(share * np.log(share) + (1 - share) * np.log(1 - share))
        assert found["calibration"] == pytest.approx(1, abs=0.1)
    else:
        assert found["rmse"] < 0.8 * np.std([row["value"] for row in rows])


def test_values_that_are_all_equal_are_refused(labelled, features, tmp_path):
    """Such as those of a log without a column of values; 4.1 has no exact square."""
    path = shutil.copytree(features.path, tmp_path / "features")
    for file in (path / "examples").rglob("*.parquet"):
        table = pq.read_table(file, partitioning=None)
        values = pa.array(np.full(len(table), 4.1), table.schema.field("value").type)
        place = table.schema.get_field_index("value")
        pq.write_table(table.set_column(place, table.schema.field(place), values), file)
    changed = dataclasses.replace(features, path=str(path))
    squared = labelled.model_copy(
        update={"deepfm": labelled.deepfm.model_copy(update={"objective": "squared"})}
    )
    Examples(features, Items(features, features.spec()), squared)
    with pytest.raises(DataError, match=r"have the value 4\.1, so there is nothing to learn"):
        Examples(changed, Items(changed, features.spec()), squared)


def test_labels_that_are_all_equal_are_refused(labelled, features, tmp_path):
    copy = shutil.copytree(features.path, tmp_path / "features")
    table = pq.read_table(f"{features.path}/examples/split=valid", partitioning=None)
    alike = table.filter(pc.field("label") == 1)
    (file,) = (copy / "examples" / "split=valid").iterdir()
    pq.write_table(alike, file)
    run = dataclasses.replace(features, path=str(copy))
    message = r"all \d+ examples in split=valid have the label 1, and AUC needs both"
    with pytest.raises(DataError, match=message):
        Predicting(run, Items(features, features.spec()), labelled)

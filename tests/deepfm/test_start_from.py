"""A model that starts from an earlier one: an FM's embeddings, or last night's with grown vocabularies."""

import dataclasses
import json
import shutil
from types import SimpleNamespace

import pytest
import torch

from recsys_dist.deepfm import train
from recsys_dist.deepfm.checkpoint import complete, load_weights, read_into
from recsys_dist.deepfm.model import PAIR_HEAD, DeepFM, initial_rows, used_fields
from recsys_dist.deepfm.published import publish
from recsys_dist.deepfm.start_from import (
    earlier_head,
    earlier_run,
    require_unseen,
    summary,
    take_over,
)
from recsys_dist.errors import ConfigError
from recsys_dist.workspace import Workspace
from tests.deepfm.workers import fused, run_workers, started_from, train_in
from tests.synthetic import synthetic_config, synthetic_features

NEW = 5
"""Users and items that the second night knows more."""


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    return synthetic_config(tmp_path_factory.mktemp("root"), init_scale=0.3)


@pytest.fixture(scope="module")
def features(config):
    return synthetic_features(config)


def with_settings(config, **changes):
    return config.model_copy(update={"deepfm": config.deepfm.model_copy(update=changes)})


def published(config, features, spec=None):
    """A deepfm run with a model whose every number differs from what any other seed gives."""
    workspace, spec = Workspace(config), spec or features.spec()
    run = workspace.new("deepfm", {"seed": config.seed}, {"features": features})
    model = DeepFM(spec, config.deepfm, seed=99)
    model.start_at(-2.0)
    publish(run, spec, config.deepfm, model.state_dict().__getitem__)
    return run.commit(config, {}), model.state_dict()


@pytest.fixture(scope="module")
def trained_fm(config, features, tmp_path_factory):
    """A deepfm run of a real training: its weights, and the whole checkpoint beside them."""
    config, folder = with_settings(config, model="fm", epochs=1), tmp_path_factory.mktemp("fm")
    run_workers(2, train_in, folder, config, features, folder)
    (_, _, checkpoint), *_ = reversed(complete(folder))
    state = DeepFM(features.spec(), config.deepfm).state_dict()
    load_weights(checkpoint, state)
    run = Workspace(config).new("deepfm", {"fm": 1}, {"features": features})
    publish(run, features.spec(), config.deepfm, state.__getitem__)
    shutil.copytree(checkpoint, f"{run.path}/checkpoint")
    return run.commit(config, {}), state


def grown(spec):
    """The next night's spec: more users and items, the same otherwise."""
    vocabularies = {
        name: found
        if name not in ("user", "item")
        else found.model_copy(
            update={
                "size": found.size + NEW,
                "fingerprint": "new",
                "ancestors": ((found.size, found.fingerprint),),
            }
        )
        for name, found in spec.vocabularies.items()
    }
    fields = tuple(
        field.model_copy(update={"cardinality": field.cardinality + NEW})
        if field.vocab in ("user", "item") and field.type in ("index", "indices")
        else field
        for field in spec.fields
    )
    return spec.model_copy(update={"vocabularies": vocabularies, "fields": fields})


def test_deepfm_takes_over_a_trained_fm(config, features, trained_fm):
    run, theirs = trained_fm
    model = DeepFM(features.spec(), config.deepfm, seed=1)
    start = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    taken = take_over(model.state_dict(), features.spec(), run)
    assert set(taken) == set(theirs)
    for name, tensor in model.state_dict().items():
        expected = theirs[name] if name in theirs else start[name]
        assert torch.equal(tensor, expected), name
        assert name in theirs or "hidden" in name or "layers" in name
    line = summary(taken, model.state_dict(), run)
    begin = f"takes over {len(taken)} of {len(start)} tensors of {run.uri}; as the seed says begin "
    assert line.startswith(begin)
    assert set(line.removeprefix(begin).split(", ")) == {"user_hidden", "item_hidden", "layers"}


@pytest.mark.parametrize("kind", [{"recency": {"recent": 3.0}}, {"attention": {"recent": 3.0}}])
def test_a_history_that_is_weighted_from_now_on_keeps_its_rows(config, features, trained_fm, kind, tmp_path):
    """Its table is of another collection then; what its optimizer has added up comes along."""
    run, theirs = trained_fm
    config = with_settings(config, **kind)
    own = "user_sequences.embedding_bags.table_recent.weight"
    old = "user_tables.embedding_bags.table_recent.weight"
    (answer,) = run_workers(1, started_from, tmp_path, config, features, run)
    assert old in theirs
    assert torch.equal(answer["weights"][own], theirs[old])
    state = {"fused": {"state": {old: {"table_recent.momentum1": torch.empty(len(theirs[old]))}}}}
    read_into(state, f"{run.path}/checkpoint")
    found = fused([answer])[own]
    assert found.any()
    assert torch.equal(found, state["fused"]["state"][old]["table_recent.momentum1"])


def test_numbers_keep_what_they_mean_and_nothing_else(config, features):
    """A vector's vocabulary has grown, and another number is made in another way."""
    run, theirs = published(config, features)
    spec = features.spec()
    vector, value = (next(f for f in spec.side("user") if f.type == kind) for kind in ("vector", "value"))
    changes = {vector.name: {"cardinality": vector.cardinality + NEW}, value.name: {"log": not value.log}}
    fields = tuple(field.model_copy(update=changes.get(field.name, {})) for field in spec.fields)
    spec = spec.model_copy(update={"fields": fields})
    model = DeepFM(spec, config.deepfm, seed=1)
    start = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    taken = take_over(model.state_dict(), spec, run)
    assert "user_values" in taken
    places, before = {}, {}
    for of, found in ((spec.fields, places), (features.spec().fields, before)):
        begin = 0
        for field in of:
            if field.side in ("user", "context") and field.type in ("value", "vector"):
                found[field.name] = begin, begin + field.cardinality
                begin += field.cardinality
    for name, (first, last) in places.items():
        old, mine = theirs["user_values"][slice(*before[name])], model.user_values[first:last]
        anew = start["user_values"][first:last]
        if name == value.name:
            assert torch.equal(mine, anew)
        else:
            assert torch.equal(mine[: len(old)], old)
            assert torch.equal(mine[len(old) :], anew[len(old) :])


def test_last_nights_model_with_a_grown_vocabulary(config, features):
    run, theirs = published(config, features)
    spec = grown(features.spec())
    assert earlier_run(Workspace(config), with_settings(config, start_from=run.run_id).deepfm, spec).run_id
    model = DeepFM(spec, config.deepfm, seed=1)
    assert set(take_over(model.state_dict(), spec, run)) == set(theirs)
    larger = 0
    for name, tensor in model.state_dict().items():
        old = len(theirs[name]) if theirs[name].dim() else None
        assert torch.equal(tensor[:old] if old else tensor, theirs[name]), name
        if old and len(tensor) > old:
            larger += 1
            table = name.split(".")[-2]
            assert torch.equal(
                tensor[old:], initial_rows(1, table, old, len(tensor), model.dim, config.deepfm.init_scale)
            )
    assert larger >= 3


def test_a_table_that_is_cut_by_columns_takes_over_its_own(config, features, tmp_path):
    settings = {"table_optimizer": "sgd", "sharding": {"item": "column_wise", "user": "column_wise"}}
    config = with_settings(config, **settings)
    run, theirs = published(config, features)
    answers = run_workers(2, started_from, tmp_path, config, features, run)
    for name, old in theirs.items():
        assert torch.equal(answers[0]["weights"][name], old), name


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("grows", [False, True])
def test_each_worker_takes_over_its_rows(config, features, trained_fm, tmp_path, workers, grows):
    """And what the optimizer has added up for them; new rows start as the seed says, with nothing."""
    run, theirs = trained_fm
    if grows:
        path = shutil.copytree(features.path, tmp_path / "grown")
        (path / "features.json").write_text(json.dumps(grown(features.spec()).model_dump(mode="json")))
        features = dataclasses.replace(features, path=str(path))
    fresh = DeepFM(features.spec(), config.deepfm, seed=config.seed).state_dict()
    answers = run_workers(workers, started_from, tmp_path, config, features, run)
    tables = [name for name in theirs if ".embedding_bags." in name]
    for name, old in theirs.items():
        expected = torch.cat([old, fresh[name][len(old) :]]) if name in tables else old
        assert torch.equal(answers[0]["weights"][name], expected), name
    state = {
        "fused": {
            "state": {
                name: {f"{name.split('.')[-2]}.momentum1": torch.empty(len(theirs[name]))} for name in tables
            }
        }
    }
    read_into(state, f"{run.path}/checkpoint")
    new, state_of = 0, fused(answers)
    for name in tables:
        (expected,) = state["fused"]["state"][name].values()
        found = state_of[name]
        assert torch.equal(found[: len(expected)], expected), name
        assert expected.any()
        assert len(found) == len(fresh[name])
        assert not found[len(expected) :].any()
        new += len(found) - len(expected)
    assert (new > NEW) == grows


@pytest.mark.parametrize(("before", "now"), [("dnn", "deepfm"), ("deepfm", "dnn"), ("deepfm", "deepfm")])
def test_the_constant_counts_once(config, features, before, now):
    """A dnn has it in its last layer, the others beside it: what is predicted at first is the mean still."""
    theirs = with_settings(config, model=before)
    workspace = Workspace(config)
    run = workspace.new("deepfm", {"of": before}, {"features": features})
    model = DeepFM(features.spec(), theirs.deepfm, seed=99)
    model.start_at(4.0)
    publish(run, features.spec(), theirs.deepfm, model.state_dict().__getitem__)
    run = run.commit(theirs, {})
    own = DeepFM(features.spec(), with_settings(config, model=now).deepfm, seed=1)
    own.start_at(4.0)
    state = own.state_dict()
    take_over(state, features.spec(), run)
    constants = [state[name] for name in ("bias", "layers.5.bias") if name in state]
    assert sum(float(of) for of in constants) == pytest.approx(4.0)


def test_a_model_that_has_learned_what_it_would_be_measured_with_is_no_beginning(config, features):
    run, _ = published(config, features)
    require_unseen(run, features)
    both, _ = published(with_settings(config, fit_on="train_valid"), features)
    with pytest.raises(ConfigError, match=rf"{both.uri} was fitted on train and valid, .*fit_on=train"):
        require_unseen(both, features)

    def made(**split):
        manifest = json.loads(json.dumps(run.manifest))
        manifest["config"]["split"] |= split
        return dataclasses.replace(run, manifest=manifest)

    with pytest.raises(ConfigError, match=r"split by .*0\.9, 0\.05, 0\.05.*Leave start_from out once"):
        require_unseen(made(fractions=[0.9, 0.05, 0.05]), features)
    earlier, later = (
        made(kind="global_time", dates=dates)
        for dates in (["2024-01-01", "2024-01-02"], ["2024-01-02", "2024-01-03"])
    )
    require_unseen(earlier, later)
    with pytest.raises(ConfigError, match="may have learned what is valid or test now"):
        require_unseen(later, earlier)


def test_latest(config, features, tmp_path):
    settings = with_settings(config, start_from="latest").deepfm
    empty = Workspace(synthetic_config(tmp_path))
    assert earlier_run(empty, settings, features.spec()) is None
    assert earlier_run(empty, config.deepfm, features.spec()) is None
    runs = [published(config, features)[0] for _ in range(2)]
    assert earlier_run(Workspace(config), settings, features.spec()).run_id == runs[-1].run_id


def test_what_pair_fields_are_worth_is_taken_over_or_not_known(config, features):
    """Beside embeddings that know the late events it cannot be learned."""
    paired = synthetic_config(config.storage.root, pair="[{name: next, measure: next_items}]")
    run, theirs = published(paired, features, used_fields(features.spec(), paired.deepfm))
    found = earlier_head(run)
    assert set(found) == {name for name in theirs if name.startswith(PAIR_HEAD)}
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in found.items())
    workspace, spec = Workspace(paired), features.spec()
    same = with_settings(paired, start_from=run.run_id)
    assert earlier_run(workspace, same.deepfm, spec).run_id == run.run_id
    other = synthetic_config(config.storage.root, pair="[{name: next, measure: next_items, recency: 2}]")
    for changed, what in ((with_settings(same, pair_hidden=(3,)), "next"), (other, "next")):
        settings = with_settings(changed, start_from=run.run_id).deepfm
        with pytest.raises(ConfigError, match=f"are worth, but {what}.*leave start_from out once"):
            earlier_run(workspace, settings, spec)
    without, _ = published(config, features)
    with pytest.raises(ConfigError, match="are worth, but no pair fields"):
        earlier_run(workspace, with_settings(paired, start_from=without.run_id).deepfm, spec)
    # The other way round the model alone is taken over.
    model = DeepFM(spec, config.deepfm, seed=1)
    assert set(take_over(model.state_dict(), spec, run)) == set(theirs) - set(found)


def test_with_pair_fields_of_als_its_settings_must_be_the_same(config, monkeypatch):
    """What is told of the inner products would hold of others no more."""
    factors = {"implicit": True, "rank": 64, "reg": 0.1, "alpha": 1.0, "iterations": 15}
    als = SimpleNamespace(uri="its/run", manifest={"figures": factors | {"ratings": 5}})
    before = SimpleNamespace(uri="earlier/run", manifest={"figures": {"factors": factors}})
    monkeypatch.setattr(train, "earlier", lambda config, inputs: before)
    assert train.check(config, {"als": als}) is before
    als.manifest["figures"]["rank"] = 32
    with pytest.raises(
        ConfigError, match=r"earlier/run with factors of .*'rank': 64, .* its/run are of .*32"
    ):
        train.check(config, {"als": als})


def test_what_does_not_fit_is_refused(config, features, trained_fm):
    workspace, run_id, spec = Workspace(config), trained_fm[0].run_id, features.spec()
    with pytest.raises(ConfigError, match=r"start_from=none_such: no finished deepfm run .*There are: "):
        earlier_run(workspace, with_settings(config, start_from="none_such").deepfm, spec)
    other = with_settings(config, start_from=run_id, embedding_dim=8).deepfm
    with pytest.raises(ConfigError, match=r"embeddings of 4 factors, and this deepfm has 8"):
        earlier_run(workspace, other, spec)
    other = with_settings(config, start_from=run_id, table_optimizer="adagrad").deepfm
    with pytest.raises(ConfigError, match="moved by rowwise_adagrad, and adagrad cannot go on with what"):
        earlier_run(workspace, other, spec)
    stranger = spec.vocabularies["item"].model_copy(update={"fingerprint": "other"})
    changed = spec.model_copy(update={"vocabularies": spec.vocabularies | {"item": stranger}})
    with pytest.raises(ConfigError, match="vocabulary item of the features run does not continue"):
        earlier_run(workspace, with_settings(config, start_from=run_id).deepfm, changed)

"""What pair fields are worth, learned on lists of late events beside what knows nothing of these."""

import dataclasses

import numpy as np
import pyarrow.compute as pc
import pyarrow.parquet
import pytest
import torch

from recsys_dist.cluster import local_or_cluster
from recsys_dist.config import DeepFM as Settings
from recsys_dist.deepfm import checkpoint, head, train
from recsys_dist.deepfm.checkpoint import load_weights
from recsys_dist.deepfm.examples import Examples
from recsys_dist.deepfm.head import SOON, Lists, fit, lists
from recsys_dist.deepfm.items import Items
from recsys_dist.deepfm.late import Early, late_users, require_earlier, require_tables
from recsys_dist.deepfm.layers import PairHead
from recsys_dist.deepfm.model import PAIR_HEAD, DeepFM, used_fields
from recsys_dist.deepfm.pairs import Pairs, pair_specs
from recsys_dist.deepfm.published import load
from recsys_dist.deepfm.reports import best, lines
from recsys_dist.deepfm.validation import users_of_part
from recsys_dist.errors import ConfigError, DataError
from recsys_dist.schema import LATE, SEEN_COLUMN
from recsys_dist.workspace import Workspace
from tests.deepfm.workers import run_workers, train_in


@pytest.fixture(scope="module")
def plain(night):
    config, _, _ = night
    return config.with_deepfm({"pair": ()})


@pytest.fixture(scope="module")
def items(night, plain):
    return Items(night[1], used_fields(night[1].spec(), plain.deepfm))


@pytest.fixture(scope="module")
def model(night, plain):
    settings = plain.deepfm.model_copy(update={"init_scale": 0.5})
    return DeepFM(used_fields(night[1].spec(), settings), settings, seed=5).eval()


@pytest.fixture(scope="module")
def pairs(night, items):
    config, features, recall = night
    return Pairs(used_fields(features.spec(), config.deepfm).side("pair"), items, {"recall": recall}, "early")


def with_filter(config, filter_seen):
    return config.model_copy(update={"score": config.score.model_copy(update={"filter_seen": filter_seen})})


def events_of(features, recall):
    """Train events as rows, each with `late`: of a user with a state, from when his late ones begin."""
    moments = {row["user"]: row["late_from"] for row in recall.table(f"{LATE}/late_from").to_pylist()}
    rows = features.table("examples", filter=pc.field("split") == "train").to_pylist()
    for row in rows:
        row["late"] = row["user"] in moments and row["timestamp"] >= moments[row["user"]]
    return rows


def test_examples_before_the_late_ones_and_where_they_are(night, plain, items):
    _, features, recall = night
    examples = Examples(features, items, plain, ("train",), Early(features, recall))
    expected = sorted(
        (row["user"], row["item"])
        for row in events_of(features, recall)
        if row["label"] == 1 and not row["late"]
    )
    found, places = [], []
    for step in range(examples.steps):
        batch = examples.batch(0, step, 0, 1)
        rows = batch.item.indices["item"].values().view(len(batch.user), -1)[:, 0]
        real = (batch.weight > 0).tolist()
        pairs = zip(batch.user.indices["user"].values().tolist(), rows.tolist(), strict=True)
        found += [pair for pair, is_real in zip(pairs, real, strict=True) if is_real]
        numbers = examples.numbers(0, step, 0, 1)[: sum(real)]
        places += examples.places(numbers.tolist())
    assert sorted(found) == expected
    every = Examples(features, items, plain).total.rows
    assert 20 < len(found) < every - 20
    for pair, place in list(zip(found, places, strict=True))[::17]:
        file, row = place.split(" row ")
        at = pyarrow.parquet.read_table(file, columns=["user", "item"]).slice(int(row), 1).to_pylist()[0]
        assert (at["user"], at["item"]) == pair


@pytest.mark.parametrize("part", ["late", "valid"])
def test_tables_that_know_what_is_learned_on_are_refused(night, part):
    """The planted leak: tables counted from the whole of train, or of train and valid, in the place of the
    earlier ones.
    """
    _, features, recall = night
    early = Early(features, recall) if part == "late" else None
    require_earlier({"features": features, "recall": recall}, early)
    positives = features.spec().positives
    known = positives["train"] + positives["valid"] * (part == "valid")
    leak = {"known": known} if part == "valid" else {"late": {"known": known}}
    figures = recall.manifest["figures"] | leak
    leaking = dataclasses.replace(recall, manifest=recall.manifest | {"figures": figures})
    with pytest.raises(DataError, match=f"was made from {known} events, .* its users' {part} ones"):
        require_earlier({"features": features, "recall": leaking}, early)


@pytest.mark.parametrize(("part", "implicit"), [("late", True), ("late", False), ("valid", True)])
def test_factors_that_know_what_is_learned_on_are_refused_too(night, part, implicit):
    _, features, recall = night
    early = Early(features, recall) if part == "late" else None
    wanted = pc.field("split") == "train"
    events = features.table("examples", filter=wanted & (pc.field("label") > 0) if implicit else wanted)
    ratings = int(early(events).sum()) if early else len(events)
    figures = {"implicit": implicit, "ratings": len(events), "earlier": {"ratings": ratings}}
    stage, config = "als", {"als": {"fit_on": "train" if early else "train_valid"}}
    als = dataclasses.replace(recall, manifest={"stage": stage, "config": config, "figures": figures})
    inputs = {"features": features, "recall": recall, "als": als}
    require_earlier(inputs, early)
    figures["earlier"] = {"ratings": ratings + 1}
    with pytest.raises(DataError, match=rf"was made from {ratings + 1} .* Run jobs/train_als\.py --force"):
        require_earlier(inputs, early)


@pytest.mark.parametrize(
    ("changed", "fit_on", "message"),
    [
        ({}, "train", None),
        (
            {"recall": {"fit_on": "train_valid"}},
            "train_valid",
            r"recall.* has no before=valid, .* recall\.late",
        ),
        (
            {"als": {"earlier": False}},
            "train",
            r"als\.earlier=false, als\.fit_on=train, .* learned with als\.earlier=true",
        ),
        (
            {"als": {"fit_on": "train_valid"}},
            "train",
            r"als\.fit_on=train_valid, .* als\.fit_on=train, .*/train_als\.py",
        ),
        ({"als": {}}, "train_valid", r"als\.fit_on=train, and .* als\.fit_on=train_valid\. Run"),
        ({"recall": {"late": 0.5}}, "train", r"recall\.late=0\.2, .* recall\.late=0\.5"),
    ],
)
def test_runs_without_what_pair_fields_are_learned_with_are_refused(night, changed, fit_on, message):
    config, _, recall = night
    made = config.model_copy(update={"als": config.als.model_copy(update={"earlier": True})}).model_dump(
        mode="json"
    )
    runs = {}
    for stage in ("recall", "als"):
        own = made | {stage: made[stage] | changed.get(stage, {})}
        manifest = recall.manifest | {"stage": stage, "config": own}
        runs[stage] = dataclasses.replace(recall, manifest=manifest)
    if message is None:
        require_tables(runs, fit_on)
    else:
        with pytest.raises(ConfigError, match=message):
            require_tables(runs, fit_on)


def test_a_recall_run_without_late_events_is_refused(night):
    config, features, _ = night
    run = Workspace(config).new("recall", {"no late": 1}, {"features": features})
    with pytest.raises(ConfigError, match=r"has no before=late, .*recall\.late above 0"):
        Early(features, run.commit(config, {}))


@pytest.mark.parametrize("filter_seen", ["all", "positives", "none"])
def test_late_users_are_as_of_when_their_late_events_began(night, items, filter_seen):
    config, features, recall = night
    early = Early(features, recall)
    users = late_users(items, features, recall, early, with_filter(config, filter_seen), 1000)
    states = {row["user"]: row for row in recall.table(f"{LATE}/users").to_pylist()}
    events = events_of(features, recall)
    checked = 0
    for row, state in enumerate(users.state.to_pylist()):
        own = [event for event in events if event["user"] == state["user"]]
        counts = {"all": lambda event: True, "positives": lambda event: event["label"] > 0}
        before = [event for event in own if not event["late"]]
        seen = {e["item"] for e in before if filter_seen != "none" and counts[filter_seen](e)}
        if filter_seen != "none":
            assert set(state.pop(SEEN_COLUMN[filter_seen])) == seen
        assert state == states[state["user"]]
        later = [e for e in own if e["late"] and e["label"] > 0 and e["item"] not in seen]
        later.sort(key=lambda event: (event["timestamp"], event["item"]))
        rows, liked, places = users.relevant(row, row + 1)
        assert rows.eq(0).all()
        assert liked.tolist() == [event["item"] for event in later]
        assert places.tolist() == list(range(len(later)))
        allowed = users.allowed(row, row + 1)[0]
        assert not allowed[list(seen)].any()
        listable = items.listable(users.days[row : row + 1])[0]
        assert allowed.sum() == listable.sum() - listable[list(seen)].sum()
        checked += len(later)
    assert len(users) > 20
    assert checked > 50


def test_valid_users_are_as_of_the_start_of_valid(night, items):
    config, features, _ = night
    users = users_of_part(features, items, config, "valid", 1000)
    events = features.table("examples", filter=(pc.field("split") == "valid") & (pc.field("label") > 0))
    states = {row["user"]: row for row in features.table("users/as_of=valid").to_pylist()}
    found = {}
    for row, state in enumerate(users.state.to_pylist()):
        assert state["recent"] == states[state["user"]]["recent"]
        found[state["user"]] = users.relevant(row, row + 1)[1].tolist()
    expected = {}
    for event in events.sort_by([("timestamp", "ascending"), ("item", "ascending")]).to_pylist():
        if event["item"] not in states[event["user"]]["seen"]:
            expected.setdefault(event["user"], []).append(event["item"])
    assert found == expected
    assert len(found) > 20


def test_lists_hold_all_of_a_small_catalogue(night, items, model, pairs):
    config, features, recall = night
    users = late_users(items, features, recall, Early(features, recall), config, 1000)
    made = lists(model, pairs, users, SOON, seed=1)
    assert made.inputs.shape == (len(users), len(items) + 1, 5)
    for row in range(0, len(users), 7):
        allowed = users.allowed(row, row + 1)[0]
        assert (made.stands_for[row] == 0).sum() == allowed.sum()
        _, liked, places = users.relevant(row, row + 1)
        worth = torch.zeros(len(items) + 1)
        for item, place in zip(liked.tolist(), places.tolist(), strict=True):
            worth[item] += np.exp(-place / SOON)
        worth *= allowed
        worth /= worth.sum()
        there = made.stands_for[row] > -torch.inf
        torch.testing.assert_close(made.weight[row][there].sort().values, worth[allowed].sort().values)
        # Each entry is an item: its fields, and the logit of the model, say which.
        state = users.state.slice(row, 1)
        user = model.user_side(users.user.take(torch.tensor([row]))).leading(-1, 1)
        side = model.item_side(items.at(torch.arange(len(items) + 1), users.days[row : row + 1]))
        expected = torch.cat([pairs.of_all(state)[0], model.logits(user, side.leading(1, -1))[0, :, None]], 1)
        by_logit = lambda of: of[of[:, -1].argsort()]  # noqa: E731
        torch.testing.assert_close(by_logit(made.inputs[row][there]), by_logit(expected[allowed]))


def test_of_a_large_one_some_entries_stand_for_the_others(night, items, model, pairs, monkeypatch):
    config, features, recall = night
    users = late_users(items, features, recall, Early(features, recall), config, 1000)
    monkeypatch.setattr(head, "LATER_EVENTS", 6)
    whole = lists(model, pairs, users, SOON, seed=1)
    monkeypatch.setattr(head, "ENTRIES", 24)
    monkeypatch.setattr(head, "CHUNK", 1)
    exact = (whole.inputs[..., -1] / 5 + whole.stands_for).exp().sum(1)
    sums = []
    for seed in range(40):
        made = lists(model, pairs, users, SOON, seed=seed)
        assert made.inputs.shape == (len(users), 24, 5)
        torch.testing.assert_close(made.stands_for.exp().sum(1), users.allowed(0, len(users)).sum(1).float())
        torch.testing.assert_close(made.weight.sum(1), whole.weight.sum(1))
        for field in (0, 1):  # what proposes: the greatest are there
            allowed = whole.stands_for > -torch.inf
            most = whole.inputs[..., field].masked_fill(~allowed, -torch.inf).amax(1)
            torch.testing.assert_close(made.inputs[..., field].amax(1), most)
        sums.append((made.inputs[..., -1] / 5 + made.stands_for).exp().sum(1))
    off = (torch.stack(sums).mean(0) / exact - 1).abs()
    assert off.mean() < 0.01
    assert torch.stack(sums).std(0).min() > 0


def planted(users, seed):
    """Lists of 30 items of which the second number decides; the logit says nothing."""
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(users, 30, 4, generator=generator) * torch.tensor([1, 50, 1, 0.5]) + 7
    inputs[..., 2] = 1
    own = (inputs[..., 1] * 3 / 50).softmax(1).multinomial(1, generator=generator)
    weight = torch.zeros(users, 30).scatter_(1, own, 1)
    return Lists(inputs, torch.zeros(users, 30), weight)


def test_a_head_learns_what_a_field_is_worth():
    made, new = planted(2000, 1), planted(200, 2)
    torch.manual_seed(1)
    start = PairHead(3, (8, 4))
    state = {name: tensor.clone() for name, tensor in start.state_dict().items()}
    found = fit(made, start, seed=3)
    assert found.loss < found.before
    assert found.epoch > 0
    score = found.head(new.inputs[..., :-1], new.inputs[..., -1])
    hits = score.argmax(1) == new.weight.argmax(1)
    best_hits = new.inputs[..., 1].argmax(1) == new.weight.argmax(1)
    assert best_hits.float().mean() > 0.3
    assert hits.float().mean() > 0.9 * best_hits.float().mean()
    again = PairHead(3, (8, 4))
    again.load_state_dict(state)
    assert found.loss == fit(made, again, seed=3).loss


def test_of_few_lists_none_is_held_out_and_the_last_epoch_counts():
    found = fit(planted(9, 1), PairHead(3, (8,)), seed=3)
    assert (found.epoch, found.loss, found.before) == (head.EPOCHS, None, None)


@pytest.mark.parametrize("fit_on", ["train", "train_valid"])
def test_the_head_is_published_with_embeddings_that_know_all(night, tmp_path, monkeypatch, fit_on):
    config, features, recall = night
    config = config.with_deepfm({"fit_on": fit_on, "epochs": 2})
    run = Workspace(config).new("deepfm", {"fit_on": fit_on}, {"features": features, "recall": recall})
    run.training.mkdir(parents=True)
    fits = []

    def fit_it(_, folder, task, tracking):
        fits.append((folder, task))
        more = {name: of for name, of in task.items() if name not in ("config", "features")}
        run_workers(1, train_in, tmp_path / str(len(fits)), task["config"], features, folder, more)

    monkeypatch.setattr(train, "_train", fit_it)
    with local_or_cluster(1):
        fitted = train._fit(config, run, None, None)
        # What is done is not done again by the driver after one that died.
        assert train._fit(config, run, None, None).told == fitted.told
    (whole, first), (last, second), *others = fits
    assert all(task["config"].deepfm.pair == () for _, task in fits)
    epochs = best(lines(whole / "history.jsonl"))["epoch"]
    assert "epochs" not in first
    assert second["epochs"] == epochs
    if fit_on == "train":
        assert second["before_late"].uri == recall.uri
        assert not others
        told = [(of / "data.json").read_text() for of in (whole, last)]
        assert told[0] != told[1]
        last = whole
    else:  # the second driver goes on with the refit
        assert second["parts"] == ("train", "valid")
        assert [folder for folder, _ in others] == [last]
    assert fitted.told["of"] == {"train": "late", "train_valid": "valid"}[fit_on]
    figures = train._publish(config, run, fitted)
    assert figures["ndcg@10"] == figures["head"]["ndcg@10"] > 0
    assert figures["head"]["lists"] > 20
    model = load(run.commit(config, {}), features.spec())
    state = model.state_dict()
    bare = {name: torch.empty_like(of) for name, of in state.items() if not name.startswith(PAIR_HEAD)}
    load_weights(train._best_checkpoint(last), bare)
    for name, tensor in bare.items():
        assert torch.equal(state[name], tensor), name
    assert set(state) - set(bare) == set(fitted.head)
    assert any(tensor.abs().sum() for name, tensor in fitted.head.items() if "mean" in name)
    for name, tensor in fitted.head.items():
        assert torch.equal(state[name], tensor), name

    def spoilt(path, tensors):
        load_weights(path, tensors)
        next(iter(tensors.values())).fill_(torch.nan)

    monkeypatch.setattr(checkpoint, "load_weights", spoilt)
    with pytest.raises(ConfigError, match=r"numbers that are not finite in .* The training diverged\."):
        train._publish(config, run, fitted)


def test_pair_fields_are_learned_by_what_lists_are_scored_with(night, plain, tmp_path, monkeypatch):
    """Also where the model itself leaves it out: the longest history, and the items' fields."""
    _, features, recall = night
    recent = features.spec().liked_history
    left_out = {"leave_out": (recent.name, "genres"), "sharding": {}}
    plain = plain.with_deepfm(left_out)
    run_workers(1, train_in, tmp_path, plain, features, tmp_path)
    path, made = train._best_checkpoint(tmp_path), []

    def kept(*arguments, **more):
        made.append(Pairs(*arguments, **more))
        return made[-1]

    monkeypatch.setattr(head, "Pairs", kept)
    fields = (
        {"name": "like", "measure": "content"},
        {"name": "alike", "measure": "share", "attribute": "genres"},
        {"name": "near", "measure": "neighbors"},
    )
    # The synthetic log's fields are not in its configuration, by which pair fields are checked.
    pair = Settings(pair=fields).pair
    config = plain.model_copy(update={"deepfm": plain.deepfm.model_copy(update={"pair": pair})})
    inputs = {"features": features, "recall": recall}
    _, told = head.learn(config, inputs, path, path, torch.device("cpu"))
    assert told["lists"] > 20
    scored = Pairs(pair_specs(config.deepfm), Items(features, features.spec()), inputs)
    assert len(made) == 2
    users = features.table("users/as_of=test").slice(0, 20)
    for pairs in made:
        assert pairs.history == recent.name
        content_and_share = slice(0, 2)
        expected = scored.of_all(users)[..., content_and_share]
        assert torch.equal(pairs.of_all(users)[..., content_and_share], expected)
        assert expected.any(0).any(0).all()


def test_what_is_not_finite_is_named(night, plain, tmp_path, monkeypatch):
    config, features, recall = night
    run_workers(1, train_in, tmp_path, plain, features, tmp_path)
    path = train._best_checkpoint(tmp_path)
    spoilt, make = [slice(None)], head.lists

    def with_nan(*arguments):
        made = make(*arguments)
        made.inputs[0, 0, spoilt[0]] = torch.nan
        return made

    monkeypatch.setattr(head, "lists", with_nan)
    cases = ((path, 1, DataError, "pair field near has numbers"), (None, 4, ConfigError, "has logits"))
    for early, spoilt[0], kind, message in cases:
        with pytest.raises(kind, match=message):
            head.learn(config, {"features": features, "recall": recall}, early, path, torch.device("cpu"))

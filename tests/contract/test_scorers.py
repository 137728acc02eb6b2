"""What every Scorer keeps: exact lists, ties by item index, nothing that must not be listed.

All numbers of a world are whole and small, in the models' weights too, so that what a scorer computes is
exact in float32 and in bfloat16, very many scores are equal, and the lists are those of plain Python.
"""

import dataclasses
import datetime as dt
import functools

import numpy as np
import pyarrow as pa
import pyarrow.dataset
import pytest
import torch

from recsys_dist.config import Proposals, load
from recsys_dist.deepfm.items import Items, day_number
from recsys_dist.deepfm.model import DeepFM, used_fields
from recsys_dist.evaluation.labels import LABELS
from recsys_dist.recall.factors import FactorTables
from recsys_dist.schema import DAILY, FACTORS, RELATED, FeatureSpec, FieldSpec
from recsys_dist.scoring import partitions, scored, scorers
from recsys_dist.scoring.scorers import Source, TwoStage
from recsys_dist.scoring.users import Users
from recsys_dist.workspace import Workspace
from tests.models import untrained_night
from tests.synthetic import synthetic_config

START = dt.date(2024, 1, 10)
GROUPS, GENRES, LAST = 2, 4, 3
LONG = 1e30
"""A recency by which all items of a history count 1."""


class Tables:
    """A run whose tables are in memory."""

    uri = "memory"

    def __init__(self, settings=None, **tables):
        self.tables, self.manifest = tables, {"config": {"recall": settings}}

    def table(self, name):
        return self.tables[name]


class World:
    """Users and items, tables about them and a model, all at random.

    Args:
        seed: of everything.
        users: number of users; user 2 has no factors, and every fourth no history.
        items: number of items; item 3 has no factors.
    """

    def __init__(self, seed, users, items, precision="float32", history=True):
        self.random = random = np.random.default_rng(seed)
        self.n_users, self.n_items, self.precision = users, items, precision
        n = items + 1
        self.genres = [random.choice(GENRES, random.integers(0, 3), replace=False) + 1 for _ in range(n)]
        self.counts = random.integers(0, 4, n)
        self.groups = random.integers(1, GROUPS + 1, users + 1)
        self.latest = [
            random.integers(1, n, random.integers(1, 7)).tolist() if history and user % 4 else []
            for user in range(users + 1)
        ]
        self.user_factors, self.item_factors = (
            random.integers(-2, 3, (size + 1, 3)) for size in (users, items)
        )
        self.next_items, self.neighbors = (
            random.integers(1, 4, (n, n)) * (random.random((n, n)) < 0.3) for _ in range(2)
        )
        self.linear = random.integers(-3, 4, (n, n)) * (random.random((n, n)) < 0.5)
        self.daily = random.integers(0, 3, (n, 6)) * (random.random((n, 6)) < 0.3)
        spec = FeatureSpec(
            fields=(
                field("user", "id", "user", "index", users + 1),
                field("item", "id", "item", "index", n),
                field("group", "categorical", "user", "index", GROUPS + 1),
                field("genres", "categorical", "item", "indices", GENRES + 1, pooling="sum"),
                field(
                    "recent",
                    "history",
                    "user",
                    "indices",
                    n,
                    pooling="sum",
                    last=LAST,
                    of="item",
                    when="positive",
                ),
            ),
            n_users=users,
            n_items=items,
            rows={},
            positives={},
            date=START.isoformat(),
            hour=0,
        )
        known = range(1, n)
        table = {
            "item": known,
            "item_id": [f"i{item}" for item in known],
            "title": [None] * items,
            "count": self.counts[1:],
            "present": [True] * items,
            "active_from": [None] * items,
            "active_to": [None] * items,
            "genres": [self.genres[item].tolist() for item in known],
        }
        self.items = Items(Tables(items=pa.table(table).cast(spec.items_schema())), spec)
        self.spec = spec
        self.recall = Tables(
            {
                "next_items_recency": LONG,
                "neighbors_recency": LONG,
                "ease_recency": LONG,
                "transitions_recency": LONG,
                "content_recency": LONG,
                "recent_days": 2,
            },
            **{
                "next_items": related(self.next_items),
                "neighbors/measure=pearson": related(self.neighbors),
                **{f"linear/model={name}": related(self.linear) for name in ("ease", "transitions")},
                "daily": daily(self.daily),
            },
        )
        small = ["deepfm.embedding_dim=4", "deepfm.hidden=[4, 3]", f"deepfm.precision={precision}"]
        settings = load(None, small).deepfm
        model = DeepFM(used_fields(spec, settings), settings).eval().requires_grad_(False)
        for parameter in model.parameters():
            parameter.copy_(torch.as_tensor(random.integers(-1, 2, parameter.shape)))
        for f in spec.fields:
            model.table(f.name)[0] = 0
        self.model = model.to(torch.get_default_device())
        self.ranker = scorers.Ranker(self.model, self.items)

    def batch(self, users=None, seen=None, listable=None):
        """A batch of these users (all), each of another day, with a third of the items seen and a fifth not
        listable where nothing else is said: both [B, I] bool."""
        users = np.arange(1, self.n_users + 1) if users is None else np.array(users)
        shape = (len(users), self.n_items + 1)
        seen = self.random.random(shape) < 0.3 if seen is None else seen
        listable = self.random.random(shape) < 0.8 if listable is None else listable.copy()
        seen[:, 0] = listable[:, 0] = False
        lists = pa.list_(pa.int32())
        table = pa.table(
            {
                "user": pa.array(users, pa.int32()),
                "group": pa.array(self.groups[users], pa.int32()),
                "recent": pa.array([self.latest[user][-LAST:] for user in users], lists),
                "latest": pa.array([self.latest[user] for user in users], lists),
                "latest_age": pa.array([[*range(len(self.latest[user]))][::-1] for user in users], lists),
            }
        )
        rows, excluded = np.ascontiguousarray(np.nonzero(seen))
        days = day_number(START) + np.arange(len(users)) % 5
        return Users(
            table,
            (torch.as_tensor(rows), torch.as_tensor(excluded)),
            torch.as_tensor(listable),
            torch.as_tensor(days.astype(np.int32)),
        )

    @functools.cached_property
    def embedded(self):
        """Field to [rows, 4] factors and [rows] weights of its table."""
        tables = {f.name: self.model.table(f.name).numpy(force=True) for f in self.spec.fields}
        return {name: (table[:, :4], table[:, 4]) for name, table in tables.items()}

    @functools.cached_property
    def vectors(self):
        """[I, GENRES] of length 1, log((1 + items) / (1 + items with the genre)) where the item has it."""
        has = np.array([[genre in of for genre in range(1, GENRES + 1)] for of in self.genres], float)
        vectors = has * np.log((1 + self.n_items) / (1 + has[1:].sum(0)))
        return vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)

    def sides(self, user, item):
        """Of the user's and the item's fields [F, 4] embeddings and [F] weights."""
        bags = (
            [("user", [user]), ("group", [self.groups[user]]), ("recent", self.latest[user][-LAST:])],
            [("item", [item]), ("genres", self.genres[item])],
        )
        for side in bags:
            yield tuple(
                np.stack([self.embedded[name][part][list(bag)].sum(0) for name, bag in side])
                for part in (0, 1)
            )

    def fm(self, user, item):
        """Bias, weights, and the products of all pairs of fields (Rendle 2010, equation 1)."""
        (users, first), (items, second) = self.sides(user, item)
        fields = np.concatenate([users, items])
        products = sum(fields[a] @ fields[b] for a in range(len(fields)) for b in range(a))
        return float(self.model.bias + first.sum() + second.sum() + products)

    def deepfm(self, user, item):
        """The FM and the MLP over all embeddings."""
        (users, _), (items, _) = self.sides(user, item)
        weights = {name: of.numpy(force=True) for name, of in self.model.named_parameters()}
        x = weights["user_hidden.weight"] @ users.ravel() + weights["user_hidden.bias"]
        x = x + weights["item_hidden.weight"] @ items.ravel()
        for layer in self.model.layers:
            if isinstance(layer, torch.nn.Linear):
                x = layer.weight.numpy(force=True) @ x + layer.bias.numpy(force=True)
            elif isinstance(layer, torch.nn.ReLU):
                x = np.maximum(x, 0)
        return self.fm(user, item) + float(x[0])


def field(name, kind, side, of_type, cardinality, **more):
    return FieldSpec(name=name, kind=kind, side=side, type=of_type, cardinality=cardinality, **more)


def related(weights):
    item, other = np.nonzero(weights[1:, 1:])
    return pa.table({"item": item + 1, "other": other + 1, "weight": weights[item + 1, other + 1]}).cast(
        RELATED
    )


def daily(counts):
    """[I, 6] counts of the three days before START and of the three from then on."""
    item, day = np.nonzero(counts[1:])
    days = [START + dt.timedelta(days=int(d) - 3) for d in day]
    return pa.table({"item": item + 1, "day": days, "count": counts[item + 1, day]}).cast(DAILY)


def brute_force(world, users, k, score_of):
    """Each row's [(item, score)], best first, in plain Python; `score_of` is None for what is not listed."""
    excluded = set(zip(*(part.tolist() for part in users.excluded), strict=True))
    listable = users.listable.expand(len(users), -1).tolist()
    found = []
    for row in range(len(users)):
        scored = [
            (item, score_of(world, users, row, item))
            for item in range(1, world.n_items + 1)
            if listable[row][item] and (row, item) not in excluded
        ]
        scored = [(item, value) for item, value in scored if value is not None]
        found.append(sorted(scored, key=lambda pair: (-pair[1], pair[0]))[:k])
    return found


DEVICES = ["cpu", *["cuda"] * torch.cuda.is_available()]


@pytest.fixture(autouse=True, params=DEVICES)
def device(request):
    with torch.device(request.param):
        yield


def world_of(*arguments, **settings):
    return world_on(torch.get_default_device(), *arguments, **settings)


@functools.cache
def world_on(_, *arguments, **settings):
    return World(*arguments, **settings)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
class Contract:
    """A Scorer's subclass says how it is made and what it must find."""

    def scorer(self, world):
        raise NotImplementedError

    def score(self, world, users, row, item):
        """Of an item for a user, None where it is not listed."""
        raise NotImplementedError

    def found(self, world, users, k):
        """Compare the lists with plain Python's and return their items."""
        with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16, world.precision == "bfloat16"):
            lists = self.scorer(world).top_k(users, k)
        expected = brute_force(world, users, k, self.score)
        items = [[item for item, _ in of] + [0] * (k - len(of)) for of in expected]
        assert lists.items.tolist() == items
        assert lists.scores.dtype == torch.float32
        scores = torch.tensor([[value for _, value in of] + [-torch.inf] * (k - len(of)) for of in expected])
        self.compare(lists.scores, scores.view(lists.scores.shape))
        return lists.items

    def compare(self, found, expected):
        assert torch.equal(found, expected)

    @pytest.mark.parametrize("seed", range(2))
    def test_equals_brute_force_with_ties(self, precision, seed):
        world = world_of(seed, 9, 70, precision)
        users = world.batch()
        for k in (1, 5):
            self.found(world, users, k)

    def test_more_asked_for_than_there_is(self, precision):
        world = world_of(2, 5, 12, precision)
        everything = np.ones((5, 13), bool)
        items = self.found(world, world.batch(seen=~everything, listable=everything), 20)
        assert (items[:, 12:] == 0).all()

    def test_users_who_have_seen_all_but_two_items(self, precision):
        world = world_of(2, 5, 12, precision)
        seen = np.ones((5, 13), bool)
        for row in range(5):
            seen[row, [1 + row, 12 - row]] = False
        items = self.found(world, world.batch(seen=seen, listable=np.ones((5, 13), bool)), 4)
        assert (items[:, 2:] == 0).all()

    def test_nothing_may_be_listed(self, precision):
        world = world_of(2, 5, 12, precision)
        assert not self.found(world, world.batch(listable=np.zeros((5, 13), bool)), 3).any()

    def test_items_that_are_listable_for_nobody(self, precision):
        """One row for all users, as where all lists are of one day and some items are denied."""
        world = world_of(3, 6, 12, precision)
        users = world.batch(listable=np.ones((6, 13), bool))
        allowed = torch.tensor([[False] + [True, False, True] * 4])
        denied = dataclasses.replace(users, listable=allowed)
        assert set(self.found(world, denied, 12).flatten().tolist()) <= {0, 1, 3, 4, 6, 7, 9, 10, 12}

    def test_one_item(self, precision):
        world = world_of(4, 5, 1, precision)
        everything = np.ones((5, 2), bool)
        self.found(world, world.batch(seen=~everything, listable=everything), 3)

    def test_one_user(self, precision):
        self.found(world_of(5, 1, 20, precision), world_of(5, 1, 20, precision).batch(), 5)

    def test_nobody_has_a_history(self, precision):
        world = world_of(6, 4, 20, precision, history=False)
        self.found(world, world.batch(), 5)

    def test_a_list_does_not_depend_on_who_else_is_in_the_batch(self, precision):
        world = world_of(0, 9, 70, precision)
        everything = np.ones((9, 71), bool)
        days = world.batch(seen=~everything, listable=everything)
        together = self.found(world, days, 6)
        for row in (0, 4, 8):
            one = np.ones((1, 71), bool)
            alone = world.batch([row + 1], seen=~one, listable=one)
            alone = dataclasses.replace(alone, days=days.days[row : row + 1])
            assert torch.equal(self.found(world, alone, 6)[0], together[row])


class TestPopularity(Contract):
    def scorer(self, world):
        return scorers.Popularity(world.items)

    def score(self, world, users, row, item):
        return world.counts[item]


class TestRecent(Contract):
    def scorer(self, world):
        return scorers.Recent(world.spec, world.recall)

    def score(self, world, users, row, item):
        end = int(users.days[row]) - day_number(START) + 3
        return world.daily[item, max(0, end - 2) : end].sum() or None


class TestALS(Contract):
    MOST = None

    def scorer(self, world):
        tables = [
            pa.table({"index": known, "vector": factors[known].tolist()}).cast(FACTORS)
            for factors, missing in ((world.user_factors, 2), (world.item_factors, 3))
            for known in [[index for index in range(1, len(factors)) if index != missing]]
        ]
        users, items = tables
        return scorers.Factors(FactorTables(world.spec, pa.dataset.dataset(users), items, self.MOST))

    def score(self, world, users, row, item):
        user = int(users.indices[row])
        return None if user == 2 or item == 3 else int(world.user_factors[user] @ world.item_factors[item])


class TestALSOfTheBatch(TestALS):
    """The users' factors are read batch by batch."""

    MOST = 0


class TestNextItems(Contract):
    def scorer(self, world):
        return scorers.NextItems(world.spec, world.recall)

    def score(self, world, users, row, item):
        return sum(world.next_items[own, item] for own in world.latest[int(users.indices[row])]) or None


class TestNeighbors(Contract):
    def scorer(self, world):
        return scorers.Neighbors(world.spec, world.recall)

    def score(self, world, users, row, item):
        return sum(world.neighbors[own, item] for own in world.latest[int(users.indices[row])]) or None


class TestEASE(Contract):
    """Weights are of either sign: what is not above 0 in sum is not listed."""

    NAME = "ease"

    def scorer(self, world):
        return scorers.Linear(world.spec, world.recall, self.NAME)

    def score(self, world, users, row, item):
        score = sum(world.linear[own, item] for own in world.latest[int(users.indices[row])])
        return score if score > 0 else None


class TestTransitions(TestEASE, Contract):
    NAME = "transitions"


class TestContent(Contract):
    """Cosines are not whole; those that are equal but for rounding are equal."""

    def scorer(self, world):
        return scorers.Content(world.items, world.recall)

    def score(self, world, users, row, item):
        vectors = world.vectors
        total = sum(vectors[own] @ vectors[item] for own in world.latest[int(users.indices[row])])
        return round(float(total), 5) or None

    def compare(self, found, expected):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


class TestFM(Contract):
    def scorer(self, world):
        return scorers.FM(world.ranker)

    def score(self, world, users, row, item):
        return world.fm(int(users.indices[row]), item)

    def compare(self, found, expected):
        """All but a constant of the user's."""
        listed = torch.isfinite(expected)
        assert torch.equal(torch.isfinite(found), listed)
        assert torch.equal(
            (found - found[:, :1]).where(listed, 0), (expected - expected[:, :1]).where(listed, 0)
        )


class TestExhaustive(Contract):
    def scorer(self, world):
        return scorers.Exhaustive(world.ranker)

    def score(self, world, users, row, item):
        return world.deepfm(int(users.indices[row]), item)


class TestTwoStage(Contract):
    """Candidates by plain Python, ranked by it."""

    SOURCES = (TestPopularity(), TestALS(), TestNextItems(), TestFM())
    QUOTAS = (2, 3, 4, 3)

    def scorer(self, world):
        sources = {
            type(of).__name__: Source(of.scorer(world), quota)
            for of, quota in zip(self.SOURCES, self.QUOTAS, strict=True)
        }
        return TwoStage(sources, world.ranker)

    def score(self, world, users, row, item):
        if getattr(self, "asked", None) is not users:
            self.asked = users
            lists = [
                brute_force(world, users, quota, of.score)
                for of, quota in zip(self.SOURCES, self.QUOTAS, strict=True)
            ]
            self.proposed = [{i for of in lists for i, _ in of[row]} for row in range(len(users))]
        return world.deepfm(int(users.indices[row]), item) if item in self.proposed[row] else None


def test_every_model_keeps_the_contract():
    names = {
        "als": "ALS",
        "next_items": "NextItems",
        "fm": "FM",
        "deepfm": "Exhaustive",
        "two_stage": "TwoStage",
        "ease": "EASE",
    }
    kept = {of.__name__.removeprefix("Test") for of in Contract.__subclasses__()}
    assert {names.get(name, name.capitalize()) for name in LABELS} == kept


def test_published_lists_do_not_depend_on_the_number_of_workers(tmp_path, monkeypatch, request):
    """Three Ray workers that hold all users' rows, and one, this process, that reads those of a task."""
    config = synthetic_config(tmp_path)
    candidates = {name: Proposals(quota=9) for name in ("als", "next_items", "recent", "content", "fm")}
    changed = {"partition_users": 7, "candidates": candidates, "most": 20}
    config = config.model_copy(update={"score": config.score.model_copy(update=changed)})
    runs = untrained_night(config, users=40)
    workspace = Workspace(config)
    date = dt.date.fromisoformat(runs["features"].spec().date)
    users = runs["features"].table("users/as_of=date")["user"].to_numpy()
    three, one = (workspace.new("score", {"workers": workers}, runs) for workers in (3, 1))
    monkeypatch.setattr("os.cpu_count", lambda: 3)
    pools = []
    real = partitions.ActorPool
    monkeypatch.setattr(partitions, "ActorPool", lambda actors: pools.append(len(actors)) or real(actors))
    figures = partitions.score_partitions(config, three, date, users)
    assert pools == [3]
    lean = config.model_copy(update={"score": config.score.model_copy(update={"users_megabytes": 0})})
    scorer = scored.PartitionScorer(lean, one, date, DEVICES[-1])
    assert scorer.models.ranker.rows is not None
    assert scorer.models.sources["als"].tables.held is None
    # As many as Ray gives a worker of one CPU: with more, sums are made in another order.
    threads = torch.get_num_threads()
    request.addfinalizer(lambda: torch.set_num_threads(threads))
    torch.set_num_threads(1)
    assert figures == [scorer.score(*part) for part in partitions.partitions(users, 7)]
    lists = [run.commit(config, {}).table("lists").drop_columns(["run_id"]) for run in (three, one)]
    assert lists[0].num_rows == 400
    assert lists[0].equals(lists[1])

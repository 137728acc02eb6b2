from fractions import Fraction

import numpy as np
import pyarrow as pa
import pytest
import torch

from recsys_dist.config import Proposals
from recsys_dist.deepfm.batches import side_batch
from recsys_dist.deepfm.items import day_number
from recsys_dist.errors import ConfigError
from recsys_dist.recall.inner_product import top_k
from recsys_dist.schema import RELATED
from recsys_dist.scoring.models import load_models
from recsys_dist.scoring.reasons import ITEMS, reasons
from recsys_dist.scoring.scorers import Exhaustive, Ranker, Related, Source, TwoStage
from recsys_dist.scoring.users import with_context
from tests.models import untrained_night
from tests.synthetic import START, items_as_of, listable, synthetic_config

K = 10
DAY = day_number(START.date())
GONE = 7
RANK_ALL = ["popularity", "als", "next_items", "neighbors", "fm", "deepfm", "two_stage"]
"""What is listable and not seen is in their lists, where these have room."""
SCORERS = [*RANK_ALL, "recent", "content"]


PAIR = "[{name: next, measure: next_items}, {name: near, measure: neighbors, recency: 9}]"


@pytest.fixture(
    scope="module",
    params=[
        {},
        {"attention": "{recent: 3}", "recency": "{genres_seen: 2}"},
        {"encoder": "{recent: 2}"},
        {"pair": PAIR},
    ],
    ids=["plain", "sequences", "encoder", "pair"],
)
def night(request, tmp_path_factory):
    config = synthetic_config(tmp_path_factory.mktemp("root"), **request.param)
    return config, untrained_night(config, gone=GONE)


@pytest.fixture(scope="module")
def features(night):
    return night[1]["features"]


@pytest.fixture(scope="module")
def models(night):
    config, runs = night
    return load_models(runs, config.score)


@pytest.fixture(scope="module")
def rows(features):
    return features.table("users/as_of=test").sort_by("user")


@pytest.fixture(scope="module")
def users(models, rows):
    """Lists of many days in one batch."""
    return with_context(models.items, rows, DAY + np.arange(len(rows), dtype=np.int32) % 7, "all")


@pytest.fixture(scope="module")
def catalogues(features, models, users):
    """The item side by day, from the tables themselves; row 0 stands for the unknown item."""
    model, sides = models.ranker.model, {}
    for day in set(users.days.tolist()):
        items = items_as_of(features, day)
        padded = pa.concat_tables([items.slice(0, 1), items])
        sides[day] = model.item_side(side_batch(padded, model.item_fields))
    return sides


@pytest.mark.parametrize("name", SCORERS)
def test_no_scorer_lists_a_seen_a_gone_or_an_inactive_item_or_one_twice(features, models, users, name):
    lists = models.all()[name].top_k(users, K)
    assert lists.items.shape == (len(users), K)
    allowed = {day: listable(features, day) for day in users.days.tolist()}
    seen = users.table["seen"].to_pylist()
    for row, items in enumerate(lists.items.tolist()):
        listed = [item for item in items if item]
        left = allowed[int(users.days[row])] - set(seen[row])
        assert len(set(listed)) == len(listed)
        assert len(listed) == min(K, len(left)) or name not in RANK_ALL
        assert set(listed) <= left
    finite = torch.where(torch.isneginf(lists.scores), -1e30, lists.scores)
    assert (finite.diff(dim=1) <= 0).all()


@pytest.mark.parametrize("name", RANK_ALL)
def test_no_scorer_lists_an_item_that_only_its_mask_keeps_out(features, models, rows, name):
    """Everything that may be listed is, and nothing else, when the list has room and nothing is left out."""
    days = np.full(len(rows), DAY + 4, np.int32)
    scorer = models.all()[name]
    if name == "two_stage":
        sources = {source: Source(models.sources[source], len(models.items)) for source in models.sources}
        scorer = TwoStage(sources, models.ranker)
    lists = scorer.top_k(with_context(models.items, rows, days, "none"), len(models.items))
    for items in lists.items.tolist():
        assert {item for item in items if item} == listable(features, DAY + 4)


@pytest.mark.parametrize("name", SCORERS)
def test_a_list_does_not_depend_on_the_batch(models, rows, users, name):
    """A user alone gets the list that he gets among users of other days."""
    together = models.all()[name].top_k(users, K)
    for row in (0, 5, 23):
        single = with_context(models.items, rows.slice(row, 1), users.days[row : row + 1].numpy(), "all")
        alone = models.all()[name].top_k(single, K)
        assert torch.equal(alone.items[0], together.items[row])
        torch.testing.assert_close(alone.scores[0], together.scores[row])


@torch.inference_mode()
def test_deepfm_ranks_by_its_logits_as_of_each_list_s_day(models, users, catalogues):
    ranker = models.ranker
    user, pair = ranker.users(users), [None] * len(users)
    if ranker.pairs:
        pair = list(ranker.pairs.of_all(users.table))
    logits = torch.cat(
        [
            ranker.model.logits(user.rows(row, row + 1), catalogues[day], pair=pair[row])[None]
            for row, day in enumerate(users.days.tolist())
        ]
    )
    expected = top_k(logits, K, users.excluded, users.listable)
    found = Exhaustive(ranker).top_k(users, K)
    torch.testing.assert_close(found.scores, expected.scores)
    assert (found.items == expected.items).float().mean() > 0.99
    assert (catalogues[DAY].hidden != catalogues[DAY + 5].hidden).any()


@torch.inference_mode()
def test_fm_search_ranks_as_the_full_fm_formula(models, users, catalogues):
    ranker = models.ranker
    user = ranker.users(users)
    full = torch.cat(
        [
            ranker.model.fm(user.rows(row, row + 1), catalogues[day])[None]
            for row, day in enumerate(users.days.tolist())
        ]
    )
    expected = top_k(full, K, users.excluded, users.listable)
    found = models.sources["fm"].top_k(users, K)
    # Equal up to each user's constant, so gaps between places agree and the order with them.
    torch.testing.assert_close(found.scores.diff(), expected.scores.diff(), rtol=1e-4, atol=1e-5)
    assert (found.items == expected.items).float().mean() > 0.99


@pytest.mark.parametrize(
    ("name", "table", "recency"),
    [("next_items", "next_items", 4.0), ("neighbors", "neighbors/measure=pearson", 3.0)],
)
def test_related_items_are_summed_over_the_latest_ones(night, models, users, name, table, recency):
    related = night[1]["recall"].table(table).to_pylist()
    weights = np.zeros((len(models.items) + 1,) * 2)
    for row in related:
        weights[row["item"], row["other"]] = row["weight"]
    scores = np.zeros((len(users), len(models.items) + 1), np.float32)
    for row, latest in enumerate(users.table["latest"].to_pylist()):
        for age, item in enumerate(reversed(latest)):
            scores[row] += weights[item] * np.exp(-age / recency)
    expected = top_k(torch.from_numpy(scores), K, users.excluded, users.listable)
    found = models.all()[name].top_k(users, K)
    torch.testing.assert_close(found.scores, expected.scores)
    assert (found.items == expected.items).float().mean() > 0.99


@pytest.mark.parametrize("days", [1, 3, 30])
def test_recent_counts_the_events_of_the_days_before_each_list_s(night, models, users, days):
    events = night[1]["features"].table("examples").to_pylist()
    scorer = models.all()["recent"]
    scores = np.full((len(users), len(models.items) + 1), -np.inf, np.float32)
    for row, day in enumerate(users.days.tolist()):
        for event in events:
            at = day_number(event["timestamp"].date())
            if event["split"] == "train" and event["label"] and day - days <= at < day:
                scores[row, event["item"]] = max(scores[row, event["item"]], 0) + 1
    expected = top_k(torch.from_numpy(scores), K, users.excluded, users.listable)
    scorer.window, window = days, scorer.window
    found = scorer.top_k(users, K)
    scorer.window = window
    assert torch.equal(found.items, expected.items)
    assert torch.equal(found.scores, expected.scores)
    assert not found.items[users.days == DAY].any()  # there is nothing before the first day
    assert found.items[users.days == DAY + 1].any()


def test_content_finds_what_is_like_the_latest_items(night, models, users):
    genres = [[], *night[1]["features"].table("items").sort_by("item")["genres"].to_pylist()]
    n = len(genres) - 1
    every = sorted({value for of in genres for value in of})
    having = np.array([[value in of for value in every] for of in genres], float)
    vectors = having * np.log((1 + n) / (1 + having.sum(0)))
    vectors /= np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
    scores = np.zeros((len(users), n + 1))
    for row, latest in enumerate(users.table["latest"].to_pylist()):
        scores[row] = sum(
            vectors @ vectors[item] * np.exp(-age / 10) for age, item in enumerate(reversed(latest))
        )
    # The profiles are few: equal but for rounding is equal.
    scores = torch.from_numpy(scores.round(6).astype(np.float32))
    expected = top_k(scores.masked_fill(scores <= 0, -torch.inf), K, users.excluded, users.listable)
    found = models.all()["content"].top_k(users, K)
    torch.testing.assert_close(found.scores, expected.scores)
    assert torch.equal(found.items, expected.items)


def test_what_no_latest_item_speaks_for_is_not_listed(models, rows):
    """Users who liked 3; 3 and then 4; and 5, which speaks for nothing."""
    table = {"item": [3, 3, 4, 4], "other": [7, 9, 9, 3], "weight": [0.5, 0.25, 0.5, 1.0]}
    scorer = Related(models.items.spec, pa.table(table).cast(RELATED), recency=1.0)
    rows = rows.slice(0, 3)
    latest = pa.chunked_array([pa.array([[3], [3, 4], [5]], pa.list_(pa.int32()))])
    rows = rows.set_column(rows.column_names.index("latest"), "latest", latest)
    lists = scorer.top_k(with_context(models.items, rows, np.full(3, DAY + 4, np.int32), "none"), 4)
    assert lists.items.tolist() == [[7, 9, 0, 0], [3, 9, 7, 0], [0, 0, 0, 0]]
    earlier = float(np.exp(-1))
    torch.testing.assert_close(lists.scores[1, :3], torch.tensor([1, 0.5 + earlier / 4, earlier / 2]))
    nothing = Related(models.items.spec, RELATED.empty_table(), recency=1.0)
    assert not nothing.top_k(
        with_context(models.items, rows, np.full(3, DAY, np.int32), "none"), 4
    ).items.any()


@pytest.mark.parametrize(
    "source", ["als", "fm", "popularity", "next_items", "neighbors", "recent", "content"]
)
def test_each_source_may_be_the_only_one(night, users, source):
    config, runs = night
    score = config.score.model_copy(update={"candidates": {source: Proposals(quota=K)}})
    stage = load_models(runs, score).two_stage
    lists, scores = stage.rank(users, K)
    assert scores.shape[2] == 1
    own = stage.sources[source].scorer.top_k(users, K).items
    assert torch.equal(own.sort(dim=1).values, lists.items.sort(dim=1).values)


def test_the_catalogue_is_computed_once_a_day(models):
    ranker = Ranker(models.ranker.model, models.items)
    assert ranker.catalogue(DAY) is ranker.catalogue(DAY)
    assert ranker.catalogue(DAY) is not ranker.catalogue(DAY + 1)


@torch.inference_mode()
def test_two_stage_with_all_items_as_candidates_equals_the_exhaustive_ranking(models, users):
    everything = TwoStage(
        {"popularity": Source(models.sources["popularity"], len(models.items))}, models.ranker
    )
    expected = Exhaustive(models.ranker).top_k(users, K)
    found = everything.top_k(users, K)
    torch.testing.assert_close(found.scores, expected.scores)
    assert torch.equal(found.items, expected.items)


@torch.inference_mode()
def test_exhaustive_lists_are_those_of_the_plain_forward_and_of_everything_proposed(night, users):
    """Each pair of user and item on its own, with fields from the tables."""
    config, runs = night
    score = config.score.model_copy(update={"mode": "exhaustive"})
    if config.deepfm.pair:
        with pytest.raises(ConfigError, match=r"score\.mode=exhaustive .* deepfm\.pair: next, near"):
            load_models(runs, score)
        return
    models = load_models(runs, score)
    model, n = models.ranker.model, len(models.items)
    logits = []
    for row, day in enumerate(users.days.tolist()):
        items = items_as_of(runs["features"], day)
        same = users.table.take(pa.array([row] * n))
        user_side = model.user_side(side_batch(same, model.user_fields))
        own = model.logits(user_side, model.item_side(side_batch(items, model.item_fields)))
        logits.append(torch.nn.functional.pad(own, (1, 0)))
    expected = top_k(torch.stack(logits), K, users.excluded, users.listable)
    lists, scores = models.published.rank(users, K)
    torch.testing.assert_close(lists.scores, expected.scores, rtol=0, atol=1e-5)
    torch.testing.assert_close(scores[..., 0], expected.scores, rtol=0, atol=1e-5)
    assert torch.equal(lists.items, expected.items)
    sources = {"als": Proposals(quota=1), "popularity": Proposals(quota=n)}
    proposed = config.score.model_copy(update={"candidates": sources})
    everything = load_models(runs, proposed).published.top_k(users, K)
    torch.testing.assert_close(lists.scores, everything.scores, rtol=0, atol=1e-5)
    assert torch.equal(lists.items, everything.items)


def test_two_stage_lists_only_what_its_sources_proposed_and_says_with_which_score(models, users):
    sources = {name: Source(models.sources[name], 4) for name in ("als", "fm", "popularity")}
    stage = TwoStage(sources, models.ranker)
    lists, scores = stage.rank(users, K)
    for s, source in enumerate(sources.values()):
        own = source.scorer.top_k(users, source.quota)
        same = (lists.items[..., None] == own.items[:, None]) & (lists.items > 0)[..., None]
        expected = torch.where(same, own.scores[:, None], -torch.inf).amax(-1)
        assert torch.equal(scores[..., s], expected)
    assert torch.equal((scores > -torch.inf).any(-1), lists.items > 0)


@pytest.mark.parametrize("most", [1, 3, 7, 1000])
def test_of_many_candidates_the_best_placed_are_ranked(models, users, most):
    """By plain Python. Of three equal sources many sums are equal, in whichever order they are made."""
    weights = {"als": 1.0, "fm": 1.0, "recent": 1.0, "next_items": 2.0, "popularity": 0.5}
    sources = {name: Source(models.sources[name], 6, weight) for name, weight in weights.items()}
    everyone = TwoStage(sources, models.ranker).candidates(users)
    stage = TwoStage(sources, models.ranker, most)
    assert stage.width == min(most, 30)
    found = stage.candidates(users)
    lists = {name: source.scorer.top_k(users, 6).items.tolist() for name, source in sources.items()}
    for row in range(len(users)):
        worth = {}
        for name, of in lists.items():
            for place, item in enumerate(of[row], 1):
                worth[item] = worth.get(item, 0) + Fraction(weights[name]) / (60 + place)
        worth.pop(0, None)
        expected = sorted(sorted(worth, key=lambda item: (-worth[item], item))[:most])
        assert [item for item in found.items[row].tolist() if item] == expected
        for item, scores in zip(found.items[row].tolist(), found.scores[row], strict=True):
            if item:
                assert torch.equal(scores, everyone.scores[row][everyone.items[row] == item][0])
            else:
                assert torch.isneginf(scores).all()
    listed = stage.top_k(users, K).items
    assert (listed > 0).sum(1).tolist() == [min(K, int((of > 0).sum())) for of in found.items]


def test_filter_positives_leaves_disliked_items_in(features, models, rows):
    batch = with_context(models.items, rows, np.full(len(rows), DAY, np.int32), "positives")
    lists = models.all()["popularity"].top_k(batch, len(models.items))
    for row, liked, seen in zip(
        lists.items.tolist(), *(rows[c].to_pylist() for c in ("liked", "seen")), strict=True
    ):
        assert not set(row) & set(liked)
        assert (set(seen) - set(liked)) & listable(features, DAY) <= set(row)


@torch.inference_mode()
def test_reasons_add_up_to_the_models_history_term(models, users, catalogues):
    """With one history of items, the contributions of all its items are its FM interaction with the item;
    with an encoder what would be missing without them.

    The history of genres beside it names no item.
    """
    lists = models.two_stage.top_k(users, K)
    why = reasons(models.ranker, users, lists)
    model = models.ranker.model
    table, encoder = model.table("recent"), model.encoder("recent") if model.encoders else None
    decay = models.ranker.model.spec.field("recent").decay
    dim = model.settings.embedding_dim
    checked = 0
    for row, history in enumerate(users.table["recent"].to_pylist()):
        catalogue = catalogues[int(users.days[row])]
        ages = torch.arange(len(history)).flip(0)
        weights = torch.exp(-ages / decay) if decay else torch.ones(len(history))
        parts = table[history, :dim] * (weights / weights.sum())[:, None]
        if encoder and history:
            parts = encoder.shares(table[history, :dim].unsqueeze(0), (ages >= 0).unsqueeze(0))[0]
        for place, item in enumerate(lists.items[row].tolist()):
            shares = dict(zip(history, (parts @ catalogue.sum[item]).tolist(), strict=True))
            best = sorted((h for h in shares if shares[h] > 0), key=lambda h: -shares[h])[:ITEMS]
            named = [h for h in why.items[row, place] if h] if item else []
            assert named == (best if item else [])
            found, expected = why.contributions[row, place][: len(named)], [shares[h] for h in named]
            # An encoder's are differences of what is greater.
            np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5 if encoder else 1e-6)
            checked += len(named)
    assert checked > 100


def test_a_user_without_history_is_served(models, rows):
    rows = rows.slice(0, 1)
    for name in ("seen", "liked", "latest", "recent", "genres_seen"):
        empty = pa.chunked_array([pa.array([[]], pa.list_(pa.int32()))])
        rows = rows.set_column(rows.column_names.index(name), name, empty)
    batch = with_context(models.items, rows, np.array([DAY], np.int32), "all")
    lists = models.two_stage.top_k(batch, K)
    assert (lists.items > 0).all()
    assert not models.sources["next_items"].top_k(batch, K).items.any()
    assert not reasons(models.ranker, batch, lists).items.any()

import numpy as np
import pyarrow as pa
import pytest
import torch

from recsys_dist.recall.inner_product import top_k
from recsys_dist.scoring.models import load_models
from recsys_dist.scoring.reasons import ITEMS, reasons
from recsys_dist.scoring.scorers import Exhaustive, TwoStage
from recsys_dist.scoring.users import with_context
from tests.models import untrained_night
from tests.synthetic import synthetic_config

K = 10


@pytest.fixture(scope="module")
def night(tmp_path_factory):
    config = synthetic_config(tmp_path_factory.mktemp("root"))
    return config, untrained_night(config)


@pytest.fixture(scope="module")
def models(night):
    config, runs = night
    return load_models(runs, config.score)


@pytest.fixture(scope="module")
def users(night, models):
    rows = night[1]["features"].table("users/as_of=test").sort_by("user")
    return with_context(models.spec, rows, np.arange(len(rows)) % 7, "all")


@pytest.mark.parametrize("name", ["popularity", "als", "fm", "deepfm", "two_stage"])
def test_no_scorer_lists_a_seen_item_or_one_twice(models, users, name):
    lists = models.all()[name].top_k(users, K)
    assert lists.items.shape == (len(users), K)
    seen = users.table["seen"].to_pylist()
    for row, items in enumerate(lists.items.tolist()):
        listed = [item for item in items if item]
        assert len(set(listed)) == len(listed) == min(K, models.spec.n_items - len(seen[row]))
        assert not set(listed) & set(seen[row])
    finite = torch.where(torch.isneginf(lists.scores), -1e30, lists.scores)
    assert (finite.diff(dim=1) <= 0).all()


@pytest.mark.parametrize("name", ["popularity", "als", "fm", "deepfm", "two_stage"])
def test_lists_longer_than_the_catalogue_end_in_unknown(models, users, name):
    lists = models.all()[name].top_k(users, models.spec.n_items + 5)
    assert (lists.items[:, -5:] == 0).all()
    assert torch.isneginf(lists.scores[:, -5:]).all()


@torch.inference_mode()
def test_fm_search_ranks_as_the_full_fm_formula(models, users):
    ranker = models.ranker
    user, items = ranker.users(users), ranker.items
    full = ranker.model.fm(user.leading(-1, 1), items.leading(1, -1))
    expected = top_k(full.clone(), K, users.excluded)
    found = models.sources["fm"].top_k(users, K)
    # Equal up to each user's constant, so gaps between places agree and the order with them.
    torch.testing.assert_close(found.scores.diff(), expected.scores.diff(), rtol=1e-4, atol=1e-5)
    assert (found.items == expected.items).float().mean() > 0.99


@torch.inference_mode()
def test_two_stage_with_all_items_as_candidates_equals_the_exhaustive_ranking(models, users):
    everything = TwoStage({"popularity": (models.sources["popularity"], models.spec.n_items)}, models.ranker)
    expected = Exhaustive(models.ranker).top_k(users, K)
    found = everything.top_k(users, K)
    torch.testing.assert_close(found.scores, expected.scores)
    assert torch.equal(found.items, expected.items)


def test_two_stage_lists_only_what_its_sources_proposed_and_says_which(models, users):
    sources = {name: (models.sources[name], 4) for name in ("als", "fm", "popularity")}
    stage = TwoStage(sources, models.ranker)
    lists, proposed = stage.rank(users, K)
    for s, (scorer, quota) in enumerate(sources.values()):
        own = scorer.top_k(users, quota).items
        expected = (lists.items[..., None] == own[:, None]).any(-1) & (lists.items > 0)
        assert torch.equal(proposed[..., s], expected)
    assert torch.equal(proposed.any(-1), lists.items > 0)


def test_filter_positives_leaves_disliked_items_in(night, models):
    rows = night[1]["features"].table("users/as_of=test").sort_by("user")
    batch = with_context(models.spec, rows, np.zeros(len(rows), int), "positives")
    lists = models.all()["popularity"].top_k(batch, models.spec.n_items)
    for row, liked, seen in zip(
        lists.items.tolist(), *(rows[c].to_pylist() for c in ("liked", "seen")), strict=True
    ):
        assert not set(row) & set(liked)
        assert set(seen) - set(liked) <= set(row)


@torch.inference_mode()
def test_reasons_add_up_to_the_models_history_term(models, users):
    """With one history field, the contributions of all its items are its FM interaction with the item."""
    lists = models.two_stage.top_k(users, K)
    why = reasons(models.ranker, users, lists)
    table = models.ranker.model.user_tables.embedding_bags["table_recent"].weight
    dim = models.ranker.items.sum.shape[1]
    checked = 0
    for row, history in enumerate(users.table["recent"].to_pylist()):
        for place, item in enumerate(lists.items[row].tolist()):
            shares = {
                h: float(table[h, :dim] @ models.ranker.items.sum[item]) / len(history) for h in history
            }
            best = sorted((h for h in shares if shares[h] > 0), key=lambda h: -shares[h])[:ITEMS]
            named = [h for h in why.items[row, place] if h] if item else []
            assert named == (best if item else [])
            np.testing.assert_allclose(
                why.contributions[row, place][: len(named)], [shares[h] for h in named], rtol=1e-4, atol=1e-6
            )
            checked += len(named)
    assert checked > 100


def test_a_user_without_history_is_served(night, models):
    rows = night[1]["features"].table("users/as_of=test").sort_by("user").slice(0, 1)
    for name in ("seen", "liked", "recent"):
        empty = pa.chunked_array([pa.array([[]], pa.list_(pa.int32()))])
        rows = rows.set_column(rows.column_names.index(name), name, empty)
    batch = with_context(models.spec, rows, np.zeros(1, int), "all")
    lists = models.two_stage.top_k(batch, K)
    assert (lists.items > 0).all()
    assert not reasons(models.ranker, batch, lists).items.any()

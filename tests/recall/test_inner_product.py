import pytest
import torch

from recsys_dist.recall import inner_product
from recsys_dist.recall.inner_product import LARGE, SMALL, nearest_items, top_k


def brute_force(scores, k, excluded=()):
    rows = []
    for row, values in enumerate(scores.tolist()):
        listed = [i for i in range(1, len(values)) if (row, i) not in excluded and values[i] != -torch.inf]
        listed = sorted(listed, key=lambda i: (-values[i], i))[:k]
        rows.append(listed + [0] * (k - len(listed)))
    return rows


@pytest.mark.parametrize("k", [1, 3, 10, 49, 50, 80])
@pytest.mark.parametrize("seed", range(4))
def test_equals_brute_force_with_ties_and_exclusions(k, seed):
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randint(0, 6, (20, 50), generator=generator).float()  # few values: ties everywhere
    excluded = torch.nonzero(torch.rand(20, 50, generator=generator) < 0.3, as_tuple=True)
    expected = brute_force(scores, k, set(zip(*(part.tolist() for part in excluded), strict=True)))
    lists = top_k(scores.clone(), k, excluded)
    assert lists.items.tolist() == expected
    listed = lists.items > 0
    assert torch.equal(lists.scores[listed], scores.gather(1, lists.items)[listed])
    assert torch.isneginf(lists.scores[~listed]).all()


@pytest.mark.parametrize("rows", [1, 20])
def test_only_what_is_listable_is_listed(rows):
    generator = torch.Generator().manual_seed(1)
    scores = torch.randint(0, 6, (20, 50), generator=generator).float()
    listable = torch.rand(rows, 50, generator=generator) < 0.5
    left_out = torch.nonzero(~listable.expand(20, 50)).tolist()
    expected = brute_force(scores, 30, {(row, item) for row, item in left_out})
    assert top_k(scores, 30, listable=listable).items.tolist() == expected


def test_inner_products_equal_brute_force():
    generator = torch.Generator().manual_seed(0)
    users, items = torch.randn(7, 4, generator=generator), torch.randn(30, 4, generator=generator)
    assert nearest_items(users, items, 5).items.tolist() == brute_force(users @ items.T, 5)


@pytest.mark.parametrize("values", [3, 40, 10**6])
@pytest.mark.parametrize(("widest", "sort"), [(4096, 4), (4096, 1), (20, 4), (20, 1)])
@pytest.mark.parametrize("n_items", [2 * SMALL * LARGE, 700, 1031, 1500])
def test_groups_lose_nothing(monkeypatch, values, n_items, widest, sort):
    """Many more items than places, so that groups are looked through, with ties everywhere and hardly any;
    with more candidates than are put in order at once, or than are taken at all.
    """
    monkeypatch.setattr(inner_product, "WIDEST", widest)
    monkeypatch.setattr(inner_product, "SORTED", sort)
    generator = torch.Generator().manual_seed(values)
    scores = torch.randint(0, values, (30, n_items), generator=generator).float()
    excluded = torch.nonzero(torch.rand(30, n_items, generator=generator) < 0.3, as_tuple=True)
    listable = torch.rand(1, n_items, generator=generator) < 0.8
    scores[5, 3:] = -torch.inf  # fewer items than places
    left_out = set(zip(*(part.tolist() for part in excluded), strict=True))
    left_out |= {(row, item) for row in range(30) for item in torch.nonzero(~listable[0]).flatten().tolist()}
    assert n_items // (SMALL * LARGE) > 1
    for k in (1, 2, 7):
        found = top_k(scores.clone(), k, excluded, listable)
        assert found.items.tolist() == brute_force(scores, k, left_out)


def test_users_are_taken_some_at_a_time(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    users, items = torch.randn(50, 4, generator=generator), torch.randn(300, 4, generator=generator)
    excluded = torch.nonzero(torch.rand(50, 300, generator=generator) < 0.2, as_tuple=True)
    listable = torch.rand(50, 300, generator=generator) < 0.8
    expected = nearest_items(users, items, 5, excluded, listable)
    monkeypatch.setattr(inner_product, "USERS_AT_ONCE", 7)
    found = nearest_items(users, items, 5, excluded, listable)
    assert torch.equal(found.items, expected.items)
    torch.testing.assert_close(found.scores, expected.scores)


def test_everything_excluded_gives_an_empty_list():
    rows = torch.zeros(3, dtype=torch.int64)
    lists = top_k(torch.ones(1, 4), 2, (rows, torch.tensor([1, 2, 3])))
    assert lists.items.tolist() == [[0, 0]]


@pytest.mark.parametrize(("n_items", "place"), [(3, 2), (700, 5), (700, 699)])
def test_nan_is_refused(n_items, place):
    scores = torch.zeros(2, n_items)
    scores[1, place] = torch.nan
    with pytest.raises(ValueError, match="NaN"):
        top_k(scores, 1)

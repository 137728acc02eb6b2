import pytest
import torch

from recsys_dist.recall.inner_product import nearest_items, top_k


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


def test_everything_excluded_gives_an_empty_list():
    rows = torch.zeros(3, dtype=torch.int64)
    lists = top_k(torch.ones(1, 4), 2, (rows, torch.tensor([1, 2, 3])))
    assert lists.items.tolist() == [[0, 0]]


def test_nan_is_refused():
    with pytest.raises(ValueError, match="NaN"):
        top_k(torch.tensor([[0.0, 1.0, float("nan")]]), 1)

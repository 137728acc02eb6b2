import datetime as dt

import numpy as np
import pyarrow as pa
import pytest
import torch

from recsys_dist.deepfm.batches import side_batch
from recsys_dist.deepfm.items import Items, day_number, days_of, weekdays
from recsys_dist.errors import DataError
from recsys_dist.schema import TIMESTAMP
from tests.synthetic import START, items_as_of, listable, synthetic_config, synthetic_features, without_daily

DAY = day_number(START.date())


@pytest.fixture(scope="module")
def features(tmp_path_factory):
    return synthetic_features(synthetic_config(tmp_path_factory.mktemp("root")))


@pytest.fixture(scope="module")
def items(features):
    return Items(features, features.spec())


def rows(batch):
    """Each row as its bags by field, and its numbers."""
    bags = {
        name: [bag.tolist() for bag in torch.split(jagged.values(), jagged.lengths().tolist())]
        for name, jagged in batch.indices.to_dict().items()
    }
    return [
        ({name: found[row] for name, found in bags.items()}, batch.values[row].tolist())
        for row in range(len(batch))
    ]


@pytest.mark.parametrize("with_daily", [True, False])
def test_items_have_the_fields_of_the_day(features, with_daily):
    """Every item on days before, within and after the log, in any order."""
    spec = features.spec() if with_daily else without_daily(features.spec())
    items = Items(features, spec)
    generator = np.random.default_rng(0)
    wanted = generator.integers(1, len(items) + 1, 400)
    days = generator.integers(DAY - 2, DAY + 12, 400).astype(np.int32)
    batch = items.at(torch.from_numpy(wanted), torch.from_numpy(days))
    assert batch.indices.keys() == [f.name for f in spec.side("item") if f.type in ("index", "indices")]
    expected = {}
    for day in np.unique(days):
        expected[day] = rows(side_batch(items_as_of(features, int(day)), spec.side("item")))
    assert rows(batch) == [expected[day][item - 1] for item, day in zip(wanted, days, strict=True)]
    if with_daily:
        assert expected[DAY] != expected[DAY + 4] != expected[DAY + 11]
        assert expected[DAY - 2] == expected[DAY]


def test_one_day_serves_all_items(items):
    every = torch.arange(len(items) + 1)
    day = torch.tensor([DAY + 3], dtype=torch.int32)
    assert rows(items.at(every, day)) == rows(items.at(every, day.expand(len(every))))


@pytest.mark.parametrize("day", [-5, 0, DAY, 2**31 - 1])
def test_the_unknown_item_is_unknown_in_every_field(items, day):
    ((bags, numbers),) = rows(items.at(torch.tensor([0]), torch.tensor([day], dtype=torch.int32)))
    assert {name: bag for name, bag in bags.items() if bag not in ([], [0])} == {}
    assert set(numbers) == {0.0}


def test_items_that_are_gone_or_not_active_are_not_listable(features, items):
    days = torch.tensor([DAY - 1, DAY, DAY + 3, DAY + 4, DAY + 5, DAY + 60, DAY], dtype=torch.int32)
    found = items.listable(days)
    assert found.shape == (len(days), len(items) + 1)
    for row, day in zip(found, days.tolist(), strict=True):
        assert set(torch.nonzero(row).squeeze(1).tolist()) == listable(features, day)
    # Item 1 until the fourth day, item 2 from noon of the fourth day, and so from the fifth.
    assert found[:, 1].tolist() == [True, True, True, False, False, False, True]
    assert found[:, 2].tolist() == [False, False, False, False, True, True, False]
    assert not found[:, len(items) - 1].any()
    assert torch.equal(items.listable(days[:1].expand(9)), found[:1])


def test_days_are_those_of_utc_also_before_1970():
    moments = [dt.datetime(1969, 12, 31, 23, 59, 59, tzinfo=dt.UTC), dt.datetime(1970, 1, 1, tzinfo=dt.UTC)]
    moments += [dt.datetime(2024, 2, 29, 23, 59, 59, 999_999, tzinfo=dt.UTC)]
    days = days_of(pa.chunked_array([pa.array(moments, TIMESTAMP)]))
    assert days.tolist() == [-1, 0, day_number(dt.date(2024, 2, 29))]
    assert weekdays(days).tolist() == [moment.weekday() for moment in moments]


@pytest.mark.parametrize("table", ["items", "item_days"])
def test_an_item_without_rows_is_reported(tmp_path, table):
    features = synthetic_features(synthetic_config(tmp_path))
    found = features.table(table)
    left = found.filter(pa.compute.not_equal(found["item"], 7))
    pa.parquet.write_table(left, f"{features.path}/{table}/part-00000.parquet")
    with pytest.raises(DataError, match=rf"{table} has .* the items 1 to 50.*featurize\.py --force"):
        Items(features, features.spec())

"""Every ready conf file reads a log of its shape, sets aside what was planted and gets the features right."""

from collections import Counter

import numpy as np
import pandas as pd
import pytest

from recsys_dist.config import load
from tests import generated
from tests.logs import featurized

pytestmark = pytest.mark.long

SHAPES = {
    "movielens_100k": generated.movielens_100k,
    "movielens_1m": generated.movielens_1m,
    "shop_events": generated.shop_events,
    "music_plays": generated.music_plays,
    "ad_clicks": generated.ad_clicks,
}
REASONS = {
    "wrong number of columns",
    "not JSON",
    "not utf-8",
    "missing user",
    "missing item",
    "unparseable timestamp",
    "future timestamp",
    "unparseable value",
    "value out of range",
    "unknown event type",
    "label is not 0 or 1",
    "duplicate",
}


class Featurized:
    """A generated log, its configuration and the features run made of it."""

    def __init__(self, name, folder):
        self.log = SHAPES[name](folder)
        self.config = load(f"conf/{name}.yaml", [*self.log.overrides, f"storage.root={folder}/runs"])
        self.run = featurized(self.config)
        self.figures = self.run.manifest["figures"]
        self.spec = self.run.spec()

    def tokens(self, name):
        """[1 + size] the vocabulary's tokens by index."""
        rows = self.run.table(f"vocab/{name}").sort_by("index")
        assert rows["index"].to_pylist() == list(range(1, len(rows) + 1))
        return np.array([None, *rows["token"].to_pylist()], object)

    def examples(self, *columns):
        """The examples with raw ids and micros, in a user's order of time."""
        names = ["user", "item", "timestamp", "value", "label", "split", *columns]
        rows = self.run.table("examples", columns=names)
        frame = rows.to_pandas()
        frame["user"] = self.tokens("user")[frame.user]
        frame["item"] = self.tokens("item")[frame.item]
        frame["micros"] = frame.pop("timestamp").astype("datetime64[us, UTC]").astype("int64")
        return frame.sort_values(["user", "micros", "item"], ignore_index=True)


@pytest.fixture(scope="module", params=SHAPES)
def done(request, spark, tmp_path_factory):
    return Featurized(request.param, tmp_path_factory.mktemp(request.param))


def test_all_reasons_are_planted_somewhere(tmp_path):
    found = set()
    for name, shape in SHAPES.items():
        (tmp_path / name).mkdir()
        found |= set(shape(tmp_path / name, 1000).planted["events"])
    assert found == REASONS


def test_planted_faults_are_set_aside_and_counted(done):
    assert done.log.rows["events"] >= 100_000
    assert done.figures["rows"] == done.log.rows
    assert done.figures["quarantined"] == done.log.planted
    assert sum(done.spec.rows.values()) == len(done.log.usable)
    aside = done.run.table("quarantine").to_pandas()
    everything = sum((Counter(reasons) for reasons in done.log.planted.values()), Counter())
    assert Counter(aside.reason) == everything
    if done.log.raw is not None:
        tables = [source.path for source in (done.config.data.items, done.config.data.users) if source]
        events = aside[~aside.source.isin(tables)]
        found = {reason: sorted(rows.raw) for reason, rows in events.groupby("reason")}
        assert found == done.log.raw


def test_usable_events_are_the_examples(done):
    expected = done.log.usable.sort_values(["user", "micros", "item"], ignore_index=True)
    found = done.examples()
    for name in ("user", "item", "micros"):
        assert (found[name] == expected[name]).all(), name
    assert np.array_equal(found.value, expected.value.astype(np.float32))
    assert np.array_equal(found.label, expected.positive.astype(np.float32))
    assert done.spec.positives == found[found.label == 1].groupby("split").size().to_dict()
    assert done.spec.date == generated.DATE


def test_items_and_users_are_all_there(done):
    items = done.run.table("items").to_pandas()
    listed = done.log.items.iloc[:, 0] if done.log.items is not None else []
    assert set(items.item_id) == {*done.log.usable.item, *listed}
    assert items.present.all()
    assert set(done.tokens("user")[1:]) >= set(done.log.usable.user)


def test_fields_look_strictly_back(done):
    """Of the most active user and of three others: histories, counts and means, by going through the log."""
    histories = [f for f in done.spec.fields if f.kind == "history" and f.of == "item"]
    aggregates = [
        f
        for f in done.spec.side("user")
        if f.kind == "aggregate" and f.of in ("count", "mean_value", "days_since")
    ]
    names = [f.name for f in (*histories, *aggregates)]
    items = done.tokens("item")
    log = done.log.usable
    activity = log.groupby("user").size().sort_values(ascending=False, kind="stable")
    users = activity.index[[0, 10, len(activity) // 2, -1]]
    found = done.examples(*names)
    found = found[found.user.isin(users)]
    assert len(found) == activity[users].sum()
    for user, rows in found.groupby("user"):
        own = log[log.user == user].sort_values(["micros", "item"])
        for row in rows.iloc[:: max(1, len(rows) // 40)].itertuples():
            earlier = own[own.micros < row.micros]
            for field in histories:
                expected = _matching(earlier, field.when).item.tolist()[-field.last :]
                assert items[getattr(row, field.name)].tolist() == expected, (user, field.name)
            for field in aggregates:
                matching = _matching(earlier, field.when)
                expected = 0.0  # without an earlier event
                if field.of == "count":
                    expected = field.transformed(len(matching))
                elif len(matching) and field.of == "mean_value":
                    expected = field.transformed(matching.value.mean())
                elif len(matching):
                    expected = field.transformed((row.micros - matching.micros.max()) / 86_400e6)
                assert getattr(row, field.name) == pytest.approx(expected, rel=1e-4, abs=1e-4), field.name


def test_item_fields_hold_what_the_table_says(done):
    """A row of the table after the other, as text, lists of texts and numbers."""
    if done.log.items is None:
        assert done.config.data.items is None
        return
    rows = done.run.table("items").to_pandas().set_index("item_id")
    key, table = done.log.items.iloc[:, 0], done.log.items
    for declared in done.config.fields:
        if declared.kind not in ("categorical", "numeric") or declared.side != "item":
            continue
        (column,) = [name for name in table if name.partition(":")[0] == declared.column.partition(":")[0]]
        found = rows.loc[key, declared.name].tolist()
        field = done.spec.field(declared.name)
        if declared.kind == "categorical":
            tokens = done.tokens(declared.name)
            if declared.several:
                split = [v if declared.list else v.split(declared.delimiter) for v in table[column]]
                assert [tokens[indices].tolist() for indices in found] == [[t for t in v if t] for v in split]
            else:
                assert [tokens[index] for index in found] == table[column].tolist()
        else:
            numbers = pd.to_numeric(table[column]).tolist()
            missing = [bool(np.isnan(number)) for number in numbers]
            if field.edges:
                below = np.searchsorted(field.edges, numbers, side="right") + 1
                assert found == np.where(missing, 0, below).tolist()
            else:
                filled = [field.fill if gone else x for x, gone in zip(numbers, missing, strict=True)]
                assert found == pytest.approx([field.transformed(x) for x in filled], rel=1e-4, abs=1e-4)
                assert rows.loc[key, f"{declared.name}_missing"].tolist() == missing


def _matching(events: pd.DataFrame, when: str) -> pd.DataFrame:
    if when == "any":
        return events
    return events[events.positive] if when == "positive" else events[events.event == when]

"""What people read of a list's entry."""

import pytest

from recsys_dist.scoring.show import _cut, _reason

TITLES = {"i1": "Emma", "i2": "Fargo", "i3": "Heat"}


@pytest.mark.parametrize(
    ("kind", "because", "told"),
    [
        ("history", ["i1", "i2", "i3"], "because of Emma and Fargo; found by als, content"),
        ("popular", [], "popular; found by als, content"),
        ("new", [], "new; found by als, content"),
        ("suggested", [], "suggested; found by als, content"),
        ("explore", ["i1"], "drawn with probability 0.250; found by als, content"),
    ],
)
def test_a_reason_can_be_read(kind, because, told):
    row = {
        "sources": ["als", "content"],
        "reason": {"kind": kind, "item_ids": because},
        "propensity": 0.25,
    }
    assert _reason(row, TITLES) == told


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("Toy Story", "Toy Story"),
        ("2f1c9a44-9e0b-4c3e-8b7d", "2f1c9a44-…"),
        ("もののけ姫 \u2014 完全版 第二", "もののけ姫 \u2014 完…"),
        ("two  words\nand more", "two words…"),
    ],
)
def test_what_is_too_long_keeps_its_beginning(text, told):
    assert _cut(text, 10) == told
    assert len(_cut(text, 10)) <= 10

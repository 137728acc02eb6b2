"""What people read of a list's entry."""

import pytest

from recsys_dist.scoring.show import _reason

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

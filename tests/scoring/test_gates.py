"""Lists that must not be published, each with one thing wrong."""

import numpy as np
import pyarrow as pa
import pytest

from recsys_dist.config import Gates, load
from recsys_dist.errors import DataError
from recsys_dist.schema import TOPK
from recsys_dist.scoring.gates import check, counts, require_passed
from recsys_dist.workspace import Workspace

USERS = pa.chunked_array([["u1", "u2"], ["u3"]])


def lists(*entries):
    """Rows of TOPK: each entry a user, a rank, an item and a score."""
    columns = dict(zip(("user_id", "rank", "item_id", "score"), zip(*entries, strict=True), strict=True))
    missing = {name: [None] * len(entries) for name in TOPK.names if name not in columns}
    return pa.table({name: list((columns | missing)[name]) for name in TOPK.names}, schema=TOPK)


GOOD = [("u1", 1, "a", 0.5), ("u1", 2, "b", 0.25), ("u2", 1, "a", 0.5), ("u3", 1, "c", 0.0)]


def figures(entries, longest=(2, 2, 1), listed=3, listable=10, active=(True, True, True)):
    found = counts(lists(*entries), USERS, np.array(longest), np.array(active))
    return found | {"listed": listed, "listable": listable}


def test_figures_are_counted():
    assert figures(GOOD) == {
        "users": 3,
        "served": 3,
        "active": 3,
        "active_served": 3,
        "full": 2,  # u3 may have one item only, u2 two
        "rows": 4,
        "not_finite": 0,
        "items_twice": 0,
        "ranks_twice": 0,
        "listed": 3,
        "listable": 10,
    }


def test_lists_at_every_bound_pass():
    check(figures(GOOD), Gates(served=1, full=2 / 3, coverage=0.3))


@pytest.mark.parametrize(
    ("entries", "asked", "told"),
    [
        (GOOD[:2], {}, "served: 1 of 3 active users have a list, a share of 0.3333, .* at least 0.95"),
        (GOOD, {"full": 0.7}, "full: 2 of 3 lists are as long as they can be, .* 0.6667, .* at least 0.7"),
        (GOOD, {"coverage": 0.31}, "coverage: 3 of 10 items .* 0.3000, .* at least 0.31"),
        ([("u1", 1, "a", float("nan")), *GOOD[1:]], {}, "not_finite: 1 of 4 scores"),
        ([("u1", 1, "a", float("inf")), *GOOD[1:]], {}, "not_finite: 1 of 4 scores"),
        ([("u1", 1, "a", None), *GOOD[1:]], {}, "not_finite: 1 of 4 scores"),
        ([*GOOD, ("u1", 3, "a", 0.1)], {}, "items_twice: 1 of 5 entries"),
        ([*GOOD, ("u1", 2, "d", 0.1)], {}, "ranks_twice: 1 of 5 entries"),
    ],
)
def test_each_gate_fails_by_name(entries, asked, told):
    asked = {"served": 0.95, "full": 0.6} | asked
    with pytest.raises(DataError, match=told) as caught:
        check(figures(entries), Gates(**asked))
    assert len(str(caught.value).splitlines()) == 2


def test_an_evaluation_of_other_lists_says_nothing_of_these(tmp_path):
    config = load(None, [f"storage.root={tmp_path}", "score.mode=two_stage"])
    workspace = Workspace(config)
    run = workspace.new("evaluation", workspace.key("evaluation", config, {}) | {"inputs": {}}, {})
    made = run.commit(config, {"verdict": {"passed": True, "text": ""}})
    require_passed(made, config)
    others = ["score.k=7", "score.rules.explore=1", "evaluation.bootstrap=700"]
    require_passed(made, load(None, [f"storage.root={tmp_path}", *others]))
    for other, told in (
        ("score.mode=exhaustive", "score.mode=two_stage, and exhaustive is asked for"),
        ("score.candidates={fm: 9}", r"score.candidates=.* is asked for"),
        ("evaluation.must_beat=null", "evaluation.must_beat=popularity, and None is asked for"),
    ):
        with pytest.raises(DataError, match=f"{told}.* jobs/evaluate.py with the same settings"):
            require_passed(made, load(None, [f"storage.root={tmp_path}", other]))


def test_who_has_no_event_does_not_count_as_active():
    """A million who once registered must not hide that nobody who comes has a list, nor the other way."""
    asked = Gates(served=1, full=0)
    only_u1 = GOOD[:2]
    check(figures(only_u1, active=(True, False, False)), asked)
    with pytest.raises(DataError, match=r"served: 0 of 1 active users"):
        check(figures(only_u1, active=(False, True, False)), asked)
    with pytest.raises(DataError, match=r"served: 1 of 3 users"):
        check(figures(only_u1, active=(False, False, False)), asked)


def test_all_that_fail_are_named_at_once():
    bad = [("u1", 1, "a", float("nan")), ("u1", 1, "a", 0.5)]
    with pytest.raises(DataError) as caught:
        check(figures(bad, longest=(3, 3, 3)), Gates(coverage=0.5))
    lines = str(caught.value).splitlines()[1:]
    names = ["served", "full", "coverage", "not_finite", "items_twice", "ranks_twice"]
    assert [line.split(":")[0].strip() for line in lines] == names


def test_nobody_served_is_refused_whatever_is_asked():
    nobody = {**figures(GOOD), "served": 0, "active_served": 0, "full": 0, "rows": 0, "listed": 0}
    with pytest.raises(DataError, match=r"served: 0 of 3 .* more than none"):
        check(nobody, Gates(served=0, full=0))

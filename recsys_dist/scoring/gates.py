"""What a night must be like to be published. Where a gate fails, the table keeps what it has.

B users of a partition. Every figure is counted by partition, by the worker that makes its lists, and summed.
"""

from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from recsys_dist import config
from recsys_dist.errors import DataError
from recsys_dist.workspace import Run

LISTED = ("score.mode", "score.candidates", "score.most", "score.filter_seen")
"""Settings that decide which lists an evaluation measures."""
JUDGED = ("metric", "must_beat", "may_fall")
"""Settings of the section evaluation that its verdict goes by."""
LONGEST = 200
"""Characters of a setting that are shown."""


def require_passed(evaluation: Run, settings: config.Config) -> None:
    """Raise a DataError where the models did not pass their evaluation, or it was one of other lists."""
    made = evaluation.manifest["key"].get("config", {})
    measured = {name: made[name] for name in LISTED if name in made}
    measured |= {f"evaluation.{key}": made["evaluation"][key] for key in JUDGED if "evaluation" in made}
    for name in measured:
        if measured[name] != settings.section(name):
            raise DataError(
                f"The evaluation {evaluation.run_id} was made with {name}={_short(measured[name])}, and "
                f"{_short(settings.section(name))} is asked for, so it says nothing of these lists. Run "
                f"jobs/evaluate.py with the same settings first. Nothing was published."
            )
    verdict = evaluation.manifest["figures"]["verdict"]
    if not verdict["passed"]:
        raise DataError(
            f"The evaluation {evaluation.run_id} did not pass: {verdict['text']}. Nothing was published; the "
            f"table still has what it had."
        )


def counts(
    lists: pa.Table, user_ids: pa.ChunkedArray, longest: np.ndarray, active: np.ndarray
) -> dict[str, int]:
    """What the gates are about, of a partition.

    Args:
        lists: its users' rows, schema TOPK.
        user_ids: [B], those who have no list too.
        longest: [B], the entries that each user's list can have.
        active: [B] bool, who has an event.
    """
    rows = pc.index_in(lists["user_id"], value_set=user_ids.combine_chunks()).to_numpy()
    lengths = np.bincount(rows, minlength=len(user_ids))
    served = lengths > 0
    return {
        "users": len(user_ids),
        "served": int(served.sum()),
        "active": int(active.sum()),
        "active_served": int((served & active).sum()),
        "full": int((served & (lengths >= longest)).sum()),
        "rows": lists.num_rows,
        "not_finite": lists.num_rows - pc.sum(pc.is_finite(lists["score"]), min_count=0).as_py(),
        "items_twice": _repeated(lists, ["user_id", "item_id"]),
        "ranks_twice": _repeated(lists, ["user_id", "rank"]),
    }


def check(figures: dict[str, Any], gates: config.Gates) -> None:
    """Refuse lists that must not be seen by anyone.

    Args:
        figures: `counts` of all partitions together, and `listed` of `listable` items.
        gates: what is asked of them.

    Raises:
        DataError: names every gate that fails, what was found and what is asked for.
    """
    wrong = []
    for name, part, whole, what in (
        ("served", "active_served", "active", "active users have a list")
        if figures["active"]
        else ("served", "served", "users", "users have a list"),
        ("full", "full", "served", "lists are as long as they can be"),
        ("coverage", "listed", "listable", "items that may be listed are in a list"),
    ):
        least = getattr(gates, name)
        found = figures[part] / figures[whole] if figures[whole] else 0.0
        # Nobody served is no night, however little is asked for; nothing else then says more.
        if found < least or (name == "served" and not figures["served"]):
            wrong.append(
                f"{name}: {figures[part]} of {figures[whole]} {what}, a share of {found:.4f}, and "
                f"score.gates.{name} asks for {f'at least {least}' if least else 'more than none'}"
            )
    for name, what in (
        ("not_finite", "scores are NaN or infinite"),
        ("items_twice", "entries repeat an item of their list"),
        ("ranks_twice", "entries have the rank of another one of their list"),
    ):
        if figures[name]:
            wrong.append(f"{name}: {figures[name]} of {figures['rows']} {what}, and none may")
    if wrong:
        raise DataError(
            "\n  ".join(["The lists are not fit to be published; the table still has what it had.", *wrong])
        )


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= LONGEST else f"{text[:LONGEST]}..."


def _repeated(lists: pa.Table, columns: list[str]) -> int:
    """Rows that have the same in these columns as a row before."""
    return int(lists.num_rows - lists.group_by(columns).aggregate([]).num_rows)

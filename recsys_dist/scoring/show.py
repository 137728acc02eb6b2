"""A user's published list beside the history it was made from, for people."""

import textwrap
from typing import Any

import pyarrow.compute as pc

from recsys_dist.errors import DataError
from recsys_dist.scoring.publish import read_user
from recsys_dist.workspace import Run, Workspace

WIDTH = 46


def show_user(workspace: Workspace, user_id: str) -> str:
    """Two columns: the user's latest liked items before the list's date, and the list with its reasons.

    Raises:
        DataError: nothing is published, or not for this user.
    """
    rows = read_user(f"{workspace.uri}/topk", user_id)
    scored = next((run for run in workspace.runs("score") if run.run_id == rows[0]["run_id"]), None)
    if scored is None:
        raise DataError(
            f"The list was made by the score run {rows[0]['run_id']}, which has no manifest: it was "
            f"removed, or stopped just after it published. Run jobs/score.py again."
        )
    features = next(run for run in workspace.runs("features") if run.run_id == scored.inputs["features"])
    titles, history = _titles(features), _history(features, user_id)
    left = [f"Liked last, before {rows[0]['date']}", ""] + [
        textwrap.shorten(titles[item], WIDTH - 2, placeholder="…") for item in history
    ]
    right = ["Recommended", ""]
    for row in rows:
        title = textwrap.shorten(titles[row["item_id"]], WIDTH, placeholder="…")
        right += [f"{row['rank']:>2}. {title}", f"    {_reason(row, titles)}"]
    height = max(len(left), len(right))
    left += [""] * (height - len(left))
    right += [""] * (height - len(right))
    lines = [f"{one:<{WIDTH}}{two}".rstrip() for one, two in zip(left, right, strict=True)]
    return "\n".join([f"User {user_id}", *lines])


def _reason(row: dict[str, Any], titles: dict[str, str]) -> str:
    found = "found by " + ", ".join(row["sources"])
    if row["reason"]["kind"] != "history":
        return f"popular; {found}"
    because = [textwrap.shorten(titles[item], 24, placeholder="…") for item in row["reason"]["item_ids"][:2]]
    return f"because of {' and '.join(because)}; {found}"


def _titles(features: Run) -> dict[str, str]:
    items = features.table("items", columns=["item_id", "title"])
    ids, titles = items["item_id"].to_pylist(), items["title"].to_pylist()
    return {item: title or item for item, title in zip(ids, titles, strict=True)}


def _history(features: Run, user_id: str) -> list[str]:
    """Raw ids of the user's history, latest first."""
    field = next((field.name for field in features.spec().fields if field.kind == "history"), "liked")
    users = features.table("users/as_of=date", columns=[field], filter=pc.field("user_id") == user_id)
    indices = [item for row in users[field].to_pylist() for item in reversed(row)]
    items = features.table("items", columns=["item", "item_id"], filter=pc.field("item").isin(indices))
    ids = dict(zip(items["item"].to_pylist(), items["item_id"].to_pylist(), strict=True))
    return [ids[item] for item in indices]

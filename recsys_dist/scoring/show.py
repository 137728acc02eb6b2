"""A user's published list beside the history it was made from, for people."""

import datetime as dt
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
from deltalake import DeltaTable

from recsys_dist.errors import DataError
from recsys_dist.scoring.publish import read_user
from recsys_dist.workspace import Run, Workspace

WIDTH = 46


def show_user(workspace: Workspace, user_id: str, date: dt.date | None = None) -> str:
    """Two columns: the user's latest liked items before the list's date, and the list with its reasons.

    Args:
        workspace: its published table is read.
        user_id: as in the log.
        date: of the list; default: the latest one.

    Raises:
        DataError: nothing is published, or not for this user.
    """
    rows = read_user(f"{workspace.uri}/topk", user_id, date)
    scored = next((run for run in workspace.runs("score") if run.run_id == rows[0]["run_id"]), None)
    if scored is None:
        raise DataError(
            f"The list was made by the score run {rows[0]['run_id']}, which has no manifest: it was "
            f"removed, or stopped just after it published. Run jobs/score.py again."
        )
    wanted = scored.inputs["features"]
    features = next((run for run in workspace.runs("features") if run.run_id == wanted), None)
    if features is None:
        raise DataError(
            f"The list was made from the features run {wanted}, which is gone from {workspace.uri}."
        )
    titles, history = _titles(features), _history(features, user_id)
    left = [f"Liked last, before {rows[0]['date']}", ""] + [_cut(titles[item], WIDTH - 2) for item in history]
    right = ["Recommended", ""]
    for row in rows:
        title = _cut(titles[row["item_id"]], WIDTH)
        right += [f"{row['rank']:>2}. {title}", f"    {_reason(row, titles)}"]
    height = max(len(left), len(right))
    left += [""] * (height - len(left))
    right += [""] * (height - len(right))
    lines = [f"{one:<{WIDTH}}{two}".rstrip() for one, two in zip(left, right, strict=True)]
    return "\n".join([f"User {user_id}", *lines])


def sample_users(table: str, date: dt.date, n: int) -> list[str]:
    """Ids of n users with a list for the date, spread over all of them."""
    if not n:
        return []
    of_date = (pc.field("date") == pa.scalar(date, pa.date32())) & (pc.field("rank") == 1)
    lists = DeltaTable(table).to_pyarrow_dataset().to_table(columns=["user_id"], filter=of_date)
    ids = sorted(lists["user_id"].to_pylist())
    return [ids[place] for place in sorted({len(ids) * (i + 1) // (n + 1) for i in range(n)})] if ids else []


def _reason(row: dict[str, Any], titles: dict[str, str]) -> str:
    found = "found by " + ", ".join(row["sources"])
    if row["reason"]["kind"] == "explore":
        return f"drawn with probability {row['propensity']:.3f}; {found}"
    if row["reason"]["kind"] != "history":
        return f"{row['reason']['kind']}; {found}"
    because = [_cut(titles[item], 24) for item in row["reason"]["item_ids"][:2]]
    return f"because of {' and '.join(because)}; {found}"


def _cut(text: str, width: int) -> str:
    """Of so many characters at most: also a text without spaces, as an id is, keeps its beginning."""
    text = " ".join(text.split())
    return text if len(text) <= width else f"{text[: width - 1].rstrip()}…"


def _titles(features: Run) -> dict[str, str]:
    items = features.table("items", columns=["item_id", "title"])
    ids, titles = items["item_id"].to_pylist(), items["title"].to_pylist()
    return {item: title or item for item, title in zip(ids, titles, strict=True)}


def _history(features: Run, user_id: str) -> list[str]:
    """Raw ids of the user's history, latest first."""
    field = features.spec().shown_history
    users = features.table("users/as_of=date", columns=[field], filter=pc.field("user_id") == user_id)
    indices = [item for row in users[field].to_pylist() for item in reversed(row)]
    items = features.table("items", columns=["item", "item_id"], filter=pc.field("item").isin(indices))
    ids = dict(zip(items["item"].to_pylist(), items["item_id"].to_pylist(), strict=True))
    return [ids[item] for item in indices]

"""Users as the page shows them: what they liked before, and what was recommended to them, and why.

Legend: B users, K places of a list.
"""

from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from jinja2.utils import htmlsafe_json_dumps

from recsys_dist.config import Config
from recsys_dist.evaluation.labels import LABELS
from recsys_dist.recall.inner_product import Lists
from recsys_dist.schema import UNKNOWN, padded
from recsys_dist.scoring.models import Models
from recsys_dist.scoring.reasons import reasons
from recsys_dist.scoring.users import with_context

USERS, BYTES = 2000, 2_500_000
"""At most so many users are shown, and so many bytes of JSON; of more, every second, third, ..."""
LENGTH, HISTORY = 10, 10
"""Places of a list, and items of a history, that are shown."""
BECAUSE = 2
"""Items of the history that a reason names."""
AT_ONCE = 256
LONGEST = 120
"""Letters of a title."""


def shown_users(
    config: Config, models: Models, users: pa.Table, truth: np.ndarray, lists: pa.Table
) -> dict[str, Any]:
    """The page's data of its searchable list, JSON types, no larger than BYTES.

    Args:
        config: the settings.
        models: of the evaluation.
        users: of `held_out`.
        truth: likewise.
        lists: of one model, schema LISTS.

    Returns:
        `users`, each with `id`, `history` (places in `titles`, the latest first), `liked` (number of held-out
        items that were liked) and `list`, whose entries have `title` (a place in `titles`), `score`,
        `sources` (places in `sources`), `kind` and `because` (of the reason) and `hit`; and `of`, the number
        of all users.
    """
    size = min(len(users), USERS)
    while True:
        rows = np.unique(np.linspace(0, len(users) - 1, size).round().astype(np.int64))
        found = _shown(config, models, users, rows, truth, lists)
        size //= 2
        if not size or len(htmlsafe_json_dumps(found)) <= BYTES:
            return found


def _shown(
    config: Config, models: Models, users: pa.Table, rows: np.ndarray, truth: np.ndarray, lists: pa.Table
) -> dict[str, Any]:
    places: dict[int, int] = {}
    sources: dict[str, int] = {}
    chosen = users.take(pa.array(rows))
    wanted = pc.is_in(lists["user"], value_set=chosen["user"].combine_chunks())
    of_user: dict[int, list[dict[str, Any]]] = {user: [] for user in chosen["user"].to_pylist()}
    for row in (
        lists.filter(pc.and_(wanted, pc.less_equal(lists["rank"], LENGTH))).sort_by("rank").to_pylist()
    ):
        of_user[row["user"]].append(row)
    kept = truth[np.isin(truth[:, 0], rows)]
    liked: dict[int, set[int]] = {row: set() for row in rows.tolist()}
    for row, item in kept.tolist():
        liked[row].add(item)

    def place(item: int) -> int:
        return places.setdefault(item, len(places))

    shown = []
    spec = models.items.spec
    history_column = chosen[spec.shown_history].to_pylist()
    ids, because = chosen["user_id"].to_pylist(), _because(config, models, chosen, of_user)
    days = chosen["day"].to_pylist()
    for at, (row, user) in enumerate(zip(rows.tolist(), of_user, strict=True)):
        history = [item for item in reversed(history_column[at]) if item != UNKNOWN][:HISTORY]
        entries = []
        for listed, spoken in zip(of_user[user], because[user], strict=True):
            item = listed["item"]
            entries.append(
                {
                    "title": place(item),
                    "score": round(listed["score"], 2),
                    "sources": [sources.setdefault(name, len(sources)) for name in listed["sources"] or []],
                    "kind": "history" if spoken else str(models.standing.kinds(item, days[at])),
                    "because": [place(other) for other in spoken],
                    "hit": item in liked[row],
                }
            )
        shown.append(
            {
                "id": ids[at],
                "history": [place(item) for item in history],
                "liked": len(liked[row]),
                "list": entries,
            }
        )
    shown.sort(key=lambda user: (len(user["id"]), user["id"]))
    return {
        "users": shown,
        "of": len(users),
        "titles": _titles(models.items.table, list(places)),
        "sources": [LABELS.get(name, name) for name in sources],
    }


@torch.inference_mode()
def _because(
    config: Config, models: Models, users: pa.Table, of_user: dict[int, list[dict[str, Any]]]
) -> dict[int, list[list[int]]]:
    """Of each user's entries, the items of the history that speak most for it."""
    found: dict[int, list[list[int]]] = {}
    for start in range(0, len(users), AT_ONCE):
        batch = users.slice(start, AT_ONCE)
        keys = batch["user"].to_pylist()
        items = pa.chunked_array([pa.array([[row["item"] for row in of_user[key]] for key in keys])])
        items_BK = torch.as_tensor(padded(items.cast(pa.list_(pa.int64())), LENGTH))
        state = with_context(models.items, batch, batch["day"].to_numpy(), config.score.filter_seen)
        why = reasons(models.ranker, state, Lists(items_BK, torch.zeros(items_BK.shape)))
        for key, of_places in zip(keys, why.items.tolist(), strict=True):
            spoken = [[item for item in items if item != UNKNOWN][:BECAUSE] for items in of_places]
            found[key] = spoken[: len(of_user[key])]
    return found


def _titles(items: pa.Table, wanted: list[int]) -> list[str]:
    """Titles of items by their indices, or their ids where they have none."""
    rows = items.filter(pc.is_in(items["item"], value_set=pa.array(wanted, items["item"].type))).to_pylist()
    titles = {row["item"]: row["title"] or row["item_id"] for row in rows}
    found = [str(titles[item]) for item in wanted]
    return [title if len(title) <= LONGEST else f"{title[: LONGEST - 1]}…" for title in found]

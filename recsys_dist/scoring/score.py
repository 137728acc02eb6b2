"""Models to the published table: every user's list for a date, checked, then committed at once."""

import datetime as dt
from typing import Any

import pyarrow as pa
import pyarrow.fs

from recsys_dist.config import Config
from recsys_dist.errors import RetryableError
from recsys_dist.schema import TOPK
from recsys_dist.scoring import gates
from recsys_dist.scoring.chosen import choose, told
from recsys_dist.scoring.lists import LISTS, finished
from recsys_dist.scoring.partitions import score_partitions
from recsys_dist.scoring.publish import publish, version, version_of
from recsys_dist.workspace import OpenRun

SUMMED = (
    "users",
    "served",
    "active",
    "active_served",
    "full",
    "rows",
    "explained",
    "explored",
    "without_history",
    "not_finite",
    "items_twice",
    "ranks_twice",
)
"""Of the partitions' figures."""


def score(config: Config, run: OpenRun) -> dict[str, Any]:
    """Score every user as of the date, or those of `score.users`, and publish. Returns the run's figures.

    Raises:
        DataError: the models' evaluation did not pass, the model is damaged, or the lists are not fit to be
            published. The published table is untouched.
        RetryableError: another run published first.
    """
    gates.require_passed(run.inputs["evaluation"], config)
    run.inputs["deepfm"].require_intact("model")
    features = run.inputs["features"]
    date = dt.date.fromisoformat(features.spec().date)
    users = features.table("users/as_of=date", columns=["user", "user_id"])
    chosen = choose(config.score.users, users) if config.score.users is not None else None
    if chosen:
        print(told(chosen), flush=True)
        users = chosen.users
    table = f"{run.workspace.uri}/topk"
    since = version(table)
    partitions = score_partitions(config, run, date, users["user"].to_numpy())
    rules = partitions[0]["files"]
    if any(part["files"] != rules for part in partitions):
        raise RetryableError(
            "A file of score.rules was changed while the lists were made, so that not all obey the same ids. "
            "Nothing was published; run again."
        )
    for file in rules:
        if file["unknown"]:
            print(
                f"score: {file['unknown']:,} ids of {file['path']} are no item's: {file['such_as']}",
                flush=True,
            )
    lists = pa.dataset.dataset(f"{run.path}/{LISTS}", filesystem=run.filesystem, schema=TOPK)
    figures = {
        "date": date.isoformat(),
        **({"chosen": chosen.figures()} if chosen else {}),
        "files": rules,
        **{name: sum(part[name] for part in partitions) for name in SUMMED},
        "listed": _distinct_items(lists),
        **{name: max(part[name] for part in partitions) for name in ("listable", "untrained_items")},
        "proposed": {
            source: sum(part["proposed"][source] for part in partitions)
            for source in partitions[0]["proposed"]
        },
    }
    if figures["without_history"] or figures["untrained_items"]:
        print(
            f"score: {figures['without_history']:,} of {figures['users']:,} users have liked nothing yet; "
            f"{figures['untrained_items']:,} of {figures['listable']:,} items have no positive train event",
            flush=True,
        )
    # What a few users get says nothing of the catalogue.
    asked = config.score.gates.model_copy(update={"coverage": 0.0} if chosen else {})
    gates.check(figures, asked)
    # A driver that died after its commit and before the manifest has published them already.
    published = version_of(table, date, run.run_id, figures["rows"])
    if published is None:
        ids = users["user_id"] if chosen else None
        published = publish(table, lists, date, run.run_id, since, ids)
    return {**figures, "table": table, "version": published}


def left_behind(run: OpenRun) -> bool:
    """Has a driver that is no longer there left partitions of this run, to go on with?

    Not those of a run with a file of users or items: others may stand in it by now. Nor those on a root that
    is not local, where nobody can tell whether the driver is still there.
    """
    if not isinstance(run.filesystem, pyarrow.fs.LocalFileSystem):
        return False
    asked = run.key["config"]["score"]
    files = (asked["users"], asked["rules"]["allow"], asked["rules"]["deny"])
    return all(file is None for file in files) and bool(finished(run))


def _distinct_items(lists: pa.dataset.Dataset) -> int:
    """The number of different items in the lists."""
    found: set[str] = set()
    for batch in lists.to_batches(columns=["item_id"]):
        found.update(batch["item_id"].unique().to_pylist())
    return len(found)

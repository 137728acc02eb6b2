"""Models to the published table: every user's list for a date, checked, then committed at once."""

import datetime as dt
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from recsys_dist.cluster import local_or_cluster
from recsys_dist.config import Config
from recsys_dist.errors import DataError
from recsys_dist.schema import TOPK
from recsys_dist.scoring.partitions import LISTS, score_partitions
from recsys_dist.scoring.publish import publish
from recsys_dist.workspace import OpenRun


def score(config: Config, run: OpenRun) -> dict[str, Any]:
    """Score every user as of the date and publish. Returns the run's figures.

    Raises:
        DataError: the models' evaluation did not pass, or the lists are not fit to be published. The
            published table is untouched.
        RetryableError: another run published first.
    """
    verdict = run.inputs["evaluation"].manifest["figures"]["verdict"]
    if not verdict["passed"]:
        raise DataError(
            f"The evaluation {run.inputs['evaluation'].run_id} did not pass: {verdict['text']}. Nothing was "
            f"published; the table still has what it had."
        )
    date = dt.date.fromisoformat(run.inputs["features"].spec().date)
    with local_or_cluster():
        partitions = score_partitions(config, run, date)
    lists = pa.dataset.dataset(f"{run.path}/{LISTS}", filesystem=run.filesystem, schema=TOPK)
    figures = {
        "date": date.isoformat(),
        "users": sum(part["users"] for part in partitions),
        "served": sum(part["served"] for part in partitions),
        "rows": sum(part["rows"] for part in partitions),
        "explained": sum(part["explained"] for part in partitions),
        "proposed": {
            source: sum(part["proposed"][source] for part in partitions) for source in config.score.candidates
        },
    }
    _check(lists, figures)
    table = f"{run.workspace.uri}/topk"
    rows = pa.RecordBatchReader.from_batches(TOPK, lists.to_batches())
    return {**figures, "table": table, "version": publish(table, rows, date, run.run_id)}


def _check(lists: pa.dataset.Dataset, figures: dict[str, Any]) -> None:
    """Refuse lists that must not be seen by anyone."""
    if not figures["rows"]:
        raise DataError(f"Not one of {figures['users']} users got a list; nothing was published.")
    wrong = lists.count_rows(filter=pc.is_nan(pc.field("score")))
    if wrong:
        raise DataError(f"{wrong} of {figures['rows']} scores are NaN; nothing was published.")
    pairs = lists.to_table(columns=["user_id", "item_id"])
    twice = pairs.num_rows - pairs.group_by(["user_id", "item_id"]).aggregate([]).num_rows
    if twice:
        raise DataError(f"{twice} items stand twice in a user's list; nothing was published.")

"""A partition's users to rows of the published table."""

import datetime as dt
import json
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch

from recsys_dist.config import Config
from recsys_dist.deepfm.items import day_number
from recsys_dist.schema import REASON, TOPK, UNKNOWN
from recsys_dist.scoring.gates import counts
from recsys_dist.scoring.lists import FIGURES, LISTS, figures_of
from recsys_dist.scoring.models import Models, load_models
from recsys_dist.scoring.reasons import reasons
from recsys_dist.scoring.rules import Rules
from recsys_dist.scoring.users import Users, with_context
from recsys_dist.workspace import OpenRun

DAYS = 1_000_000
"""More than there are."""


class PartitionScorer:
    """Loads the models once, then scores one partition after another.

    Args:
        config: the settings.
        run: that the lists become part of.
        date: that they are for.
        device: on which the models are, and all that is made of them.
    """

    def __init__(
        self, config: Config, run: OpenRun, date: dt.date, device: torch.device | str = "cpu"
    ) -> None:
        self.config, self.run, self.date = config, run, date
        self.device = torch.device(device)
        # Other draws every day, and the same ones however often a day is done.
        seed = config.seed * DAYS + day_number(date)
        with self.device:
            self.models = load_models(run.inputs, config.score)
            self.rules = Rules(config.score.rules, self.models.items, seed)
        self.users = run.inputs["features"].dataset("users/as_of=date")

    def score(self, part: int, users: np.ndarray) -> dict[str, Any]:
        """Score some users, write the partition's file, return its figures.

        Args:
            part: number of the partition.
            users: their indices, in order.
        """
        # A worker may die when it has written its file, before it has told anyone.
        written = figures_of(self.run, part)
        if written is not None:
            return written
        settings = self.config.score
        # The range alone decides which parts of the files are read.
        between = (pc.field("user") >= int(users[0])) & (pc.field("user") <= int(users[-1]))
        rows = self.users.to_table(filter=between & pc.field("user").isin(users)).sort_by("user")
        days = np.full(len(rows), day_number(self.date), np.int32)
        with self.device:
            batch = with_context(self.models.items, rows, days, settings.filter_seen)
            table, figures = published_rows(
                self.models, self.rules, self.rules.limit(batch), settings.k, self.date, self.run.run_id
            )
        self.run.write_table(LISTS, table.replace_schema_metadata({FIGURES: json.dumps(figures)}), part)
        return figures


@torch.inference_mode()
def published_rows(
    models: Models, rules: Rules, users: Users, k: int, date: dt.date, run_id: str
) -> tuple[pa.Table, dict[str, Any]]:
    """The lists of a batch of users as rows of the published table (schema TOPK), and their figures."""
    lists, scores_BKS, chosen = rules.ranked(models.published, users, min(k, len(models.items)))
    proposed_BKS = ~torch.isneginf(scores_BKS)
    why = reasons(models.ranker, users, lists)
    explored_BK = chosen.explored.numpy(force=True)
    names = np.array(list(models.published.sources))
    item_ids = np.append([""], models.items.table["item_id"].to_numpy(zero_copy_only=False))
    rows, places = np.nonzero(lists.items.numpy(force=True) != UNKNOWN)
    listed = lists.items.numpy(force=True)[rows, places]
    spoken = why.items[rows, places]
    n, proposed = len(rows), proposed_BKS.numpy(force=True)[rows, places]
    kind = models.standing.kinds(listed, day_number(date))
    kind = np.where((spoken != UNKNOWN).any(axis=1), "history", kind)
    kind = np.where(explored_BK[rows, places], "explore", kind)
    table = pa.table(
        {
            "date": pa.array([date] * n, pa.date32()),
            "user_id": users.table["user_id"].take(pa.array(rows)),
            "rank": pa.array(places + 1, pa.int32()),
            "item_id": pa.array(item_ids[listed], pa.string()),
            "score": pa.array(lists.scores.numpy(force=True)[rows, places]),
            "sources": _lists(np.broadcast_to(names, (n, len(names))), proposed),
            "reason": pa.StructArray.from_arrays(
                [
                    pa.array(kind, pa.string()),
                    _lists(item_ids[spoken], spoken != UNKNOWN).cast(pa.list_(pa.string())),
                    _lists(why.contributions[rows, places], spoken != UNKNOWN),
                ],
                fields=list(REASON),
            ),
            "run_id": pa.array([run_id] * n, pa.string()),
            "source_scores": _lists(scores_BKS.numpy(force=True)[rows, places], proposed),
            "propensity": pa.array(chosen.propensity.numpy(force=True)[rows, places]),
        },
        schema=TOPK,
    )
    by_source = proposed_BKS.sum(dim=(0, 1)).tolist()
    figures = {
        **counts(
            table,
            users.table["user_id"],
            np.minimum(_allowed(users), k),
            active=pc.list_value_length(users.table["seen"]).to_numpy() > 0,
        ),
        "listable": int(users.listable[0].sum()),
        # What the models know nothing of is served from what is known: context, popularity, content.
        "without_history": int(
            (pc.list_value_length(users.table["latest"]).fill_null(0).to_numpy() == 0).sum()
        ),
        "untrained_items": int((users.listable[0, 1:].numpy(force=True) & (models.items.counts == 0)).sum()),
        "proposed": dict(zip(names.tolist(), by_source, strict=True)),
        "explained": int((spoken != UNKNOWN).any(axis=1).sum()),
        "explored": int(explored_BK.sum()),
        "files": rules.files,
    }
    return table, figures


def _allowed(users: Users) -> np.ndarray:
    """[B] the number of items that each user's list may hold."""
    rows, items = users.excluded
    listable_BI = users.listable.expand(len(users), -1)
    excluded_B = torch.bincount(rows, weights=listable_BI[rows, items].double(), minlength=len(users))
    return (listable_BI.sum(dim=1) - excluded_B).long().numpy(force=True)


def _lists(values: np.ndarray, chosen: np.ndarray) -> pa.ListArray:
    """Each row's chosen values as an Arrow list: both [N, M]."""
    offsets = np.append([0], np.cumsum(chosen.sum(axis=1))).astype(np.int32)
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(values[chosen]))

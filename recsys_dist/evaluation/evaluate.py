"""Models and held-out events to lists, metrics and a report.

Every model ranks the whole catalogue, or its candidates from it, for every user who has a positive event in
the test part, from what was known before that user's test part, as of the day of that first event.

Legend: U users, K list length, I items.
"""

from collections.abc import Iterator
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch

from recsys_dist.config import Config
from recsys_dist.deepfm.items import Items, days_of
from recsys_dist.errors import ConfigError, DataError
from recsys_dist.evaluation.metrics import METRICS, coverage, novelty
from recsys_dist.evaluation.report import write_report
from recsys_dist.evaluation.significance import bootstrap, coverage_interval
from recsys_dist.schema import LISTS, UNKNOWN, SeenFilter, without_seen
from recsys_dist.scoring.models import load_models
from recsys_dist.scoring.scorers import Scorer
from recsys_dist.scoring.users import with_context
from recsys_dist.workspace import OpenRun, Run

USERS_AT_ONCE = 4096


def evaluate(config: Config, run: OpenRun) -> dict[str, Any]:
    """Write lists/, metrics.json and report.html, and return the run's figures with the verdict.

    Raises:
        ConfigError: evaluation.metric is none that is computed.
        DataError: no user has a positive event in the test part.
    """
    names = [f"{name}@{k}" for name in (*METRICS, "coverage", "novelty") for k in config.evaluation.k]
    if config.evaluation.metric not in names:
        raise ConfigError(
            f"evaluation.metric={config.evaluation.metric!r}, expected one of {', '.join(names)}"
        )
    models = load_models(run.inputs, config.score)
    users, truth = held_out(run.inputs["features"], config.score.filter_seen)
    results = {}
    tables = []
    for name, scorer in models.all().items():
        items_UK, scores_UK = rank(config, models.items, scorer, users)
        results[name] = measure(config, items_UK, truth, users, models.items)
        tables.append(_lists(name, users, items_UK, scores_UK))
    lists = pa.concat_tables(tables)
    run.write_table("lists", lists)
    metrics = {
        "protocol": {
            "split": config.section("split"),
            "k": list(config.evaluation.k),
            "users": "every user with a relevant item",
            "relevant": "items of the user's positive events of the test part, but those left out as seen",
            "candidates": f"all items active on the day of the user's first relevant event, but the user's "
            f"own before the test part (filter_seen: {config.score.filter_seen})",
            "fitted_on": "train",
            "intervals": f"95%, over users, {config.evaluation.bootstrap} resamplings",
        },
        "users": len(users),
        "models": results,
    }
    run.write_json("metrics.json", metrics)
    verdict = _verdict(config, results)
    write_report(run, metrics, verdict, lists)
    return {"users": len(users), "verdict": verdict, "models": results}


def held_out(
    features: Run, filter_seen: SeenFilter, part: Literal["valid", "test"] = "test"
) -> tuple[pa.Table, np.ndarray]:
    """Users as of a part who have positives in it, with `day` of their first one, and the truth.

    Ascending by day, so that few batches share one. The truth is [N, 2]: (row of the user, relevant item),
    distinct. Items that are left out of every list because the user has seen them are not relevant: no model
    could list them.
    """
    events = features.table(
        "examples",
        columns=["user", "item", "timestamp"],
        filter=(pc.field("split") == part) & (pc.field("label") > 0),
    )
    users = features.table(f"users/as_of={part}", filter=pc.field("user").isin(events["user"]))
    users = users.sort_by("user")
    events = without_seen(events, users, filter_seen)
    if not events.num_rows:
        raise DataError(
            f"{features.uri}: no positive event in the {part} part, so nothing can be evaluated. Check "
            f"label.positive_when, split.fractions and score.filter_seen."
        )
    first = events.group_by("user").aggregate([("timestamp", "min")]).sort_by("user")
    users = users.filter(pc.is_in(users["user"], first["user"].combine_chunks()))
    users = users.append_column("day", pa.array(days_of(first["timestamp_min"])))
    users = users.sort_by([("day", "ascending"), ("user", "ascending")])
    row_of = np.full(pc.max(users["user"]).as_py() + 1, -1)
    row_of[users["user"].to_numpy()] = np.arange(len(users))
    truth = np.stack([row_of[events["user"].to_numpy()], events["item"].to_numpy()], axis=1)
    return users, np.unique(truth, axis=0)


@torch.inference_mode()
def rank(config: Config, catalogue: Items, scorer: Scorer, users: pa.Table) -> tuple[np.ndarray, np.ndarray]:
    """[U, K] items and scores at the greatest K asked for."""
    k = max(config.evaluation.k)
    items, scores = [], []
    for rows in _batches(users, USERS_AT_ONCE):
        batch = with_context(catalogue, rows, rows["day"].to_numpy(), config.score.filter_seen)
        lists = scorer.top_k(batch, k)
        items.append(lists.items.numpy())
        scores.append(lists.scores.numpy())
    return np.concatenate(items), np.concatenate(scores)


def measure(
    config: Config, items_UK: np.ndarray, truth: np.ndarray, users: pa.Table, catalogue: Items
) -> dict[str, dict[str, float]]:
    """Every metric of these lists, with its interval: users and truth are those of `held_out`."""
    relevant_U = np.bincount(truth[:, 0], minlength=len(users))
    width = len(catalogue) + 1
    wanted = truth[:, 0] * width + truth[:, 1]
    hits_UK = np.isin(np.arange(len(users))[:, None] * width + items_UK, wanted)
    per_user = {
        f"{name}@{k}": metric(hits_UK[:, :k], relevant_U)
        for name, metric in METRICS.items()
        for k in config.evaluation.k
    }
    intervals = bootstrap(np.stack(list(per_user.values()), axis=1), config.evaluation.bootstrap, config.seed)
    figures = {
        name: {"value": float(values.mean()), "low": float(low), "high": float(high)}
        for (name, values), (low, high) in zip(per_user.items(), intervals, strict=True)
    }
    for k in config.evaluation.k:
        listed_I = np.bincount(items_UK[:, :k].ravel(), minlength=width)[1:]
        present_I = listed_I[catalogue.present]
        low, high = coverage_interval(present_I, len(users))
        figures[f"coverage@{k}"] = {"value": coverage(present_I), "low": low, "high": high}
        figures[f"novelty@{k}"] = {"value": novelty(listed_I, catalogue.counts)}
    return figures


def _lists(model: str, users: pa.Table, items_UK: np.ndarray, scores_UK: np.ndarray) -> pa.Table:
    rows, places = np.nonzero(items_UK != UNKNOWN)
    return pa.table(
        {
            "model": pa.array([model] * len(rows)),
            "user": users["user"].take(pa.array(rows)),
            "rank": pa.array(places + 1, pa.int32()),
            "item": pa.array(items_UK[rows, places].astype(np.int32)),
            "score": pa.array(scores_UK[rows, places]),
        },
        schema=LISTS,
    )


def _verdict(config: Config, results: dict[str, Any]) -> dict[str, Any]:
    """May the lists of score.mode be published? They must be better than the declared model's."""
    metric, rival = config.evaluation.metric, config.evaluation.must_beat
    model = config.score.published
    ours = results[model][metric]["value"]
    if rival is None:
        text = f"{model} {metric} is {ours:.4f}, and nothing is to be beaten"
        return {"passed": True, "model": model, "text": text}
    theirs = results[rival][metric]["value"]
    passed = ours > theirs
    text = f"{model} {metric} {ours:.4f} is {'above' if passed else 'not above'} {rival}'s {theirs:.4f}"
    return {"passed": passed, "model": model, "text": text}


def _batches(table: pa.Table, size: int) -> Iterator[pa.Table]:
    """A table in consecutive parts of at most `size` rows."""
    for start in range(0, table.num_rows, size):
        yield table.slice(start, size)

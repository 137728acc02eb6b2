"""Models and held-out events to lists, metrics and a report.

Every model ranks the whole catalogue, or its candidates from it, for every user who has a positive event in
the test part, from what was known before that user's test part, as of the day of that first event.

Legend: U users, K list length, I items.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch

from recsys_dist.config import FIT_ON, Config
from recsys_dist.deepfm.items import Items, days_of
from recsys_dist.errors import ConfigError, DataError
from recsys_dist.evaluation.large import measured_by_spark
from recsys_dist.evaluation.measured import BySegment, Catalogue, figures, measure
from recsys_dist.evaluation.metrics import METRICS, Values
from recsys_dist.evaluation.nights import interval, measured_alike, published_last
from recsys_dist.evaluation.predictions import predictions
from recsys_dist.evaluation.report import write_report
from recsys_dist.evaluation.segments import known_events, told, user_segments
from recsys_dist.evaluation.significance import bootstrap, fallen, randomisation
from recsys_dist.schema import LISTS, RELEVANT, UNKNOWN, SeenFilter, without_seen
from recsys_dist.scoring.models import load_models
from recsys_dist.scoring.scorers import Popularity, Scorer, TwoStage, no_score, scored_by
from recsys_dist.scoring.users import with_context
from recsys_dist.workspace import OpenRun, Run

USERS_AT_ONCE = 4096
SCORES_AT_ONCE = 1 << 28
"""Of a batch of users for all items, at most: 1 GiB."""
BESIDE_HITS = ("serendipity", "diversity", "popularity", "coverage", "novelty", "gini")
"""Metrics beside METRICS: of each user, or of all lists together."""
NOT_BETTER = ("popularity", "gini")
"""Of which more is not better, so that nothing can be held against them."""


def evaluate(config: Config, run: OpenRun) -> dict[str, Any]:
    """Write lists/, relevant/, metrics.json and report.html, and return the run's figures with the verdict.

    Raises:
        ConfigError: evaluation.metric, or one of evaluation.may_fall, is none that is computed.
        DataError: no user has a positive event in the test part, or the model is damaged.
    """
    computed = [name for name in (*METRICS, *BESIDE_HITS) if name not in NOT_BETTER]
    if not run.inputs["features"].spec().attributes(None, "recall.content"):
        computed.remove("diversity")  # of attributes that there are none of
    names = [f"{name}@{k}" for name in computed for k in config.evaluation.k]
    asked = {"metric": [config.evaluation.metric], "may_fall": list(config.evaluation.may_fall)}
    for key, wanted in asked.items():
        wrong = [name for name in wanted if name not in names]
        if wrong:
            raise ConfigError(
                f"evaluation.{key}: {', '.join(wrong)} is not computed, or more of it is not better; "
                f"expected are {', '.join(names)}"
            )
    run.inputs["deepfm"].require_intact("model")
    models = load_models(run.inputs, config.score)
    scorers = models.all()
    parts = FIT_ON[run.inputs["deepfm"].manifest["config"]["deepfm"]["fit_on"]]
    # Who is to be beaten knows as much.
    scorers["popularity"] = Popularity(models.items, positives(run.inputs["features"], models.items, parts))
    fitted_on = {
        stage: run.inputs[stage].manifest["config"][stage]["fit_on"] for stage in ("als", "recall", "deepfm")
    }
    metrics, lists, users, truth = hold_out(
        config, run, models.items, list(scorers), scorers.__getitem__, config.score.published, fitted_on
    )
    metrics["predictions"] = predictions(run.inputs["features"], models.ranker)
    run.write_json("metrics.json", metrics)
    results = metrics["models"]
    verdict = _verdict(config, metrics, published_last(run.workspace))
    write_report(config, run, models, metrics, verdict, lists, users, truth)
    told = {"predictions": metrics["predictions"]} if metrics["predictions"] else {}
    return {"users": metrics["users"], "verdict": verdict, "models": results, **told}


def hold_out(
    config: Config,
    run: OpenRun,
    items: Items,
    names: Sequence[str],
    scorer_of: Callable[[str], Scorer],
    reference: str,
    fitted_on: dict[str, str],
    own_filter: Mapping[str, SeenFilter] | None = None,
) -> tuple[dict[str, Any], pa.Table, pa.Table, np.ndarray]:
    """Measure models on the test part, write lists/ and relevant/, and return what metrics.json has, the
    lists, and the users and truth of `held_out`.

    Args:
        config: of the lengths, intervals and seen items.
        run: has the features run among its inputs.
        items: of that run.
        names: of the models.
        scorer_of: makes or gives one of them; none is needed for longer than it ranks.
        reference: which of them the others are held against.
        fitted_on: stage to the parts of the log that its models know, a key of FIT_ON.
        own_filter: which seen items those models leave out that are asked for more than others: what counts
            as relevant is the same for all.

    Raises:
        DataError: no user has a positive event in the test part.
    """
    features, settings = run.inputs["features"], config.evaluation
    users, truth = held_out(features, config.score.filter_seen)
    catalogue = Catalogue(items, settings.head_share)
    by_segment = BySegment(user_segments(known_events(features, users)), truth, catalogue)
    large = len(names) * len(users) * max(settings.k) >= settings.spark_rows
    measured, tables = {}, []
    own_filter = own_filter or {}
    for name in names:
        scorer = scorer_of(name)
        filter_seen = own_filter.get(name)
        items_UK, scores_UK, sources_UKS = rank(config, items, name, scorer, users, filter_seen)
        sources = list(scorer.sources) if isinstance(scorer, TwoStage) else []
        tables.append(_lists(name, users, items_UK, scores_UK, sources, sources_UKS))
        if not large:
            measured[name] = measure(settings.k, items_UK, truth, catalogue)
    lists = pa.concat_tables(tables)
    run.write_table("lists", lists)
    run.write_table("relevant", _relevant(users, truth))
    by_spark = measured_by_spark(config, run, names, users, catalogue, len(lists)) if large else None
    results, values = {}, {}
    for name, of in by_spark or measured.items():
        results[name] = figures(config, of, len(users), catalogue)
        by_segment.add(name, of, config)
        values[name] = of.of_users
    metrics = {
        "protocol": {
            "split": config.section("split"),
            "label": config.section("label"),
            "k": list(settings.k),
            "users": "every user with a relevant item",
            "relevant": "items of the user's positive events of the test part, but those left out as seen",
            "candidates": f"all items active on the day of the user's first relevant event, but the user's "
            f"own before the test part (filter_seen: {config.score.filter_seen})",
            "own_filter": dict(own_filter),
            "fitted_on": {stage: " and ".join(FIT_ON[parts]) for stage, parts in fitted_on.items()},
            "intervals": f"95%, over users, {settings.bootstrap} resamplings",
            "segments": told(settings.head_share),
        },
        "users": len(users),
        "models": results,
        "compared": _compared(config, values, reference),
        "ahead": _ahead(config, values),
        "segments": by_segment.found(),
    }
    return metrics, lists, users, truth


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


def positives(features: Run, items: Items, parts: Sequence[str]) -> np.ndarray:
    """[I] positive events of the items from 1 on in some parts of the log."""
    if tuple(parts) == ("train",):
        return items.counts
    kept = pc.field("split").isin(list(parts)) & (pc.field("label") > 0)
    counts = np.zeros(len(items) + 1, np.int64)
    for batch in features.dataset("examples").to_batches(columns=["item"], filter=kept):
        counts += np.bincount(batch["item"].to_numpy(), minlength=len(counts))
    return counts[1:]


@torch.inference_mode()
def rank(
    config: Config,
    catalogue: Items,
    name: str,
    scorer: Scorer,
    users: pa.Table,
    filter_seen: SeenFilter | None = None,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """[U, K] items and scores at the greatest K asked for, and [U, K, S] which sources proposed the item: no
    S where the model has none. `filter_seen` is by default that of the configuration.

    Raises:
        DataError: a score of the model, which has this name, is NaN or infinite.
    """
    k = max(config.evaluation.k)
    filter_seen = filter_seen or config.score.filter_seen
    items, scores, sources = [], [], []
    for rows in _batches(users, max(1, min(USERS_AT_ONCE, SCORES_AT_ONCE // (len(catalogue) + 1)))):
        batch = with_context(catalogue, rows, rows["day"].to_numpy(), filter_seen)
        if isinstance(scorer, TwoStage):
            lists, proposed_BKS = scorer.rank(batch, k)
        else:
            with scored_by(name, batch):
                lists = scorer.top_k(batch, k)
            proposed_BKS = torch.empty(*lists.items.shape, 0)
        if lists.scores.isposinf().any():
            raise no_score(f"{name}: a score is infinite")
        items.append(lists.items.numpy())
        scores.append(lists.scores.numpy())
        sources.append(~torch.isneginf(proposed_BKS).numpy())
    return np.concatenate(items), np.concatenate(scores), np.concatenate(sources)


def _compared(config: Config, values: dict[str, dict[str, Values]], model: str) -> dict[str, Any]:
    """What the models' `evaluation.metric` is less than that of one of them, the interval of this, and p: the
    same users, in pairs.
    """
    metric = config.evaluation.metric
    if metric not in values[model]:
        return {"metric": metric, "with": model, "models": {}}
    found = {
        name: _difference(config, of[metric] - values[model][metric])
        for name, of in values.items()
        if name != model
    }
    return {"metric": metric, "with": model, "models": found}


def _ahead(config: Config, values: dict[str, dict[str, Values]]) -> dict[str, Any] | None:
    """By how much the best model's `evaluation.metric` is above the second's; None where no two have it."""
    metric = config.evaluation.metric
    means = {name: of[metric].mean() for name, of in values.items() if metric in of}
    best, *others = sorted(means, key=lambda name: -means[name])[:2] or [""]
    if not others:
        return None
    difference = _difference(config, values[best][metric] - values[others[0]][metric])
    return {"model": best, "second": others[0], **difference}


def _difference(config: Config, difference_U: Values) -> dict[str, float]:
    """The mean of a difference of the same users, its interval, and p."""
    settings = config.evaluation
    ((low, high),) = bootstrap(difference_U[:, None], settings.bootstrap, config.seed)
    p = randomisation(difference_U, settings.bootstrap, config.seed)
    return {"value": float(difference_U.mean()), "low": float(low), "high": float(high), "p": p}


def _lists(
    model: str,
    users: pa.Table,
    items_UK: np.ndarray,
    scores_UK: np.ndarray,
    names: Sequence[str] = (),
    sources_UKS: np.ndarray | None = None,
) -> pa.Table:
    """The lists as rows of LISTS, with the names of the S sources where the model has any."""
    rows, places = np.nonzero(items_UK != UNKNOWN)
    sources = pa.nulls(len(rows), LISTS.field("sources").type)
    if sources_UKS is not None and names:
        of_row, source = np.nonzero(sources_UKS[rows, places])
        ends = np.searchsorted(of_row, np.arange(len(rows) + 1)).astype(np.int32)
        sources = pa.ListArray.from_arrays(pa.array(ends), pa.array(np.array(names)[source], pa.string()))
    return pa.table(
        {
            "model": pa.array([model] * len(rows)),
            "user": users["user"].take(pa.array(rows)),
            "rank": pa.array(places + 1, pa.int32()),
            "item": pa.array(items_UK[rows, places].astype(np.int32)),
            "score": pa.array(scores_UK[rows, places]),
            "sources": sources,
        },
        schema=LISTS,
    )


def _relevant(users: pa.Table, truth: np.ndarray) -> pa.Table:
    columns = {"user": users["user"].take(pa.array(truth[:, 0])), "item": truth[:, 1].astype(np.int32)}
    return pa.table(columns, schema=RELEVANT)


def _verdict(config: Config, metrics: dict[str, Any], last: Run | None = None) -> dict[str, Any]:
    """May the lists of score.mode be published? They must be better than the declared model's, and no
    declared metric may have fallen too much since `last`, the evaluation of the lists that were published
    last, where that measured in the same way.
    """
    results = metrics["models"]
    verdict = _against_rival(config, results)
    if last is None:
        return verdict
    measured_last, may_fall = last.json("metrics.json"), config.evaluation.may_fall
    alike = measured_alike(measured_last, metrics)
    earlier = measured_last["models"].get(verdict["model"], {}) if alike else {}
    changes, wrong = {}, []
    unknown = [metric for metric in may_fall if metric not in earlier]
    if unknown:
        why = "did not measure it" if alike else "measured in another way"
        untold = f"{', '.join(unknown)}: not held against {last.run_id}, published last, which {why}"
        verdict |= {"not_compared": dict.fromkeys(unknown, why), "text": f"{verdict['text']}; {untold}"}
    for metric, most in may_fall.items():
        before, now = earlier.get(metric), results[verdict["model"]][metric]
        if before is not None:
            fell, chance = fallen(interval(before), interval(now))
            changes[metric] = {"before": before["value"], "now": now["value"], "chance": chance}
            if fell - chance > most:
                wrong.append(
                    f"{metric} fell from {before['value']:.4f} to {now['value']:.4f}, by {fell:.4f}, of "
                    f"which {chance:.4f} may be chance and {most:g} is allowed (evaluation.may_fall)"
                )
    passed = verdict["passed"] and not wrong
    text = "; ".join([verdict["text"], *wrong])
    return verdict | {"passed": passed, "text": text, "last": last.run_id, "changes": changes}


def _against_rival(config: Config, results: dict[str, Any]) -> dict[str, Any]:
    """Are the lists of score.mode better than the declared model's?"""
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

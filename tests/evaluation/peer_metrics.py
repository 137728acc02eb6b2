"""The same lists measured by ranx, ir_measures and RecTools: run with the Python of .venv/ranking.

    .venv/ranking/bin/python -P tests/evaluation/peer_metrics.py < INPUT.json

INPUT has `k`, lengths; `lists`, each user's items from the first place on, users without a list among them;
`relevant`, each user's relevant items; `train`, pairs of a user and an item. Prints JSON: library to metric
to a number a user, in the order of the users; and `rectools` to `coverage`, length to number.
"""

import json
import os
import sys
from typing import Any

os.environ["NUMBA_DISABLE_JIT"] = "1"  # ranx compiles for a minute what then takes a millisecond

import ir_measures
import pandas as pd
import ranx
from ir_measures import AP, RR, P, R, Success, nDCG
from rectools import Columns
from rectools import metrics as rectools


def scored(items: list[int]) -> dict[str, float]:
    """Item to a score that puts it at its place."""
    return {str(item): float(len(items) - place) for place, item in enumerate(items)}


def by_ranx(asked: dict[str, Any]) -> dict[str, list[float]]:
    qrels = ranx.Qrels({user: dict.fromkeys(map(str, of), 1) for user, of in asked["relevant"].items()})
    run = ranx.Run({user: scored(items) for user, items in asked["lists"].items() if items})
    run = run.make_comparable(qrels)  # users without a list have an empty one
    names = ("precision", "recall", "hit_rate", "mrr", "map", "ndcg")
    metrics = [f"{name}@{k}" for name in names for k in asked["k"]]
    ranx.evaluate(qrels, run, metrics)
    return {name: [run.scores[name].get(user, 0.0) for user in asked["relevant"]] for name in metrics}


def by_ir_measures(asked: dict[str, Any]) -> dict[str, list[float]]:
    qrels = {user: dict.fromkeys(map(str, of), 1) for user, of in asked["relevant"].items()}
    run = {user: scored(items) for user, items in asked["lists"].items()}
    kinds = {"precision": P, "recall": R, "hit_rate": Success, "mrr": RR, "map": AP, "ndcg": nDCG}
    measures = {kind @ k: f"{name}@{k}" for name, kind in kinds.items() for k in asked["k"]}
    found: dict[str, dict[str, float]] = {name: {} for name in measures.values()}
    for one in ir_measures.iter_calc(list(measures), qrels, run):
        found[measures[one.measure]][one.query_id] = one.value
    return {name: [of.get(user, 0.0) for user in asked["relevant"]] for name, of in found.items()}


def by_rectools(asked: dict[str, Any]) -> dict[str, Any]:
    rows = [
        (user, item, place)
        for user, items in asked["lists"].items()
        for place, item in enumerate(items, start=1)
    ]
    lists = pd.DataFrame(rows, columns=[Columns.User, Columns.Item, Columns.Rank])
    pairs = [(user, item) for user, items in asked["relevant"].items() for item in items]
    relevant = pd.DataFrame(pairs, columns=[Columns.User, Columns.Item])
    train = pd.DataFrame(asked["train"], columns=[Columns.User, Columns.Item])
    found: dict[str, Any] = {"coverage": {}}
    for k in asked["k"]:
        of_users = {
            "precision": rectools.Precision(k).calc_per_user(lists, relevant),
            "recall": rectools.Recall(k).calc_per_user(lists, relevant),
            "hit_rate": rectools.HitRate(k).calc_per_user(lists, relevant),
            "mrr": rectools.MRR(k).calc_per_user(lists, relevant),
            "map": rectools.MAP(k).calc_per_user(lists, relevant),
            "ndcg": rectools.NDCG(k, divide_by_achievable=True).calc_per_user(lists, relevant),
            "popularity": rectools.AvgRecPopularity(k).calc_per_user(lists, train),
            "information": rectools.MeanInvUserFreq(k).calc_per_user(lists, train),
        }
        for name, values in of_users.items():
            found[f"{name}@{k}"] = [float(values.get(user, 0.0)) for user in asked["relevant"]]
        coverage = rectools.CatalogCoverage(k, normalize=True)
        found["coverage"][str(k)] = float(coverage.calc(lists, sorted(set(train[Columns.Item]))))
    return found


if __name__ == "__main__":
    asked = json.load(sys.stdin)
    json.dump(
        {"ranx": by_ranx(asked), "ir_measures": by_ir_measures(asked), "rectools": by_rectools(asked)},
        sys.stdout,
    )

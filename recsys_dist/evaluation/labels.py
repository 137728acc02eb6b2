"""How models and figures are named where people read them."""

from collections.abc import Mapping, Sequence
from typing import Any

LABELS = {
    "popularity": "popularity",
    "recent": "recent popularity",
    "als": "ALS",
    "next_items": "next items",
    "neighbors": "neighbours",
    "ease": "EASE",
    "transitions": "transitions",
    "content": "content",
    "fm": "FM",
    "deepfm": "DeepFM, all items",
    "two_stage": "two-stage",
}
"""Model of an evaluation to its name for people."""
COMPARED = LABELS | {
    "cosine": "neighbours, cosine",
    "jaccard": "neighbours, jaccard",
    "pearson": "neighbours, pearson",
    "als_explicit": "ALS, explicit",
    "mf": "MF",
    "dnn": "DNN",
}
"""The same with those that only a comparison has."""

METRIC_LABELS = {
    "ndcg": (
        "NDCG",
        "how many of the liked items a list has, and how near its top; 1 is the best possible list",
    ),
    "recall": ("Recall", "the share of what the user liked that is in the list"),
    "precision": ("Precision", "the share of the list that the user liked"),
    "map": ("MAP", "the mean precision at the places of the items that the user liked"),
    "mrr": ("MRR", "1 divided by the rank of the first item that the user liked"),
    "hit_rate": ("Hit rate", "the share of users whose list has at least one item that they liked"),
    "serendipity": (
        "Serendipity",
        "the share of the list that the user liked and that is not among the most popular items",
    ),
    "popularity": ("Popularity", "the mean number of training events of the items of a list"),
    "diversity": ("Diversity", "how unlike each other the items of a list are, from 0 (alike) to 1"),
    "coverage": ("Coverage", "the share of the catalogue that is in at least one list"),
    "novelty": ("Novelty", "how rare the listed items are in training, in bits"),
    "gini": ("Gini", "how unequally often items are listed, from 0 (all equally) to 1 (few make all lists)"),
    "rmse": ("RMSE", "the root of the mean squared error of the predicted value"),
    "mse": ("MSE", "the mean squared error of the predicted value"),
    "auc": ("AUC", "the share of pairs of a liked and another item that are put in the right order"),
    "gauc": ("GAUC", "the AUC of each user, averaged"),
    "calibration": (
        "Calibration",
        "the mean predicted probability over the share of positive labels; 1 where neither is too high",
    ),
    "logloss": ("Log loss", "how surprising the true labels are to the model, in nats; less is better"),
}
"""Metric in metrics.json (before the @) to its name for people, and what it is."""

DECIMALS = {"popularity": 1, "novelty": 2}
"""Of metrics that have not 4."""


def model_label(model: str) -> str:
    """A model's name as the first word of a cell or sentence; an unknown one's is itself."""
    name = COMPARED.get(model, model)
    return name[:1].upper() + name[1:]


def ranked(models: Mapping[str, Mapping[str, Any]], metric: str) -> list[str]:
    """The models of metrics.json by a metric, the best first."""
    return sorted(models, key=lambda name: -models[name][metric]["value"])


def metric_label(metric: str) -> str:
    """`ndcg@10` to `NDCG@10`; an unknown metric's name is itself."""
    name, _, k = metric.partition("@")
    label = METRIC_LABELS.get(name, (name,))[0]
    return f"{label}@{k}" if k else label


def figure(metric: str, value: float) -> str:
    """A metric's value as it is printed."""
    return f"{value:,.{DECIMALS.get(metric.partition('@')[0], 4)}f}"


def summary_columns(k: Sequence[int]) -> dict[str, str]:
    """The metrics that summaries show, by their names in metrics.json, for these list lengths."""
    columns = {f"ndcg@{k[0]}": f"NDCG@{k[0]}"}
    columns |= {f"recall@{length}": f"Recall@{length}" for length in k[:2]}
    return columns | {f"coverage@{k[0]}": f"Coverage@{k[0]}"}

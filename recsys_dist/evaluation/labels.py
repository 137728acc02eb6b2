"""How models and figures are named where people read them."""

COLUMNS = {
    "ndcg@10": "NDCG@10",
    "recall@10": "Recall@10",
    "recall@20": "Recall@20",
    "coverage@10": "Coverage@10",
}
"""The metrics that summaries show, by their names in metrics.json."""

LABELS = {
    "popularity": "popularity",
    "als": "ALS",
    "fm": "FM part",
    "deepfm": "DeepFM, all items",
    "two_stage": "two-stage",
}
"""Model in metrics.json to its name for people."""

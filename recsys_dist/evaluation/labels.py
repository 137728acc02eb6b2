"""How models and figures are named where people read them."""

from collections.abc import Sequence

LABELS = {
    "popularity": "popularity",
    "recent": "recent popularity",
    "als": "ALS",
    "next_items": "next items",
    "neighbors": "neighbours",
    "content": "content",
    "fm": "FM part",
    "deepfm": "DeepFM, all items",
    "two_stage": "two-stage",
}
"""Model in metrics.json to its name for people."""


def summary_columns(k: Sequence[int]) -> dict[str, str]:
    """The metrics that summaries show, by their names in metrics.json, for these list lengths."""
    columns = {f"ndcg@{k[0]}": f"NDCG@{k[0]}"}
    columns |= {f"recall@{length}": f"Recall@{length}" for length in k[:2]}
    return columns | {f"coverage@{k[0]}": f"Coverage@{k[0]}"}

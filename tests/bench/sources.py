"""How well the sources that need no training rank alone: NDCG@10 and Recall@200 on valid and test.

python -m tests.bench.sources --conf conf/movielens_1m.yaml

Reads the latest recall run and its features. Where that is fitted on train_valid, valid says nothing.
"""

import sys

from recsys_dist import job
from recsys_dist.config import load
from recsys_dist.deepfm.items import Items
from recsys_dist.evaluation.evaluate import held_out, rank
from recsys_dist.evaluation.measured import Catalogue, figures, measure
from recsys_dist.scoring.scorers import Content, Linear, Neighbors, NextItems, Popularity, Recent, Scorer
from recsys_dist.workspace import Workspace


def main() -> int:
    arguments = job.parser(__doc__ or "").parse_args()
    config = load(arguments.conf, [*arguments.overrides, "evaluation.k=[10, 200]"])
    workspace = Workspace(config)
    recall = workspace.runs("recall")[-1]
    features = next(run for run in workspace.runs("features") if run.run_id == recall.inputs["features"])
    spec = features.spec()
    items = Items(features, spec)
    settings = recall.manifest["config"]["recall"]
    scorers: dict[str, Scorer] = {
        "popularity": Popularity(items),
        "recent": Recent(spec, recall),
        "next_items": NextItems(spec, recall),
        "neighbors": Neighbors(spec, recall),
        **{name: Linear(spec, recall, name) for name in settings["linear"]},
    }
    if spec.attributes(None, "recall.content"):
        scorers["content"] = Content(items, recall)
    print(", ".join(f"{name}={value}" for name, value in settings.items()))
    catalogue = Catalogue(items, config.evaluation.head_share)
    for part in ("valid", "test"):
        users, truth = held_out(features, config.score.filter_seen, part)
        for name, scorer in scorers.items():
            lists = rank(config, items, name, scorer, users)[0]
            measured = measure(config.evaluation.k, lists, truth, catalogue)
            found = figures(config, measured, len(users), catalogue)
            line = "  ".join(f"{metric} {found[metric]['value']:.4f}" for metric in ("ndcg@10", "recall@200"))
            print(f"{part:<5} {len(users)} users  {name:<11}  {line}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())

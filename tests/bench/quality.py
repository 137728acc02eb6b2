"""make bench-quality: how well DeepFM predicts on MovieLens 1M, beside FuxiCTR's.

Labels, parts and fields as in `clicks.movielens`; three seeds each. Both stop early by the AUC of valid and
are measured once, on test, with what was best there. FuxiCTR's embeddings have an L2 of 1e-5; a search over
settings has been made for neither side.

Prints a table and writes bench-quality.json.
"""

import json
import statistics
import sys
import tempfile
from pathlib import Path

import torch

from recsys_dist.config import REPOSITORY, Config, load
from recsys_dist.workspace import Run, Workspace
from tests.bench import clicks, peer
from tests.bench.features import python
from tests.deepfm.workers import run_workers

SEEDS = (1, 2, 3)
FIGURES = ("auc", "logloss")
OURS = [*peer.OURS, "deepfm.precision=float32", "deepfm.num_workers=1"]
THEIRS = {"loader": "npz", "num_workers": 0, "epochs": 50, "embedding_regularizer": 1e-5}


def main() -> int:
    found: dict[str, list[dict[str, float]]] = {"recsys_dist": [], "FuxiCTR": []}
    with tempfile.TemporaryDirectory(prefix="bench-") as scratch:
        conf = clicks.movielens(Path(scratch))
        python("jobs/featurize.py", "--conf", conf)
        workspace = Workspace(load(conf))
        features = workspace.runs("features")[-1]
        folder = Path(scratch) / "fuxictr"
        clicks.for_fuxictr(features, folder)
        for seed in SEEDS:
            chosen = [*OURS, f"seed={seed}"]
            config = load(conf, chosen)
            python("jobs/train_deepfm.py", "--conf", conf, *(of for one in chosen for of in ("--set", one)))
            model = workspace.runs("deepfm")[-1]
            group = Path(scratch) / f"group-{seed}"
            found["recsys_dist"].append(run_workers(1, tested, group, config, features, model)[0])
            peers = peer.fuxictr(config, folder, quality=True, **THEIRS)["test"]
            found["FuxiCTR"].append({"auc": peers["AUC"], "logloss": peers["logloss"]})
            print(json.dumps({name: of[-1] for name, of in found.items()}), flush=True)
    print(f"\n{'':<12}" + "".join(f"{name:<25}" for name in FIGURES))
    for name, of in found.items():
        print(f"{name:<12}" + "".join(f"{_range([one[figure] for one in of]):<25}" for figure in FIGURES))
    for figure, sign in (("auc", 1), ("logloss", -1)):
        ours, theirs = (sign * statistics.mean(one[figure] for one in of) for of in found.values())
        print(f"{figure}: ours is {'at least as good' if ours >= theirs else 'worse: missed'}")
    (REPOSITORY / "bench-quality.json").write_text(json.dumps(found, indent=1) + "\n")
    return 0


def tested(config: Config, features: Run, model: Run) -> dict[str, float]:
    """The figures of a published model on the test part."""
    from recsys_dist.deepfm.items import Items
    from recsys_dist.deepfm.published import load as load_model
    from recsys_dist.deepfm.validation import validation

    spec = features.spec()
    measured = validation(features, Items(features, spec), config, "test")
    return measured.figures(load_model(model, spec), torch.device("cpu"))


def _range(values: list[float]) -> str:
    return f"{statistics.mean(values):.4f} ({min(values):.4f}-{max(values):.4f})"


if __name__ == "__main__":
    sys.exit(main())

"""What the settings of the ranking model do on MovieLens 100K: each alone changed in its conf file.

python -m tests.bench.effects
python -m tests.bench.effects attention recency    only those whose change names one of these

Each is trained on one worker until valid no longer gets better. Prints a line each: the best epoch's figures
of the valid part, its number, and the seconds of the whole training; of a training that nothing stops
(`patience=20`) the last one's. What begins from another model, or fits again on more, is measured on the test
part, after jobs/train_deepfm.py.
"""

import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from recsys_dist.cluster import MALLOC
from recsys_dist.config import load
from recsys_dist.deepfm.reports import HISTORY, best, lines
from recsys_dist.workspace import Workspace
from tests.bench.features import python
from tests.bench.quality import tested
from tests.deepfm.workers import run_workers, train_in

CONF = "conf/movielens_100k.yaml"
LABELS = ["negatives=0", "objective=logistic"]
CHANGES: list[list[str]] = [
    [],
    ["epochs=20", "patience=20"],
    *([f"model={kind}"] for kind in ("lr", "fm", "mf", "dnn")),
    ["objective=bpr"],
    ["objective=logistic"],
    ["recency={recent: 5}"],
    ["attention={recent: 5}"],
    ["encoder={recent: 2}"],
    ["convolution=[4]"],
    ["batch_norm=true"],
    ["dropout=0"],
    ["dropout=[0.5, 0.4, 0.3, 0.2]"],
    ["weight_decay=0.01"],
    ["weight_decay=[0.1, 0.01, 0]"],
    ["l1=0.0001"],
    ["l1=[0.001, 0.0001, 0]"],
    ["embedding_weight_decay=0.001"],
    ["embedding_weight_decay=[0.003, 0.001, 0]"],
    ["warmup_steps=100"],
    ["schedule=cosine"],
    ["schedule=plateau"],
    ["clip_norm=0.1"],
    ["table_optimizer=adagrad"],
    ["table_optimizer=sgd", "embedding_learning_rate=1"],
    ["dense_optimizer=adam", "weight_decay=0.01"],
    ["dense_optimizer=adagrad", "learning_rate=0.01"],
    ["precision=bfloat16"],
    ["negatives_power=0.5"],
    ["negatives_from=batch"],
    ["negatives_outside_history=true"],
    ["negatives=256", "negatives_shared=true"],
    ["model=fm", "negatives=10000", "negatives_shared=true"],
    ["sample_weight=value"],
    LABELS,
    [*LABELS, "label_smoothing=0.1"],
    [*LABELS, "batch_norm=true"],
    [*LABELS, "embedding_weight_decay=0.01"],
    ["negatives=0", "objective=squared"],
]
JOBS: list[list[str]] = [[], ["fit_on=train_valid"], ["model=fm"], ["start_from=latest"]]
"""By the job, in this order: the last starts from the one before."""


def main() -> int:
    named = sys.argv[1:]
    chosen = [change for change in CHANGES if not named or any(n in " ".join(change) for n in named)]
    jobs = not named or "jobs" in named
    os.environ.update(MALLOC)
    with tempfile.TemporaryDirectory(prefix="bench-") as root:
        python("-m", "recsys_dist.datasets", "movielens_100k", "data")
        python("jobs/featurize.py", "--conf", CONF, "--set", f"storage.root={root}")
        for number, change in enumerate(chosen):
            # Nothing is recommended here, and a model without an FM part could not recall by it.
            settings = [f"storage.root={root}", "score.candidates={als: 200}"]
            config = load(CONF, settings + [f"deepfm.{setting}" for setting in change])
            folder = Path(root) / f"training-{number}"
            begin = time.perf_counter()
            found = run_workers(1, _best, folder, config, Workspace(config).runs("features")[-1], folder)[0]
            figures = ", ".join(f"{name} {value:.4f}" for name, value in found["figures"].items())
            what = " ".join(change) or "as in the conf file"
            print(
                f"| {what} | {figures} | {found['epoch']} | {time.perf_counter() - begin:.0f} |", flush=True
            )
        for change in JOBS if jobs else []:
            settings = [f"storage.root={root}", "deepfm.num_workers=1", *(f"deepfm.{of}" for of in change)]
            begin = time.perf_counter()
            python("jobs/train_deepfm.py", "--conf", CONF, *(of for one in settings for of in ("--set", one)))
            taken = time.perf_counter() - begin
            config = load(CONF, settings)
            workspace = Workspace(config)
            model, features = workspace.runs("deepfm")[-1], workspace.runs("features")[-1]
            folder = Path(root) / f"test-{model.run_id}"
            figures = run_workers(1, tested, folder, config, features, model)[0]
            epoch = model.manifest["figures"]["best_epoch"]
            what = " ".join(change) or "as in the conf file"
            print(f"| {what}, test | NDCG@10 {figures['ndcg@10']:.4f} | {epoch} | {taken:.0f} |", flush=True)
    return 0


def _best(config: Any, features: Any, folder: Path) -> dict[str, Any]:
    """The best epoch of a training with all cores; the last one of a training that nothing stops."""
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    train_in(config, features, folder)
    history, settings = lines(folder / HISTORY), config.deepfm
    line = best(history) if settings.patience < settings.epochs else history[-1]
    names = [n for n in ("ndcg@10", "auc", "gauc", "logloss", "rmse") if n in line]
    return {"epoch": line["epoch"], "figures": {name: line[name] for name in names}}


if __name__ == "__main__":
    sys.exit(main())

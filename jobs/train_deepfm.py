"""Train DeepFM on the latest features run and publish the model as a deepfm run.

    python jobs/train_deepfm.py [--conf FILE] [--set SECTION.KEY=VALUE] [--force]
    ray job submit --working-dir . -- python jobs/train_deepfm.py --set storage.root=/shared/recsys

The workers run on the Ray cluster of RAY_ADDRESS, or on a local Ray that is started for the job.
"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
if (ROOT / "recsys_dist").is_dir():  # a checkout; an installed wheel is importable already
    sys.path.insert(0, str(ROOT))

from recsys_dist.config import Config
from recsys_dist.job import run_stage, stage_parser
from recsys_dist.workspace import OpenRun, Run


def make(config: Config, run: OpenRun) -> dict[str, object]:
    from recsys_dist.deepfm import train  # slow to import, and not needed for --help or a run made before

    return train.make(config, run)


def left_behind(run: OpenRun) -> bool:
    from recsys_dist.deepfm import train

    return train.left_behind(run)


def check(config: Config, inputs: dict[str, Run]) -> None:
    from recsys_dist.deepfm import train

    train.check(config, inputs)


def main() -> int:
    arguments = stage_parser(__doc__).parse_args()
    return run_stage("deepfm", arguments, make, left_behind=left_behind, check=check)


if __name__ == "__main__":
    sys.exit(main())

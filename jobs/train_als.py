"""spark-submit jobs/train_als.py --conf conf/movielens_100k.yaml

Fits ALS to the latest features run: user and item factors.
Also starts as `python jobs/train_als.py`, with all cores of this machine.
"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
if (ROOT / "recsys_dist").is_dir():  # a checkout; an installed wheel is importable already
    sys.path.insert(0, str(ROOT))

from recsys_dist.als import train_als
from recsys_dist.job import run_stage, stage_parser


def main() -> int:
    return run_stage("als", stage_parser(__doc__ or "").parse_args(), train_als)


if __name__ == "__main__":
    sys.exit(main())

"""spark-submit jobs/featurize.py --conf conf/movielens_100k.yaml

Turns the raw log into a features run: examples, items, users, vocabularies and features.json.
Also starts as `python jobs/featurize.py`, with all cores of this machine.
"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
if (ROOT / "recsys_dist").is_dir():  # a checkout; an installed wheel is importable already
    sys.path.insert(0, str(ROOT))

from recsys_dist.features.featurize import featurize
from recsys_dist.job import run_stage, stage_parser


def main() -> int:
    return run_stage("features", stage_parser(__doc__ or "").parse_args(), featurize)


if __name__ == "__main__":
    sys.exit(main())

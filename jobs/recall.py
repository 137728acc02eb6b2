"""spark-submit jobs/recall.py --conf conf/movielens_100k.yaml

Counts on the train part of the latest features run which items follow an item, which have the same users, and
how often each was had, day by day.
Also starts as `python jobs/recall.py`, with all cores of this machine.
"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
if (ROOT / "recsys_dist").is_dir():  # a checkout; an installed wheel is importable already
    sys.path.insert(0, str(ROOT))

from recsys_dist.job import run_stage, stage_parser
from recsys_dist.recall.fit import fit_recall


def main() -> int:
    return run_stage("recall", stage_parser(__doc__ or "").parse_args(), fit_recall)


if __name__ == "__main__":
    sys.exit(main())

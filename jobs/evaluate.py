"""Models and held-out events to metrics and a report.

python jobs/evaluate.py --conf conf/movielens_100k.yaml
"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
if (ROOT / "recsys_dist").is_dir():  # a checkout; an installed wheel is importable already
    sys.path.insert(0, str(ROOT))

from recsys_dist import job


def main() -> int:
    arguments = job.stage_parser(__doc__).parse_args()
    from recsys_dist.evaluation.evaluate import evaluate

    return job.run_stage("evaluation", arguments, evaluate)


if __name__ == "__main__":
    sys.exit(main())

"""Models and held-out events to metrics and a report.

python jobs/evaluate.py --conf conf/movielens_100k.yaml
"""

import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
if (ROOT / "recsys_dist").is_dir():  # a checkout; an installed wheel is importable already
    sys.path.insert(0, str(ROOT))

from recsys_dist import job
from recsys_dist.config import Config
from recsys_dist.workspace import OpenRun


def make(config: Config, run: OpenRun) -> dict[str, Any]:
    from recsys_dist.evaluation.evaluate import evaluate  # after the arguments: torch takes seconds

    return evaluate(config, run)


def main() -> int:
    return job.run_stage("evaluation", job.stage_parser(__doc__).parse_args(), make)


if __name__ == "__main__":
    sys.exit(main())

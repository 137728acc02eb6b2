"""Models to the published top-K table, over Ray; or one thing done with what is published.

ray job submit --working-dir . -- python jobs/score.py --conf conf/movielens_100k.yaml
python jobs/score.py --conf conf/movielens_100k.yaml
python jobs/score.py --conf conf/movielens_100k.yaml --user 196
python jobs/score.py --conf conf/movielens_100k.yaml --versions
"""

import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
if (ROOT / "recsys_dist").is_dir():  # a checkout; an installed wheel is importable already
    sys.path.insert(0, str(ROOT))

from recsys_dist import job
from recsys_dist.config import Config
from recsys_dist.scoring import commands
from recsys_dist.scoring.publish import is_published
from recsys_dist.workspace import OpenRun


def make(config: Config, run: OpenRun) -> dict[str, Any]:
    from recsys_dist.scoring import score  # after the arguments: torch takes seconds

    return score.score(config, run)


def left_behind(run: OpenRun) -> bool:
    from recsys_dist.scoring import score

    return score.left_behind(run)


def main() -> int:
    parser = job.stage_parser(__doc__)
    commands.add_arguments(parser)
    arguments = parser.parse_args()
    if commands.asked(parser, arguments):
        return job.guard(lambda: print(commands.answer(arguments)))
    return job.run_stage("score", arguments, make, is_published, left_behind)


if __name__ == "__main__":
    sys.exit(main())

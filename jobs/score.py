"""Models to the published top-K table, over Ray; or one user's published list beside the history.

ray job submit --working-dir . -- python jobs/score.py --conf conf/movielens_100k.yaml
python jobs/score.py --conf conf/movielens_100k.yaml
python jobs/score.py --conf conf/movielens_100k.yaml --user 196
"""

import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
if (ROOT / "recsys_dist").is_dir():  # a checkout; an installed wheel is importable already
    sys.path.insert(0, str(ROOT))

from recsys_dist import job
from recsys_dist.config import Config, load
from recsys_dist.scoring.publish import is_published
from recsys_dist.workspace import OpenRun, Workspace


def make(config: Config, run: OpenRun) -> dict[str, Any]:
    from recsys_dist.scoring.score import score  # after the arguments: torch takes seconds

    return score(config, run)


def main() -> int:
    parser = job.stage_parser(__doc__)
    parser.add_argument("--user", metavar="ID", help="only print this user's history and list")
    arguments = parser.parse_args()
    if arguments.user is not None:
        from recsys_dist.scoring.show import show_user

        return job.guard(
            lambda: print(show_user(Workspace(load(arguments.conf, arguments.overrides)), arguments.user))
        )
    return job.run_stage("score", arguments, make, is_published)


if __name__ == "__main__":
    sys.exit(main())

"""Search for better settings of DeepFM on the latest features run; write the best ones as a conf file.

    python jobs/tune.py [--conf FILE] [--set SECTION.KEY=VALUE] [--force]
    ray job submit --working-dir . -- python jobs/tune.py --set storage.root=/shared/recsys

What is tried is the section `tune` of the conf file. The trials run on the Ray cluster of RAY_ADDRESS, or on
a local Ray that is started for the job.
"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
if (ROOT / "recsys_dist").is_dir():  # a checkout; an installed wheel is importable already
    sys.path.insert(0, str(ROOT))

from recsys_dist.config import Config, asked
from recsys_dist.job import run_stage, stage_parser
from recsys_dist.workspace import OpenRun


def left_behind(run: OpenRun) -> bool:
    from recsys_dist.deepfm import tune  # slow to import, and not needed for --help or a search made before

    return tune.left_behind(run)


def main() -> int:
    arguments = stage_parser(__doc__).parse_args()

    def make(config: Config, run: OpenRun) -> dict[str, object]:
        from recsys_dist.deepfm import tune

        return tune.make(config, run, asked(arguments.conf, ()), arguments.overrides)

    return run_stage("tune", arguments, make, left_behind=left_behind)


if __name__ == "__main__":
    sys.exit(main())

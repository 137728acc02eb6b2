"""All stages in order, each its own process, skipping what is done: raw log in, published lists out.

python jobs/nightly.py --conf conf/movielens_100k.yaml
"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
if (ROOT / "recsys_dist").is_dir():  # a checkout; an installed wheel is importable already
    sys.path.insert(0, str(ROOT))

from recsys_dist import job, nightly


def main() -> int:
    parser = job.parser(__doc__)
    parser.add_argument("--date", metavar="YYYY-MM-DD", help="the day the lists are for (score.date)")
    parser.add_argument("--samples", type=int, default=0, metavar="N", help="print N users' lists at the end")
    arguments = parser.parse_args()
    overrides = [*arguments.overrides, *([f"score.date={arguments.date}"] if arguments.date else [])]
    return job.guard(lambda: nightly.run_night(arguments.conf, overrides, arguments.samples))


if __name__ == "__main__":
    sys.exit(main())

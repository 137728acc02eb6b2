"""All models on one log under one protocol: quality on test, time and memory, as a table.

    python jobs/compare.py --conf conf/movielens_1m.yaml --set split.events=positive \
        --set score.filter_seen=positives

Everything is trained that is not there yet, under compare.root, which no night reads.
"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
if (ROOT / "recsys_dist").is_dir():  # a checkout; an installed wheel is importable already
    sys.path.insert(0, str(ROOT))

from recsys_dist import job


def main() -> int:
    arguments = job.parser(__doc__).parse_args()

    def compare() -> None:
        from recsys_dist import comparison  # after the arguments: torch takes seconds

        comparison.compare(arguments.conf, arguments.overrides)

    return job.guard(compare)


if __name__ == "__main__":
    sys.exit(main())

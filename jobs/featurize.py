"""spark-submit jobs/featurize.py --conf conf/movielens_100k.yaml

Turns the raw log into a features run: examples, items, users, vocabularies and features.json.
Also starts as `python jobs/featurize.py`, with all cores of this machine.

python jobs/featurize.py --conf conf/movielens_100k.yaml --explain    also shows what came out
"""

import functools
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
if (ROOT / "recsys_dist").is_dir():  # a checkout; an installed wheel is importable already
    sys.path.insert(0, str(ROOT))

from recsys_dist.config import load
from recsys_dist.features.explain import explain
from recsys_dist.features.featurize import featurize
from recsys_dist.job import guard, run_stage, stage_parser
from recsys_dist.workspace import Workspace


def main() -> int:
    parser = stage_parser(__doc__ or "")
    parser.add_argument("--explain", action="store_true", help="then print the run's fields as a table")
    rebuild = "begin the vocabularies anew and forget the ids of data.forget; implies --force"
    parser.add_argument("--rebuild", action="store_true", help=rebuild)
    arguments = parser.parse_args()
    arguments.force |= arguments.rebuild
    code = run_stage("features", arguments, functools.partial(featurize, rebuild=arguments.rebuild))
    if code or not arguments.explain:
        return code
    config = load(arguments.conf, arguments.overrides)
    return guard(lambda: print(explain(config, Workspace(config).runs("features")[-1])))


if __name__ == "__main__":
    sys.exit(main())

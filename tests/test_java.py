"""A machine whose Java cannot run Spark is told so before Spark is started."""

import os
import shutil
import subprocess
import sys

import pytest

from recsys_dist import java
from recsys_dist.config import REPOSITORY


def fake_java(folder, version):
    """A machine's PATH where java, if any, prints this version."""
    for tool in ("bash", "env", "make", "sh"):
        os.symlink(shutil.which(tool), folder / tool)  # noqa: PTH211
    if version:
        script = folder / "java"
        script.write_text(f"#!/bin/sh\necho 'openjdk version \"{version}\" 2020-01-01' >&2\n")
        script.chmod(0o755)
    return {"PATH": str(folder), "HOME": str(folder)}


@pytest.mark.parametrize(
    ("version", "expected"),
    [
        (None, "No Java was found"),
        ("11.0.2", "is Java 11"),
        ("1.8.0_292", "is Java 8"),
        ("soon", "no version"),
    ],
)
@pytest.mark.parametrize("entry", ["make", "nightly"])
def test_old_or_missing_java_is_named_and_exits_64(tmp_path, version, expected, entry):
    environment = fake_java(tmp_path, version)
    words = {
        "make": ["make", "java", f"PYTHON={sys.executable}"],
        "nightly": [sys.executable, "jobs/nightly.py", "--conf", "conf/movielens_100k.yaml"],
    }[entry]
    words += ["--set", f"storage.root={tmp_path}/root"] if entry == "nightly" else []
    done = subprocess.run(
        words, cwd=REPOSITORY, env=environment, capture_output=True, text=True, check=False, timeout=60
    )
    # make itself answers 2 to any failing command, and prints the command's own code.
    assert done.returncode == (2 if entry == "make" else 64)
    assert entry != "make" or "Error 64" in done.stderr
    assert expected in done.stderr
    assert "Install Java 17 or newer" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("version", ["17.0.15", "21", "25.0.1"])
def test_new_enough_java_passes(tmp_path, monkeypatch, version):
    monkeypatch.setenv("PATH", fake_java(tmp_path, version)["PATH"])
    monkeypatch.delenv("JAVA_HOME", raising=False)
    assert java.problem() is None


def test_java_home_goes_before_path(tmp_path, monkeypatch):
    (tmp_path / "bin").mkdir()
    fake_java(tmp_path / "bin", "11.0.2")
    monkeypatch.setenv("JAVA_HOME", str(tmp_path))
    assert "is Java 11" in (java.problem() or "")

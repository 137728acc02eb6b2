"""Processes that tests start, and kill; and jobs that need no process of their own."""

import contextlib
import io
import os
import runpy
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from recsys_dist.config import REPOSITORY

DEADLINE_SECONDS = 180


def wait_for(found: Callable[[], Any], process: subprocess.Popen[Any], output: Path) -> Any:
    """What `found` returns as soon as it is true; fails when the job ended before."""
    end = time.monotonic() + DEADLINE_SECONDS
    while time.monotonic() < end:
        assert process.poll() is None, output.read_text()
        answer = found()
        if answer:
            return answer
        time.sleep(0.1)
    raise AssertionError(f"nothing within {DEADLINE_SECONDS} s: {output.read_text()}")


@contextlib.contextmanager
def stopped_at_the_end(process: subprocess.Popen[Any]) -> Iterator[subprocess.Popen[Any]]:
    """The process, interrupted at the end where it is still there, so that what it started ends too."""
    try:
        yield process
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGINT)
            process.wait(timeout=60)


def kill_group(process: subprocess.Popen[str]) -> None:
    """kill -9 a process that leads its own session, and everything that came from it, Ray's daemons too."""
    family = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    for member in family:
        with contextlib.suppress(psutil.NoSuchProcess):
            member.kill()
    process.communicate(timeout=60)


def run_here(job: str, *arguments: str, code: int = 0) -> str:
    """Run jobs/<job> in this process, check the exit code it would have, return what it printed."""
    script, printed = REPOSITORY / "jobs" / job, io.StringIO()
    with (
        pytest.MonkeyPatch.context() as patch,
        contextlib.redirect_stdout(printed),
        contextlib.redirect_stderr(printed),
    ):
        patch.setattr(sys, "argv", [str(script), *arguments])
        patch.setattr(sys, "path", [*sys.path])
        with pytest.raises(SystemExit) as ended:
            runpy.run_path(str(script), run_name="__main__")
    assert ended.value.code == code, printed.getvalue()
    return printed.getvalue()


@contextlib.contextmanager
def ray_head(cpus: int) -> Iterator[str]:
    """A Ray cluster of one node; its address, for the RAY_ADDRESS of jobs that need none of their own."""
    from ray.cluster_utils import Cluster

    node = {"num_cpus": cpus, "include_dashboard": False, "object_store_memory": 100_000_000}
    cluster = Cluster(initialize_head=True, head_node_args=node)
    try:
        yield cluster.address
    finally:
        cluster.shutdown()

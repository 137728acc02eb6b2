"""Processes that tests start, and kill."""

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil

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

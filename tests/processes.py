"""Processes that tests start, and kill."""

import contextlib
import os
import signal
import subprocess

import psutil


def kill_group(process: subprocess.Popen[str]) -> None:
    """kill -9 a process that leads its own session, and everything that came from it, Ray's daemons too."""
    family = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    for member in family:
        with contextlib.suppress(psutil.NoSuchProcess):
            member.kill()
    process.communicate(timeout=60)

"""What every job does around its stage: arguments, configuration, run, errors and exit code."""

import argparse
import contextlib
import fcntl
import itertools
import json
import os
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from typing import Any

from recsys_dist import java
from recsys_dist.config import DEFAULT_CONF, PACKAGE, Config, load
from recsys_dist.errors import ConfigError, DataError, RecsysError, RetryableError
from recsys_dist.workspace import (
    EXPERIMENTS,
    LOCK,
    MANIFEST,
    STAGES,
    OpenRun,
    Run,
    Workspace,
    differences,
    here,
    tidy,
)

EXIT_CODES = "exit codes: 0 done, 64 bad usage or config, 65 bad data or a missing input run, 75 try again"


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> Any:
        self.print_usage(sys.stderr)
        self.exit(ConfigError.exit_code, f"error: {message}\n")


def parser(doc: str) -> argparse.ArgumentParser:
    """The arguments that all jobs share."""
    made = _Parser(description=doc, epilog=EXIT_CODES, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument(
        "--conf", metavar="FILE", help=f"path or URI of a conf file (default: {DEFAULT_CONF.name})"
    )
    made.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="SECTION.KEY=VALUE",
        dest="overrides",
        help="set one key of the configuration; may be given again, later ones win",
    )
    return made


def stage_parser(doc: str) -> argparse.ArgumentParser:
    """The arguments of the jobs that make a run."""
    made = parser(doc)
    made.add_argument("--force", action="store_true", help="make a new run even where an equal one exists")
    return made


INTERRUPTED = 128 + signal.SIGINT
"""The exit code, as shells have it."""


def guard(action: Callable[[], None]) -> int:
    """Run an action; print the error it ends with, if any, and return the exit code."""
    try:
        action()
    except RecsysError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("interrupted; the same command goes on with what it has saved", file=sys.stderr)
        return INTERRUPTED
    return 0


def require_java() -> None:
    """Raise a ConfigError where Spark would not start."""
    problem = java.problem()
    if problem:
        raise ConfigError(problem)


def run_module(module: str, task: str) -> "subprocess.CompletedProcess[bytes]":
    """Run a module of this package in a process of its own: what needs pyspark beside torch, or torch beside
    pyspark.

    Args:
        module: its name.
        task: for its standard input.

    Returns:
        its exit code, and what it wrote to its standard output.
    """
    path = os.pathsep.join([str(PACKAGE.parent), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = os.environ | {"PYTHONPATH": path}
    line = [sys.executable, "-P", "-m", module]
    return subprocess.run(line, check=False, env=environment, input=task.encode(), stdout=subprocess.PIPE)


NAMED = 5
"""Differences that a line names."""
LOOKED_AT = 20
"""Unfinished runs, the latest, of which one may be gone on with."""

Make = Callable[[Config, OpenRun], dict[str, Any]]


@contextlib.contextmanager
def own(run: OpenRun) -> Iterator[None]:
    """Hold a run for this process while it is made; the system lets go of it however the process ends.

    Where the run's root is not local, only processes of this machine are kept out.

    Raises:
        RetryableError: another process holds it, or has finished it; or its folder knows no locks.
    """
    file = here(run) / LOCK
    with contextlib.ExitStack() as held:
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            lock = held.enter_context(file.open("w"))
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise RetryableError(f"{run.uri} is in use: another process is making it. Run again.") from None
        except OSError as error:
            raise RetryableError(f"{file} cannot be locked: {error}. Give a root on another disk.") from error
        if run.filesystem.get_file_info(f"{run.path}/{MANIFEST}").is_file:
            raise RetryableError(f"{run.uri} was finished by another process. Run again.")
        yield


def run_stage(
    stage: str,
    arguments: argparse.Namespace,
    make: Make,
    valid: Callable[[Run], bool] = lambda run: True,
    left_behind: Callable[[OpenRun], bool] | None = None,
    check: Callable[[Config, dict[str, Run]], None] = lambda config, inputs: None,
) -> int:
    """Make one run of a stage, unless an equal one exists, and return the exit code.

    Args:
        stage: a key of STAGES or EXPERIMENTS.
        arguments: of `stage_parser`.
        make: writes the run's files and returns its figures.
        valid: does what an equal run did outside of its folder still stand?
        left_behind: has an equal run that was not finished left something that `make` goes on with? None:
            it never has. Two processes never make such a run at the same time.
        check: raises where a run of these settings and inputs could not succeed, before one is begun.
    """
    return guard(lambda: _run_stage(stage, arguments, make, valid, left_behind, check))


def _run_stage(
    stage: str,
    arguments: argparse.Namespace,
    make: Make,
    valid: Callable[[Run], bool],
    left_behind: Callable[[OpenRun], bool] | None,
    check: Callable[[Config, dict[str, Run]], None],
) -> None:
    config = load(arguments.conf, arguments.overrides)
    workspace = Workspace(config)
    experiment = stage in EXPERIMENTS
    if not (STAGES | EXPERIMENTS)[stage].reads and config.data.events is None:
        raise ConfigError("data.events is not set: give a conf file that names your log, --conf FILE")
    inputs = workspace.inputs(stage)
    if experiment:
        workspace = Workspace(config, "tune.root")
    key = workspace.key(stage, config, inputs)
    done = None if arguments.force else workspace.find(stage, key)
    # An older run would not be the one that the next job reads.
    if done and (experiment or done.run_id == workspace.runs(stage)[-1].run_id) and valid(done):
        tidy(done)
        print(f"{stage}: done before, {done.uri}")
        return
    check(config, inputs)
    begun = None
    if left_behind and not arguments.force:
        begun = _begun(workspace, stage, key, inputs, left_behind)
    with contextlib.ExitStack() as held:
        run = None
        if begun:
            with contextlib.suppress(RetryableError):  # another process makes it: this one makes its own
                held.enter_context(own(begun))
                run = begun
        if run:
            print(f"{stage}: goes on with {run.uri}", flush=True)
            run.remove("error.json")
        else:
            run = workspace.new(stage, key, inputs)
            if left_behind:
                held.enter_context(own(run))
        _commit(stage, config, run, make)


def _begun(
    workspace: Workspace,
    stage: str,
    key: dict[str, Any],
    inputs: dict[str, Run],
    left_behind: Callable[[OpenRun], bool],
) -> OpenRun | None:
    """The run to go on with, if any, whatever it ended with; of the latest that cannot be gone on with it is
    said why.
    """
    key, why = json.loads(json.dumps(key)), None
    for run, later in itertools.islice(workspace.unfinished(stage, inputs), LOOKED_AT):
        if not left_behind(run):
            continue
        if run.key == key and later is None:
            return run
        if why is None:
            changed = differences(run.key, key)
            names = ", ".join(changed[:NAMED]) + (", ..." if len(changed) > NAMED else "")
            older = f"is older than {later}, which the next stage would read"
            why = f"{run.uri}, which is not finished, {f'was begun with other {names}' if changed else older}"
    if why and stage not in EXPERIMENTS:
        print(f"{stage}: begins anew: {why}", flush=True)
    return None


def _commit(stage: str, config: Config, run: OpenRun, make: Make) -> None:
    """Make the run and commit it, or leave an error.json in it."""
    start = time.perf_counter()
    try:
        committed = _make(config, run, make)
    except BaseException as error:
        code = error.exit_code if isinstance(error, RecsysError) else 1
        kind = type(error).__name__
        text = str(error) if isinstance(error, RecsysError) else traceback.format_exc()
        try:
            run.write_json("error.json", {"class": kind, "exit_code": code, "error": text})
        except OSError:
            print(f"{stage}: error.json could not be written to {run.uri}", file=sys.stderr)
        raise
    tidy(committed)  # not earlier: from it the same command goes on after a kill
    print(f"{stage}: {time.perf_counter() - start:.1f} s, {committed.uri}")


def _make(config: Config, run: OpenRun, make: Make) -> Run:
    try:
        return run.commit(config, make(config, run))
    except FileNotFoundError as error:
        raise DataError(
            f"A file of an input run is missing: {error}. Make that run again, --force."
        ) from error
    except OSError as error:
        if error.errno is None:
            raise
        raise RetryableError(f"{run.uri}: {error}") from error

"""The files by which a training's workers tell its driver how they stand, in the folder of the checkpoints.

Worker 0 writes `data.json`, what is learned from and measured with; `plan.json`, how the tables are sharded;
`history.jsonl`, a line an evaluation; `now.json`, where it stands between evaluations; `workers.json`, host
and process of each; `attempt`, the number of this start of the workers; `resumed.json`, from which step it
goes on, on how many workers, and remarks, such as which checkpoints were refused. Any worker writes
`refused-<number>.json`, what it found wrong with settings or data. Nothing here needs torch.
"""

import contextlib
import json
import os
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from recsys_dist.errors import DataError, RecsysError, named

HISTORY, PLAN, NOW, WORKERS, ATTEMPT = "history.jsonl", "plan.json", "now.json", "workers.json", "attempt"
DATA, RESUMED, REFUSED = "data.json", "resumed.json", "refused-{}.json"
AGREED_SECONDS = 3
"""In which all workers find what all can."""


def write_json(file: Path, value: Any) -> None:
    """Write a JSON file, whole or not at all."""
    write_text(file, json.dumps(value))


def write_text(file: Path, text: str) -> None:
    """Write a file, whole or not at all."""
    write_bytes(file, text.encode())


def write_bytes(file: Path, content: bytes) -> None:
    """Write a file, whole or not at all."""
    new = file.with_name(f"{file.name}.{os.getpid()}.new")
    new.write_bytes(content)
    new.replace(file)


def lines(file: Path) -> list[dict[str, Any]]:
    """The lines of a file, as far as they are there and whole: one may be half written, or damaged."""
    try:
        text = file.read_text(errors="replace")
    except OSError:
        return []
    found = []
    for line in text.splitlines():
        with contextlib.suppress(ValueError):
            found.append(json.loads(line))
    return [line for line in found if isinstance(line, dict)]


def best(history: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The best epoch's line of a history.

    Raises:
        DataError: none is marked as the best.
    """
    marked = [line for line in history if line["best"]]
    if not marked:
        raise DataError(
            f"Of the {len(history)} whole lines of {HISTORY} none is marked as the best epoch, and the first "
            f"epoch always is. The file is damaged: train again, --force."
        )
    return marked[-1]


@contextlib.contextmanager
def refusing(folder: Path, worker: int = 0, workers: int = 1) -> Iterator[None]:
    """Write down what is found wrong with settings or data: that is no failure, and no second try helps.

    Workers that have not found it wait in vain for one that has. So where not all do, it fails after all,
    which ends the others; those that are started in their place see what is written (`refused`).

    Args:
        folder: of the training.
        worker: which of them this is, from 0.
        workers: how many there are.

    Raises:
        RecsysError: what was found, where others have not found it.
    """
    try:
        yield
    except RecsysError as error:
        told = {"class": type(error).__name__, "error": str(error)}
        write_json(folder / REFUSED.format(worker), told)
        until = time.monotonic() + AGREED_SECONDS
        while len(list(folder.glob(REFUSED.format("*")))) < workers:
            if time.monotonic() > until:
                raise
            time.sleep(0.1)


def refused(folder: Path) -> RecsysError | None:
    """What was written down by `refusing`."""
    for file in sorted(folder.glob(REFUSED.format("*"))):
        for found in lines(file):
            return named(found["class"], found["error"])
    return None


def forget_refused(folder: Path) -> None:
    """Remove what an earlier start has written down: it is tried again."""
    for file in folder.glob(REFUSED.format("*")):
        file.unlink(missing_ok=True)

"""Files with an id a line that a configuration names: the users that `score.users` limits a run to, and the
items of its rules.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from recsys_dist.errors import ConfigError, DataError
from recsys_dist.workspace import raw_input

SHOWN = 5
"""Ids that a message names."""


@dataclass(frozen=True)
class Chosen:
    """Users by the ids of a file."""

    path: str
    """As it stands in the configuration."""
    sha256: str
    """Of the file: another content makes another run."""
    users: pa.Table
    """Those that are known, of users/: user (index) and user_id."""
    unknown: list[str]
    """Ids that no user has, in the order of the file."""

    def figures(self) -> dict[str, Any]:
        """What the run keeps of it."""
        return {
            "path": self.path,
            "sha256": self.sha256,
            "users": self.users.num_rows,
            "unknown": len(self.unknown),
        }


def choose(path: str, users: pa.Table) -> Chosen:
    """Find the users whose ids a file names.

    Args:
        path: text, an id a line; spaces around an id and empty lines do not count, nor does an id's second
            time.
        users: all users there are: user and user_id.

    Raises:
        ConfigError: there is no such file.
        DataError: not one of its ids is known.
    """
    found, sha256 = read_ids("score.users", path)
    ids = pa.array(found, pa.string())
    known = users.filter(pc.is_in(users["user_id"], value_set=ids))
    unknown = ids.filter(pc.invert(pc.is_in(ids, value_set=known["user_id"].combine_chunks()))).to_pylist()
    if not known.num_rows:
        some = f", such as {', '.join(unknown[:SHOWN])}" if unknown else ""
        raise DataError(
            f"score.users={path}: not one of its {len(ids)} ids is a user's{some}. Ids are those of the raw "
            f"log, one a line. Nothing was published."
        )
    return Chosen(path, sha256, known, unknown)


def read_ids(key: str, path: str) -> tuple[list[str], str]:
    """The distinct ids of a file in its order, without the spaces around them, and the file's sha256.

    Args:
        key: of the configuration.
        path: text, an id a line.

    Raises:
        ConfigError: there is no such file.
        DataError: it is not text.
    """
    content = _content(path)
    if content is None:
        raise ConfigError(f"{key}={path}: there is no such file. It has an id a line.")
    try:
        # As featurize: other white space may be part of an id.
        lines = [line.strip(" \r") for line in content.decode("utf-8-sig").split("\n")]
    except UnicodeDecodeError as error:
        raise DataError(f"{key}={path} is not text in UTF-8: {error}") from None
    return list(dict.fromkeys(filter(None, lines))), hashlib.sha256(content).hexdigest()


def told(chosen: Chosen) -> str:
    """Whom the run is for, in a line."""
    line = f"score: {chosen.users.num_rows} users of {chosen.path}; the others' lists stay as they are"
    if not chosen.unknown:
        return line
    return f"{line}\nscore: {len(chosen.unknown)} ids of {chosen.path} are not known: {few(chosen.unknown)}"


def few(ids: Sequence[str]) -> str:
    """The first of some ids, for people."""
    return ", ".join(ids[:SHOWN]) + (", ..." if len(ids) > SHOWN else "")


def unchanged(figures: dict[str, Any]) -> bool:
    """Has the file the content that a run was made with?

    Args:
        figures: its `path` and `sha256`.
    """
    content = _content(figures["path"])
    return content is not None and hashlib.sha256(content).hexdigest() == figures["sha256"]


def _content(path: str) -> bytes | None:
    filesystem, files = raw_input(path)
    if len(files) != 1:
        return None
    with filesystem.open_input_stream(files[0].path) as stream:
        return bytes(stream.read())

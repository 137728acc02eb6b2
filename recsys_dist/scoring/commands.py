"""What jobs/score.py does in place of a run, one thing a call."""

import argparse
from typing import Any

from recsys_dist.config import load
from recsys_dist.errors import DataError
from recsys_dist.scoring import show, table
from recsys_dist.workspace import Workspace


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments, of which there may be one."""
    group = parser.add_argument_group("in place of a run, one of these")
    one = group.add_mutually_exclusive_group()
    arguments: dict[str, dict[str, Any]] = {
        "user": {"metavar": "ID", "help": "print this user's history and latest list"},
        "versions": {"action": "store_true", "help": "list the published table's versions, newest first"},
        "rollback": {
            "type": int,
            "metavar": "VERSION",
            "help": "make the published table what it was in a version, as a new version",
        },
        "export": {
            "nargs": 2,
            "metavar": ("DATE", "PATH"),
            "help": "write a date's lists to a file: .parquet, .jsonl or .csv",
        },
        "vacuum": {
            "type": float,
            "metavar": "DAYS",
            "help": "remove the files that no version of the last DAYS days has; older ones cannot be rolled "
            "back to afterwards",
        },
    }
    for name, settings in arguments.items():
        one.add_argument(f"--{name}", **settings)
    group.add_argument(
        "--recent",
        action="store_true",
        help=f"with --vacuum: also below {table.SAFE_DAYS:g} day, where no night is under way",
    )


def asked(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> bool:
    """Is anything asked for in place of a run?"""
    if arguments.recent and arguments.vacuum is None:
        parser.error("argument --recent: only with --vacuum")
    given = (arguments.user, arguments.rollback, arguments.export, arguments.vacuum)
    return arguments.versions or any(value is not None for value in given)


def answer(arguments: argparse.Namespace) -> str:
    """Do what is asked for and return what is to be printed."""
    workspace = Workspace(load(arguments.conf, arguments.overrides))
    lists = f"{workspace.uri}/topk"
    try:
        return _answer(arguments, workspace, lists)
    except FileNotFoundError as error:
        gone = str(error).splitlines()[0]
        raise DataError(
            f"{lists} is damaged, a file that it names is missing: {gone}. Make the lists again with "
            f"jobs/score.py --force, or take an earlier version with --rollback (--versions has them)."
        ) from None


def _answer(arguments: argparse.Namespace, workspace: Workspace, lists: str) -> str:
    if arguments.user is not None:
        return show.show_user(workspace, arguments.user)
    if arguments.rollback is not None:
        return table.rollback(lists, arguments.rollback)
    if arguments.export is not None:
        return table.export(lists, *arguments.export)
    if arguments.vacuum is not None:
        return table.vacuum(lists, arguments.vacuum, arguments.recent)
    return table.versions(lists)

"""The errors a job ends with, each with its exit code (sysexits.h)."""


class RecsysError(Exception):
    """A failure that the user can act on: the message says what was found, where, and what to do."""

    exit_code = 1


class ConfigError(RecsysError):
    """The command line, a conf file or the machine is not as it must be. Nothing was read yet."""

    exit_code = 64


class DataError(RecsysError):
    """The data, or a run that the stage reads, is missing or not as declared."""

    exit_code = 65


class RetryableError(RecsysError):
    """The same command may work later: the root cannot be written, or somebody else won a race."""

    exit_code = 75


def named(kind: str, text: str) -> RecsysError:
    """An error of the class with this name: what another process was ended by."""
    return {of.__name__: of for of in (ConfigError, DataError, RetryableError)}[kind](text)

"""The exceptions that speak to the user, and the exit statuses that go with them."""

from __future__ import annotations

import signal

AGAIN = "the same command continues from the last checkpoint"


def installing(extra: str) -> str:
    """The command that installs an optional part of pyproject.toml, in the folder of train.py."""
    return f"pip install -c constraints.txt -e '.[{extra}]'"


class UserError(ValueError):
    """Something the user can mend; the commands print it without a traceback and exit with `status`.

    The message says what was given, what is allowed and how to mend it. Where several processes
    run, all of them meet it and the first tells it.

    Attributes:
        status: exit status of the command.
        local: whether the process that meets it tells it, whatever its rank.
    """

    status = 2
    local = False


class LocalError(UserError):
    """What one process of several has met alone (a broken file of its share) and tells itself."""

    local = True


class RankLost(UserError):
    """Another process of the run has died or does not answer; nothing is wrong with this one.

    The status is EX_UNAVAILABLE of sysexits.h: a repetition may well succeed.
    """

    status = 69


class Interrupted(Exception):
    """The run was asked by a signal to stop. The same command continues it.

    Attributes:
        signal: the number of the signal.
    """

    def __init__(self, signum: int) -> None:
        super().__init__(f"stopped by {signal.Signals(signum).name}")
        self.signal = signum

    @property
    def status(self) -> int:
        """130 after Ctrl-C, as of every command: a person has ended it. Else EX_TEMPFAIL of
        sysexits.h, by which a batch script knows that the command is to be repeated."""
        return 130 if self.signal == signal.SIGINT else 75

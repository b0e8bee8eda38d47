"""Requests to stop. A batch system sends SIGTERM or SIGUSR1 some time before it kills, a person
presses Ctrl-C: a training then ends its step, writes a checkpoint and stops."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from cutmix_exp.distributed import launched_world
from cutmix_exp.errors import Interrupted

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
"""SIGHUP is not among them: `nohup` lets it be ignored, and a handler would undo that."""


class Stop:
    """Whether this process was asked to stop. While there is nothing to save, a signal ends the
    program at once (`Interrupted`); within `deferred` it is noted, and the training looks at it.

    Attributes:
        signal: the number of the first signal that was noted; 0: none.
    """

    def __init__(self) -> None:
        self.signal = 0
        self._deferred = False

    def asked(self) -> int:
        return self.signal

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Receive the signals, which only the main thread of a program can."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.signal(number, self._receive) for number in SIGNALS}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    @contextmanager
    def deferred(self) -> Iterator[None]:
        self._deferred = True
        try:
            yield
        finally:
            self._deferred = False

    def _receive(self, signum: int, frame: FrameType | None) -> None:
        # A launcher passes on what its workers have received already: only without one does a
        # second Ctrl-C come from a person who does not want to wait.
        impatient = signum == self.signal == signal.SIGINT and launched_world() is None
        if not self._deferred or impatient:
            raise Interrupted(signum)
        self.signal = self.signal or signum


@contextmanager
def held_back() -> Iterator[None]:
    """No signal to stop arrives within; processes that are started here never get one that they
    do not ask for (see `obey_parent`)."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def obey_parent(_: int = 0) -> None:
    """In a process that helps another: end on signals of that one alone.

    A batch system and Ctrl-C send theirs to all processes. A helper that died of them would keep
    the training from ending its step; it ends when the training wants it to.
    """
    parent = os.getppid()
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)

    def wait() -> None:
        while signal.sigwaitinfo(SIGNALS).si_pid != parent:
            pass
        os._exit(0)

    threading.Thread(target=wait, daemon=True).start()

"""Real processes without the seconds that an import of torch takes: forks of the test's own."""

from __future__ import annotations

import os
import runpy
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.utils.flop_counter
import torch.utils.tensorboard  # noqa: F401

import cutmix_exp.experiment  # noqa: F401
from cutmix_exp.training.optim import SGD
from tests.helpers import ROOT


@dataclass
class Fork:
    """A child of this process.

    Attributes:
        pid: its number; it leads a process group of its own.
        log: the file that its output and its errors go to.
    """

    pid: int
    log: Path

    def said(self) -> str:
        return self.log.read_text()

    def wait(self, timeout: float = 120) -> int:
        """The exit status, or minus the number of the signal that has ended it."""
        until = time.monotonic() + timeout
        while time.monotonic() < until:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                return os.waitstatus_to_exitcode(status)
            time.sleep(0.01)
        os.killpg(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)
        raise AssertionError(f"still runs after {timeout} s:\n{self.said()}")

    def when(self, text: str, timeout: float = 120) -> Fork:
        """Wait until it has said something."""
        until = time.monotonic() + timeout
        while text not in self.said():
            assert time.monotonic() < until, f"{text!r} was never said:\n{self.said()}"
            time.sleep(0.01)
        return self


def fork(action: Callable[[], Any], log: Path, **environment: str) -> Fork:
    """Do something in a child process; its exit status is what a script's would be."""
    log.parent.mkdir(parents=True, exist_ok=True)
    log.write_text("")
    pid = os.fork()
    if pid:
        return Fork(pid, log)
    status = 1
    try:
        os.setpgrp()
        target = os.open(log, os.O_WRONLY | os.O_APPEND)
        os.dup2(target, 1)
        os.dup2(target, 2)
        sys.stdout = os.fdopen(1, "w", buffering=1, closefd=False)
        sys.stderr = os.fdopen(2, "w", buffering=1, closefd=False)
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, signal.SIG_DFL)
        os.environ.update(environment)
        action()
        status = 0
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def fork_train(*overrides: str, log: Path, before: Callable[[], Any] = bool, **env: str) -> Fork:
    """python train.py OVERRIDES in a fork; `before` is called in it first."""

    def action() -> None:
        before()
        sys.argv = [str(ROOT / "train.py"), *overrides]
        runpy.run_path(sys.argv[0], run_name="__main__")

    return fork(action, log, **env)


def fork_ranks(
    size: int, action: Callable[[int], Any], folder: Path, **environment: str
) -> list[Fork]:
    """`action(rank)` in one process for each of `size` ranks, as a launcher would start them."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]

    def start(rank: int) -> Fork:
        return fork(
            lambda: action(rank),
            folder / f"rank{rank}.log",
            RANK=str(rank),
            LOCAL_RANK=str(rank),
            WORLD_SIZE=str(size),
            LOCAL_WORLD_SIZE=str(size),
            MASTER_ADDR="127.0.0.1",
            MASTER_PORT=str(port),
            **environment,
        )

    return [start(rank) for rank in range(size)]


def ends(fork: Fork, status: int) -> str:
    """What a fork has said that must end so, without a traceback."""
    assert fork.wait() == status, fork.said()
    assert "Traceback" not in fork.said(), fork.said()
    return fork.said()


def train_ranks(size: int, *overrides: str, folder: Path, before: Any = None) -> list[Fork]:
    """python train.py OVERRIDES in `size` ranks. `before(rank)` is called in each first."""

    def action(rank: int) -> None:
        if before is not None:
            before(rank)
        sys.argv = [str(ROOT / "train.py"), *overrides]
        runpy.run_path(sys.argv[0], run_name="__main__")

    return fork_ranks(size, action, folder)


def at_step(count: int, action: Callable[[], Any]) -> None:
    """In a fork: do something in the optimizer's step of that number, counted from 1."""
    original, calls = SGD.step, [0]

    def step(*args: Any, **kwargs: Any) -> Any:
        calls[0] += 1
        if calls[0] == count:
            action()
        return original(*args, **kwargs)

    SGD.step = step  # type: ignore[method-assign]

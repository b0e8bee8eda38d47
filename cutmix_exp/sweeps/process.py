"""A run in a process of its own, that does not outlive the process which asked for it."""

from __future__ import annotations

import ctypes
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from cutmix_exp.reporting.record import REPOSITORY

PR_SET_PDEATHSIG = 1  # <linux/prctl.h>
TRAIN = (sys.executable, str(REPOSITORY / "train.py"))
EVALUATE = (sys.executable, str(REPOSITORY / "scripts" / "evaluate.py"))


def start(
    words: Sequence[str],
    log: Path,
    *,
    env: Mapping[str, str] | None = None,
    cores: Sequence[int] = (),
    show: bool = False,
    program: Sequence[str] = TRAIN,
) -> subprocess.Popen[bytes]:
    """Start `train.py WORDS`, or another program.

    The process is told to stop (SIGTERM) when the one that started it dies, however it dies, and
    is in a session of its own: Ctrl-C is passed on by the sweep, once.

    Args:
        log: what it prints is appended to this file, below a line that says what was started.
        env: added to the environment.
        cores: the CPU cores that it may use; empty leaves it all.
        show: print what it prints here; only its errors go to the log.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    parent, prctl = os.getpid(), getattr(ctypes.CDLL(None), "prctl", None)  # Linux has it

    def prepare() -> None:
        if prctl is not None:
            prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() != parent:
            os._exit(1)  # died in between
        signal.signal(signal.SIGUSR2, signal.SIG_IGN)  # submitit's, meant for the process above
        if cores:
            os.sched_setaffinity(0, cores)

    with open(log, "ab") as file:
        at = time.strftime("%Y-%m-%d %H:%M:%S")
        script = os.path.relpath(program[-1], REPOSITORY)
        file.write(f"--- {at}: python {script} {shlex.join(words)}\n".encode())
        file.flush()
        return subprocess.Popen(
            [*program, *words],
            stdin=subprocess.DEVNULL,
            stdout=None if show else file,
            stderr=file,
            env={**os.environ, **(env or {})},
            start_new_session=True,
            preexec_fn=prepare,
        )


def wait(process: subprocess.Popen[bytes]) -> int:
    """The exit status. If the waiting is interrupted, the process is told to stop, and does."""
    try:
        while (status := process.poll()) is None:
            time.sleep(0.1)
        return status
    except BaseException:
        stop(process)
        raise


def stop(process: subprocess.Popen[bytes]) -> None:
    """Tell it to stop (it writes a checkpoint) and wait until it has; its status stays readable.

    Without the locks of `Popen`, so that a signal handler may call it.
    """
    try:
        os.kill(process.pid, signal.SIGTERM)
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
    except (ProcessLookupError, ChildProcessError):
        pass  # has ended before


def carry_out(words: Sequence[str], log: str, folder: str, program: Sequence[str] = TRAIN) -> int:
    """What another machine does for one try, in a working folder that it shares with this one."""
    os.chdir(folder)
    return wait(start(words, Path(log), program=program))

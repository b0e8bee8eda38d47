"""The directory of a run: made, held against other processes, and cleared of what a kill has left."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

from cutmix_exp.config import Config
from cutmix_exp.distributed import World
from cutmix_exp.errors import UserError
from cutmix_exp.reporting.record import Record, read_record

BEAT = 5.0
"""Seconds between two signs of life of the process that holds a directory."""

Owner = dict[str, Any]


def finished_record(config: Config) -> Record | None:
    """The record of this run if it is complete and not to be started over.

    Raises:
        UserError: the directory holds another run.
    """
    file = config.run_dir / "record.json"
    if config.force or not file.exists():
        return None
    record = read_record(file)
    if record["run_id"] != config.run_id or record["cell"] != config.cell():
        raise UserError(
            f"{config.run_dir} holds another run: {record['run_id']} with another configuration; it "
            "was moved there or changed by hand; move it back, or use another runs_dir (force=true "
            "would remove it)"
        )
    return record if record["status"] == "complete" else None


@contextmanager
def run_directory(config: Config, world: World) -> Iterator[list[str]]:
    """Make the run directory and hold it against other processes; empties it under `force`.

    Gives warnings about what was found.

    Raises:
        UserError: it cannot be written, or another process works in it.
    """
    if not world.is_main:
        yield []
        return
    directory = config.run_dir
    try:
        directory.mkdir(parents=True, exist_ok=True)
        file = open(directory / ".lock", "a+")  # noqa: SIM115 (held until the run ends)
    except OSError as error:
        raise UserError(
            f"cannot write into {directory}: {error.strerror}; set runs_dir=FOLDER"
        ) from None
    with file, _held(file, directory) as warnings:
        for path in directory.iterdir() if config.force else directory.rglob(".*.tmp"):
            if path.name != ".lock":
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        yield warnings


@contextmanager
def _held(file: TextIO, directory: Path) -> Iterator[list[str]]:
    """Hold the lock `file`, and say in it who does.

    The kernel gives the lock back when its holder dies, however it dies. On file systems of
    several machines such a lock may hold on one of them only: so a file that names a process of
    another machine is watched for signs of life before it counts as stale.
    """
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno != errno.EWOULDBLOCK:
            raise UserError(
                f"{directory}: this file system knows no locks ({error.strerror}); two processes "
                "could ruin each other's run; set runs_dir=FOLDER on another one"
            ) from None
        raise in_use(directory, _owner(file)) from None
    before = _owner(file)
    if before and before["host"] != socket.gethostname() and _lives(file):
        raise in_use(directory, before)
    left = f"taking over from {_named(before)}, which has ended without a word" if before else ""
    _write(file, {"pid": os.getpid(), "host": socket.gethostname(), "since": time.time()})
    ended = threading.Event()
    beat = threading.Thread(target=_beat, args=(file.name, ended), daemon=True)
    beat.start()
    try:
        yield [left] if left else []
    finally:
        ended.set()
        beat.join()
        _write(file, None)


def in_use(directory: Path, owner: Owner | None) -> UserError:
    return UserError(
        f"{directory} is in use by {_named(owner)}; wait for it, or use another runs_dir"
    )


def _named(owner: Owner | None) -> str:
    if owner is None:
        return "another process"
    minutes = max(0.0, time.time() - owner["since"]) / 60
    return f"process {owner['pid']} on {owner['host']} (for {minutes:.0f} minutes)"


def _owner(file: TextIO) -> Owner | None:
    """Who has written his name into the lock file; None: nobody, or nobody that can be read."""
    file.seek(0)
    try:
        found = json.loads(file.read())
        return {"pid": int(found["pid"]), "host": str(found["host"]), "since": found["since"] + 0.0}
    except (ValueError, LookupError, TypeError):
        return None


def _write(file: TextIO, owner: Owner | None) -> None:
    try:
        file.truncate(0)
        file.write(json.dumps(owner) if owner else "")
        file.flush()
    except OSError:  # a full disk: the lock holds without the name
        pass


def _beat(path: str, ended: threading.Event) -> None:
    while not ended.wait(BEAT):
        try:
            os.utime(path)
        except OSError:
            return


def _lives(file: TextIO) -> bool:
    """Whether somebody touches the file within two beats; clocks need not agree."""
    seen, until = os.stat(file.name).st_mtime_ns, time.monotonic() + 2 * BEAT
    while time.monotonic() < until:
        time.sleep(BEAT / 10)
        if os.stat(file.name).st_mtime_ns != seen:
            return True
    return False

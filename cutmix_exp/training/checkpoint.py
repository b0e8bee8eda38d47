"""Checkpoints: tensors and plain containers only, so that they load with weights_only=True.

Two are kept, `last.pt` and `previous.pt`. Each holds a digest of its contents, so that a damaged
one is recognised whatever the damage.
"""

from __future__ import annotations

import errno
import hashlib
import os
import pickle
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cutmix_exp.errors import UserError
from cutmix_exp.files import write_atomically

SCHEMA = 2
LAST, PREVIOUS = "last.pt", "previous.pt"

State = dict[str, Any]

UNREADABLE = (
    OSError,
    RuntimeError,
    ValueError,
    LookupError,
    EOFError,
    pickle.UnpicklingError,
    zipfile.BadZipFile,
)
"""What torch.load raises for files that are not what it has written."""


class Damaged(UserError):
    """A checkpoint that is not what was written."""

    def __init__(self, path: Path, reason: str) -> None:
        super().__init__(
            f"the checkpoint {path} cannot be read: {reason}\n"
            "remove it to go on without it, or start over with force=true"
        )
        self.reason = reason


def save_checkpoint(path: Path, state: State) -> None:
    """Write a checkpoint; a crash in the middle leaves the one before it in place."""
    content = _undigested({"schema": SCHEMA, **state})
    content["digest"] = digest(content)
    write_atomically(path, lambda file: torch.save(content, file))


def save_last(folder: Path, state: State) -> None:
    """Write `last.pt`; what was there becomes `previous.pt`. At each moment `last.pt` is whole."""
    last, previous = folder / LAST, folder / PREVIOUS
    if last.exists():
        temporary = folder / f".{PREVIOUS}.{os.getpid()}.tmp"
        temporary.unlink(missing_ok=True)
        try:
            os.link(last, temporary)
        except OSError:  # a file system without hard links
            shutil.copyfile(last, temporary)
        os.replace(temporary, previous)
    save_checkpoint(last, state)


def digest(value: Any) -> str:
    """SHA-256 of tensors (dtype, shape, bytes) and plain values in nested containers."""
    held = hashlib.sha256()

    def feed(value: Any) -> None:
        if isinstance(value, Tensor):
            held.update(f"{value.dtype} {tuple(value.shape)}".encode())
            flat = value.detach().cpu().contiguous().reshape(-1)
            held.update(flat.view(torch.uint8).numpy().data)
        elif isinstance(value, dict):
            held.update(f"dict {len(value)}".encode())
            for key, part in value.items():
                feed(key)
                feed(part)
        elif isinstance(value, (list, tuple)):
            held.update(f"list {len(value)}".encode())
            for part in value:
                feed(part)
        else:
            held.update(repr(value).encode() + b"\0")

    feed(value)
    return held.hexdigest()


def load_checkpoint(path: Path) -> State:
    """Read a checkpoint onto the CPU; nothing in it is executed.

    Raises:
        Damaged: the file is damaged, or holds more than tensors and plain containers.
        UserError: it is of a schema that this version does not know.
    """
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except UNREADABLE as error:
        raise Damaged(path, _reason(path, error)) from None
    if not isinstance(state, dict) or "schema" not in state:
        raise Damaged(path, "it is no checkpoint of this project")
    if state["schema"] == SCHEMA and digest(_undigested(state)) != state.get("digest"):
        raise Damaged(path, "its contents do not match their digest")
    while state["schema"] in MIGRATIONS:
        state = MIGRATIONS[state["schema"]](state)
    if state["schema"] != SCHEMA:
        raise UserError(
            f"the checkpoint {path} has schema {state['schema']}; this version reads up to {SCHEMA}; "
            "use the version that wrote it, or start over with force=true"
        )
    return state


def _reason(path: Path, error: Exception) -> str:
    """Why a file cannot be read. Torch's own words are of its internals, and may advise to execute
    what the file holds."""
    if isinstance(error, OSError) and error.errno != errno.EINVAL:  # as of a seek beyond the end
        return error.strerror or str(error)
    if not zipfile.is_zipfile(path):
        return "it is cut off, or not a checkpoint"
    if isinstance(error, pickle.UnpicklingError):
        return "it is damaged, or holds more than tensors, none of which is executed"
    return "it is damaged"


def _undigested(state: State) -> State:
    return {key: value for key, value in state.items() if key != "digest"}


def _from_schema_1(state: State) -> State:
    """It had no digest, and did not know its data."""
    return {**state, "schema": 2, "fingerprint": None}


MIGRATIONS: dict[int, Callable[[State], State]] = {1: _from_schema_1}
"""What makes of a schema the next one."""


def has_checkpoint(folder: Path) -> bool:
    return (folder / LAST).exists() or (folder / PREVIOUS).exists()


def newest_sound(folder: Path) -> tuple[Path | None, str]:
    """The checkpoint to continue from, and a warning if it is not the last one.

    Raises:
        Damaged: there are checkpoints, and none is sound.
        UserError: it is of an unknown schema.
    """
    last, previous = folder / LAST, folder / PREVIOUS
    if not has_checkpoint(folder):
        return None, ""
    try:
        load_checkpoint(last)
        return last, ""
    except Damaged as error:
        if not previous.exists():
            raise
        reason = error.reason if last.exists() else "it is missing"
    try:
        load_checkpoint(previous)
    except Damaged as error:
        raise Damaged(last, f"{reason}; nor can {PREVIOUS}: {error.reason}") from None
    return previous, (
        f"the checkpoint {last} cannot be read ({reason}); continuing from the one before it"
    )

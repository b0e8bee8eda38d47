"""Checkpoints: tensors and plain containers only, so that they load with weights_only=True."""

from __future__ import annotations

import pickle
import zipfile
from pathlib import Path
from typing import Any

import torch

from cutmix_exp.errors import UserError
from cutmix_exp.files import write_atomically

SCHEMA = 1


def save_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """Write a checkpoint; a crash in the middle leaves the one before it in place."""
    write_atomically(path, lambda file: torch.save({"schema": SCHEMA, **state}, file))


def damaged(path: Path, reason: str) -> UserError:
    return UserError(
        f"the checkpoint {path} cannot be read: {reason}\n"
        "remove it to go on without it, or start over with force=true"
    )


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Read a checkpoint onto the CPU; nothing in it is executed.

    Raises:
        UserError: the file is damaged, holds more than tensors, or is of another schema.
    """
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise damaged(path, "it holds more than tensors, none of which is executed") from None
    except (OSError, RuntimeError, EOFError, zipfile.BadZipFile) as error:
        raise damaged(path, str(error).splitlines()[0]) from None
    if not isinstance(state, dict) or state.get("schema") != SCHEMA:
        found = state.get("schema") if isinstance(state, dict) else type(state).__name__
        raise UserError(
            f"the checkpoint {path} has schema {found}; this version reads {SCHEMA}; "
            "start over with force=true"
        )
    return state

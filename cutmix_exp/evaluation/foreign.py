"""Networks' tensors from files: our checkpoints, the CutMix authors' `.pth.tar`, torchvision's names.

Nothing in a file is executed: only tensors, plain containers and NumPy's numbers are read.
"""

from __future__ import annotations

import hashlib
import pickle
import re
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from cutmix_exp.errors import UserError
from cutmix_exp.models.base import StagedNetwork
from cutmix_exp.models.pyramidnet import PyramidUnit

State = dict[str, Tensor]

RESIDUAL = {"conv1": 0, "bn1": 1, "conv2": 3, "bn2": 4, "conv3": 6, "bn3": 7}
"""Places of the authors' (and torchvision's) layers in our residual branch, ..."""
PYRAMID = {"bn1": 0, "conv1": 1, "bn2": 2, "conv2": 4, "bn3": 5, "conv3": 7, "bn4": 8}
"""... and of those of the authors' PyramidNet, whose units begin and end with BatchNorm."""

_scalar = np.float64(0).__reduce__()[0]
NUMBERS: list[Any] = [
    np.dtype,
    np.float64,
    (_scalar, "numpy.core.multiarray.scalar"),
    (_scalar, "numpy._core.multiarray.scalar"),
    type(np.dtype(np.float64)),
    type(np.dtype(np.float32)),
]
"""Old training scripts keep their best error as a number of NumPy's."""


def read_state(file: Path) -> State:
    """The tensors of a network from a checkpoint: a bare state, or one under `state_dict` or
    `model`; of our runs the moving average, where the recipe has one. Prefixes of DataParallel,
    DistributedDataParallel and torch.compile are taken off.

    Raises:
        UserError: the file cannot be read, holds more than tensors, or no network's tensors.
    """
    try:
        with torch.serialization.safe_globals(NUMBERS):
            held = torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise UserError(
            f"{file} holds more than tensors, none of which is executed; "
            "save the network's state_dict() alone"
        ) from None
    except (OSError, RuntimeError, EOFError, zipfile.BadZipFile) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"{file} cannot be read as a checkpoint: {reason}") from None
    if isinstance(held, dict) and held.get("average"):
        averaged = held["average"].items()
        return {n.removeprefix("module."): t for n, t in averaged if n.startswith("module.")}
    for name in ("state_dict", "model"):
        if isinstance(held, dict) and isinstance(held.get(name), dict):
            held = held[name]
            break
    if not isinstance(held, dict) or not all(isinstance(t, Tensor) for t in held.values()):
        raise UserError(f"{file} holds no network's tensors (a state_dict, or one under that name)")
    return {re.sub(r"^(module\.|_orig_mod\.)+", "", name): t for name, t in held.items()}


def load_into(network: nn.Module, state: State, origin: str) -> None:
    """Fill a network with the tensors of `state`, by our names or by the authors'.

    Raises:
        UserError: names or shapes that do not fit; says which.
    """
    own = network.state_dict()
    if isinstance(network, StagedNetwork) and not set(state) & set(own):
        units = any(isinstance(m, PyramidUnit) for m in network.modules())
        state = {our_name(name, pyramid=units): tensor for name, tensor in state.items()}
    # torch before 0.4.1 did not count the batches that BatchNorm has seen; nothing reads it here.
    counted = {n: t for n, t in own.items() if n.endswith("num_batches_tracked")}
    state = counted | state
    missing, surplus = sorted(set(own) - set(state)), sorted(set(state) - set(own))
    shapes = [n for n in own if n in state and own[n].shape != state[n].shape]
    if missing or surplus or shapes:
        said = [
            f"{what} {', '.join(names[:3])}{f' and {len(names) - 3} more' if len(names) > 3 else ''}"
            for what, names in (
                ("lacks", missing),
                ("has besides", surplus),
                ("has in other shapes", shapes),
            )
            if names
        ]
        raise UserError(
            f"the tensors of {origin} do not fit the network: it {'; it '.join(said)}\n"
            "choose the network that they are of: model=..., model.depth=..., dataset=... (for the "
            "number of classes)"
        )
    network.load_state_dict(state)


def our_name(name: str, *, pyramid: bool) -> str:
    """A layer's name in the authors' resnet.py and pyramidnet.py (and torchvision's ResNet) as it
    is in a `StagedNetwork`; an unknown one stays."""
    found = re.fullmatch(r"layer(\d+)\.(\d+)\.(\w+)\.(.+)", name)
    if found:
        stage, block, layer, rest = found.groups()
        if layer == "downsample":
            return f"stage{stage}.{block}.shortcut.{rest}"
        place = (PYRAMID if pyramid else RESIDUAL).get(layer)
        return name if place is None else f"stage{stage}.{block}.branch.{place}.{rest}"
    renamed = {"conv1.": "stem.0.", "bn1.": "stem.1.", "bn_final.": "head.0."}
    renamed["fc."] = "head.2.fc." if pyramid else "head.fc."
    for theirs, ours in renamed.items():
        if name.startswith(theirs):
            return ours + name.removeprefix(theirs)
    return name


def digest(network: nn.Module) -> str:
    """16 hexadecimal digits of the SHA-256 of a network's tensors with their names: the same
    network has the same digest whatever file it came from."""
    out = hashlib.sha256()
    for name, tensor in sorted(network.state_dict().items()):
        if not name.endswith("num_batches_tracked"):
            out.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            flat = tensor.detach().cpu().contiguous().reshape(-1)
            out.update(flat.view(torch.uint8).numpy().data)
    return out.hexdigest()[:16]

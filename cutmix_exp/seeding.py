"""Keyed randomness: one stream per purpose, a function of (seed, purpose, epoch, step) alone.

Whatever a method draws, it cannot shift what another stream yields, so two methods run with one
seed share initial weights, batch order and crops; and a resumed run draws what the unbroken one
would have drawn, because nothing about a stream is stored.
"""

from __future__ import annotations

import hashlib

import numpy as np


def _key(seed: int, purpose: str) -> int:
    return int.from_bytes(hashlib.sha256(f"{seed}/{purpose}".encode()).digest()[:16], "little")


def stream(seed: int, purpose: str, epoch: int = 0, step: int = 0) -> np.random.Generator:
    """A NumPy generator (counter-based Philox) for one purpose at one step.

    The upper two of the four 64-bit counter words hold step and epoch, which leaves 2**128 draws
    to each stream.
    """
    return np.random.Generator(
        np.random.Philox(key=_key(seed, purpose), counter=[0, 0, step, epoch])
    )


def torch_seed(seed: int, purpose: str, epoch: int = 0, step: int = 0, rank: int = 0) -> int:
    """A 63-bit seed for a torch generator, keyed like `stream` and by rank."""
    return _key(seed, f"{purpose}/{epoch}/{step}/{rank}") >> 65

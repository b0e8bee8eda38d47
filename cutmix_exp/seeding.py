"""Keyed randomness: one stream per purpose, a function of (seed, purpose, epoch, step) alone.

Whatever a method draws, it cannot shift what another stream yields, so two methods run with one
seed share initial weights, batch order and crops; and a resumed run draws what the unbroken one
would have drawn, because nothing about a stream is stored.
"""

from __future__ import annotations

import hashlib
from functools import lru_cache

import numpy as np


class _PhiloxKey(np.random.SeedSequence):
    """Hands a key to Philox as it is. Philox's own argument `key` asks the system for random bytes
    besides, which it does not use: twice the time."""

    def __init__(self, key: int) -> None:
        super().__init__(0)
        self.words = np.array([key & (2**64 - 1), key >> 64], dtype=np.uint64)

    def generate_state(self, n_words: int, dtype: object = np.uint64) -> np.ndarray:
        return self.words


def _key(seed: int, purpose: str) -> int:
    return int.from_bytes(hashlib.sha256(f"{seed}/{purpose}".encode()).digest()[:16], "little")


@lru_cache(1024)
def _philox_key(seed: int, purpose: str) -> _PhiloxKey:
    return _PhiloxKey(_key(seed, purpose))


def stream(seed: int, purpose: str, epoch: int = 0, step: int = 0) -> np.random.Generator:
    """A NumPy generator (counter-based Philox) for one purpose at one step.

    The upper two of the four 64-bit counter words hold step and epoch, which leaves 2**128 draws
    to each stream.
    """
    philox = np.random.Philox(_philox_key(seed, purpose))
    philox.advance((epoch << 192) + (step << 128))
    return np.random.Generator(philox)


def torch_seed(seed: int, purpose: str, epoch: int = 0, step: int = 0, rank: int = 0) -> int:
    """A 63-bit seed for a torch generator, keyed like `stream` and by rank."""
    return _key(seed, f"{purpose}/{epoch}/{step}/{rank}") >> 65

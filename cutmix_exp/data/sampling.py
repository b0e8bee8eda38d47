"""Sampling: which images come when, and which of them are a rank's.

All of it is a function of (seed, epoch, step) and of positions in the *global* batch, so that
nothing depends on the number of processes.
"""

from __future__ import annotations

import numpy as np

from cutmix_exp.seeding import stream


def epoch_order(seed: int, epoch: int, size: int) -> np.ndarray:
    """The permutation int64 [size] in which one epoch visits the training images."""
    return stream(seed, "order", epoch).permutation(size)


def steps_per_epoch(size: int, batch_size: int) -> int:
    """The last partial batch is kept, as in the authors' code."""
    return -(-size // batch_size)


def share(size: int, rank: int, world_size: int) -> np.ndarray:
    """Positions of a rank in a batch: contiguous, and the ranks' counts differ by at most one."""
    return np.arange(size * rank // world_size, size * (rank + 1) // world_size)


def share_or_last(size: int, rank: int, world_size: int) -> np.ndarray:
    """What a rank computes on: its share, or the batch's last image where it has none, since it
    must join every collective."""
    mine = share(size, rank, world_size)
    return mine if len(mine) else np.array([size - 1])

"""Sampling: which images come when.

All of it is a function of (seed, epoch, step) and of positions in the *global* batch, so that
nothing depends on the number of processes.
"""

from __future__ import annotations

import numpy as np

from cutmix_exp.seeding import stream


def epoch_order(
    seed: int, epoch: int, size: int, *, repeats: int = 1, batch_size: int = 1
) -> np.ndarray:
    """The order int64 [size] in which one epoch visits the training images: a permutation, or with
    repeated augmentation (Hoffer et al., arXiv 1901.09335) the start of one in which each image
    comes `repeats` times in a row; the rest is not seen in this epoch.

    Within a batch the images' first appearances come before their second ones, and so on: the
    ranks' contiguous shares then hold different images, as under DeiT's, torchvision's and timm's
    samplers, which deal an image's repeats to different ranks. (A batch that `repeats` does not
    divide shares an image with the next one, as theirs does.)
    """
    place = np.arange(size)
    place = place[np.lexsort((place % repeats, place // batch_size))]
    return stream(seed, "order", epoch).permutation(size)[place // repeats]


def steps_per_epoch(size: int, batch_size: int) -> int:
    """The last partial batch is kept, as in the authors' code."""
    return -(-size // batch_size)

"""Slot `image`: operations on single images."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from cutmix_exp.aug.base import BatchShape, ImageOp
from cutmix_exp.schema import option


def cut_out(images: Tensor, centres: Tensor, size: int) -> Tensor:
    """Zero one square of side `size` in each image [n, C, H, W], around its centre [n, 2] (y, x).

    The square is clipped at the border; an odd side loses a pixel, as in the authors' code.
    """
    height, width = images.shape[-2:]
    half = size // 2
    hidden = [
        (axis >= centre[:, None] - half) & (axis < centre[:, None] + half)
        for axis, centre in (
            (torch.arange(height, device=images.device), centres[:, 0]),
            (torch.arange(width, device=images.device), centres[:, 1]),
        )
    ]
    mask = hidden[0][:, None, :, None] & hidden[1][:, None, None, :]
    return images.masked_fill(mask, 0)


@dataclass(frozen=True, kw_only=True)
class Cutout(ImageOp):
    """Cutout (DeVries & Taylor, 1708.04552; uoguelph-mlrg/Cutout): a hole of zeros after
    normalisation, centre uniform over the pixels, clipped at the border, in every image.

    Attributes:
        size: side of the hole in pixels; None is half the image's side, which is the CutMix
            paper's 16 at 32 px and 112 at 224 px.
    """

    size: int | None = option(None, ge=1)

    def resolve(self, image_size: int) -> Cutout:
        return self if self.size is not None else replace(self, size=image_size // 2)

    def sample(self, shape: BatchShape, progress: float, rng: np.random.Generator) -> np.ndarray:
        """Centres int64 [B, 2] as (y, x)."""
        return rng.integers(0, (shape.height, shape.width), size=(shape.batch, 2))

    def apply(self, plan: np.ndarray, images: Tensor) -> Tensor:
        assert self.size is not None, "resolve() comes first"
        return cut_out(images, torch.from_numpy(plan).to(images.device), self.size)

"""Slot `mix`: masks of low-frequency noise."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from cutmix_exp.aug.base import BatchShape, MixPlan, two_weights, unmixed
from cutmix_exp.aug.mix import PairMixer
from cutmix_exp.schema import option

Spectrum = Literal["official", "complex"]


def low_frequency_noise(
    n: int, height: int, width: int, decay: float, spectrum: Spectrum, rng: np.random.Generator
) -> np.ndarray:
    """Grey images float64 [n, H, W] whose amplitudes fall with the frequency to the power `decay`.

    `complex` is the paper's: a complex normal amplitude for each frequency. `official` is what the
    authors' NumPy code does: it reads the real and the imaginary parts, one after the other, as
    real amplitudes of twice as many frequencies, so that a frequency f across the image has the
    strength of f/2, and each mask is symmetric about a point.
    """
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width))
    strength = 1 / np.maximum(frequency, 1 / max(height, width)) ** decay
    parts = rng.standard_normal((n, *strength.shape, 2)) * strength[..., None]
    if spectrum == "official":
        amplitudes = parts.reshape(n, height, -1)
    else:
        amplitudes = parts[..., 0] + 1j * parts[..., 1]
    return np.fft.irfft2(amplitudes, (height, width))


def share_mask(noise: np.ndarray, count: np.ndarray, soft: np.ndarray) -> np.ndarray:
    """Masks float32 [n, H, W]: 1 at the `count` [n] highest pixels of noise [n, H, W], 0 elsewhere;
    over `soft` [n] pixels on both sides of the edge it falls from 1 to 0 in even steps."""
    flat = noise.reshape(len(noise), -1)
    rank = np.empty(flat.shape, np.int64)
    np.put_along_axis(rank, np.argsort(-flat, axis=1), np.arange(flat.shape[1])[None], axis=1)
    count, soft = count[:, None], soft[:, None]
    ramp = 1 - (rank - (count - soft)) / np.maximum(2 * soft - 1, 1)
    mask = np.where(soft > 0, ramp.clip(0, 1), rank < count)
    return mask.reshape(noise.shape).astype(np.float32)


@dataclass(frozen=True, kw_only=True)
class FMix(PairMixer):
    """FMix (Harris et al., 2002.12047; ecs-vlc/FMix): the image where low-frequency noise is high,
    its partner elsewhere.

    Attributes:
        decay: power by which the noise's amplitudes fall with the frequency.
        max_soft: width of the soft edge, as a share of the image on each side; 0 is a hard edge.
        spectrum: of the noise, see `low_frequency_noise`.
        correct_lambda: weight the labels by the mean of the mask instead of by the drawn lambda
            (authors), from which it differs by less than a pixel.
        granularity: one mask per `batch` (authors) or per `sample`.
    """

    decay: float = option(3.0, gt=0)
    max_soft: float = option(0.0, ge=0, le=0.5)
    spectrum: Spectrum = "official"
    correct_lambda: bool = False

    def sample(self, shape: BatchShape, progress: float, rng: np.random.Generator) -> MixPlan:
        """Arrays: `mask` float32 [B, H, W], the image's part of each pixel; without copies where
        the batch shares it."""
        acts, lam, partner = self._draw(shape, progress, rng)
        up = rng.random(len(lam)) < 0.5
        if not acts.any():
            return unmixed(shape.batch)
        size = (shape.height, shape.width)
        noise = low_frequency_noise(len(lam), *size, self.decay, self.spectrum, rng)
        pixels = shape.height * shape.width
        count = np.where(up, np.ceil(lam * pixels), np.floor(lam * pixels)).astype(np.int64)
        soft = (pixels * np.minimum(self.max_soft, np.minimum(lam, 1 - lam))).astype(np.int64)
        mask = share_mask(noise, count, soft)
        mask[~acts] = 1
        share = mask.astype(np.float64).mean((1, 2)) if self.correct_lambda else lam
        return MixPlan(
            partners=partner[None],
            weights=two_weights(np.broadcast_to(np.where(acts, share, 1.0), shape.batch)),
            arrays={"mask": np.broadcast_to(mask, (shape.batch, *size))},
        )

    def apply(self, plan: MixPlan, sources: list[Tensor]) -> Tensor:
        if plan.num_sources == 1:
            return sources[0]
        image, partner = sources
        mask = torch.from_numpy(np.require(plan.arrays["mask"], requirements=["C", "W"]))
        mask = mask[:, None].to(image.device)
        if self.max_soft == 0:
            return torch.where(mask > 0, image, partner)
        return image * mask.to(image.dtype) + partner * (1 - mask).to(image.dtype)

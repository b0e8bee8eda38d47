"""Slot `mix`: the box is where the partner is salient."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from cutmix_exp.aug.base import BatchShape, MixPlan, two_weights, unmixed
from cutmix_exp.aug.mix import PairMixer, boxes_around, cut_prob, cut_sides, paste_partner

RADII = (12, 24, 48, 28, 56, 112)
"""Of the neighbourhoods that a pixel is compared with, in pixels (OpenCV's)."""
LUMINANCE = (0.299, 0.587, 0.114)


def _window(side: int, radius: int, device: torch.device) -> Tensor:
    """0/1 float64 [side, side]: row p marks the pixels p-radius+1 to p+radius; as in OpenCV the
    last pixel is never among them."""
    pixel = torch.arange(side, device=device)
    first = (pixel - radius + 1).clamp(0, side - 1)
    end = (pixel + radius + 1).clamp(0, side - 1)
    return ((pixel >= first[:, None]) & (pixel < end[:, None])).double()


def fine_grained_saliency(images: Tensor) -> Tensor:
    """Saliency float64 [n, H, W] of images [n, 3, H, W] (Montabone & Soto, 2010): how much brighter
    or darker a pixel is than its neighbourhoods of six sizes.

    After OpenCV's StaticSaliencyFineGrained, in floating point where OpenCV cuts to bytes.
    """
    weights = torch.tensor(LUMINANCE, dtype=torch.float64, device=images.device)
    grey = (images.double() * weights[:, None, None]).sum(1, keepdim=True)
    tap = torch.tensor([0.25, 0.5, 0.25], dtype=torch.float64, device=images.device)
    kernel = (tap[:, None] * tap)[None, None]
    for _ in range(2):
        grey = F.conv2d(F.pad(grey, (1, 1, 1, 1), mode="reflect"), kernel)
    grey = grey[:, 0]
    on = off = torch.zeros_like(grey)
    for radius in RADII:
        rows, columns = (_window(side, radius, grey.device) for side in grey.shape[1:])
        count = rows.sum(1)[:, None] * columns.sum(1) - 1
        around = (rows @ grey @ columns.T - grey) / count.clamp_min(1)
        on = on + (grey - around).clamp_min(0)
        off = off + (around - grey).clamp_min(0)
    on, off = (part / part.amax((1, 2), keepdim=True).clamp_min(1e-12) for part in (on, off))
    return on + off


@dataclass(frozen=True, kw_only=True)
class SaliencyMix(PairMixer):
    """SaliencyMix (Uddin et al., 2006.01791; afm-shahab-uddin/SaliencyMix): CutMix with the box
    around the most salient pixel of the partner.

    Attributes:
        prob: None is 0.5 at 32 px and 1.0 elsewhere, as the authors' commands have it.
        granularity: `batch` (authors): one lambda, and one box for all images: around the most
            salient pixel of the partner of the batch's first image. `sample`: each image has its
            own lambda, and the box of its own partner.
    """

    def resolve(self, image_size: int) -> SaliencyMix:
        return self if self.prob is not None else replace(self, prob=cut_prob(image_size))

    def sample(self, shape: BatchShape, progress: float, rng: np.random.Generator) -> MixPlan:
        """The plan's last source is the one that is looked at; `finish` fills in the boxes and
        label weights. Arrays: `lam` float64 [B], 1 where nothing is mixed."""
        acts, lam, partner = self._draw(shape, progress, rng)
        if not acts.any():
            return unmixed(shape.batch)
        partners = partner[None]
        if self.granularity == "batch":
            partners = np.stack([partner, np.full(shape.batch, partner[0])])
        weights = np.zeros((1 + len(partners), shape.batch), np.float32)
        weights[0] = 1
        lam = np.broadcast_to(np.where(acts, lam, 1.0), shape.batch)
        return MixPlan(partners, weights, arrays={"lam": lam})

    def finish(self, plan: MixPlan, sources: list[Tensor]) -> MixPlan:
        if plan.num_sources == 1:
            return plan
        height, width = sources[0].shape[-2:]
        seen = sources[-1][:1] if self.granularity == "batch" else sources[-1]
        peak = fine_grained_saliency(seen).flatten(1).argmax(1).cpu().numpy()
        centre_y, centre_x = np.divmod(np.broadcast_to(peak, len(sources[0])), width)
        sides = cut_sides("official", height, width, plan.arrays["lam"])
        boxes = boxes_around(sides, height, width, centre_y, centre_x)
        area = (boxes[:, 2:] - boxes[:, :2]).prod(1)
        weights = np.zeros_like(plan.weights)
        weights[:2] = two_weights(1 - area / (height * width))
        return replace(plan, weights=weights, boxes=boxes)

    def apply(self, plan: MixPlan, sources: list[Tensor]) -> Tensor:
        if plan.num_sources == 1:
            return sources[0]
        assert plan.boxes is not None, "finish() comes first"
        return paste_partner(plan, sources)

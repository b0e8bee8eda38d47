"""Slot `mix`: images blended as waves, and blends of concatenated images."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from cutmix_exp.aug.base import BatchShape, MixPlan, Partner, two_weights, unmixed
from cutmix_exp.aug.mix import Granularity, Mixup, PairMixer, paste_boxes


def blend_waves(first: Tensor, second: Tensor, ratio: Tensor) -> Tensor:
    """Images [n, C, H, W] mixed so that the first is heard at `ratio` [n], as sounds are: each
    image's loudness is its standard deviation, and the result keeps the energy of uncorrelated
    waves (Between-class learning, 1711.10284, section 3.3 and BC+ of mil-tokyo/bc_learning_image).
    """
    loudness = [
        image.float().flatten(1).std(1, correction=0).clamp_min(1e-6) for image in (first, second)
    ]
    own, other = loudness[1] * ratio, loudness[0] * (1 - ratio)
    p = (own / (own + other))[:, None, None, None]
    energy = (p**2 + (1 - p) ** 2).sqrt()
    return first * (p / energy).to(first.dtype) + second * ((1 - p) / energy).to(first.dtype)


@dataclass(frozen=True, kw_only=True)
class BCPlus(Mixup):
    """BC+ of between-class learning (Tokozume et al., 1711.10284; mil-tokyo/bc_learning_image):
    images mixed as waves of different loudness, labels by the ratio that is heard.

    BC without the plus is `Mixup` with the same switches. docs/fidelity.md has the differences.

    Attributes:
        alpha: of the ratio; uniform in the authors' code, which is 1.
        partner, granularity: the authors' pairs are drawn from the whole data set, one ratio each.
    """

    partner: Partner = "dataset"
    granularity: Granularity = "sample"

    def apply(self, plan: MixPlan, sources: list[Tensor]) -> Tensor:
        if plan.num_sources == 1:
            return sources[0]
        ratio = torch.from_numpy(plan.weights[0]).to(sources[0].device)
        return blend_waves(sources[0], sources[1], ratio)


@dataclass(frozen=True, kw_only=True)
class VHMix(PairMixer):
    """VH-Mixup and VH-BC+ (Summers & Dinneen, 1805.11272; ceciliaresearch/MixedExample): the
    vertical and the horizontal concatenation of one pair, each with its own cut, blended.

    Attributes:
        blend: of the two concatenations: `mixup` or `waves` (BC+).
        alpha: the vertical one has the weight Beta(alpha, alpha); uniform in the authors' code.
        granularity: one draw per `sample` (authors) or per `batch`.
    """

    blend: Literal["mixup", "waves"] = "mixup"
    granularity: Granularity = "sample"

    def sample(self, shape: BatchShape, progress: float, rng: np.random.Generator) -> MixPlan:
        """Arrays: `cut` int64 [B, 2]: first row and first column of the partner; `ratio` float32
        [B]: the weight of the vertical concatenation."""
        acts, ratio, partner = self._draw(shape, progress, rng)
        size = np.array([shape.height, shape.width])
        cut = rng.integers(0, size, (len(acts), 2))
        if not acts.any():
            return unmixed(shape.batch)
        cut[~acts] = size
        ratio = np.where(acts, ratio, 1.0).astype(np.float32)
        share = ratio.astype(float) * cut[:, 0] / shape.height
        share += (1.0 - ratio) * cut[:, 1] / shape.width
        every = np.broadcast_to(np.arange(len(acts)), shape.batch)
        return MixPlan(
            partners=partner[None],
            weights=two_weights(share)[:, every],
            arrays={"cut": cut[every], "ratio": ratio[every]},
        )

    def apply(self, plan: MixPlan, sources: list[Tensor]) -> Tensor:
        if plan.num_sources == 1:
            return sources[0]
        height, width = sources[0].shape[-2:]
        boxes = np.tile([0, 0, height, width], (2, len(plan.arrays["cut"]), 1))
        boxes[0, :, 0], boxes[1, :, 1] = plan.arrays["cut"].T
        vertical, horizontal = (
            paste_boxes(sources[0], sources[1], torch.from_numpy(b).to(sources[0].device))
            for b in boxes
        )
        ratio = torch.from_numpy(plan.arrays["ratio"]).to(sources[0].device)
        if self.blend == "waves":
            return blend_waves(vertical, horizontal, ratio)
        ratio = ratio.to(vertical)[:, None, None, None]
        return vertical * ratio + horizontal * (1 - ratio)

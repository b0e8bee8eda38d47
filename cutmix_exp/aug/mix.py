"""Slot `mix`: CutMix and Mixup on images.

The semantics are those of the CutMix authors' code (clovaai/CutMix-PyTorch); each doubtful choice
is a switch whose default is theirs. docs/fidelity.md lists them.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from cutmix_exp.aug.base import (
    BatchShape,
    Mixer,
    MixPlan,
    Partner,
    draw_partner,
    two_weights,
    unmixed,
)
from cutmix_exp.schema import option

BoxLaw = Literal["official", "unbiased"]
Granularity = Literal["batch", "sample"]


def cut_boxes(
    law: BoxLaw,
    height: int,
    width: int,
    lam: np.ndarray,
    centre_y: np.ndarray,
    centre_x: np.ndarray,
) -> np.ndarray:
    """Boxes int64 [n, 4] (top, left, bottom, right) around integer centres, clipped to the image.

    `official` truncates the sides H*sqrt(1-lambda), W*sqrt(1-lambda) and takes half of each on
    both sides of the centre, so an unclipped box has even sides and is never larger than asked
    (authors' `rand_bbox`). `unbiased` rounds the sides and keeps odd ones.
    """
    ratio = np.sqrt(1.0 - lam)
    edges = []
    for side, centre in ((height, centre_y), (width, centre_x)):
        if law == "official":
            cut = (side * ratio).astype(np.int64) // 2 * 2
        else:
            cut = np.rint(side * ratio).astype(np.int64)
        start = centre - cut // 2
        edges.append((np.clip(start, 0, side), np.clip(start + cut, 0, side)))
    (top, bottom), (left, right) = edges
    return np.stack([top, left, bottom, right], axis=1)


def paste_boxes(images: Tensor, partners: Tensor, boxes: Tensor) -> Tensor:
    """Images [n, C, H, W] with the partners' pixels inside each image's box [n, 4]."""
    height, width = images.shape[-2:]
    y = torch.arange(height, device=images.device)
    x = torch.arange(width, device=images.device)
    top, left, bottom, right = boxes[:, :, None].unbind(1)
    rows, columns = (y >= top) & (y < bottom), (x >= left) & (x < right)
    return torch.where(rows[:, None, :, None] & columns[:, None, None, :], partners, images)


@dataclass(frozen=True, kw_only=True)
class _PairMixer(Mixer):
    """What CutMix and Mixup share: when they act, with whom, and at which granularity."""

    prob: float | None = option(None, ge=0, le=1)
    alpha: float = option(1.0, gt=0)
    partner: Partner = "permutation"
    granularity: Granularity = "batch"

    def _draw(
        self, shape: BatchShape, rng: np.random.Generator
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Coins bool [n], lambdas float64 [n] and partners int64 [B]; n is 1 or B.

        All three are drawn whatever the coin says, so that `prob` shifts no other draw.
        """
        n = 1 if self.granularity == "batch" else shape.batch
        assert self.prob is not None, "resolve() comes first"
        acts = rng.random(n) < self.prob
        lam = rng.beta(self.alpha, self.alpha, n)
        return acts, lam, draw_partner(self.partner, shape, rng)


@dataclass(frozen=True, kw_only=True)
class CutMix(_PairMixer):
    """CutMix (Yun et al., 1905.04899, section 3.1 and algorithm A1; authors' train.py).

    Attributes:
        prob: probability of mixing; None is 0.5 at 32 px and 1.0 elsewhere (the first author in
            clovaai/CutMix-PyTorch issue 30). One coin per batch, or per sample.
        alpha: of Beta(alpha, alpha), from which lambda is drawn.
        box_law: `official` or `unbiased`, see `cut_boxes`.
        correct_lambda: weight the labels by the true area after clipping (the authors since
            August 2019) instead of by the drawn lambda.
        partner: `permutation` (authors), `roll` (torchvision) or `flip` (timm).
        granularity: one box and lambda per `batch` (authors) or per `sample`.
    """

    box_law: BoxLaw = "official"
    correct_lambda: bool = True

    def resolve(self, image_size: int) -> CutMix:
        if self.prob is not None:
            return self
        return replace(self, prob=0.5 if image_size == 32 else 1.0)

    def sample(self, shape: BatchShape, progress: float, rng: np.random.Generator) -> MixPlan:
        acts, lam, partner = self._draw(shape, rng)
        centre_y = rng.integers(0, shape.height, len(lam))
        centre_x = rng.integers(0, shape.width, len(lam))
        if not acts.any():
            return unmixed(shape.batch)
        boxes = cut_boxes(self.box_law, shape.height, shape.width, lam, centre_y, centre_x)
        boxes[~acts] = 0
        area = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
        share = 1.0 - area / (shape.height * shape.width)
        if not self.correct_lambda:
            share = np.where(acts, lam, 1.0)
        return MixPlan(
            partners=partner[None],
            weights=two_weights(np.broadcast_to(share, shape.batch)),
            boxes=np.broadcast_to(boxes, (shape.batch, 4)).copy(),
        )

    def apply(self, plan: MixPlan, sources: list[Tensor]) -> Tensor:
        if plan.boxes is None:
            return sources[0]
        return paste_boxes(
            sources[0], sources[1], torch.from_numpy(plan.boxes).to(sources[0].device)
        )


@dataclass(frozen=True, kw_only=True)
class Mixup(_PairMixer):
    """Mixup (Zhang et al., 1710.09412; facebookresearch/mixup-cifar10): whole images blended.

    Attributes:
        prob: probability of mixing; None is 1.0.
        alpha: of Beta(alpha, alpha); the CutMix paper tried 0.5 and 1.0.
        partner, granularity: as in `CutMix`.
    """

    def resolve(self, image_size: int) -> Mixup:
        return self if self.prob is not None else replace(self, prob=1.0)

    def sample(self, shape: BatchShape, progress: float, rng: np.random.Generator) -> MixPlan:
        acts, lam, partner = self._draw(shape, rng)
        if not acts.any():
            return unmixed(shape.batch)
        share = np.broadcast_to(np.where(acts, lam, 1.0), shape.batch)
        return MixPlan(partners=partner[None], weights=two_weights(share))

    def apply(self, plan: MixPlan, sources: list[Tensor]) -> Tensor:
        if plan.num_sources == 1:
            return sources[0]
        weights = torch.from_numpy(plan.weights).to(sources[0])[:, :, None, None, None]
        return sources[0] * weights[0] + sources[1] * weights[1]

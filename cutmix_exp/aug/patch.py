"""Slot `mix`: images put together from crops, bands or smaller copies of images."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from cutmix_exp.aug.base import (
    BatchShape,
    Mixer,
    MixPlan,
    draw_partner,
    exact_weights,
    two_weights,
    unmixed,
)
from cutmix_exp.aug.mix import Granularity, PairMixer, paste_boxes, paste_partner
from cutmix_exp.errors import UserError
from cutmix_exp.schema import option


def in_layout_of(images: Tensor, pixels: Tensor) -> Tensor:
    """Pixels [n, H, W, C], as indexing gives them, as [n, C, H, W] in the memory layout of images
    [n, C, H, W]."""
    channels_last = images.is_contiguous(memory_format=torch.channels_last)
    wanted = torch.channels_last if channels_last else torch.contiguous_format
    return pixels.permute(0, 3, 1, 2).contiguous(memory_format=wanted)


@dataclass(frozen=True, kw_only=True)
class Ricap(Mixer):
    """RICAP (Takahashi et al., 1811.09030; jackryo/ricap): crops of four images around a boundary
    point, with the labels weighted by area.

    The image itself gives the upper left crop. The authors shuffle the batch for that one too,
    which changes the order of the batch and nothing else.

    Attributes:
        prob: probability of mixing; the authors always do.
        alpha: the authors' beta: the boundary point is at Beta(alpha, alpha) of height and width.
        granularity: one boundary point and one place of each crop per `batch` (authors) or per
            `sample`.
    """

    prob: float = option(1.0, ge=0, le=1)
    alpha: float = option(0.3, gt=0)
    granularity: Granularity = "batch"

    def sample(self, shape: BatchShape, progress: float, rng: np.random.Generator) -> MixPlan:
        """Arrays: `boundary` int64 [B, 2] (y, x); `shift` int64 [B, 4, 2]: what to add to (y, x) in
        each quarter (upper left, upper right, lower left, lower right) to find the pixel of its
        source."""
        n = 1 if self.granularity == "batch" else shape.batch
        acts = rng.random(n) < self.prob
        size = np.array([shape.height, shape.width])
        boundary = np.rint(size * rng.beta(self.alpha, self.alpha, (n, 2))).astype(np.int64)
        partners = np.stack([draw_partner("permutation", shape, rng) for _ in range(3)])
        boundary[~acts] = size  # everything is the upper left crop
        rest = size - boundary
        (top, left), (bottom, right) = boundary.T, rest.T
        quarters = np.array([[top, left], [top, right], [bottom, left], [bottom, right]])
        quarters = quarters.transpose(2, 0, 1)  # [n, 4, 2] sides
        crop = rng.integers(0, size - quarters + 1)
        if not acts.any():
            return unmixed(shape.batch)
        is_second = np.array([[0, 0], [0, 1], [1, 0], [1, 1]])
        shares = quarters.prod(2).T / size.prod()
        every = np.broadcast_to(np.arange(n), shape.batch)
        return MixPlan(
            partners=partners,
            weights=exact_weights(shares)[:, every],
            arrays={
                "boundary": boundary[every],
                "shift": (crop - boundary[:, None] * is_second)[every],
            },
        )

    def apply(self, plan: MixPlan, sources: list[Tensor]) -> Tensor:
        if plan.num_sources == 1:
            return sources[0]
        n, _, height, width = sources[0].shape
        device = sources[0].device
        boundary = torch.from_numpy(plan.arrays["boundary"]).to(device)
        shift = torch.from_numpy(plan.arrays["shift"]).to(device)
        image = torch.arange(n, device=device)[:, None, None]
        y = torch.arange(height, device=device)[:, None]
        x = torch.arange(width, device=device)
        top, left = boundary[:, :, None, None].unbind(1)
        quarter = 2 * (y >= top).long() + (x >= left).long()
        moved_y, moved_x = shift[image, quarter].unbind(-1)
        pixels = torch.stack(sources)[quarter, image, :, y + moved_y, x + moved_x]
        return in_layout_of(sources[0], pixels)


@dataclass(frozen=True, kw_only=True)
class ResizeMix(PairMixer):
    """ResizeMix (Qin et al., 2012.11101; JayQine/ResizeMix): the whole partner, made smaller, over
    a part of the image.

    Attributes:
        scale_min, scale_max: the partner's sides are multiplied by a rate uniform between these.
            At `granularity: batch` (authors) one rate holds for the batch; the place is each
            image's own.
        alpha: does not matter; lambda is the share of the image that stays.
    """

    scale_min: float = option(0.1, gt=0, le=1)
    scale_max: float = option(0.8, gt=0, le=1)

    def __post_init__(self) -> None:
        if self.scale_min > self.scale_max:
            raise UserError(
                f"scale_min={self.scale_min} is above scale_max={self.scale_max}; exchange them"
            )
        if self.alpha != 1:
            raise UserError(
                "alpha is of a Beta distribution, and ResizeMix draws none: "
                "set scale_min and scale_max, and leave alpha out"
            )

    def sample(self, shape: BatchShape, progress: float, rng: np.random.Generator) -> MixPlan:
        """Arrays: `rate` float32 [B]."""
        acts, _, partner = self._draw(shape, progress, rng)
        rate = rng.uniform(self.scale_min, self.scale_max, len(acts))
        size = (shape.height, shape.width)
        sides = [np.broadcast_to((s * rate).astype(np.int64), shape.batch) for s in size]
        corner = []
        for side, cut in zip(size, sides, strict=True):
            # As the authors: around a pixel, and pushed inside where it does not fit.
            first = np.maximum(rng.integers(0, side, shape.batch) - cut // 2, 0)
            corner.append(np.minimum(first, side - cut))
        if not acts.any():
            return unmixed(shape.batch)
        boxes = np.stack([*corner, corner[0] + sides[0], corner[1] + sides[1]], axis=1)
        boxes[~np.broadcast_to(acts, shape.batch)] = 0
        area = (boxes[:, 2:] - boxes[:, :2]).prod(1)
        return MixPlan(
            partners=partner[None],
            weights=two_weights(1 - area / (shape.height * shape.width)),
            boxes=boxes,
            arrays={"rate": np.broadcast_to(rate, shape.batch).astype(np.float32)},
        )

    def apply(self, plan: MixPlan, sources: list[Tensor]) -> Tensor:
        if plan.boxes is None:
            return sources[0]
        image, partner = sources
        boxes = torch.from_numpy(plan.boxes).to(image.device)
        step = 1 / torch.from_numpy(plan.arrays["rate"]).to(image.device)
        rows, columns = (
            ((torch.arange(side, device=image.device) - boxes[:, axis, None]) * step[:, None])
            .long()  # of no matter outside the box, where it may be negative
            .clamp(0, side - 1)
            for axis, side in enumerate(image.shape[-2:])
        )
        n = torch.arange(len(image), device=image.device)[:, None, None]
        small = partner[n, :, rows[:, :, None], columns[:, None, :]]
        return paste_boxes(image, in_layout_of(image, small), boxes)


@dataclass(frozen=True, kw_only=True)
class Concat(PairMixer):
    """Vertical or horizontal concatenation (Summers & Dinneen, 1805.11272;
    ceciliaresearch/MixedExample): the image above, or left of, a straight cut, and its partner
    below, or right of it, with the labels weighted by area.

    Attributes:
        direction: `vertical`: one above the other; `horizontal`: side by side.
        alpha: the cut is at Beta(alpha, alpha) of the side, rounded down; uniform in the authors'
            code, which is 1.
        granularity: one cut per `sample` (authors) or per `batch`.
    """

    direction: Literal["vertical", "horizontal"] = "vertical"
    granularity: Granularity = "sample"

    def sample(self, shape: BatchShape, progress: float, rng: np.random.Generator) -> MixPlan:
        acts, lam, partner = self._draw(shape, progress, rng)
        if not acts.any():
            return unmixed(shape.batch)
        side = shape.height if self.direction == "vertical" else shape.width
        cut = np.broadcast_to(np.where(acts, (lam * side).astype(np.int64), side), shape.batch)
        boxes = np.tile([0, 0, shape.height, shape.width], (shape.batch, 1))
        boxes[:, 0 if self.direction == "vertical" else 1] = cut
        return MixPlan(partners=partner[None], weights=two_weights(cut / side), boxes=boxes)

    def apply(self, plan: MixPlan, sources: list[Tensor]) -> Tensor:
        return paste_partner(plan, sources)

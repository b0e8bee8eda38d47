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
    on,
    taken,
    two_weights,
    unmixed,
)
from cutmix_exp.errors import UserError
from cutmix_exp.schema import option

BoxLaw = Literal["official", "unbiased", "inside"]
Granularity = Literal["batch", "sample"]


def cut_sides(
    law: BoxLaw, height: int, width: int, lam: np.ndarray, aspect: np.ndarray | float = 1.0
) -> tuple[np.ndarray, np.ndarray]:
    """Unclipped sides of boxes, int64 [n] each: H and W times sqrt(1-lambda).

    `official` truncates each side to an even number, so a box is never larger than asked (authors'
    `rand_bbox`); the other laws round, and keep odd sides.

    Args:
        aspect: makes the height sqrt(aspect) times larger and the width as much smaller, where
            both still fit the image.
    """
    area = 1.0 - lam
    # Beyond these limits a side would be longer than the image's.
    aspect = np.clip(aspect, area, 1 / np.maximum(area, 1e-12))
    sides = height * np.sqrt(area * aspect), width * np.sqrt(area / aspect)
    if law == "official":
        return sides[0].astype(np.int64) // 2 * 2, sides[1].astype(np.int64) // 2 * 2
    return np.rint(sides[0]).astype(np.int64), np.rint(sides[1]).astype(np.int64)


def boxes_around(
    sides: tuple[np.ndarray, np.ndarray],
    height: int,
    width: int,
    centre_y: np.ndarray,
    centre_x: np.ndarray,
) -> np.ndarray:
    """Boxes int64 [n, 4] (top, left, bottom, right) with these sides: each starts half a side
    before its integer centre and is clipped to the image."""
    top, left = centre_y - sides[0] // 2, centre_x - sides[1] // 2
    bottom, right = top + sides[0], left + sides[1]
    boxes = np.stack([top, left, bottom, right], axis=1)
    return np.minimum(np.maximum(boxes, 0), [height, width, height, width])


def cut_boxes(
    law: BoxLaw,
    height: int,
    width: int,
    lam: np.ndarray,
    centre_y: np.ndarray,
    centre_x: np.ndarray,
) -> np.ndarray:
    """`boxes_around` these centres with the `cut_sides` of this law: CutMix's boxes."""
    return boxes_around(cut_sides(law, height, width, lam), height, width, centre_y, centre_x)


def paste_boxes(images: Tensor, partners: Tensor, boxes: Tensor) -> Tensor:
    """Images [n, C, H, W] with the partners' pixels inside each image's box [n, 4]."""
    height, width = images.shape[-2:]
    y = torch.arange(height, device=images.device)
    x = torch.arange(width, device=images.device)
    top, left, bottom, right = boxes[:, :, None].unbind(1)
    rows, columns = (y >= top) & (y < bottom), (x >= left) & (x < right)
    return torch.where(rows[:, None, :, None] & columns[:, None, None, :], partners, images)


def paste_partner(plan: MixPlan, sources: list[Tensor]) -> Tensor:
    """Source 0 with source 1 inside the plan's boxes; source 0 itself where the plan has none."""
    if plan.boxes is None:
        return sources[0]
    boxes = on(sources[0], plan.boxes)
    return paste_boxes(sources[0], sources[1], boxes)


def paste_in_place(plan: MixPlan, images: Tensor, rows: list[np.ndarray]) -> Tensor:
    """`paste_partner` of images out of a pool [m, C, H, W] that may be overwritten (see
    `Mixer.combine`): what lies outside the boxes is not touched where the pool is the host."""
    if plan.boxes is None:
        return taken(images, rows[0])
    partners = on(images, rows[1])
    if (plan.boxes == plan.boxes[0]).all():
        top, left, bottom, right = plan.boxes[0].tolist()
        box = (slice(None), slice(None), slice(top, bottom), slice(left, right))
        # Copied before the pool changes. index_select has kernels that images[box][partners] lacks.
        inside = images[box].contiguous().index_select(0, partners)
        mixed = taken(images, rows[0])
        mixed[box] = inside
        return mixed
    if images.device.type != "cpu":
        boxes = on(images, plan.boxes)
        return paste_boxes(taken(images, rows[0]), images.index_select(0, partners), boxes)
    mixed = images.index_select(0, torch.from_numpy(rows[0]))
    pool, out = images.numpy(), mixed.numpy()
    for image, row, (top, left, bottom, right) in zip(
        out, rows[1].tolist(), plan.boxes.tolist(), strict=True
    ):
        image[:, top:bottom, left:right] = pool[row, :, top:bottom, left:right]
    return mixed


def cut_prob(image_size: int) -> float:
    """The probability with which CutMix's authors, and SaliencyMix's after them, mix images."""
    return 0.5 if image_size == 32 else 1.0


@dataclass(frozen=True, kw_only=True)
class PairMixer(Mixer):
    """What mixers of two images share: when they act, with whom, and at which granularity.

    Attributes:
        prob: probability of mixing; one coin per batch, or per sample.
        alpha: of Beta(alpha, alpha), from which lambda is drawn.
        partner: `permutation` of the batch (CutMix and Mixup authors), `roll` (torchvision),
            `flip` (timm) or `dataset`: drawn from the whole data set (ildoonet/cutmix).
        granularity: one coin and lambda per `batch` (authors) or per `sample`.
        prob_schedule: `constant`, or `linear`: the probability grows from 0 to `prob` over the
            training (the paper's "Scheduled CutMix").
    """

    prob: float | None = option(None, ge=0, le=1)
    alpha: float = option(1.0, gt=0)
    partner: Partner = "permutation"
    granularity: Granularity = "batch"
    prob_schedule: Literal["constant", "linear"] = option("constant", neutral="constant")

    @property
    def wants_guests(self) -> bool:
        return self.partner == "dataset"

    def resolve(self, image_size: int) -> PairMixer:
        """Mix always, unless `prob` is given."""
        return self if self.prob is not None else replace(self, prob=1.0)

    def _draw(
        self, shape: BatchShape, progress: float, rng: np.random.Generator
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Coins bool [n], lambdas float64 [n] and partners int64 [B]; n is 1 or B.

        All three are drawn whatever the coin says, so that `prob` shifts no other draw.
        """
        n = 1 if self.granularity == "batch" else shape.batch
        assert self.prob is not None, "resolve() comes first"
        prob = self.prob * progress if self.prob_schedule == "linear" else self.prob
        acts = rng.random(n) < prob
        lam = rng.beta(self.alpha, self.alpha, n)
        return acts, lam, draw_partner(self.partner, shape, rng)


@dataclass(frozen=True, kw_only=True)
class CutMix(PairMixer):
    """CutMix (Yun et al., 1905.04899, section 3.1 and algorithm A1; authors' train.py) and the
    variants of the paper's Table 8 (section 4.1.3).

    Attributes:
        prob: None is 0.5 at 32 px and 1.0 elsewhere (the first author in clovaai/CutMix-PyTorch
            issue 30).
        box_law: `official` (authors) or `unbiased`, see `cut_sides`; `inside` has the sides of
            `unbiased` and a corner uniform over the places where the whole box fits.
        correct_lambda: weight the labels by the true area after clipping (the authors since
            August 2019) instead of by the drawn lambda.
        centre: of the box: `uniform` over the pixels, or `gaussian` around the image's centre
            ("Center Gaussian"), rounded to a pixel and kept within the image.
        centre_std: of the Gaussian, in sides of the image; the paper does not give it.
        fixed_lambda: the box is that of this lambda instead of a drawn one; 0.75 is "Fixed-size":
            half the side, 16 at 32 px. Clipping and `correct_lambda` are as ever.
        max_aspect: 1 is a box of the image's own shape; above, the box's height over its width is
            that shape's times a factor, log-uniform in 1/max_aspect to max_aspect; the area stays.
        label: `area`; `one_hot`: the label of the source with the larger area, the host where they
            are equal ("One-hot"); `half`: half of each, whatever the area ("Complete-label").
    """

    box_law: BoxLaw = "official"
    correct_lambda: bool = True
    centre: Literal["uniform", "gaussian"] = option("uniform", neutral="uniform")
    centre_std: float = option(0.25, gt=0, neutral=0.25)
    fixed_lambda: float | None = option(None, ge=0, le=1, neutral=None)
    max_aspect: float = option(1.0, ge=1, neutral=1.0)
    label: Literal["area", "one_hot", "half"] = option("area", neutral="area")

    def __post_init__(self) -> None:
        refused = {
            "centre_std is of centre=gaussian: set that too, or leave it out": (
                self.centre == "uniform" and self.centre_std != 0.25
            ),
            "box_law=inside draws the corner of the box, centre=gaussian its centre: "
            "choose centre=uniform, or box_law=official or unbiased": (
                self.box_law == "inside" and self.centre == "gaussian"
            ),
            f"correct_lambda=false weights the labels by lambda, label={self.label} does not: "
            "choose label=area, or leave correct_lambda=true": (
                self.label != "area" and not self.correct_lambda
            ),
            "fixed_lambda takes the place of the lambda that alpha is for: "
            "leave alpha at 1.0, or fixed_lambda out": (
                self.fixed_lambda is not None and self.alpha != 1
            ),
        }
        for reason, holds in refused.items():
            if holds:
                raise UserError(reason)

    def resolve(self, image_size: int) -> CutMix:
        return self if self.prob is not None else replace(self, prob=cut_prob(image_size))

    def sample(self, shape: BatchShape, progress: float, rng: np.random.Generator) -> MixPlan:
        acts, lam, partner = self._draw(shape, progress, rng)
        if self.fixed_lambda is not None:
            lam = np.full_like(lam, self.fixed_lambda)
        boxes = self._boxes(shape, lam, rng)
        if not acts.any():
            return unmixed(shape.batch)
        boxes[~acts] = 0
        area = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
        share = 1.0 - area / (shape.height * shape.width)
        weight = share if self.correct_lambda else lam
        if self.label != "area":
            weight = share >= 0.5 if self.label == "one_hot" else np.full_like(lam, 0.5)
        weights = two_weights(np.where(acts, weight, 1.0))
        return MixPlan(
            partners=partner[None],
            weights=np.repeat(weights, shape.batch // len(lam), axis=1),
            boxes=np.repeat(boxes, shape.batch // len(lam), axis=0),
        )

    def _boxes(self, shape: BatchShape, lam: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """Draw boxes int64 [n, 4] for the lambdas [n]."""
        n, size = len(lam), (shape.height, shape.width)
        aspect: np.ndarray | float = 1.0
        if self.max_aspect > 1:
            limit = np.log(self.max_aspect)
            aspect = np.exp(rng.uniform(-limit, limit, n))
        sides = cut_sides(self.box_law, *size, lam, aspect)
        centre = []
        for side, cut in zip(size, sides, strict=True):
            if self.box_law == "inside":
                centre.append(rng.integers(0, side - cut + 1) + cut // 2)
            elif self.centre == "gaussian":
                drawn = rng.normal((side - 1) / 2, self.centre_std * side, n)
                centre.append(np.rint(drawn.clip(0, side - 1)).astype(np.int64))
            else:
                centre.append(rng.integers(0, side, n))
        return boxes_around(sides, *size, *centre)

    def apply(self, plan: MixPlan, sources: list[Tensor]) -> Tensor:
        return paste_partner(plan, sources)

    def combine(
        self, plan: MixPlan, images: Tensor, rows: list[np.ndarray]
    ) -> tuple[MixPlan, Tensor]:
        return plan, taken(images, rows[0]) if plan.layer else paste_in_place(plan, images, rows)


@dataclass(frozen=True, kw_only=True)
class Mixup(PairMixer):
    """Mixup (Zhang et al., 1710.09412; facebookresearch/mixup-cifar10): whole images blended.

    `prob` None is 1.0; the CutMix paper tried alpha 0.5 and 1.0.
    """

    def sample(self, shape: BatchShape, progress: float, rng: np.random.Generator) -> MixPlan:
        acts, lam, partner = self._draw(shape, progress, rng)
        if not acts.any():
            return unmixed(shape.batch)
        share = np.broadcast_to(np.where(acts, lam, 1.0), shape.batch)
        return MixPlan(partners=partner[None], weights=two_weights(share))

    def apply(self, plan: MixPlan, sources: list[Tensor]) -> Tensor:
        if plan.num_sources == 1:
            return sources[0]
        weights = on(sources[0], plan.weights).to(sources[0].dtype)[:, :, None, None, None]
        return sources[0] * weights[0] + sources[1] * weights[1]

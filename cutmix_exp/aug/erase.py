"""Slot `image`: regions of an image are hidden, as boxes or as cells of a grid."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from cutmix_exp.aug.base import BatchShape, ImageOp
from cutmix_exp.aug.mix import paste_boxes
from cutmix_exp.errors import UserError
from cutmix_exp.schema import option

TRIES = 100
"""How often Random Erasing draws a box that may be too long for the image, before it gives up."""
OFFICIAL_FILL = (0.4914, 0.4822, 0.4465)


@dataclass(frozen=True, kw_only=True)
class RandomErasing(ImageOp):
    """Random Erasing (Zhong et al., 1708.04896; zhunzhong07/Random-Erasing): a rectangle of one
    colour, wholly inside the image.

    Attributes:
        prob: probability that an image is changed.
        area_min, area_max: of the rectangle, as a share of the image; uniform between them.
        aspect_min: height over width is uniform between this and 1/aspect_min.
        fill: `mean`: 0 after normalisation; `official`: the authors' code writes the CIFAR means
            of the 0..1 scale, 0.4914, 0.4822 and 0.4465, into normalised images.
    """

    prob: float = option(0.5, ge=0, le=1)
    area_min: float = option(0.02, gt=0, le=1)
    area_max: float = option(0.4, gt=0, le=1)
    aspect_min: float = option(0.3, gt=0, le=1)
    fill: Literal["mean", "official"] = "mean"

    def __post_init__(self) -> None:
        if self.area_min > self.area_max:
            raise UserError(
                f"area_min={self.area_min} is above area_max={self.area_max}; exchange them"
            )

    def sample(self, shape: BatchShape, progress: float, rng: np.random.Generator) -> np.ndarray:
        """Boxes int64 [B, 4] as (top, left, bottom, right); empty where nothing is erased."""
        acts = rng.random(shape.batch) < self.prob
        tries = (shape.batch, TRIES)
        area = rng.uniform(self.area_min, self.area_max, tries) * shape.height * shape.width
        aspect = rng.uniform(self.aspect_min, 1 / self.aspect_min, tries)
        height = np.rint(np.sqrt(area * aspect)).astype(np.int64)
        width = np.rint(np.sqrt(area / aspect)).astype(np.int64)
        fits = (height < shape.height) & (width < shape.width)
        first = np.arange(shape.batch), fits.argmax(1)
        erased = acts & fits[first]
        height, width = (np.where(erased, side[first], 0) for side in (height, width))
        top = rng.integers(0, shape.height - height + 1)
        left = rng.integers(0, shape.width - width + 1)
        return np.stack([top, left, top + height, left + width], axis=1)

    def apply(self, plan: np.ndarray, images: Tensor) -> Tensor:
        fill = torch.tensor(OFFICIAL_FILL if self.fill == "official" else (0.0, 0.0, 0.0))
        colour = fill.to(images)[None, :, None, None]
        return paste_boxes(images, colour, torch.from_numpy(plan).to(images.device))


@dataclass(frozen=True, kw_only=True)
class HideAndSeek(ImageOp):
    """Hide-and-Seek (Singh & Lee, 1704.04232; kkanshul/Hide-and-Seek): each cell of a grid is
    hidden with a probability; hidden pixels are 0 after normalisation.

    Attributes:
        prob: that a cell is hidden.
        cells: sides in pixels of which each image draws one; 0 hides nothing. None is the authors'
            0, 16, 32, 44, 56 at 224 px, in proportion to the image's side and at least 1.
    """

    prob: float = option(0.5, ge=0, le=1)
    cells: tuple[int, ...] | None = option(None, ge=0)

    def __post_init__(self) -> None:
        if self.cells == ():
            raise UserError("cells=[] has no side to draw; give one, such as cells=[8]")

    def resolve(self, image_size: int) -> HideAndSeek:
        if self.cells is not None:
            return self
        scaled = (max(1, round(cell * image_size / 224)) for cell in (16, 32, 44, 56))
        return replace(self, cells=(0, *scaled))

    def sample(self, shape: BatchShape, progress: float, rng: np.random.Generator) -> np.ndarray:
        """Hidden pixels, bool [B, H, W]."""
        assert self.cells is not None, "resolve() comes first"
        sides = rng.choice(self.cells, shape.batch)
        smallest = min((c for c in self.cells if c > 0), default=max(shape.height, shape.width))
        grid = (-(-shape.height // smallest), -(-shape.width // smallest))
        hidden = rng.random((shape.batch, *grid)) < self.prob
        step = np.where(sides > 0, sides, max(shape.height, shape.width))[:, None]
        rows = np.arange(shape.height) // step
        columns = np.arange(shape.width) // step
        image = np.arange(shape.batch)[:, None, None]
        return hidden[image, rows[:, :, None], columns[:, None]] & (sides > 0)[:, None, None]

    def apply(self, plan: np.ndarray, images: Tensor) -> Tensor:
        hidden = torch.from_numpy(plan)[:, None].to(images.device)
        return torch.where(hidden, images.new_zeros(()), images)


@dataclass(frozen=True, kw_only=True)
class GridMask(ImageOp):
    """GridMask (Chen et al., 2001.04086; dvlab-research/GridMask): squares in the cells of a turned
    grid are hidden; hidden pixels are 0 after normalisation.

    Attributes:
        prob: probability that an image is changed, at the end of `ramp`.
        ramp: share of the training over which the probability grows from 0; 0: constant.
        cell_min, cell_max: the grid's period in pixels is a whole number, uniform from `cell_min`
            to `cell_max` - 1. None are the authors' 96 and 224 at 224 px, in proportion.
        ratio: share of a period that is kept between the squares.
        rotate: the grid is turned by a whole number of degrees below this.
    """

    prob: float = option(0.8, ge=0, le=1)
    ramp: float = option(0.8, ge=0, le=1)
    cell_min: int | None = option(None, ge=2)
    cell_max: int | None = option(None, ge=3)
    ratio: float = option(0.6, gt=0, lt=1)
    rotate: int = option(360, ge=1, le=360)

    def resolve(self, image_size: int) -> GridMask:
        low = self.cell_min or max(2, round(image_size * 96 / 224))
        high = self.cell_max or max(low + 1, image_size)
        if low >= high:
            raise UserError(f"cell_min={low} must be below cell_max={high}")
        return replace(self, cell_min=low, cell_max=high)

    def sample(self, shape: BatchShape, progress: float, rng: np.random.Generator) -> np.ndarray:
        """float64 [B, 4]: period in pixels (0 hides nothing), where it begins (y, x), degrees."""
        assert self.cell_min is not None and self.cell_max is not None, "resolve() comes first"
        prob = self.prob * min(1.0, progress / self.ramp if self.ramp else 1.0)
        acts = rng.random(shape.batch) < prob
        period = rng.integers(self.cell_min, self.cell_max, shape.batch)
        start = rng.integers(0, period[:, None], (shape.batch, 2))
        degrees = rng.integers(0, self.rotate, shape.batch)
        return np.stack([period * acts, *start.T, degrees], axis=1).astype(np.float64)

    def apply(self, plan: np.ndarray, images: Tensor) -> Tensor:
        height, width = images.shape[-2:]
        drawn = torch.from_numpy(plan).to(images.device)[:, :, None, None]
        period, start_y, start_x, degrees = drawn.unbind(1)
        cos, sin = torch.cos(torch.deg2rad(degrees)), torch.sin(torch.deg2rad(degrees))
        y = torch.arange(height, device=images.device)[:, None] - (height - 1) / 2
        x = torch.arange(width, device=images.device) - (width - 1) / 2
        kept = torch.floor(period * self.ratio + 0.5)
        within = period.clamp(min=1)
        rows = (cos * y - sin * x - start_y).remainder(within) < kept
        columns = (sin * y + cos * x - start_x).remainder(within) < kept
        hidden = ~rows & ~columns & (period > 0)
        return torch.where(hidden[:, None], images.new_zeros(()), images)

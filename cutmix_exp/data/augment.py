"""Geometry and colour of training images: drawn on the host for a whole global batch, then applied
by pure functions. Both paths of data share the draws, so both see the same crops."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    from cutmix_exp.data.sources import Dataset

TRIES = 10
"""How often a random box is drawn before the largest centred one is taken (torchvision)."""

GREY = torch.tensor([0.299, 0.587, 0.114], dtype=torch.float64)
"""Weights of R, G, B in the luminance (ITU-R 601)."""

# Principal components of ImageNet's colours in [0, 1] (Krizhevsky et al. 2012), as in the CutMix
# authors' train.py: standard deviations, and a column [R, G, B] for each.
PCA_STD = torch.tensor([0.2175, 0.0188, 0.0045], dtype=torch.float64)
PCA_AXES = torch.tensor(
    [[-0.5675, 0.7192, 0.4009], [-0.5808, -0.0045, -0.8140], [-0.5836, -0.6948, 0.4203]],
    dtype=torch.float64,
)


def draw_crops(dataset: Dataset, count: int, rng: np.random.Generator) -> np.ndarray:
    """What a crop is made of, for each of `count` images.

    Returns:
        `pad`: int64 [count, 2], top and left of the window in the padded image.
        `window`: int64 [count, 2], top and left of the window in the resized image.
        `random_resized`: float64 [count, 11, 2] in [0, 1): ten tries of (area, aspect), and where
        the box lies (y, x); the box itself depends on the image's size (`crop_boxes`).
    """
    if dataset.crop == "pad":
        return rng.integers(0, 2 * dataset.crop_padding + 1, size=(count, 2))
    if dataset.crop == "window":
        assert dataset.crop_resize is not None
        return rng.integers(0, dataset.crop_resize - dataset.image_size + 1, size=(count, 2))
    return rng.random((count, TRIES + 1, 2))


def crop_boxes(dataset: Dataset, draws: np.ndarray, height: int, width: int) -> np.ndarray:
    """Boxes int64 [n, 4] (top, left, height, width) of `random_resized` crops of images H x W.

    The law is that of torchvision's RandomResizedCrop: the first of ten boxes that fits, else the
    largest centred one whose aspect is allowed.

    Args:
        draws: float64 [n, 11, 2], see `draw_crops`.
    """
    low, high = np.log(dataset.crop_ratio)
    smallest, largest = dataset.crop_scale
    area = height * width * (smallest + (largest - smallest) * draws[:, :-1, 0])
    aspect = np.exp(low + (high - low) * draws[:, :-1, 1])
    heights = np.rint(np.sqrt(area / aspect)).astype(np.int64)
    widths = np.rint(np.sqrt(area * aspect)).astype(np.int64)
    fits = (widths > 0) & (widths <= width) & (heights > 0) & (heights <= height)
    first = fits.argmax(1)
    rows = np.arange(len(draws))
    box_h, box_w = heights[rows, first], widths[rows, first]
    top = (draws[:, -1, 0] * (height - box_h + 1)).astype(np.int64)
    left = (draws[:, -1, 1] * (width - box_w + 1)).astype(np.int64)
    boxes = np.stack([top, left, box_h, box_w], axis=1)

    ratio = min(max(width / height, dataset.crop_ratio[0]), dataset.crop_ratio[1])
    centred_h = min(height, round(width / ratio))
    centred_w = min(width, round(height * ratio))
    centred = [(height - centred_h) // 2, (width - centred_w) // 2, centred_h, centred_w]
    return np.where(fits.any(1)[:, None], boxes, np.array(centred))


def resize_weights(start: Tensor, length: Tensor, size_in: int, size_out: int) -> Tensor:
    """Linear interpolation along one axis as matrices float32 [n, size_out, size_in]: row i says
    of which input pixels output pixel i is made. Antialiased: the triangle widens where pixels
    get fewer.

    Args:
        start, length: int64 [n], the part of the axis that is stretched to `size_out` pixels.
    """
    scale = length.double() / size_out
    support = scale.clamp(min=1.0)
    centres = (torch.arange(size_out, device=start.device) + 0.5) * scale[:, None]
    pixels = torch.arange(size_in, device=start.device) - start[:, None]
    distance = pixels[:, None, :] + 0.5 - centres[:, :, None]
    weights = (1.0 - distance.abs() / support[:, None, None]).clamp(min=0.0)
    inside = (pixels >= 0) & (pixels < length[:, None])
    weights = weights * inside[:, None, :]
    return (weights / weights.sum(2, keepdim=True)).float()


def resized_crops(images: Tensor, boxes: Tensor, size: int) -> Tensor:
    """Boxes of images, resized: uint8 [n, 3, size, size] from uint8 [n, 3, H, W].

    Two matrix products for a whole batch; within one grey level of torchvision's antialiased
    `resized_crop`.

    Args:
        boxes: int64 [n, 4] as (top, left, height, width).
    """
    height, width = images.shape[2:]
    top, left, box_h, box_w = boxes.unbind(1)
    rows = resize_weights(top, box_h, height, size)[:, None]
    columns = resize_weights(left, box_w, width, size)[:, None]
    resized = rows @ images.float() @ columns.transpose(2, 3)
    return resized.round_().clamp_(0, 255).to(torch.uint8)


def draw_colors(dataset: Dataset, count: int, rng: np.random.Generator) -> np.ndarray:
    """What changes the colours, for each of `count` images: float64 [count, 9], or [count, 0]
    where nothing does. Columns: the blends of brightness, contrast and saturation, uniform in
    [-color_jitter, color_jitter]; the order in which they act; the lighting noise."""
    if not dataset.color_jitter and not dataset.lighting:
        return np.empty((count, 0))
    blends = rng.uniform(-dataset.color_jitter, dataset.color_jitter, (count, 3))
    order = rng.random((count, 3)).argsort(1)
    return np.concatenate([blends, order, rng.normal(0.0, dataset.lighting, (count, 3))], axis=1)


def recolor(images: Tensor, draws: np.ndarray) -> Tensor:
    """Colour jitter and PCA lighting of images float32 [n, 3, H, W] in [0, 1], not clamped, as in
    the CutMix authors' utils.py.

    An image x is blended with black (brightness), with its mean grey (contrast) and with its
    greyscale (saturation): x + blend * (other - x). All three and the lighting are affine in a
    pixel's colour, and the mean grey follows from the image's mean colour; so the whole chain is
    one 3x3 matrix and one shift for each image.

    Args:
        draws: float64 [n, 9], see `draw_colors`; [n, 0] changes nothing.
    """
    if not draws.shape[1]:
        return images
    plan = torch.from_numpy(draws).to(images.device)
    grey, std, axes = (t.to(images.device) for t in (GREY, PCA_STD, PCA_AXES))
    count = len(images)
    mean = images.double().mean((2, 3))
    matrix = torch.eye(3, dtype=torch.float64, device=images.device).repeat(count, 1, 1)
    shift = torch.zeros(count, 3, dtype=torch.float64, device=images.device)
    for place in range(3):
        which = plan[:, 3 + place].long()
        blend = plan.gather(1, which[:, None])
        keep = 1.0 - blend
        # Saturation blends with the greyscale: a matrix; the other two with one colour.
        mixed = keep[:, :, None] * torch.eye(3, device=images.device) + blend[:, :, None] * grey
        saturates = (which == 2)[:, None]
        now = (matrix @ mean[:, :, None]).squeeze(2) + shift
        other = torch.where((which == 1)[:, None], (now @ grey)[:, None], 0.0)
        matrix = torch.where(saturates[:, :, None], mixed @ matrix, keep[:, :, None] * matrix)
        shift = torch.where(
            saturates, (mixed @ shift[:, :, None]).squeeze(2), keep * shift + blend * other
        )
    shift = shift + (plan[:, 6:9] * std) @ axes.T
    flat = torch.baddbmm(shift.float()[:, :, None], matrix.float(), images.flatten(2))
    return flat.view_as(images)


def pad_images(images: Tensor, padding: int, mode: str) -> Tensor:
    """Images uint8 [n, 3, H, W] with `padding` pixels on each side: zeros, or the image reflected
    (without repeating the border)."""
    height, width = images.shape[2:]
    if mode == "zeros":
        return torch.nn.functional.pad(images, (padding,) * 4)
    rows, columns = (
        torch.from_numpy(np.pad(np.arange(side), padding, mode="reflect")).to(images.device)
        for side in (height, width)
    )
    return images[:, :, rows][:, :, :, columns]

"""Common corruptions of batches of images, after Hendrycks and Dietterich (ICLR 2019).

The published program corrupts one image after the other, from global generators, by OpenCV,
scikit-image and ImageMagick. Here each operation is written out for whole batches; what an image's
own generator draws is all that is random. As there, results are cut to [0, 1] and truncated, not
rounded, to 8 bits.
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from scipy import ndimage
from torch import Tensor

from cutmix_exp.errors import UserError
from cutmix_exp.evaluation.severities import FROST_SCALE, SEVERITIES, Family
from cutmix_exp.seeding import stream

Generators = list[np.random.Generator]
"""One for each image."""

FROST_FILES = ("frost1.png", "frost2.png", "frost3.png", "frost4.jpg", "frost5.jpg")
"""The published program draws from the first five of its six photographs."""


def draws(
    rngs: Generators, device: torch.device, draw: Callable[[np.random.Generator], Any]
) -> Tensor:
    """What `draw` takes from each image's generator, stacked; floats in float32."""
    drawn = np.stack([np.asarray(draw(rng)) for rng in rngs])
    return torch.from_numpy(drawn.astype(np.float32) if drawn.dtype == np.float64 else drawn).to(
        device
    )


def to_bytes(images: Tensor) -> Tensor:
    """Float [0, 1] to uint8, truncated; a thousandth of a level is allowed for rounding errors."""
    return (images.clamp(0, 1) * 255 + 1e-3).to(torch.uint8)


def truncated(images: Tensor) -> Tensor:
    """The nearest 8-bit levels below, still as floats in [0, 1]."""
    return to_bytes(images).float() / 255


def each_way(matrix: Tensor, images: Tensor) -> Tensor:
    """A linear map [S, S] of the rows and then of the columns of images [..., S, S]."""
    return matrix @ images @ matrix.T


# Operations: (images float32 [n, 3, S, S] in [0, 1], the severity's numbers, generators) to images.


def gaussian_noise(images: Tensor, scale: float, rngs: Generators) -> Tensor:
    shape = images.shape[1:]
    noise = draws(rngs, images.device, lambda rng: rng.standard_normal(shape, np.float32))
    return images + scale * noise


def shot_noise(images: Tensor, photons: float, rngs: Generators) -> Tensor:
    """Poisson counts of light, `photons` of them for a white pixel."""
    means = (images.double() * photons).cpu().numpy()
    counts = np.stack([rng.poisson(mean) for rng, mean in zip(rngs, means, strict=True)])
    return torch.from_numpy(counts).to(images.device).float() / photons


def impulse_noise(images: Tensor, amount: float, rngs: Generators) -> Tensor:
    """A share `amount` of the values of each channel becomes 0 or 1."""
    shape = (2, *images.shape[1:])
    hit, salt = draws(rngs, images.device, lambda rng: rng.random(shape, np.float32)).unbind(1)
    return torch.where(hit <= amount, (salt <= 0.5).float(), images)


@lru_cache(maxsize=64)
def disk(radius: float, sigma: float) -> Tensor:
    """A disk of equal weights, softened by a small Gaussian: float32 [2r+1, 2r+1]."""
    reach = 8 if radius <= 8 else math.ceil(radius)
    rows, columns = np.mgrid[-reach : reach + 1, -reach : reach + 1]
    flat = (rows**2 + columns**2 <= radius**2).astype(np.float64)
    flat /= flat.sum()
    half = 1 if radius <= 8 else 2
    bell = np.exp(-(np.arange(-half, half + 1) ** 2) / (2 * sigma**2))
    for axis in (0, 1):
        flat = ndimage.correlate1d(flat, bell / bell.sum(), axis=axis, mode="mirror")
    used = np.abs(rows[flat > 0]).max()
    kept = flat[reach - used : reach + used + 1, reach - used : reach + used + 1]
    return torch.tensor(kept, dtype=torch.float32)


def defocus_blur(images: Tensor, numbers: tuple[float, float], rngs: Generators) -> Tensor:
    """Convolution with a disk of some radius and softness; the image is mirrored at its edges."""
    kernel = disk(*numbers).to(images.device)
    half = len(kernel) // 2
    padded = F.pad(images, [half] * 4, mode="reflect")
    return F.conv2d(padded.flatten(0, 1)[:, None], kernel[None, None]).view_as(images)


@lru_cache(maxsize=64)
def gaussian_matrix(size: int, sigma: float, mode: str, truncate: float) -> Tensor:
    """A Gaussian blur of a line of `size` pixels as a matrix, float32 [S, S]."""
    lines = np.eye(size)
    if sigma > 0:
        lines = ndimage.gaussian_filter1d(lines, sigma, axis=0, mode=mode, truncate=truncate)
    return torch.tensor(lines, dtype=torch.float32)


def glass_blur(images: Tensor, numbers: tuple[float, int, int], rngs: Generators) -> Tensor:
    """Blur, let pixels take their neighbours' values, blur.

    The published program goes through the pixels from the lower right and means to swap each with a
    neighbour up to `reach` away; its swap of NumPy views only copies the neighbour, which may itself
    have been overwritten before. This is what the published images have, so it is done here. Since
    the neighbours are drawn first, the chains of copies are followed for all pixels at once.
    """
    sigma, reach, rounds = numbers
    size = images.shape[-1]
    matrix = gaussian_matrix(size, sigma, "nearest", 4.0).to(images.device)
    soft = truncated(each_way(matrix, images))
    side = size - 2 * reach
    shift = draws(
        rngs, images.device, lambda rng: rng.integers(-reach, reach, (rounds, 2, side, side))
    )
    here = torch.arange(size * size, device=images.device).view(size, size)
    inner = slice(reach + 1, size - reach + 1)
    for drawn in shift.unbind(1):
        neighbour = here.repeat(len(images), 1, 1)
        neighbour[:, inner, inner] += drawn[:, 0] * size + drawn[:, 1]
        source = followed(neighbour.flatten(1), here.flatten())
        soft = soft.flatten(2).gather(2, source[:, None].expand(-1, 3, -1)).view_as(soft)
    return each_way(matrix, soft)


def followed(neighbour: Tensor, here: Tensor) -> Tensor:
    """Whose old value each pixel has when all have copied their neighbour's, the last first.

    A neighbour that comes later in the order of pixels has copied already: the chain goes on there.

    Args:
        neighbour: int64 [n, S*S], the pixel that each copies (itself: none).
        here: int64 [S*S], 0, 1, ...
    """
    source = neighbour
    while bool((going := source > here).any()):
        there = torch.where(going, source, here)
        source = torch.where(going, neighbour.gather(1, there), source)
        here = torch.where(going, there, here)
    return source


def motion_offsets(width: int, angles: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Row and column offsets int64 [n, width] of the pixels that lie along each angle in degrees."""
    steps, radians = np.arange(width), np.deg2rad(angles)[:, None]
    offsets = [np.ceil(steps * part(radians) - 0.5) for part in (np.sin, np.cos)]
    return offsets[0].astype(np.int64), offsets[1].astype(np.int64)


def moved(images: Tensor, radius: float, sigma: float, angles: np.ndarray) -> Tensor:
    """ImageMagick's motion blur: half a Gaussian along a line from each pixel on; pixels outside are
    those of the edge.

    Args:
        images: float [n, C, S, S].
        angles: in degrees, float [n].
    """
    count, channels, size = images.shape[:3]
    width = 2 * math.ceil(radius) + 1
    weights = np.exp(-(np.arange(width) ** 2) / (2 * sigma**2))
    weights /= weights.sum()
    place = torch.arange(size, device=images.device)
    rows, columns = (
        (torch.from_numpy(o).to(images.device)[:, :, None] + place).clamp(0, size - 1)
        for o in motion_offsets(width, angles)
    )
    flat, total = images.flatten(2), torch.zeros_like(images.flatten(2))
    for step, weight in enumerate(weights):
        index = (rows[:, step, :, None] * size + columns[:, step, None, :]).view(count, 1, -1)
        total += float(weight) * flat.gather(2, index.expand(-1, channels, -1))
    return total.view_as(images)


def motion_blur(images: Tensor, numbers: tuple[float, float], rngs: Generators) -> Tensor:
    angles = np.array([rng.uniform(-45, 45) for rng in rngs])
    return moved(images, *numbers, angles)


@lru_cache(maxsize=256)
def zoom_matrix(size: int, factor: float) -> Tensor:
    """A line's middle magnified by `factor` to its old length, as a matrix float32 [S, S]; linear
    interpolation between the ends, as scipy's `zoom`."""
    part = math.ceil(size / factor)
    first = (size - part) // 2
    lines = ndimage.zoom(np.eye(part), (factor, 1), order=1)
    trim = (len(lines) - size) // 2
    matrix = np.zeros((size, size))
    matrix[:, first : first + part] = lines[trim : trim + size]
    return torch.tensor(matrix, dtype=torch.float32)


def zoom_blur(images: Tensor, factors: tuple[float, ...], rngs: Generators) -> Tensor:
    """The mean of the image and of magnified ones."""
    total = images.clone()
    for factor in factors:
        total += each_way(zoom_matrix(images.shape[-1], factor).to(images.device), images)
    return total / (len(factors) + 1)


def snow(images: Tensor, numbers: tuple[float, ...], rngs: Generators) -> Tensor:
    """Flakes (magnified noise above a threshold, moved by the wind), and a whitened image below."""
    mean, scale, zoom, threshold, radius, sigma, kept = numbers
    size, device = images.shape[-1], images.device
    noise = draws(rngs, device, lambda rng: rng.standard_normal((1, size, size), np.float32))
    angles = np.array([rng.uniform(-135, -45) for rng in rngs])
    flakes = each_way(zoom_matrix(size, zoom).to(device), mean + scale * noise)
    flakes = truncated(torch.where(flakes < threshold, 0.0, flakes))
    flakes = truncated(moved(flakes, radius, sigma, angles))
    weights = torch.tensor([0.299, 0.587, 0.114], device=device)[:, None, None]
    grey = (images * weights).sum(1, keepdim=True)
    whitened = kept * images + (1 - kept) * torch.maximum(images, grey * 1.5 + 0.5)
    return whitened + flakes + flakes.flip(-1, -2)


def frost(
    images: Tensor, numbers: tuple[float, float], rngs: Generators, *, photos: tuple[Tensor, ...]
) -> Tensor:
    """The image, darkened, under a random part of a photograph of frost.

    Args:
        photos: float32 [3, H, W] in [0, 1].
    """
    kept, strength = numbers
    size, parts = images.shape[-1], []
    for rng in rngs:
        photo = photos[rng.integers(len(photos))]
        top, left = (int(rng.integers(0, length - size)) for length in photo.shape[1:])
        parts.append(photo[:, top : top + size, left : left + size])
    return kept * images + strength * torch.stack(parts).to(images.device)


def plasma(uniform: Tensor, size: int, decay: float) -> Tensor:
    """A random landscape by the diamond-square algorithm, on a torus, from 0 to 1.

    Args:
        uniform: in [-1, 1], float [n, size*size - 1]: the height added to each new point, in the order
            in which they arise (of each step: squares, then diamonds in rows and in columns).
        size: a power of two.
        decay: what the heights' range is divided by at each step, before it is squared.
    """
    count = len(uniform)
    land = torch.zeros(count, size, size, device=uniform.device)
    step, height, used = size, 100.0, 0
    while step >= 2:
        half, points = step // 2, size // step

        def raised(sums: Tensor, points: int = points, height: float = height) -> Tensor:
            nonlocal used
            drawn = uniform[:, used : used + points**2].view(count, points, points)
            used += points**2
            return sums / 4 + height**2 * drawn

        corners = land[:, ::step, ::step]
        rows = corners + corners.roll(-1, 1)
        land[:, half::step, half::step] = raised(rows + rows.roll(-1, 2))
        centres = land[:, half::step, half::step]
        beside = centres + centres.roll(1, 1) + corners + corners.roll(-1, 2)
        land[:, ::step, half::step] = raised(beside)
        below = centres + centres.roll(1, 2) + corners + corners.roll(-1, 1)
        land[:, half::step, ::step] = raised(below)
        step, height = half, height / decay
    land -= land.amin((1, 2), keepdim=True)
    return land / land.amax((1, 2), keepdim=True)


def fog(images: Tensor, numbers: tuple[float, float], rngs: Generators) -> Tensor:
    """A landscape of fog is added, and the brightest value kept."""
    thickness, decay = numbers
    size = images.shape[-1]
    whole = 1 << (size - 1).bit_length()
    uniform = draws(rngs, images.device, lambda rng: rng.random(whole**2 - 1, np.float32)) * 2 - 1
    land = plasma(uniform, whole, decay)[:, None, :size, :size]
    brightest = images.amax((1, 2, 3), keepdim=True)
    return (images + thickness * land) * brightest / (brightest + thickness)


def brightness(images: Tensor, amount: float, rngs: Generators) -> Tensor:
    """The value of HSV is raised. Hue and saturation stay, so the channels keep their ratios; black
    has none and becomes grey."""
    value = images.amax(1, keepdim=True)
    raised = (value + amount).clamp(0, 1)
    return torch.where(value > 0, images * (raised / value.clamp(min=1e-6)), raised)


def contrast(images: Tensor, kept: float, rngs: Generators) -> Tensor:
    """The distance from each channel's mean is reduced."""
    mean = images.mean((2, 3), keepdim=True)
    return (images - mean) * kept + mean


def elastic_transform(
    images: Tensor, numbers: tuple[float, float, float], rngs: Generators
) -> Tensor:
    """A random affine map, then a random smooth displacement of `alpha` times noise of width `sigma`.

    The affine map sends three points around the centre to where they are jittered to; it mirrors the
    image about its outermost pixels, the displacement about its edges.
    """
    alpha, sigma, jitter = numbers
    count, _, size, _ = images.shape
    middle, third = size // 2, size // 3
    low, high = middle - third, middle + third
    points = np.array([[high, high], [high, low], [low, low]], dtype=np.float64)  # x, y
    moves = np.stack([rng.uniform(-jitter, jitter, (3, 2)) for rng in rngs])
    ones = np.ones((count, 3, 1))
    back = np.linalg.solve(
        np.concatenate([points + moves, ones], 2), np.broadcast_to(points, moves.shape)
    )
    rows, columns = np.mgrid[:size, :size]
    places = np.stack([columns, rows, np.ones_like(rows)], -1).reshape(-1, 3) @ back
    grid = torch.tensor(places.reshape(count, size, size, 2), dtype=torch.float32)
    images = F.grid_sample(
        images,
        grid.to(images.device) * (2 / (size - 1)) - 1,
        padding_mode="reflection",
        align_corners=True,
    )
    fields = draws(rngs, images.device, lambda rng: rng.uniform(-1, 1, (2, size, size)))
    matrix = gaussian_matrix(size, sigma, "reflect", 3.0).to(images.device)
    shift = (each_way(matrix, fields) * alpha).permute(0, 2, 3, 1)
    still = torch.tensor(np.stack([columns, rows], -1), dtype=torch.float32, device=images.device)
    return F.grid_sample(
        images,
        (2 * (still + shift) + 1) / size - 1,
        padding_mode="reflection",
        align_corners=False,
    )


def through_pil(images: Tensor, change: Callable[[Image.Image], Image.Image]) -> Tensor:
    """Each image as PIL changes it."""
    pixels = to_bytes(images).permute(0, 2, 3, 1).cpu().numpy()
    changed = np.stack([np.asarray(change(Image.fromarray(image))) for image in pixels])
    return torch.from_numpy(changed).to(images.device).permute(0, 3, 1, 2).float() / 255


def pixelate(images: Tensor, scale: float, rngs: Generators) -> Tensor:
    size = images.shape[-1]
    small = int(size * scale)

    def coarse(image: Image.Image) -> Image.Image:
        box = Image.Resampling.BOX
        return image.resize((small, small), box).resize((size, size), box)

    return through_pil(images, coarse)


def as_jpeg(image: Image.Image, quality: int) -> Image.Image:
    file = io.BytesIO()
    image.save(file, "JPEG", quality=quality)
    return Image.open(file)


def jpeg_compression(images: Tensor, quality: int, rngs: Generators) -> Tensor:
    return through_pil(images, partial(as_jpeg, quality=quality))


OPERATIONS: dict[str, Callable[..., Tensor]] = {
    operation.__name__: operation
    for operation in (
        gaussian_noise,
        shot_noise,
        impulse_noise,
        defocus_blur,
        glass_blur,
        motion_blur,
        zoom_blur,
        snow,
        frost,
        fog,
        brightness,
        contrast,
        elastic_transform,
        pixelate,
        jpeg_compression,
    )
}


def read_frost(folder: Path, family: Family) -> tuple[Tensor, ...]:
    """The published photographs, resized for the family: float32 [3, H, W] each.

    Raises:
        UserError: one of them is not there.
    """
    photos = []
    for name in FROST_FILES:
        try:
            pixels = np.asarray(Image.open(folder / name).convert("RGB"))
        except OSError as error:
            raise UserError(
                f"a photograph of frost cannot be read: {error}\nexpected in {folder}: "
                f"{', '.join(FROST_FILES)}, of https://github.com/hendrycks/robustness "
                "(ImageNet-C/imagenet_c/imagenet_c/frost)"
            ) from None
        photo = torch.from_numpy(pixels.copy()).permute(2, 0, 1).float()[None] / 255
        scale = FROST_SCALE[family]
        if scale != 1:
            size = [int(side * scale + 0.5) for side in photo.shape[2:]]
            photo = F.interpolate(photo, size=size, mode="bilinear", align_corners=False)
        photos.append(photo[0])
    return tuple(photos)


@dataclass(frozen=True)
class Corrupter:
    """Corrupts images by their indices: the same image, the same corruption, whatever the batch.

    Attributes:
        family: whose severities.
        seed: of what is drawn.
        photos: of frost.
        jpeg_quality: the results are written as JPEG and read again, as the published ImageNet-C is
            stored (85); None: they are not.
    """

    family: Family
    seed: int = 0
    photos: tuple[Tensor, ...] = ()
    jpeg_quality: int | None = None

    def __call__(self, images: Tensor, name: str, severity: int, index: np.ndarray) -> Tensor:
        """Images uint8 [n, 3, S, S], corrupted.

        Args:
            severity: 1 to 5; 0 leaves the images as they are.
            index: int [n], the images' indices in their set.
        """
        if severity == 0:
            return images
        purpose = f"corruption/{name}/{severity}"
        rngs = [stream(self.seed, purpose, step=int(i)) for i in index]
        operation = OPERATIONS[name]
        if name == "frost":
            operation = partial(operation, photos=self.photos)
        numbers = SEVERITIES[self.family][name][severity - 1]
        changed = operation(images.float() / 255, numbers, rngs)
        if self.jpeg_quality is not None:
            changed = through_pil(truncated(changed), partial(as_jpeg, quality=self.jpeg_quality))
        return to_bytes(changed)

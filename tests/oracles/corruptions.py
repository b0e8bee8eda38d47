"""The common corruptions of one image by plain loops and scipy, in float64: written from their
definitions, without the package's code. `image` is [3, S, S] in [0, 1]; `rng` is drawn from in the
order that the package documents."""

from __future__ import annotations

import colorsys
import math
from typing import Any

import numpy as np
from scipy import ndimage

Image = np.ndarray


def gaussian_noise(image: Image, scale: float, rng: Any) -> Image:
    return image + scale * rng.standard_normal(image.shape, np.float32)


def shot_noise(image: Image, photons: float, rng: Any) -> Image:
    return rng.poisson(image.astype(np.float32).astype(np.float64) * photons) / photons


def impulse_noise(image: Image, amount: float, rng: Any) -> Image:
    hit, salt = rng.random((2, *image.shape), np.float32)
    out = image.copy()
    for place in np.ndindex(image.shape):
        if hit[place] <= amount:
            out[place] = 1.0 if salt[place] <= 0.5 else 0.0
    return out


def mirrored(i: int, size: int) -> int:
    """About the outermost pixels."""
    period = 2 * (size - 1)
    i %= period
    return min(i, period - i)


def defocus_blur(image: Image, numbers: tuple[float, float], rng: Any) -> Image:
    radius, sigma = numbers
    reach, half = (8, 1) if radius <= 8 else (int(radius), 2)
    side = 2 * reach + 1
    disk = np.zeros((side, side))
    for y in range(side):
        for x in range(side):
            disk[y, x] = (y - reach) ** 2 + (x - reach) ** 2 <= radius**2
    disk /= disk.sum()
    bell = np.array([math.exp(-(d**2) / (2 * sigma**2)) for d in range(-half, half + 1)])
    bell /= bell.sum()
    soft = np.zeros_like(disk)
    for y in range(side):
        for x in range(side):
            for i, a in enumerate(bell):
                for j, b in enumerate(bell):
                    soft[y, x] += (
                        a * b * disk[mirrored(y + i - half, side), mirrored(x + j - half, side)]
                    )
    return np.stack([ndimage.correlate(channel, soft, mode="mirror") for channel in image])


def glass_blur(image: Image, numbers: tuple[float, int, int], rng: Any) -> Image:
    """Pixel by pixel, as published: the pair assignment of NumPy views copies, it does not swap."""
    sigma, reach, rounds = numbers
    size = image.shape[1]
    soft = [ndimage.gaussian_filter(c, sigma, mode="nearest", truncate=4) for c in image]
    pixels = (np.stack(soft, -1) * 255 + 1e-3).astype(np.uint8)
    shifts = rng.integers(-reach, reach, (rounds, 2, size - 2 * reach, size - 2 * reach))
    for down, right in shifts:
        for h in range(size - reach, reach, -1):
            for w in range(size - reach, reach, -1):
                i = h + down[h - reach - 1, w - reach - 1]
                j = w + right[h - reach - 1, w - reach - 1]
                pixels[h, w], pixels[i, j] = pixels[i, j], pixels[h, w]
    again = np.moveaxis(pixels / 255, -1, 0)
    return np.stack([ndimage.gaussian_filter(c, sigma, mode="nearest", truncate=4) for c in again])


def line_blur(image: Image, radius: float, sigma: float, angle: float) -> Image:
    size, out = image.shape[1], np.zeros_like(image)
    weights = [math.exp(-(i**2) / (2 * sigma**2)) for i in range(2 * math.ceil(radius) + 1)]
    for i, weight in enumerate(weights):
        down = math.ceil(i * math.sin(math.radians(angle)) - 0.5)
        right = math.ceil(i * math.cos(math.radians(angle)) - 0.5)
        for y in range(size):
            for x in range(size):
                row, column = min(max(y + down, 0), size - 1), min(max(x + right, 0), size - 1)
                out[:, y, x] += weight / sum(weights) * image[:, row, column]
    return out


def motion_blur(image: Image, numbers: tuple[float, float], rng: Any) -> Image:
    return line_blur(image, *numbers, rng.uniform(-45, 45))


def magnified(channel: np.ndarray, factor: float) -> np.ndarray:
    size = len(channel)
    part = math.ceil(size / factor)
    first = (size - part) // 2
    large = ndimage.zoom(channel[first : first + part, first : first + part], factor, order=1)
    trim = (len(large) - size) // 2
    return large[trim : trim + size, trim : trim + size]


def zoom_blur(image: Image, factors: Any, rng: Any) -> Image:
    total = image.copy()
    for factor in factors:
        total += np.stack([magnified(channel, factor) for channel in image])
    return total / (len(factors) + 1)


def snow(image: Image, numbers: tuple[float, ...], rng: Any) -> Image:
    mean, scale, zoom, threshold, radius, sigma, kept = numbers
    size = image.shape[1]
    noise = mean + scale * rng.standard_normal((1, size, size), np.float32)[0]
    flakes = magnified(noise, zoom)
    flakes = np.where(flakes < threshold, 0, np.clip(flakes, 0, 1))
    flakes = np.floor(flakes * 255 + 1e-3) / 255
    flakes = line_blur(flakes[None], radius, sigma, rng.uniform(-135, -45))
    flakes = np.floor(flakes * 255 + 1e-3) / 255
    grey = 0.299 * image[0] + 0.587 * image[1] + 0.114 * image[2]
    white = np.maximum(image, grey * 1.5 + 0.5)
    return kept * image + (1 - kept) * white + flakes + np.rot90(flakes, 2, axes=(1, 2))


def frost(image: Image, numbers: tuple[float, float], rng: Any, photos: Any) -> Image:
    kept, strength = numbers
    size = image.shape[1]
    photo = photos[rng.integers(len(photos))]
    top = rng.integers(0, photo.shape[1] - size)
    left = rng.integers(0, photo.shape[2] - size)
    return kept * image + strength * photo[:, top : top + size, left : left + size]


def landscape(uniform: np.ndarray, size: int, decay: float) -> np.ndarray:
    """Point by point on a torus."""
    land, given = np.zeros((size, size)), iter(uniform.tolist())
    step, height = size, 100.0
    while step >= 2:
        half = step // 2
        for y in range(0, size, step):
            for x in range(0, size, step):
                far_y, far_x = (y + step) % size, (x + step) % size
                around = land[y, x] + land[y, far_x] + land[far_y, x] + land[far_y, far_x]
                land[y + half, x + half] = around / 4 + height**2 * next(given)
        for dy, dx in ((0, half), (half, 0)):
            for y in range(0, size, step):
                for x in range(0, size, step):
                    v, u = y + dy, x + dx
                    near = [(v - half, u), (v + half, u), (v, u - half), (v, u + half)]
                    around = sum(land[i % size, j % size] for i, j in near)
                    land[v, u] = around / 4 + height**2 * next(given)
        step, height = half, height / decay
    land -= land.min()
    return land / land.max()


def fog(image: Image, numbers: tuple[float, float], rng: Any) -> Image:
    thickness, decay = numbers
    size = image.shape[1]
    whole = 2 ** math.ceil(math.log2(size))
    land = landscape(rng.random(whole**2 - 1, np.float32) * 2.0 - 1.0, whole, decay)
    top = image.max()
    return (image + thickness * land[:size, :size]) * top / (top + thickness)


def brightness(image: Image, amount: float, rng: Any) -> Image:
    out = np.empty_like(image)
    for y, x in np.ndindex(image.shape[1:]):
        hue, saturation, value = colorsys.rgb_to_hsv(*image[:, y, x])
        out[:, y, x] = colorsys.hsv_to_rgb(hue, saturation, min(value + amount, 1.0))
    return out


def contrast(image: Image, kept: float, rng: Any) -> Image:
    return np.stack([c.mean() + kept * (c - c.mean()) for c in image])


def elastic_transform(image: Image, numbers: tuple[float, float, float], rng: Any) -> Image:
    alpha, sigma, jitter = numbers
    size = image.shape[1]
    middle, third = size // 2, size // 3
    source = np.array(
        [[middle + third] * 2, [middle + third, middle - third], [middle - third] * 2], float
    )
    target = source + rng.uniform(-jitter, jitter, (3, 2))
    # x' = a x + b y + c, y' = d x + e y + f takes each target to its source.
    system = np.array([[x, y, 1] for x, y in target])
    abc, deff = np.linalg.solve(system, source[:, 0]), np.linalg.solve(system, source[:, 1])
    y, x = np.mgrid[:size, :size].astype(float)
    places = [deff[0] * x + deff[1] * y + deff[2], abc[0] * x + abc[1] * y + abc[2]]
    moved = [ndimage.map_coordinates(c, places, order=1, mode="mirror") for c in image]
    fields = rng.uniform(-1, 1, (2, size, size))
    if sigma > 0:
        fields = [ndimage.gaussian_filter(f, sigma, mode="reflect", truncate=3) for f in fields]
    places = [y + alpha * fields[1], x + alpha * fields[0]]
    return np.stack([ndimage.map_coordinates(c, places, order=1, mode="reflect") for c in moved])

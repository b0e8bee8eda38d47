"""The images that every subject is measured on: noise of CIFAR's size, and JPEG files of ImageNet's
usual size, made once.

A subject is a function that prepares everything and returns the work: a call of it does one unit (a
step, a batch) and returns the number of images in it.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

Work = Callable[[], int]

CLASSES = 100
SMALL = 4096
"""Number of small images. More would measure the memory's size rather than the work."""
JPEGS, HEIGHT, WIDTH = 64, 375, 500
MEAN, STD = (0.5, 0.5, 0.5), (0.25, 0.25, 0.25)


def small_images() -> tuple[np.ndarray, np.ndarray]:
    """uint8 [N, 32, 32, 3] and labels int64 [N]."""
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (SMALL, 32, 32, 3), dtype=np.uint8)
    return images, np.arange(SMALL) % CLASSES


def jpeg_files(folder: Path) -> list[Path]:
    return sorted(folder.glob("train/*/*.jpg"))


def label_of(file: Path) -> int:
    """The number of its class folder, `class<number>`."""
    return int(file.parent.name.removeprefix("class"))


def write_jpegs(folder: Path) -> None:
    """A tree of class folders. Each picture is noise of many scales under a smooth background: at
    quality 90 about 100 kB, as ImageNet's."""
    from PIL import Image

    rng = np.random.default_rng(0)
    for number in range(JPEGS):
        picture = np.full((HEIGHT, WIDTH, 3), 128.0)
        for side, strength in ((2, 90), (8, 50), (32, 30), (128, 20)):
            coarse = rng.normal(128, strength, (side, side, 3)).clip(0, 255).astype(np.uint8)
            layer = Image.fromarray(coarse).resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC)
            picture += np.asarray(layer) - 128.0
        picture += rng.normal(0, 8, picture.shape)
        image = Image.fromarray(picture.clip(0, 255).astype(np.uint8))
        for part in ("train", "val"):
            file = folder / part / f"class{number % 4}" / f"{number:03}.jpg"
            file.parent.mkdir(parents=True, exist_ok=True)
            image.save(file, quality=90)


def random_batch(batch: int) -> tuple[Tensor, Tensor]:
    return torch.randn(batch, 3, 32, 32), torch.arange(batch) % CLASSES

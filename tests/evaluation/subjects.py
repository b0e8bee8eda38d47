"""Subjects made by hand: small networks on small sets of images."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from cutmix_exp.data.sources import ImageSet, Splits
from cutmix_exp.distributed import World
from cutmix_exp.evaluation.base import Subject
from tests.helpers import config_of

CPU = torch.device("cpu")
ALONE = World(0, 1, CPU)


class Linear(nn.Module):
    """A linear classifier of all pixels, float32 [K, 3*S*S]."""

    def __init__(self, classes: int, size: int, seed: int = 0) -> None:
        super().__init__()
        draws = np.random.default_rng(seed).normal(size=(classes, 3 * size * size))
        self.weight = nn.Parameter(torch.tensor(draws / size, dtype=torch.float32))
        self.requires_grad_(False)

    def forward(self, images: Tensor) -> Tensor:
        return images.flatten(1) @ self.weight.T


class Small(nn.Module):
    """A small convolutional network whose random weights leave its classes in balance."""

    def __init__(self, classes: int = 10, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.layers = nn.Sequential(
            nn.Conv2d(3, 8, 3, stride=2, padding=1),
            nn.BatchNorm2d(8),
            nn.ReLU(),
            nn.Conv2d(8, 16, 3, stride=2, padding=1),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(2),
            nn.Flatten(),
            nn.Linear(64, classes),
        )
        self.eval()

    def forward(self, images: Tensor) -> Tensor:
        return self.layers(images)


def images_of(
    count: int, size: int, classes: int, seed: int = 0, labels: list[int] | None = None
) -> ImageSet:
    rng = np.random.default_rng(seed)
    pixels = rng.integers(0, 256, (count, 3, size, size), dtype=np.uint8)
    given = rng.integers(0, classes, count) if labels is None else np.array(labels)
    return ImageSet(torch.from_numpy(pixels), torch.from_numpy(given.astype(np.int64)))


def subject_of(
    network: nn.Module,
    test: ImageSet,
    *words: str,
    dataset: str = "synthetic",
    world: World = ALONE,
    class_names: tuple[str, ...] | None = None,
) -> Subject:
    """A network with a test set, under the config of the synthetic set (its mean and std)."""
    size = test.images.shape[-1]
    classes = max(2, int(test.labels.max()) + 1)
    named = [word.split("=")[0] for word in words]
    if "dataset.num_classes" not in named:
        words = (*words, f"dataset.num_classes={classes}")
    config = config_of(
        f"dataset={dataset}",
        f"dataset.image_size={size}",
        "model=resnet",
        "model.depth=8",
        "precision=fp32",
        "device=cpu",
        *words,
    )
    names = class_names or tuple(f"class {i}" for i in range(config.dataset.num_classes))
    splits = Splits(test, None, test, names)
    network.eval().requires_grad_(False)
    return Subject("a-run", "0" * 16, network, config, splits, world, say=lambda _: None)


def agreed(network: nn.Module, test: ImageSet) -> ImageSet:
    """The same images, half of them labelled as the network sees them, so that some are right."""
    subject = subject_of(network, test)
    predicted = subject.logits_of(test.images).argmax(1)
    labels = torch.where(torch.arange(len(test)) % 4 < 3, predicted, test.labels)
    return ImageSet(test.images, labels)

"""Networks to be examined, made by hand: small, untrained or rigged."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import nn

from cutmix_exp.config import Config
from cutmix_exp.data.sources import ImageSet, Splits
from cutmix_exp.distributed import World
from cutmix_exp.evaluation.base import Subject
from tests.helpers import config_of

CPU = torch.device("cpu")


def digits_config(*overrides: str) -> Config:
    return config_of("dataset=digits", "model=resnet", "model.depth=8", "device=cpu", *overrides)


def subject_of(config: Config, splits: Splits, network: nn.Module | None = None) -> Subject:
    """An untrained network of the config, or a given one."""
    torch.manual_seed(0)
    built = network or config.model.build(config.dataset.num_classes)
    built.eval().requires_grad_(False)
    alone = World(0, 1, CPU)
    return Subject("by-hand", "0" * 16, built, config, splits, alone, say=lambda _: None)


def few(part: Any, count: int) -> Any:
    """Some images of a split, of all classes."""
    chosen = np.linspace(0, len(part) - 1, min(count, len(part))).astype(np.int64)
    return part.at(chosen)


def digits_subject(test: int = 60, train: int = 200, *overrides: str) -> Subject:
    config = digits_config("precision=fp32", *overrides)
    splits = config.dataset.load()
    return subject_of(
        config, replace(splits, train=few(splits.train, train), test=few(splits.test, test))
    )


def numbered(labels: list[int], side: int = 8) -> ImageSet:
    """Images whose first pixel tells their number."""
    images = torch.zeros(len(labels), 3, side, side, dtype=torch.uint8)
    images[:, 0, 0, 0] = torch.arange(len(labels))
    return ImageSet(images, torch.tensor(labels))


class Told(nn.Module):
    """Returns the logits that the first pixel of an image names."""

    def __init__(self, logits: np.ndarray, config: Config) -> None:
        super().__init__()
        self.logits = torch.from_numpy(logits).float()
        self.mean, self.std = config.dataset.mean[0], config.dataset.std[0]

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        first = images[:, 0, 0, 0] * self.std + self.mean
        return self.logits[(first * 255).round().long()]


def told_subject(logits: np.ndarray, labels: list[int], val: int = 0, **splits: Any) -> Subject:
    """A network with these logits on its (up to 256) test images; the last `val` of them are the
    validation split."""
    config = digits_config("precision=fp32", f"dataset.num_classes={max(logits.shape[1], 10)}")
    data = numbered(labels)
    last = len(labels) - val
    return subject_of(
        config,
        Splits(
            data,
            data.at(np.arange(last, len(labels))) if val else None,
            data.at(np.arange(last)),
            tuple(str(i) for i in range(logits.shape[1])),
        ),
        Told(logits, config),
    )

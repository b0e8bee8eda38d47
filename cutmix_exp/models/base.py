"""What a model of the config is, and what all its networks have in common."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from cutmix_exp.errors import UserError
from cutmix_exp.schema import Part

Family = Literal["cifar", "imagenet"]
Block = Literal["basic", "bottleneck"]
Statistics = tuple[tuple[float, ...], tuple[float, ...]]
Criterion = Callable[[Tensor, Tensor], Tensor]
"""The recipe's losses [n] of logits [n, K] with soft targets [n, K]."""

SMALL_IMAGE = 64
"""Images up to this side are CIFAR-like: networks keep their resolution longer."""


@dataclass(frozen=True, kw_only=True)
class Model(Part):
    """The config group `model`. Fields that are None follow the image size."""

    name: str

    @property
    def memory_format(self) -> torch.memory_format:
        """In which layout of tensors the network is fastest (docs/performance.md)."""
        return torch.channels_last

    def resolve(self, image_size: int) -> Model:
        """Fill in what depends on the image's side in pixels; explicit values win.

        Raises:
            UserError: a depth that fits no layout, an image too small for the strides.
        """
        return self

    def normalization(self) -> Statistics | None:
        """Mean and standard deviation of each channel in [0, 1] that the initial weights expect;
        None: the data set's own."""
        return None

    def prepare(self) -> None:
        """Make sure that weights which are to be loaded can be had. Raises UserError."""

    def build(self, num_classes: int) -> nn.Module:
        """A network for float images [B, 3, H, W] that returns logits [B, num_classes]."""
        raise NotImplementedError

    def blank(self, num_classes: int) -> nn.Module:
        """The same network where all its tensors are about to be replaced: nothing is loaded."""
        return self.build(num_classes)


class AuxiliaryNetwork(nn.Module):
    """A network with losses of its own in training, beside the recipe's on its logits.

    `network(images)` returns logits, as of any network. A training step calls `network(images,
    targets)` with soft targets [n, K]; that returns a tuple of tensors, the logits first, and then
    `auxiliary_losses` is asked. All that has a gradient is made in the call, where DDP sees it, and
    nothing is kept in the network: so it works under accumulation, autocast and torch.compile.
    """

    def auxiliary_losses(
        self, others: tuple[Tensor, ...], targets: Tensor, criterion: Criterion
    ) -> Tensor:
        """What each image adds to the recipe's loss on its logits [n], of that image alone: so the
        sum is the same on any number of ranks and micro-batches.

        Args:
            others: what followed the logits, in float32 or better.
            targets: soft, [n, K].
            criterion: the recipe's loss, for further logits.
        """
        raise NotImplementedError


class StagedNetwork(nn.Module):
    """stem, stage1, stage2, ..., head: a hook finds "after stage k" by name.

    Attributes:
        stages: the names of the stages, in order.
        feature_points: the modules after which features can be mixed: the stem, then the stages.
    """

    def __init__(self, stem: nn.Module, stages: list[nn.Module], head: nn.Module) -> None:
        super().__init__()
        self.stem = stem
        self.stages = tuple(f"stage{i + 1}" for i in range(len(stages)))
        for name, stage in zip(self.stages, stages, strict=True):
            self.add_module(name, stage)
        self.head = head
        self.feature_points = ("stem", *self.stages)
        initialise(self)

    def forward(self, images: Tensor) -> Tensor:
        features = self.stem(images)
        for name in self.stages:
            features = getattr(self, name)(features)
        return self.head(features)


class PooledLinear(nn.Module):
    """Global average pooling and the classifier; averages over any map size."""

    def __init__(self, channels: int, num_classes: int) -> None:
        super().__init__()
        self.fc = nn.Linear(channels, num_classes)

    def forward(self, features: Tensor) -> Tensor:
        return self.fc(features.mean((2, 3)))


def conv(inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1) -> nn.Conv2d:
    """A convolution without bias that keeps H and W up to the stride."""
    return nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False)


def imagenet_stem(channels: int) -> nn.Sequential:
    """7x7 stride 2, BN, ReLU, 3x3 max pooling stride 2."""
    return nn.Sequential(
        conv(3, channels, 7, 2), nn.BatchNorm2d(channels), nn.ReLU(), nn.MaxPool2d(3, 2, 1)
    )


def initialise(network: nn.Module) -> None:
    """He's normal initialisation by the fan-out k*k*C_out of each convolution (not divided by the
    groups), unit BatchNorm scales, zero shifts; linear layers keep torch's default. As in the
    CutMix authors' resnet.py and pyramidnet.py."""
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            fan_out = module.kernel_size[0] * module.kernel_size[1] * module.out_channels
            nn.init.normal_(module.weight, 0.0, math.sqrt(2.0 / fan_out))
        elif isinstance(module, nn.BatchNorm2d):
            nn.init.ones_(module.weight)
            nn.init.zeros_(module.bias)


def blocks_per_stage(name: str, depth: int, per_block: int, offset: int = 2) -> int:
    """How many blocks a three-stage network of `depth` layers has in each stage.

    Raises:
        UserError: the depth fits no whole number of blocks.
    """
    unit = 3 * per_block
    if depth <= offset or (depth - offset) % unit:
        below = max(1, (depth - offset) // unit)
        near = f"{unit * below + offset} and {unit * (below + 1) + offset}"
        raise UserError(
            f"model.depth={depth} fits no three-stage {name}: "
            f"it must be {unit}n+{offset}; the nearest are {near}"
        )
    return (depth - offset) // unit


def check_image(name: str, image_size: int, stride: int) -> None:
    """Raises UserError if an image of this side vanishes under the network's total stride."""
    if image_size < stride:
        raise UserError(
            f"the images are too small for {name}: {image_size} px, but its total stride is {stride}; "
            f"use images of at least {stride} px (dataset.image_size) or a model with fewer strides"
        )


def count_parameters(network: nn.Module) -> int:
    return sum(p.numel() for p in network.parameters())


def family(image_size: int) -> Family:
    return "cifar" if image_size <= SMALL_IMAGE else "imagenet"

"""DenseNet-BC for small images (Huang et al., 1608.06993): three dense blocks."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from cutmix_exp.models.base import (
    Model,
    PooledLinear,
    StagedNetwork,
    blocks_per_stage,
    check_image,
    conv,
)
from cutmix_exp.schema import option


class DenseLayer(nn.Module):
    """BN, ReLU, 1x1 to four times the growth rate, BN, ReLU, 3x3; its `growth` maps are appended
    to the input's."""

    def __init__(self, inputs: int, growth: int) -> None:
        super().__init__()
        inner = 4 * growth
        self.branch = nn.Sequential(
            nn.BatchNorm2d(inputs),
            nn.ReLU(),
            conv(inputs, inner, 1),
            nn.BatchNorm2d(inner),
            nn.ReLU(),
            conv(inner, growth, 3),
        )

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x, self.branch(x)], 1)


@dataclass(frozen=True, kw_only=True)
class DenseNet(Model):
    """DenseNet-BC-depth-growth; DenseNet-BC-100-12 by default. No dropout.

    The transition between two blocks (BN, ReLU, 1x1, 2x2 average pooling) opens the later stage.

    Attributes:
        depth: 6n+4 layers.
        growth: maps that each layer adds; the stem has twice as many.
        compression: share of the maps that a transition keeps, rounded down.
    """

    depth: int = option(100, ge=1)
    growth: int = option(12, ge=1)
    compression: float = option(0.5, gt=0, le=1)

    def resolve(self, image_size: int) -> DenseNet:
        blocks_per_stage(self.name, self.depth, 2, offset=4)
        check_image(self.name, image_size, 4)
        return self

    def build(self, num_classes: int) -> nn.Module:
        channels = 2 * self.growth
        stem, stages = conv(3, channels, 3), list[nn.Module]()
        for index in range(3):
            layers: list[nn.Module] = []
            if index:
                kept = int(channels * self.compression)
                layers += [
                    nn.BatchNorm2d(channels),
                    nn.ReLU(),
                    conv(channels, kept, 1),
                    nn.AvgPool2d(2),
                ]
                channels = kept
            for _ in range(blocks_per_stage(self.name, self.depth, 2, offset=4)):
                layers.append(DenseLayer(channels, self.growth))
                channels += self.growth
            stages.append(nn.Sequential(*layers))
        head = nn.Sequential(
            nn.BatchNorm2d(channels), nn.ReLU(), PooledLinear(channels, num_classes)
        )
        return StagedNetwork(stem, stages, head)

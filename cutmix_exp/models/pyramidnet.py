"""PyramidNet with additive widening (Han et al., 1610.02915), as the CutMix authors define it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cutmix_exp.models.base import (
    Block,
    Model,
    PooledLinear,
    StagedNetwork,
    blocks_per_stage,
    check_image,
    conv,
)
from cutmix_exp.schema import option


class PyramidUnit(nn.Module):
    """BN, convolutions, BN: no ReLU first and none last. The shortcut is the input, average-pooled
    where strided, with zeros for the channels that it lacks; it has no parameters.

    The zeros are added by `F.pad`, which torch.compile traces and fuses; adding into a slice of
    the branch would give the same bits.
    """

    def __init__(self, inputs: int, planes: int, stride: int, block: Block) -> None:
        super().__init__()
        layers: list[nn.Module] = [nn.BatchNorm2d(inputs)]
        if block == "bottleneck":
            outputs = planes * 4
            layers += [
                conv(inputs, planes, 1),
                nn.BatchNorm2d(planes),
                nn.ReLU(),
                conv(planes, planes, 3, stride),
                nn.BatchNorm2d(planes),
                nn.ReLU(),
                conv(planes, outputs, 1),
            ]
        else:
            outputs = planes
            layers += [
                conv(inputs, planes, 3, stride),
                nn.BatchNorm2d(planes),
                nn.ReLU(),
                conv(planes, planes, 3),
            ]
        self.branch = nn.Sequential(*layers, nn.BatchNorm2d(outputs))
        self.shortcut = nn.AvgPool2d(2, ceil_mode=True) if stride == 2 else nn.Identity()
        self.missing = outputs - inputs

    def forward(self, x: Tensor) -> Tensor:
        return self.branch(x) + F.pad(self.shortcut(x), (0, 0, 0, 0, 0, self.missing))


@dataclass(frozen=True, kw_only=True)
class PyramidNet(Model):
    """The paper's CIFAR network: PyramidNet-200, alpha 240, bottleneck (Table 5).

    Attributes:
        depth: 9n+2 layers (bottleneck) or 6n+2 (basic).
        alpha: widening factor: the planes grow by alpha/(3n) with each unit, from 16 to 16+alpha.
        block: `bottleneck` or `basic`.
    """

    # Its many odd widths make channels_last slower than the plain layout in eager bf16.
    memory_format: ClassVar[torch.memory_format] = torch.contiguous_format

    depth: int = option(200, ge=1)
    alpha: int = option(240, ge=1)
    block: Block = "bottleneck"

    def resolve(self, image_size: int) -> PyramidNet:
        self._units()
        check_image(self.name, image_size, 4)
        return self

    def _units(self) -> int:
        per_block = 3 if self.block == "bottleneck" else 2
        return blocks_per_stage(f"{self.name} of {self.block} blocks", self.depth, per_block)

    def build(self, num_classes: int) -> nn.Module:
        units, expansion = self._units(), 4 if self.block == "bottleneck" else 1
        inputs, planes = 16, 16.0
        stem = nn.Sequential(conv(3, inputs, 3), nn.BatchNorm2d(inputs))
        stages: list[nn.Module] = []
        for index in range(3):
            stage = []
            for position in range(units):
                # The sum is kept as a float: rounding each width from a product instead would
                # give other widths, and other parameter counts, than the authors'.
                planes += self.alpha / (3 * units)
                stride = 2 if index and not position else 1
                stage.append(PyramidUnit(inputs, round(planes), stride, self.block))
                inputs = round(planes) * expansion
            stages.append(nn.Sequential(*stage))
        head = nn.Sequential(nn.BatchNorm2d(inputs), nn.ReLU(), PooledLinear(inputs, num_classes))
        return StagedNetwork(stem, stages, head)

"""Wide residual networks (Zagoruyko & Komodakis, 1605.07146): pre-activation blocks."""

from __future__ import annotations

from dataclasses import dataclass

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


class WideBlock(nn.Module):
    """BN, ReLU, 3x3, BN, ReLU, 3x3. Where the shape changes, the shortcut is a 1x1 convolution of
    the activated input; otherwise it is the input itself."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.activate = nn.Sequential(nn.BatchNorm2d(inputs), nn.ReLU())
        self.branch = nn.Sequential(
            conv(inputs, outputs, 3, stride),
            nn.BatchNorm2d(outputs),
            nn.ReLU(),
            conv(outputs, outputs, 3),
        )
        self.same = stride == 1 and inputs == outputs
        projection = () if self.same else (conv(inputs, outputs, 1, stride),)
        self.shortcut = nn.Sequential(*projection)

    def forward(self, x: Tensor) -> Tensor:
        active = self.activate(x)
        return self.branch(active) + self.shortcut(x if self.same else active)


@dataclass(frozen=True, kw_only=True)
class WideResNet(Model):
    """WRN-depth-widen_factor; WRN-28-10 by default.

    Attributes:
        depth: 6n+4 layers.
        widen_factor: multiplies the widths 16, 32, 64.
    """

    depth: int = option(28, ge=1)
    widen_factor: int = option(10, ge=1)

    def resolve(self, image_size: int) -> WideResNet:
        blocks_per_stage(self.name, self.depth, 2, offset=4)
        check_image(self.name, image_size, 4)
        return self

    def build(self, num_classes: int) -> nn.Module:
        inputs, stages = 16, []
        for index in range(3):
            outputs = 16 * 2**index * self.widen_factor
            stage = []
            for position in range(blocks_per_stage(self.name, self.depth, 2, offset=4)):
                stage.append(WideBlock(inputs, outputs, 2 if index and not position else 1))
                inputs = outputs
            stages.append(nn.Sequential(*stage))
        head = nn.Sequential(nn.BatchNorm2d(inputs), nn.ReLU(), PooledLinear(inputs, num_classes))
        return StagedNetwork(conv(3, 16, 3), list(stages), head)

"""PyramidNet with additive widening (Han et al., 1610.02915), as the CutMix authors define it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cutmix_exp.models.base import (
    Block,
    Family,
    PooledLinear,
    StagedNetwork,
    conv,
    family,
    imagenet_stem,
)
from cutmix_exp.models.resnet import FOUR_STAGES, Residual
from cutmix_exp.schema import option


class AddIntoSlice(torch.autograd.Function):
    """The shortcut added to the branch's first channels, in place: no zeros, no copy. Forward and
    backward give the bits of a concatenation with zeros (a test)."""

    @staticmethod
    def forward(ctx: Any, branch: Tensor, shortcut: Tensor) -> Tensor:
        ctx.mark_dirty(branch)
        ctx.channels = shortcut.shape[1]
        branch[:, : ctx.channels] += shortcut
        return branch

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        return gradient, gradient[:, : ctx.channels]


def add_shortcut(branch: Tensor, shortcut: Tensor) -> Tensor:
    """branch [B, C, H, W] plus shortcut [B, c, H, W] with zeros for the channels that it lacks.
    The branch may be overwritten, unless torch.compile fuses the addition anyway."""
    missing = branch.shape[1] - shortcut.shape[1]
    if torch.compiler.is_compiling() or branch.dtype != shortcut.dtype:
        return branch + F.pad(shortcut, (0, 0, 0, 0, 0, missing))
    added: Tensor = AddIntoSlice.apply(branch, shortcut)
    return added


class PyramidUnit(nn.Module):
    """BN, convolutions, BN: no ReLU first and none last. The shortcut is the input, average-pooled
    where strided, with zeros for the channels that it lacks; it has no parameters.

    See `add_shortcut`: the zeros are never made.
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

    def forward(self, x: Tensor) -> Tensor:
        return add_shortcut(self.branch(x), self.shortcut(x))


@dataclass(frozen=True, kw_only=True)
class PyramidNet(Residual):
    """PyramidNet-200: alpha 240 in three stages on CIFAR-like images (paper Table 5), alpha 300 in
    four stages on ImageNet-like ones (that of Han et al.). Bottleneck units.

    Attributes:
        depth: 9n+2 layers (bottleneck) or 6n+2 (basic) in three stages; 18, 34, 50, 101, 152 or
            200 in four. Depth 200 is both: its layout follows the image size.
        alpha: widening factor: of `units` units in all, each has alpha/units planes more than the
            one before it; they begin at the width of the stem, 16 in three stages and 64 in four.
        block: None is `bottleneck`, but `basic` for depths 18 and 34 in four stages.
    """

    four_stages: ClassVar[dict[int, tuple[Block, tuple[int, ...]]]] = {
        **FOUR_STAGES,
        200: ("bottleneck", (3, 24, 36, 3)),
    }

    layout: Family | None = option(None, neutral="cifar")
    stem: Family | None = option(None, neutral="cifar")
    alpha: int | None = option(None, ge=1)

    @property
    def memory_format(self) -> torch.memory_format:
        """Of basic blocks the plain one: 3x3 convolutions of many odd widths are slower on a CPU in
        channels_last. In bottlenecks the 1x1 convolutions outweigh them."""
        return torch.contiguous_format if self.block == "basic" else torch.channels_last

    def _default_depth(self, image_size: int) -> int:
        return 200

    def _default_layout(self, depth: int, image_size: int) -> Family:
        return family(image_size) if depth == 200 else super()._default_layout(depth, image_size)

    def _three_stage_block(self, depth: int) -> Block:
        return "bottleneck"

    def resolve(self, image_size: int) -> PyramidNet:
        resolved = super().resolve(image_size)
        assert isinstance(resolved, PyramidNet)
        return replace(resolved, alpha=self.alpha or (240 if resolved.layout == "cifar" else 300))

    def build(self, num_classes: int) -> nn.Module:
        assert self.alpha is not None and self.block is not None, "resolve() comes first"
        lengths, expansion = self._stage_lengths(), 4 if self.block == "bottleneck" else 1
        inputs = 64 if self.layout == "imagenet" else 16
        stem = imagenet_stem(inputs) if self.stem == "imagenet" else self._small_stem(inputs)
        planes, stages = float(inputs), list[nn.Module]()
        for index, length in enumerate(lengths):
            stage = []
            for position in range(length):
                # The sum is kept as a float: rounding each width from a product instead would
                # give other widths, and other parameter counts, than the authors'.
                planes += self.alpha / sum(lengths)
                stride = 2 if index and not position else 1
                stage.append(PyramidUnit(inputs, round(planes), stride, self.block))
                inputs = round(planes) * expansion
            stages.append(nn.Sequential(*stage))
        head = nn.Sequential(nn.BatchNorm2d(inputs), nn.ReLU(), PooledLinear(inputs, num_classes))
        return StagedNetwork(stem, stages, head)

    def _small_stem(self, channels: int) -> nn.Module:
        return nn.Sequential(conv(3, channels, 3), nn.BatchNorm2d(channels))  # no ReLU

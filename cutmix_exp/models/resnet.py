"""ResNet and ResNeXt for small and large images.

The three-stage CIFAR layout follows the CutMix authors' resnet.py: post-activation blocks and a
projection wherever the shape changes; bottleneck networks have 9n+2 layers, basic ones 6n+2. The
four-stage layout is He et al.'s with the stride in the 3x3 convolution (v1.5); on small images
its stem is one 3x3 convolution, as customary for "ResNet-18 on CIFAR".
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from torch import Tensor, nn

from cutmix_exp.errors import UserError
from cutmix_exp.models.base import (
    Block,
    Family,
    Model,
    PooledLinear,
    StagedNetwork,
    blocks_per_stage,
    check_image,
    conv,
    family,
    imagenet_stem,
)
from cutmix_exp.schema import option

FOUR_STAGES: dict[int, tuple[Block, tuple[int, ...]]] = {
    18: ("basic", (2, 2, 2, 2)),
    34: ("basic", (3, 4, 6, 3)),
    50: ("bottleneck", (3, 4, 6, 3)),
    101: ("bottleneck", (3, 4, 23, 3)),
    152: ("bottleneck", (3, 8, 36, 3)),
}


def projection(inputs: int, outputs: int, stride: int) -> nn.Module:
    """The shortcut: identity, or a strided 1x1 convolution with BN where the shape changes."""
    if stride == 1 and inputs == outputs:
        return nn.Identity()
    return nn.Sequential(conv(inputs, outputs, 1, stride), nn.BatchNorm2d(outputs))


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut."""

    expansion = 1

    def __init__(self, inputs: int, planes: int, stride: int) -> None:
        super().__init__()
        self.branch = nn.Sequential(
            conv(inputs, planes, 3, stride),
            nn.BatchNorm2d(planes),
            nn.ReLU(),
            conv(planes, planes, 3),
            nn.BatchNorm2d(planes),
        )
        self.shortcut = projection(inputs, planes, stride)
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.relu(self.branch(x) + self.shortcut(x))


class Bottleneck(nn.Module):
    """1x1, 3x3 (strided, grouped), 1x1 convolution and a shortcut; 4 x planes outputs."""

    expansion = 4

    def __init__(
        self, inputs: int, planes: int, stride: int, *, inner: int | None = None, groups: int = 1
    ) -> None:
        super().__init__()
        inner = inner or planes
        outputs = planes * self.expansion
        self.branch = nn.Sequential(
            conv(inputs, inner, 1),
            nn.BatchNorm2d(inner),
            nn.ReLU(),
            conv(inner, inner, 3, stride, groups),
            nn.BatchNorm2d(inner),
            nn.ReLU(),
            conv(inner, outputs, 1),
            nn.BatchNorm2d(outputs),
        )
        self.shortcut = projection(inputs, outputs, stride)
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.relu(self.branch(x) + self.shortcut(x))


@dataclass(frozen=True, kw_only=True)
class Residual(Model):
    """What ResNet, ResNeXt and PyramidNet share: the choice of layout, stem and block.

    Attributes:
        four_stages: block and stage lengths by depth of the four-stage layout.
        depth: number of layers; None is the paper's choice for the image size.
        layout: `cifar` (three stages) or `imagenet` (four). None follows depth and image size:
            depths 18, 34, 50, 101 and 152 always mean four stages.
        stem: `cifar` (3x3 stride 1) or `imagenet` (7x7 stride 2 with pooling); None follows the
            image size.
        block: `basic` or `bottleneck`; None is the depth's own in four stages. In three stages
            it is `bottleneck` from depth 110 on (paper Table 6) and `basic` below, which is what
            the field calls ResNet-20, 32, 44 and 56, or whichever of the two fits the depth.
    """

    four_stages: ClassVar[dict[int, tuple[Block, tuple[int, ...]]]] = FOUR_STAGES

    depth: int | None = option(None, ge=1)
    layout: Family | None = None
    stem: Family | None = None
    block: Block | None = None

    def _default_depth(self, image_size: int) -> int:
        raise NotImplementedError

    def _default_layout(self, depth: int, image_size: int) -> Family:
        return "imagenet" if depth in FOUR_STAGES else "cifar"

    def _three_stage_block(self, depth: int) -> Block:
        fits_basic, fits_bottleneck = not (depth - 2) % 6, not (depth - 2) % 9
        if fits_basic and fits_bottleneck:
            return "bottleneck" if depth >= 110 else "basic"
        return "basic" if fits_basic else "bottleneck"

    def resolve(self, image_size: int) -> Residual:
        depth = self.depth or self._default_depth(image_size)
        layout: Family = self.layout or self._default_layout(depth, image_size)
        stem: Family = self.stem or family(image_size)
        if layout == "imagenet":
            if depth not in self.four_stages:
                raise UserError(
                    f"model.depth={depth} fits no four-stage {self.name}; "
                    f"it must be one of {', '.join(map(str, self.four_stages))}"
                )
            own = self.four_stages[depth][0]
            block: Block = self.block or own
            if block != own:
                raise UserError(
                    f"model.block={block}: {self.name} of depth {depth} in four stages "
                    f"is made of {own} blocks"
                )
        else:
            block = self.block or self._three_stage_block(depth)
            blocks_per_stage(
                f"{self.name} of {block} blocks", depth, 3 if block == "bottleneck" else 2
            )
        stride = (4 if stem == "imagenet" else 1) * (8 if layout == "imagenet" else 4)
        check_image(f"{self.name} of depth {depth}", image_size, stride)
        return replace(self, depth=depth, layout=layout, stem=stem, block=block)

    def _stage_lengths(self) -> tuple[int, ...]:
        assert self.depth is not None, "resolve() comes first"
        if self.layout == "imagenet":
            return self.four_stages[self.depth][1]
        return (
            blocks_per_stage(self.name, self.depth, 3 if self.block == "bottleneck" else 2),
        ) * 3

    def _small_stem(self, channels: int) -> nn.Module:
        return nn.Sequential(conv(3, channels, 3), nn.BatchNorm2d(channels), nn.ReLU())


@dataclass(frozen=True, kw_only=True)
class ResNet(Residual):
    """ResNet (He et al., 1512.03385): ResNet-110 with bottlenecks on CIFAR-like images (paper
    Table 6), ResNet-50 on ImageNet-like ones (Table 3).

    Attributes:
        last_stride: of the last stage. 1 doubles the side of the last map, as for localisation
            (paper appendix B: 14x14 of 224 px).
    """

    last_stride: int = option(2, ge=1, le=2, neutral=2)

    def _default_depth(self, image_size: int) -> int:
        return 110 if (self.layout or family(image_size)) == "cifar" else 50

    def build(self, num_classes: int) -> nn.Module:
        block = Bottleneck if self.block == "bottleneck" else BasicBlock
        planes = inputs = 64 if self.layout == "imagenet" else 16
        stem = imagenet_stem(planes) if self.stem == "imagenet" else self._small_stem(planes)
        stages: list[nn.Module] = []
        lengths = self._stage_lengths()
        for index, length in enumerate(lengths):
            blocks = []
            stage_stride = self.last_stride if index == len(lengths) - 1 else min(2, index + 1)
            for position in range(length):
                blocks.append(block(inputs, planes, 1 if position else stage_stride))
                inputs = planes * block.expansion
            stages.append(nn.Sequential(*blocks))
            planes *= 2
        return StagedNetwork(stem, stages, PooledLinear(inputs, num_classes))


@dataclass(frozen=True, kw_only=True)
class ResNeXt(Residual):
    """ResNeXt (Xie et al., 1611.05431): ResNeXt-29 8x64d in three stages on CIFAR-like images,
    ResNeXt-101 32x4d on ImageNet-like ones (paper Table 4). Bottleneck blocks only.

    Attributes:
        cardinality: number of groups of the 3x3 convolution.
        base_width: channels of each group in the first stage; doubles with each stage.
    """

    cardinality: int | None = option(None, ge=1)
    base_width: int | None = option(None, ge=1)

    def _default_depth(self, image_size: int) -> int:
        return 29 if (self.layout or family(image_size)) == "cifar" else 101

    def resolve(self, image_size: int) -> ResNeXt:
        if self.block == "basic":
            raise UserError(
                "model.block=basic: resnext is made of bottleneck blocks; use model=resnet"
            )
        wanted = self.depth or self._default_depth(image_size)
        if wanted in (18, 34):
            raise UserError(
                f"model.depth={wanted}: resnext is made of bottleneck blocks; use 50, 101, 152 or 9n+2"
            )
        base = replace(self, block="bottleneck")
        resolved = super(ResNeXt, base).resolve(image_size)
        assert isinstance(resolved, ResNeXt)
        small = resolved.layout == "cifar"
        return replace(
            resolved,
            cardinality=self.cardinality or (8 if small else 32),
            base_width=self.base_width or (64 if small else 4),
        )

    def build(self, num_classes: int) -> nn.Module:
        assert self.cardinality is not None, "resolve() comes first"
        assert self.base_width is not None, "resolve() comes first"
        planes, inputs, inner = 64, 64, self.cardinality * self.base_width
        stem = imagenet_stem(planes) if self.stem == "imagenet" else self._small_stem(planes)
        stages: list[nn.Module] = []
        for index, length in enumerate(self._stage_lengths()):
            blocks = []
            for position in range(length):
                stride = 2 if index and not position else 1
                blocks.append(
                    Bottleneck(inputs, planes, stride, inner=inner, groups=self.cardinality)
                )
                inputs = planes * Bottleneck.expansion
            stages.append(nn.Sequential(*blocks))
            planes, inner = planes * 2, inner * 2
        return StagedNetwork(stem, stages, PooledLinear(inputs, num_classes))

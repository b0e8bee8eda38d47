"""Reference definitions of the networks used on CIFAR, written for reading, not for speed.

All networks take float images [B, 3, H, W] and return class scores [B, num_classes]. They are
meant for 32x32 images: the three-stage networks need a last feature map of exactly 8x8 (input
sides 29 to 32), ReferenceResNet18 one of 4x4 (input sides 25 to 32).

Order of the submodules, so that weights can be copied in order of `parameters()` and
`buffers()`: stem first; blocks in order of use; within a block the residual branch in order of
use, then the shortcut's projection; head last. No convolution has a bias; the linear layer has
one. Weights keep PyTorch's default initialisation (no claim about the authors').

"paper" is Yun et al., "CutMix", ICCV 2019, arXiv 1905.04899v2.
"""

import torch
from torch import nn
from torch.nn import functional


def _conv1x1(channels_in: int, channels_out: int, stride: int = 1) -> nn.Conv2d:
    """Make a 1x1 convolution without bias."""
    return nn.Conv2d(channels_in, channels_out, kernel_size=1, stride=stride, bias=False)


def _conv3x3(channels_in: int, channels_out: int, stride: int = 1) -> nn.Conv2d:
    """Make a 3x3 convolution without bias that keeps the size at stride 1."""
    return nn.Conv2d(channels_in, channels_out, kernel_size=3, stride=stride, padding=1, bias=False)


def _average_pool_exactly(x: torch.Tensor, side: int) -> torch.Tensor:
    """Average a map [B, C, side, side] over its pixels to [B, C]; refuse any other size."""
    if tuple(x.shape[2:]) != (side, side):
        raise ValueError(f"the last map must be {side}x{side}, not {tuple(x.shape[2:])}")
    pooled = functional.avg_pool2d(x, kernel_size=side)
    return pooled.flatten(start_dim=1)


class _PyramidShortcut(nn.Module):
    """Shortcut of PyramidNet: no parameters (fact sheet, section 2.3)."""

    def __init__(self, stride: int) -> None:
        super().__init__()
        self.stride = stride

    def forward(self, x: torch.Tensor, channels: int) -> torch.Tensor:
        """Map [B, C, H, W] to [B, channels, H / stride, W / stride] (rounded up)."""
        if self.stride == 2:
            x = functional.avg_pool2d(x, kernel_size=2, stride=2, ceil_mode=True)
        batch, present, height, width = x.shape
        if channels > present:
            zeros = torch.zeros(
                batch, channels - present, height, width, dtype=x.dtype, device=x.device
            )
            x = torch.cat([x, zeros], dim=1)
        return x


class _PyramidBasicUnit(nn.Module):
    """BN, 3x3, BN, ReLU, 3x3, BN, plus the shortcut; no ReLU after the sum."""

    expansion = 1

    def __init__(self, channels_in: int, planes: int, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(channels_in)
        self.conv1 = _conv3x3(channels_in, planes, stride)
        self.bn2 = nn.BatchNorm2d(planes)
        self.conv2 = _conv3x3(planes, planes)
        self.bn3 = nn.BatchNorm2d(planes)
        self.shortcut = _PyramidShortcut(stride)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        branch = self.bn1(x)
        branch = self.conv1(branch)
        branch = self.bn2(branch)
        branch = torch.relu(branch)
        branch = self.conv2(branch)
        branch = self.bn3(branch)
        return branch + self.shortcut(x, branch.shape[1])


class _PyramidBottleneckUnit(nn.Module):
    """BN, 1x1, BN, ReLU, 3x3, BN, ReLU, 1x1 to 4 times the planes, BN, plus the shortcut."""

    expansion = 4

    def __init__(self, channels_in: int, planes: int, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(channels_in)
        self.conv1 = _conv1x1(channels_in, planes)
        self.bn2 = nn.BatchNorm2d(planes)
        self.conv2 = _conv3x3(planes, planes, stride)
        self.bn3 = nn.BatchNorm2d(planes)
        self.conv3 = _conv1x1(planes, 4 * planes)
        self.bn4 = nn.BatchNorm2d(4 * planes)
        self.shortcut = _PyramidShortcut(stride)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        branch = self.bn1(x)
        branch = self.conv1(branch)
        branch = self.bn2(branch)
        branch = torch.relu(branch)
        branch = self.conv2(branch)
        branch = self.bn3(branch)
        branch = torch.relu(branch)
        branch = self.conv3(branch)
        branch = self.bn4(branch)
        return branch + self.shortcut(x, branch.shape[1])


class ReferencePyramidNet(nn.Module):
    """PyramidNet for CIFAR with additive widening (paper, section 4.1.2; fact sheet 2.3).

    Input [B, 3, 32, 32], output [B, num_classes]. Each of the three stages has
    n = (depth - 2) // 9 bottleneck units, or (depth - 2) // 6 basic units; the first unit of
    stages 2 and 3 has stride 2. The width starts at 16.0 and grows by alpha / (3 n) before each
    unit; it is added up as a float and rounded only where a layer is made.
    """

    def __init__(self, depth: int, alpha: float, num_classes: int, bottleneck: bool) -> None:
        super().__init__()
        if bottleneck:
            unit = _PyramidBottleneckUnit
            units_per_stage = (depth - 2) // 9
        else:
            unit = _PyramidBasicUnit
            units_per_stage = (depth - 2) // 6
        self.stem_conv = _conv3x3(3, 16)
        self.stem_bn = nn.BatchNorm2d(16)
        self.units = nn.ModuleList()
        width = 16.0
        channels = 16
        for stage in range(3):
            for index in range(units_per_stage):
                width += alpha / (3 * units_per_stage)
                planes = round(width)
                stride = 2 if stage > 0 and index == 0 else 1
                self.units.append(unit(channels, planes, stride))
                channels = planes * unit.expansion
        self.final_bn = nn.BatchNorm2d(channels)
        self.linear = nn.Linear(channels, num_classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map images [B, 3, 32, 32] to scores [B, num_classes]; no ReLU after the stem."""
        x = self.stem_conv(x)
        x = self.stem_bn(x)
        for unit in self.units:
            x = unit(x)
        x = self.final_bn(x)
        x = torch.relu(x)
        x = _average_pool_exactly(x, 8)
        return self.linear(x)


class ReferencePyramidNet200ImageNet(nn.Module):
    """PyramidNet-200 for ImageNet (Han et al., arXiv 1610.02915).

    Input [B, 3, H, W], output [B, num_classes]. Stem of a 7x7 convolution of stride 2 to 64
    channels with BN, ReLU and 3x3 max pooling of stride 2; four stages of 3, 24, 36 and 3
    bottleneck units, the first unit of stages 2 to 4 with stride 2. The width starts at 64.0 and
    grows by alpha / 66 before each unit.
    """

    def __init__(self, alpha: float, num_classes: int) -> None:
        super().__init__()
        self.stem_conv = nn.Conv2d(3, 64, kernel_size=7, stride=2, padding=3, bias=False)
        self.stem_bn = nn.BatchNorm2d(64)
        self.units = nn.ModuleList()
        width = 64.0
        channels = 64
        for number in range(1, 67):
            width += alpha / 66
            stride = 2 if number in (4, 28, 64) else 1
            self.units.append(_PyramidBottleneckUnit(channels, round(width), stride))
            channels = 4 * round(width)
        self.final_bn = nn.BatchNorm2d(channels)
        self.linear = nn.Linear(channels, num_classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map images [B, 3, H, W] to scores [B, num_classes]."""
        x = torch.relu(self.stem_bn(self.stem_conv(x)))
        x = functional.max_pool2d(x, kernel_size=3, stride=2, padding=1)
        for unit in self.units:
            x = unit(x)
        x = torch.relu(self.final_bn(x))
        return self.linear(functional.adaptive_avg_pool2d(x, 1).flatten(1))


class _BasicBlock(nn.Module):
    """3x3, BN, ReLU, 3x3, BN, plus the shortcut, then ReLU (ResNet, arXiv 1512.03385)."""

    expansion = 1

    def __init__(self, channels_in: int, planes: int, stride: int) -> None:
        super().__init__()
        self.conv1 = _conv3x3(channels_in, planes, stride)
        self.bn1 = nn.BatchNorm2d(planes)
        self.conv2 = _conv3x3(planes, planes)
        self.bn2 = nn.BatchNorm2d(planes)
        self.has_projection = stride != 1 or channels_in != planes
        if self.has_projection:
            self.project_conv = _conv1x1(channels_in, planes, stride)
            self.project_bn = nn.BatchNorm2d(planes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        branch = self.conv1(x)
        branch = self.bn1(branch)
        branch = torch.relu(branch)
        branch = self.conv2(branch)
        branch = self.bn2(branch)
        shortcut = x
        if self.has_projection:
            shortcut = self.project_conv(shortcut)
            shortcut = self.project_bn(shortcut)
        return torch.relu(branch + shortcut)


class _BottleneckBlock(nn.Module):
    """1x1, BN, ReLU, 3x3 (with the stride), BN, ReLU, 1x1, BN, plus the shortcut, then ReLU."""

    expansion = 4

    def __init__(self, channels_in: int, planes: int, stride: int) -> None:
        super().__init__()
        self.conv1 = _conv1x1(channels_in, planes)
        self.bn1 = nn.BatchNorm2d(planes)
        self.conv2 = _conv3x3(planes, planes, stride)
        self.bn2 = nn.BatchNorm2d(planes)
        self.conv3 = _conv1x1(planes, 4 * planes)
        self.bn3 = nn.BatchNorm2d(4 * planes)
        self.has_projection = stride != 1 or channels_in != 4 * planes
        if self.has_projection:
            self.project_conv = _conv1x1(channels_in, 4 * planes, stride)
            self.project_bn = nn.BatchNorm2d(4 * planes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        branch = self.conv1(x)
        branch = self.bn1(branch)
        branch = torch.relu(branch)
        branch = self.conv2(branch)
        branch = self.bn2(branch)
        branch = torch.relu(branch)
        branch = self.conv3(branch)
        branch = self.bn3(branch)
        shortcut = x
        if self.has_projection:
            shortcut = self.project_conv(shortcut)
            shortcut = self.project_bn(shortcut)
        return torch.relu(branch + shortcut)


class ReferenceResNet(nn.Module):
    """Three-stage ResNet for CIFAR (paper, Table 6; fact sheet, section 0 point 4).

    Input [B, 3, 32, 32], output [B, num_classes]. Stages of 16, 32 and 64 planes with
    n = (depth - 2) // 9 bottleneck blocks each, or (depth - 2) // 6 basic blocks; the first
    block of stages 2 and 3 has stride 2. Where a block changes the shape, the shortcut is a
    1x1 convolution with BN.
    """

    def __init__(self, depth: int, num_classes: int, bottleneck: bool) -> None:
        super().__init__()
        if bottleneck:
            block = _BottleneckBlock
            blocks_per_stage = (depth - 2) // 9
        else:
            block = _BasicBlock
            blocks_per_stage = (depth - 2) // 6
        self.stem_conv = _conv3x3(3, 16)
        self.stem_bn = nn.BatchNorm2d(16)
        self.blocks = nn.ModuleList()
        channels = 16
        for stage, planes in enumerate([16, 32, 64]):
            for index in range(blocks_per_stage):
                stride = 2 if stage > 0 and index == 0 else 1
                self.blocks.append(block(channels, planes, stride))
                channels = planes * block.expansion
        self.linear = nn.Linear(channels, num_classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map images [B, 3, 32, 32] to scores [B, num_classes]."""
        x = self.stem_conv(x)
        x = self.stem_bn(x)
        x = torch.relu(x)
        for block in self.blocks:
            x = block(x)
        x = _average_pool_exactly(x, 8)
        return self.linear(x)


class ReferenceResNet18(nn.Module):
    """ResNet-18 with a stem for small images (the CIFAR network of arXiv 1708.04552, Cutout).

    Input [B, 3, 32, 32], output [B, num_classes]. Stem of one 3x3 convolution of stride 1, no
    max pooling; four stages of 64, 128, 256 and 512 planes with two basic blocks each, the
    first block of stages 2 to 4 with stride 2 and a 1x1 convolution with BN as shortcut.
    """

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.stem_conv = _conv3x3(3, 64)
        self.stem_bn = nn.BatchNorm2d(64)
        self.blocks = nn.ModuleList()
        channels = 64
        for stage, planes in enumerate([64, 128, 256, 512]):
            for index in range(2):
                stride = 2 if stage > 0 and index == 0 else 1
                self.blocks.append(_BasicBlock(channels, planes, stride))
                channels = planes
        self.linear = nn.Linear(channels, num_classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map images [B, 3, 32, 32] to scores [B, num_classes]."""
        x = self.stem_conv(x)
        x = self.stem_bn(x)
        x = torch.relu(x)
        for block in self.blocks:
            x = block(x)
        x = _average_pool_exactly(x, 4)
        return self.linear(x)


class _WideBlock(nn.Module):
    """BN, ReLU, 3x3, BN, ReLU, 3x3, plus the shortcut; no dropout, nothing after the sum.

    Where the shape changes, the shortcut is a 1x1 convolution (no BN) of the activated input,
    that is of the input after the first BN and ReLU; elsewhere it is the raw input.
    """

    def __init__(self, channels_in: int, channels_out: int, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(channels_in)
        self.conv1 = _conv3x3(channels_in, channels_out, stride)
        self.bn2 = nn.BatchNorm2d(channels_out)
        self.conv2 = _conv3x3(channels_out, channels_out)
        self.has_projection = stride != 1 or channels_in != channels_out
        if self.has_projection:
            self.project_conv = _conv1x1(channels_in, channels_out, stride)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        activated = self.bn1(x)
        activated = torch.relu(activated)
        branch = self.conv1(activated)
        branch = self.bn2(branch)
        branch = torch.relu(branch)
        branch = self.conv2(branch)
        shortcut = x
        if self.has_projection:
            shortcut = self.project_conv(activated)
        return branch + shortcut


class ReferenceWideResNet(nn.Module):
    """Wide ResNet (Zagoruyko and Komodakis, arXiv 1605.07146, section 2 and Table 1).

    Input [B, 3, 32, 32], output [B, num_classes]. Stem of one 3x3 convolution to 16 channels
    without BN; three stages of 16 k, 32 k and 64 k channels (k = widen_factor) with
    n = (depth - 4) // 6 blocks each; the first block of stages 2 and 3 has stride 2.
    """

    def __init__(self, depth: int, widen_factor: int, num_classes: int) -> None:
        super().__init__()
        blocks_per_stage = (depth - 4) // 6
        self.stem_conv = _conv3x3(3, 16)
        self.blocks = nn.ModuleList()
        channels = 16
        for stage, planes in enumerate([16, 32, 64]):
            for index in range(blocks_per_stage):
                stride = 2 if stage > 0 and index == 0 else 1
                self.blocks.append(_WideBlock(channels, planes * widen_factor, stride))
                channels = planes * widen_factor
        self.final_bn = nn.BatchNorm2d(channels)
        self.linear = nn.Linear(channels, num_classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map images [B, 3, 32, 32] to scores [B, num_classes]."""
        x = self.stem_conv(x)
        for block in self.blocks:
            x = block(x)
        x = self.final_bn(x)
        x = torch.relu(x)
        x = _average_pool_exactly(x, 8)
        return self.linear(x)

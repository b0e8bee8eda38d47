"""Slot `network`: regularizers that act inside the network.

Each changes a built network in place. A layer that has no state joins a block where the names of
the parameters do not notice: at the end of `branch`, around a ReLU, on the shortcut. Whether it
acts depends on training mode alone.

"Whole batch" means what a device sees at once, as under the authors' DataParallel: ranks and
micro-batches draw their own.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cutmix_exp.aug.base import NetworkOp, Progress
from cutmix_exp.errors import UserError
from cutmix_exp.models.base import family
from cutmix_exp.schema import option

Decay = Literal["linear", "uniform"]


def residual_blocks(model: nn.Module, wanted_by: str) -> list[Any]:
    """The modules with a `branch` and a `shortcut`, in the order of the forward pass.

    Raises:
        UserError: there is none.
    """
    blocks = [
        module
        for module in model.modules()
        if isinstance(getattr(module, "branch", None), nn.Sequential)
        and hasattr(module, "shortcut")
    ]
    if not blocks:
        has_own = any(hasattr(m, "drop_path") or hasattr(m, "drop_path1") for m in model.modules())
        hint = "; its own stochastic depth is model.options.drop_path_rate" if has_own else ""
        raise UserError(
            f"{wanted_by} acts on the branches of residual blocks, of which {type(model).__name__} "
            f"has none that it knows; use model=resnet, resnext, pyramidnet or wide_resnet{hint}"
        )
    return blocks


# ------------------------------------------------------------------------- on whole branches


@dataclass(frozen=True, kw_only=True)
class BranchOp(NetworkOp):
    """A layer at the end of the branch of each of L residual blocks.

    Attributes:
        rate: drop probability of the last block.
        decay: `linear`: block l of 1..L has rate * l/L; `uniform`: each has `rate`.
    """

    rate: float = option(0.5, ge=0, lt=1)
    decay: Decay = "linear"

    def rates(self, count: int) -> list[float]:
        """The drop probability of each of `count` blocks, from the input on."""
        if self.decay == "uniform":
            return [self.rate] * count
        return [self.rate * (index + 1) / count for index in range(count)]

    def layer(self, rate: float) -> nn.Module:
        raise NotImplementedError

    def attach(self, model: nn.Module) -> nn.Module:
        blocks = residual_blocks(model, type(self).__name__)
        for block, rate in zip(blocks, self.rates(len(blocks)), strict=True):
            block.branch.append(self.layer(rate))
        return model


@dataclass(frozen=True, kw_only=True)
class StochasticDepth(BranchOp):
    """Stochastic depth (Huang et al., 1603.09382; yueatsprograms/Stochastic_Depth): a branch is
    left out with its drop probability.

    Unlike the authors' code, which skips the branch, it is computed and multiplied by zero, so its
    running statistics go on; the gradients are the same.

    Attributes:
        rate: 0.25 in the CutMix paper (4.1.1, 4.1.2), which does not say whether it decays.
        granularity: one gate for the whole `batch` (authors) or for each `image` (timm).
        scaling: in the `test` a branch is scaled by its survival probability (authors), or in
            `training` by the inverse (timm, torchvision).
    """

    rate: float = option(0.25, ge=0, lt=1)
    granularity: Literal["batch", "image"] = "batch"
    scaling: Literal["test", "training"] = "test"

    def layer(self, rate: float) -> nn.Module:
        return StochasticDepthLayer(
            rate, per_image=self.granularity == "image", inverse=self.scaling == "training"
        )


class StochasticDepthLayer(nn.Module):
    """A branch [n, C, H, W], or zeros with probability `rate`."""

    def __init__(self, rate: float, *, per_image: bool, inverse: bool) -> None:
        super().__init__()
        self.survival = 1 - rate
        self.per_image, self.inverse = per_image, inverse

    def forward(self, branch: Tensor) -> Tensor:
        if not self.training:
            return branch if self.inverse else branch * self.survival
        gates = len(branch) if self.per_image else 1
        is_open = torch.rand(gates, 1, 1, 1, device=branch.device) < self.survival
        kept = branch * is_open.to(branch.dtype)
        return kept / self.survival if self.inverse else kept


@dataclass(frozen=True, kw_only=True)
class ShakeDrop(BranchOp):
    """ShakeDrop (Yamada et al., 1802.02375; owruby/shake-drop_pytorch): with its drop probability
    p_l, drawn once for the whole batch, a branch is multiplied by alpha on the way forward and its
    gradient by beta on the way back.

    In evaluation a branch is multiplied by the expectation of the forward factor, which is
    1 - p_l + p_l E[alpha], i.e. 1 - p_l for the authors' alpha.

    Attributes:
        alpha, beta: lower and upper end of their uniform laws. The paper has [-1, 1] and [0, 1]
            for PyramidNet, and alpha = 0 (here [0, 0]) as the other choice that works.
        granularity: alpha and beta are drawn for each `image` (owruby) or `element` (the authors'
            imenurok/ShakeDrop; beta then takes as much memory as the branch).
    """

    alpha: tuple[float, ...] = (-1.0, 1.0)
    beta: tuple[float, ...] = (0.0, 1.0)
    granularity: Literal["image", "element"] = "image"

    def __post_init__(self) -> None:
        for name, ends in (("alpha", self.alpha), ("beta", self.beta)):
            if len(ends) != 2 or ends[0] > ends[1]:
                raise UserError(f"{name}={list(ends)}: expected [low,high], e.g. [-1,1] or [0,0]")

    def layer(self, rate: float) -> nn.Module:
        return ShakeDropLayer(
            rate, self.alpha, self.beta, per_element=self.granularity == "element"
        )


class ShakeDropLayer(nn.Module):
    """A branch [n, C, H, W], or, with probability `rate`, alpha times it."""

    def __init__(
        self,
        rate: float,
        alpha: tuple[float, ...],
        beta: tuple[float, ...],
        *,
        per_element: bool,
    ) -> None:
        super().__init__()
        self.rate, self.alpha, self.beta = rate, alpha, beta
        self.per_element = per_element
        self.expected = 1 - rate + rate * sum(alpha) / 2

    def forward(self, branch: Tensor) -> Tensor:
        if not self.training:
            return branch * self.expected
        is_open = torch.rand(1, 1, 1, 1, device=branch.device) >= self.rate
        shape = branch.shape if self.per_element else (len(branch), 1, 1, 1)
        ahead, back = (
            torch.where(is_open, 1, low + (high - low) * torch.rand(shape, device=branch.device))
            for low, high in (self.alpha, self.beta)
        )
        shaken: Tensor = TwoFactors.apply(branch, ahead.to(branch.dtype), back.to(branch.dtype))
        return shaken


class TwoFactors(torch.autograd.Function):
    """x times `ahead`, whose gradient is multiplied by `back` instead."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, ahead: Tensor, back: Tensor) -> Tensor:
        ctx.save_for_backward(back)
        return x * ahead

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (back,) = ctx.saved_tensors
        return gradients[0] * back, None, None


# --------------------------------------------------------------------------- on feature maps


@dataclass(frozen=True, kw_only=True)
class DropBlock(NetworkOp):
    """DropBlock (Ghiasi et al., 1810.12890), with the formula and, on ImageNet, the places of its
    authors' code (tensorflow/tpu, models/official/resnet): after each convolution of a branch with
    its BN and ReLU, and on the shortcut, in the last two of four stages.

    The CutMix paper says keep 0.9 and block 4 for CIFAR (4.1.2), but not where and whether
    scheduled; see docs/fidelity.md.

    Attributes:
        keep: share of the units that the last stage keeps, at the end if `scheduled`.
        block: side of the dropped squares, at most the map's; None is 4 up to 64 px, else 7.
        scheduled: the drop rate grows linearly from 0 over the training (authors).
        stages: numbers of the stages it acts in, from 1; None is the last two.
        stage_factor: drop rate of a stage over that of the next one; the last has 1 - `keep`.
        shortcut: whether it acts on the shortcuts too. None is yes above 64 px (authors), no up to
            64 px: the many blocks of a CIFAR network would leave little of what they hand on.
    """

    keep: float = option(0.9, gt=0, le=1)
    block: int | None = option(None, ge=1)
    scheduled: bool = True
    stages: tuple[int, ...] | None = option(None, ge=1)
    stage_factor: float = option(0.25, ge=0, le=1)
    shortcut: bool | None = None

    def resolve(self, image_size: int) -> DropBlock:
        small = family(image_size) == "cifar"
        block = self.block if self.block is not None else (4 if small else 7)
        shortcut = self.shortcut if self.shortcut is not None else not small
        return replace(self, block=block, shortcut=shortcut)

    def attach(self, model: nn.Module) -> nn.Module:
        assert self.block is not None, "resolve() comes first"
        residual_blocks(model, "DropBlock")
        names: tuple[str, ...] = getattr(model, "stages", ())
        known = tuple(range(1, len(names) + 1))
        numbers = known[-2:] if self.stages is None else self.stages
        if not numbers or not set(numbers) <= set(known):
            raise UserError(
                f"aug.network.dropblock.stages={list(numbers)}: the network has the stages "
                f"{list(known)}; choose one or more of them"
            )
        progress = Progress() if self.scheduled else None
        for number in numbers:
            rate = (1 - self.keep) * self.stage_factor ** (len(names) - number)
            for block in residual_blocks(getattr(model, names[number - 1]), "DropBlock"):
                self._attach_to(block, rate, progress)
        return model

    def _attach_to(self, block: Any, rate: float, progress: Progress | None) -> None:
        def layer() -> nn.Module:
            assert self.block is not None
            return DropBlockLayer(rate, self.block, progress)

        for index, module in enumerate(block.branch):
            if isinstance(module, nn.ReLU):
                block.branch[index] = nn.Sequential(module, layer())
        block.branch.append(layer())
        if self.shortcut:
            if not isinstance(block.shortcut, nn.Sequential):  # then it has no parameters
                block.shortcut = nn.Sequential(block.shortcut)
            block.shortcut.append(layer())


class DropBlockLayer(nn.Module):
    """Zeros squares of each channel of maps [n, C, H, W] and scales up the rest.

    Args:
        rate: share of the units to drop. Where squares overlap, somewhat less is dropped, as the
            formula of the authors has it: 0.093 to 0.1 for a rate of 0.1.
        block: side of the squares, cut to the map's.
        progress: where given, the rate grows linearly with it.
    """

    def __init__(self, rate: float, block: int, progress: Progress | None) -> None:
        super().__init__()
        self.rate, self.block, self.progress = rate, block, progress

    def forward(self, maps: Tensor) -> Tensor:
        if not self.training:
            return maps
        height, width = maps.shape[-2:]
        tall, wide = min(self.block, height), min(self.block, width)
        rows, columns = height - tall + 1, width - wide + 1  # where a whole square fits
        seeds_per_unit = height * width / (tall * wide * rows * columns)
        rate = self.rate if self.progress is None else self.rate * self.progress.done
        # A seed is the top left corner of a square.
        noise = torch.rand_like(maps[..., :rows, :columns], dtype=torch.float32)
        seeds = (noise < rate * seeds_per_unit).to(maps.dtype)
        around = F.pad(seeds, (wide - 1, wide - 1, tall - 1, tall - 1))
        # Averaging finds the squares like max pooling would, without an index for each unit.
        kept = (F.avg_pool2d(around, (tall, wide), stride=1) == 0).to(maps.dtype)
        ones = kept.sum(dtype=torch.float32).clamp(min=1)
        return maps * kept * (kept.numel() / ones)


# ------------------------------------------------------------------------- on the classifier


@dataclass(frozen=True, kw_only=True)
class Dropout(NetworkOp):
    """Dropout (Srivastava et al., 2014) of what enters the classifier, the last linear layer.

    Attributes:
        rate: probability that a feature is dropped; the others are scaled up in training.
    """

    rate: float = option(0.5, ge=0, lt=1)

    def attach(self, model: nn.Module) -> nn.Module:
        linear = [name for name, m in model.named_modules() if type(m) is nn.Linear]
        if not linear:
            raise UserError(
                f"Dropout acts before the last linear layer, and {type(model).__name__} has none; "
                "use model=resnet, resnext, pyramidnet or wide_resnet"
            )
        parent, _, name = linear[-1].rpartition(".")
        holder = model.get_submodule(parent)
        setattr(holder, name, DropoutLinear.convert(getattr(holder, name), self.rate))
        return model


class DropoutLinear(nn.Linear):
    """A linear layer with dropout of its input, which has the state of a linear layer."""

    rate: float

    @classmethod
    def convert(cls, linear: nn.Linear, rate: float) -> DropoutLinear:
        """A layer that shares the tensors of `linear`."""
        made = cls(linear.in_features, linear.out_features, device="meta")
        made.weight, made.bias = linear.weight, linear.bias
        made.rate = rate
        return made

    def forward(self, features: Tensor) -> Tensor:
        return super().forward(F.dropout(features, self.rate, self.training))

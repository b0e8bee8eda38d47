"""Slot `image`: policies of torchvision.transforms.v2 on bytes, one image at a time."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import torch
from torch import Tensor

from cutmix_exp.aug.base import PixelOp
from cutmix_exp.schema import option


@dataclass(frozen=True, kw_only=True)
class Policy(PixelOp):
    """A transform of torchvision, which draws from torch's default generator: that is seeded for
    each image and left as it was found."""

    def transform(self) -> Any:
        raise NotImplementedError

    @cached_property
    def _made(self) -> Any:
        return self.transform()

    def change(self, image: Tensor, seed: int) -> Tensor:
        generator = torch.default_generator
        before = generator.get_state()
        try:
            generator.manual_seed(seed)
            changed: Tensor = self._made(image)
        finally:
            generator.set_state(before)
        return changed


@dataclass(frozen=True, kw_only=True)
class RandAugment(Policy):
    """RandAugment (Cubuk et al., 1909.13719) as torchvision has it.

    Attributes:
        num_ops: operations on each image.
        magnitude: of `num_magnitude_bins`; published for ImageNet, ResNet-50: 9 of 31.
    """

    num_ops: int = option(2, ge=1)
    magnitude: int = option(9, ge=0, le=30)

    def transform(self) -> Any:
        from torchvision.transforms import v2

        return v2.RandAugment(num_ops=self.num_ops, magnitude=self.magnitude)


@dataclass(frozen=True, kw_only=True)
class TrivialAugmentWide(Policy):
    """TrivialAugment (Mueller & Hutter, 2103.10158), the wide space: one operation of random
    strength on each image."""

    def transform(self) -> Any:
        from torchvision.transforms import v2

        return v2.TrivialAugmentWide()


@dataclass(frozen=True, kw_only=True)
class AutoAugment(Policy):
    """AutoAugment (Cubuk et al., 1805.09501) with one of its published policies."""

    policy: Literal["cifar10", "imagenet", "svhn"] = "imagenet"

    def transform(self) -> Any:
        from torchvision.transforms import v2

        return v2.AutoAugment(v2.AutoAugmentPolicy(self.policy))


@dataclass(frozen=True, kw_only=True)
class AugMix(Policy):
    """AugMix (Hendrycks et al., 1912.02781): chains of operations, blended with the image. Its
    consistency loss over three views is not part of it here.

    Attributes:
        severity: of the operations, 1 to 10.
        mixture_width: number of chains.
        chain_depth: length of a chain; -1 draws 1 to 3.
        alpha: of the Dirichlet and Beta laws of the blend.
    """

    severity: int = option(3, ge=1, le=10)
    mixture_width: int = option(3, ge=1)
    chain_depth: int = option(-1, ge=-1, le=10)
    alpha: float = option(1.0, gt=0)

    def transform(self) -> Any:
        from torchvision.transforms import v2

        return v2.AugMix(
            severity=self.severity,
            mixture_width=self.mixture_width,
            chain_depth=self.chain_depth,
            alpha=self.alpha,
            all_ops=False,
        )

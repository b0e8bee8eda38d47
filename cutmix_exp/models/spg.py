"""Self-produced guidance (SPG; Zhang et al., ECCV 2018): paper Table 9."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cutmix_exp.errors import UserError
from cutmix_exp.models.base import Criterion
from cutmix_exp.models.heads import Head, LocalizationHead, Stages, conv_relu, initialise_head
from cutmix_exp.models.maps import normalized, own_class_maps
from cutmix_exp.schema import option

FEW = 30 / 224**2
"""Of the pixels of an image: where fewer are above the upper threshold, those above a share of the
map's maximum count as foreground (the authors' code: 30 pixels of 224 x 224)."""
SHARE = 0.7
"""That share (the authors' code)."""


@dataclass(frozen=True, kw_only=True)
class Spg(Head):
    """The map of the true class says which pixels are certainly object and which background, and so
    teaches a side branch on a later stage of the backbone (B2); what that says teaches one on an
    earlier stage (B1); the mean of both teaches a last one (C) at the classifier's own features.
    Pixels between the thresholds teach nothing. The loss is the classifier's and each branch's
    binary cross-entropy. The map of a class is the classifier's (CAM).

    Sources: xiaomengyc/SPG, on Inception v3; clovaai/wsolevaluation, on VGG-16 and ResNet-50 too.

    Attributes:
        upper, lower: thresholds of the map for B2, of B2 for B1, of the mean for C: object is above
            the upper one, background below the lower one. wsolevaluation's.
        convolutions: 3x3 convolutions between backbone and classifier: 2 on VGG; none on ResNet,
            whose last stage takes their place (wsolevaluation).
        channels: of the convolution in branch C.
    """

    upper: tuple[float, ...] = option((0.7, 0.5, 0.7), ge=0, le=1)
    lower: tuple[float, ...] = option((0.01, 0.05, 0.1), ge=0, le=1)
    convolutions: int = option(2, ge=0)
    channels: int = option(512, ge=1)

    def __post_init__(self) -> None:
        if len(self.upper) != 3 or len(self.lower) != 3:
            raise UserError(
                f"upper={list(self.upper)}, lower={list(self.lower)}: expected three thresholds each, "
                "of the map, of B2 and of the mean of both, e.g. upper=[0.7,0.5,0.7]"
            )
        if any(low > high for low, high in zip(self.lower, self.upper, strict=True)):
            raise UserError(
                f"lower={list(self.lower)} must not be above upper={list(self.upper)}: a pixel would "
                "be object and background"
            )

    def build(self, widths: tuple[int, int, int], num_classes: int, side: int) -> LocalizationHead:
        thresholds = tuple(zip(self.upper, self.lower, strict=True))
        return SpgHead(widths, num_classes, side, thresholds, self.convolutions, self.channels)


class SpgHead(LocalizationHead):
    """See `Spg`. In training the logits are followed by those of the branches B2, B1 and C and by
    the map of the true class, each [n, h, w]."""

    def __init__(
        self,
        widths: tuple[int, int, int],
        num_classes: int,
        side: int,
        thresholds: tuple[tuple[float, float], ...],
        convolutions: int,
        channels: int,
    ) -> None:
        super().__init__()
        earlier, later, last = widths
        self.side, self.thresholds = side, thresholds
        self.b1, self.b2 = conv_relu(earlier, later), conv_relu(later, later)
        self.b_shared = nn.Sequential(conv_relu(later, later), nn.Conv2d(later, 1, 1))
        self.c = nn.Sequential(conv_relu(last, channels), nn.Conv2d(channels, 1, 1))
        self.convs = nn.Sequential(*(conv_relu(last, last) for _ in range(convolutions)))
        self.fc = nn.Linear(last, num_classes)  # the last layer is the one that counts
        initialise_head(self)

    def forward(self, stages: Stages, targets: Tensor | None = None) -> Tensor | tuple[Tensor, ...]:
        earlier, later, last = stages
        features = self.convs(last)
        logits: Tensor = self.fc(features.mean((2, 3)))
        if targets is None:
            return logits
        b1, b2 = self.b_shared(self.b1(earlier)), self.b_shared(self.b2(later))
        found = own_class_maps(self.fc, features, targets.argmax(1))
        return logits, b2[:, 0], b1[:, 0], self.c(features)[:, 0], found

    def auxiliary_losses(
        self, others: tuple[Tensor, ...], targets: Tensor, criterion: Criterion
    ) -> Tensor:
        """The binary cross-entropies of the branches B2, B1 and C."""
        b2, b1, c, found = (enlarged(maps, self.side) for maps in others)
        second, first = b2.detach().sigmoid(), b1.detach().sigmoid()
        guides = (normalized(found, "minmax"), second, (first + second) / 2)
        losses = [
            guided_losses(branch, *guidance(guide, upper, lower))
            for branch, guide, (upper, lower) in zip(
                (b2, b1, c), guides, self.thresholds, strict=True
            )
        ]
        return torch.stack(losses).sum(0)


def guidance(maps: Tensor, upper: float, lower: float) -> tuple[Tensor, Tensor]:
    """Which pixels of maps [n, H, W] in [0, 1] are object, and which are known to be object or
    background, bool [n, H, W] each. What is below the lower threshold is background in any case."""
    above = maps > upper
    few = above.sum((1, 2), keepdim=True) < FEW * maps[0].numel()
    above = torch.where(few, maps > SHARE * maps.amax((1, 2), keepdim=True), above)
    below = maps < lower
    return above & ~below, above | below


def guided_losses(logits: Tensor, is_object: Tensor, is_known: Tensor) -> Tensor:
    """The mean binary cross-entropy [n] of logits [n, H, W] over an image's known pixels; 0 where
    none is."""
    losses = F.binary_cross_entropy_with_logits(
        logits, is_object.to(logits.dtype), reduction="none"
    )
    return (losses * is_known).sum((1, 2)) / is_known.sum((1, 2)).clamp(min=1)


def enlarged(maps: Tensor, side: int) -> Tensor:
    """Maps [n, side, side] from maps [n, h, w], bilinearly (the corners are not aligned), as two
    products of matrices, whose gradients on a GPU have a fixed order of sums."""

    def rows(length: int) -> Tensor:
        one = torch.eye(length, device=maps.device, dtype=maps.dtype)[None]
        return F.interpolate(one, size=side, mode="linear", align_corners=False)[0].T

    return rows(maps.shape[1]) @ maps @ rows(maps.shape[2]).T

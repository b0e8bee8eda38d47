"""Adversarial complementary learning (ACoL; Zhang et al., CVPR 2018): paper Table 9."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from cutmix_exp.models.base import Criterion
from cutmix_exp.models.heads import (
    Head,
    LocalizationHead,
    MappingHead,
    Stages,
    conv_relu,
    initialise_head,
)
from cutmix_exp.models.maps import normalized, own_class_maps
from cutmix_exp.schema import option


@dataclass(frozen=True, kw_only=True)
class Acol(Head):
    """Two classifiers side by side on the backbone's last map (xiaomengyc/ACoL;
    clovaai/wsolevaluation). The second one sees zeros where the first one's map of the true class,
    from minimum to maximum, reaches the threshold, and so has to find other parts of the object. The
    loss is the sum of both classifiers'; the first one's logits count; the map of a class is the
    larger of both maps at each pixel.

    Attributes:
        threshold: from which on the map is erased; wsolevaluation's.
        channels: of the two 3x3 convolutions of each classifier.
    """

    threshold: float = option(0.7, gt=0, le=1)
    channels: int = option(1024, ge=1)

    def build(self, widths: tuple[int, int, int], num_classes: int, side: int) -> LocalizationHead:
        return AcolHead(widths[-1], self.channels, num_classes, self.threshold)


class Branch(nn.Module):
    """Two convolutions and a classifier of their averaged map. The authors classify each pixel and
    average then, which is the same (their section 3.1)."""

    def __init__(self, inputs: int, channels: int, num_classes: int) -> None:
        super().__init__()
        self.convs = nn.Sequential(conv_relu(inputs, channels), conv_relu(channels, channels))
        self.fc = nn.Linear(channels, num_classes)

    def forward(self, maps: Tensor) -> tuple[Tensor, Tensor]:
        """Logits [n, K], and the map [n, C, h, w] that was averaged."""
        features = self.convs(maps)
        return self.fc(features.mean((2, 3))), features


class AcolHead(MappingHead):
    """See `Acol`. In training the second classifier's logits follow the first one's."""

    def __init__(self, inputs: int, channels: int, num_classes: int, threshold: float) -> None:
        super().__init__()
        self.threshold = threshold
        self.second = Branch(inputs, channels, num_classes)
        self.first = Branch(inputs, channels, num_classes)  # the last layer is the one that counts
        initialise_head(self)

    def forward(self, stages: Stages, targets: Tensor | None = None) -> Tensor | tuple[Tensor, ...]:
        last = stages[-1]
        logits, features = self.first(last)
        if targets is None:
            return logits
        found = own_class_maps(self.first.fc, features, targets.argmax(1))
        second, _ = self.second(erased(last, found, self.threshold))
        return logits, second

    def auxiliary_losses(
        self, others: tuple[Tensor, ...], targets: Tensor, criterion: Criterion
    ) -> Tensor:
        """The recipe's loss on the second classifier's logits."""
        (second,) = others
        return criterion(second, targets)

    @torch.no_grad()
    def maps(self, last: Tensor, classes: Tensor) -> Tensor:
        """The larger of both classifiers' maps, each from minimum to maximum; the second one sees
        what the first one's map of the asked class leaves."""
        _, features = self.first(last)
        first = own_class_maps(self.first.fc, features, classes)
        _, features = self.second(erased(last, first, self.threshold))
        second = own_class_maps(self.second.fc, features, classes)
        return torch.maximum(normalized(first, "minmax"), normalized(second, "minmax"))


def erased(features: Tensor, maps: Tensor, threshold: float) -> Tensor:
    """Features [n, C, h, w] with zeros where maps [n, h, w], from minimum to maximum, are the
    threshold or more. A map without differences erases nothing."""
    kept = normalized(maps, "minmax") < threshold
    return features * kept[:, None].to(features.dtype)

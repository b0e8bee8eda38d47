"""Class activation maps (Zhou et al., 1512.04150): where a network with global average pooling and
one linear layer sees a class; or one with a head that makes the maps itself."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cutmix_exp.errors import UserError
from cutmix_exp.models.heads import MappingHead
from cutmix_exp.models.maps import class_maps

FITTING = (
    "class activation maps need global average pooling and one linear layer at the end, as in this "
    "project's networks, timm's and torchvision's ResNets, GoogLeNet, Inception v3, and model=vgg_gap"
)


class MapHead(Protocol):
    """The end of a network, which makes a map of each class out of the last feature map.

    Attributes:
        name: of the module at which the feature map is found.
        module: that module.
    """

    @property
    def name(self) -> str: ...
    @property
    def module(self) -> nn.Module: ...
    def of(self, inputs: Any, output: Any) -> Tensor:
        """The feature map float32 [n, C, h, w] of a call of the module."""
        ...

    def maps(self, features: Tensor, classes: Tensor) -> Tensor:
        """Activation maps float32 [n, h, w] of one class int64 [n] for each image."""
        ...


@dataclass(frozen=True)
class OwnHead:
    """A localisation head that makes its maps itself."""

    name: str
    module: MappingHead

    def of(self, inputs: Any, output: Any) -> Tensor:
        last: Tensor = inputs[0][-1]
        return last.to(torch.float32, copy=True)

    def maps(self, features: Tensor, classes: Tensor) -> Tensor:
        return self.module.maps(features, classes)


@dataclass(frozen=True)
class CamHead:
    """The feature map, averaged, times the classifier's weights, is the logits.

    Attributes:
        name, module: see `MapHead`.
        entering: the map is what enters the module; else what leaves it.
        rectified: the network averages the map's positive part (DenseNet of torchvision).
        weights: float32 [K, C], of the classifier.
    """

    name: str
    module: nn.Module
    entering: bool
    rectified: bool
    weights: Tensor

    def of(self, inputs: Any, output: Any) -> Tensor:
        found: Tensor = inputs[0] if self.entering else output
        found = found.to(torch.float32, copy=True)  # layers that follow may work in place
        return F.relu(found) if self.rectified else found

    def maps(self, features: Tensor, classes: Tensor) -> Tensor:
        return class_maps(self.weights, features, classes)


@dataclass
class Seen:
    """What hooks have seen of a forward pass."""

    features: list[Tensor] = field(default_factory=list)


@contextmanager
def watched(head: MapHead) -> Iterator[Seen]:
    """While it is open, each forward pass appends its last feature map to `features`."""
    seen = Seen()

    def hook(_: nn.Module, inputs: Any, output: Any) -> None:
        seen.features.append(head.of(inputs, output))

    handle = head.module.register_forward_hook(hook)
    try:
        yield seen
    finally:
        handle.remove()


@torch.no_grad()
def find_head(network: nn.Module, side: int, device: torch.device) -> MapHead:
    """The end of a network, found by showing it two images of noise: the linear layer whose output
    is the network's, and the last map [n, C, h, w] whose means are what enters that layer. A head that
    makes its maps itself is taken as it is.

    Args:
        network: in evaluation mode; it is not changed.
        side: of the images in pixels.

    Raises:
        UserError: the network does not end so, or its last map has one pixel.
    """
    for name, module in network.named_modules():
        if isinstance(module, MappingHead):
            return OwnHead(name, module)
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(2, 3, side, side, generator=generator).to(device)
    calls: list[Call] = []
    handles = [
        module.register_forward_hook(
            lambda m, inputs, output, name=name: calls.extend(Call.both(name, m, inputs, output))
        )
        for name, module in network.named_modules()
    ]
    try:
        logits = network(images)
    finally:
        for handle in handles:
            handle.remove()
    linear = [c for c in calls if isinstance(c.module, nn.Linear)]
    last = [c.module for c in linear if not c.entering and same(c.value, logits)]
    if not last:
        raise UserError(f"{FITTING}; {type(network).__name__} does not end with a linear layer")
    classifier = last[-1]
    assert isinstance(classifier, nn.Linear)
    pooled = [c.value for c in linear if c.entering and c.module is classifier][-1]
    maps = [c for c in reversed(calls) if c.value.ndim == 4 and c.value.shape[2:] != (1, 1)]
    for rectified in (False, True):
        for call in maps:
            shown = F.relu(call.value) if rectified else call.value
            if same(shown.mean((2, 3)), pooled):
                weights = classifier.weight.detach().float()
                return CamHead(call.name, call.module, call.entering, rectified, weights)
    raise UserError(
        f"{FITTING}; what enters the classifier of {type(network).__name__} is not the mean of a map "
        f"of more than one pixel (images of {side} px)"
    )


@dataclass(frozen=True)
class Call:
    """What entered or left a module in a forward pass."""

    name: str
    module: nn.Module
    entering: bool
    value: Tensor

    @classmethod
    def both(cls, name: str, module: nn.Module, inputs: Any, output: Any) -> list[Call]:
        """Copies: layers that follow may work in place."""
        values = [(True, inputs[0] if inputs else None), (False, output)]
        return [
            cls(name, module, entering, value.to(torch.float32, copy=True))
            for entering, value in values
            if isinstance(value, Tensor)
        ]


def same(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and torch.allclose(one, other.float(), rtol=1e-3, atol=1e-5)


def upsampled(maps: Tensor, side: int) -> Tensor:
    """Maps [n, side, side] from maps [n, h, w], bilinearly (the corners are not aligned)."""
    size = [side, side]
    return F.interpolate(maps[:, None], size=size, mode="bilinear", align_corners=False)[:, 0]

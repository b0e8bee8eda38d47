"""The networks in which the paper localises objects (appendix B): torchvision's, whose last map is
made twice as large, with their published weights and a new head."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cutmix_exp.errors import UserError
from cutmix_exp.models.base import initialise
from cutmix_exp.models.heads import Head, HeadedNetwork, HeadedResNet, HeadedVgg
from cutmix_exp.models.library import TorchvisionModel, read_state
from cutmix_exp.schema import option


@dataclass(frozen=True, kw_only=True)
class FineTuned(TorchvisionModel):
    """A torchvision network whose weights are loaded and whose head is always new, even where it has
    as many classes (paper appendix B).

    Attributes:
        head: None is global average pooling and one linear layer, whose map of a class is the CAM.
    """

    head: Head | None = option(None, neutral=None)

    def _try_image(self) -> None:
        """Raises UserError: as ever; the last map has one pixel, where a head compares pixels."""
        super()._try_image()
        network, side = self._sketch(), self.image_size
        if not isinstance(network, HeadedNetwork):
            return
        assert side is not None
        maps = network.stages_of(torch.zeros(1, 3, side, side, device="meta"))[-1]
        if maps.shape[2:] == (1, 1):
            raise UserError(
                f"{self.name} compares the pixels of its last map, of which images of {side} px leave "
                "one; use images of at least 32 px (dataset.image_size), or model=vgg_gap, resnet_gap"
            )

    def load(self, num_classes: int, file: Path | None) -> nn.Module:
        network = self.make(num_classes)
        if file is None:
            state = self._weights().get_state_dict(progress=False, check_hash=True)
        else:
            state = read_state(file)
        network.load_state_dict(self.with_new_layers(state, network))
        return network

    def with_new_layers(self, state: dict[str, Tensor], network: nn.Module) -> dict[str, Tensor]:
        """The published tensors, but those of `new_layers` from the network; what belongs to the
        old head is left out. Raises ValueError: tensors are missing."""
        own = network.state_dict()
        new = tuple(f"{name}." for name in getattr(network, "new_layers"))  # noqa: B009
        missing = [key for key in own if key not in state and not key.startswith(new)]
        if missing:
            raise ValueError(f"the file lacks {missing[0]} and {len(missing) - 1} more tensors")
        return {key: own[key] if key.startswith(new) else state[key] for key in own}


@dataclass(frozen=True, kw_only=True)
class ResNetGap(FineTuned):
    """A ResNet of torchvision whose last stage has stride 1, without dilation: a 14x14 map of
    224 px images. (`replace_stride_with_dilation` of torchvision dilates.)"""

    def make(self, num_classes: int) -> nn.Module:
        network: Any = super().make(num_classes)
        if not hasattr(network, "layer4"):
            raise ValueError(
                f"{self.architecture} has no last stage whose stride could be 1; choose one of "
                "torchvision's ResNets, such as model.architecture=resnet50"
            )
        for module in network.layer4[0].modules():
            if isinstance(module, nn.Conv2d):
                module.stride = (1, 1)
        if self.head is not None:
            assert self.image_size is not None, "resolve() comes first"
            return HeadedResNet(network, self.head, num_classes, self.image_size)
        network.new_layers = ("fc",)
        made: nn.Module = network
        return made


LAYERS = {"vgg11": "A", "vgg13": "B", "vgg16": "D", "vgg19": "E"}
"""The letters of Simonyan and Zisserman's table, by which torchvision names its layers."""


@dataclass(frozen=True, kw_only=True)
class VggGap(FineTuned):
    """VGG-GAP (Zhou et al., 1512.04150) of torchvision's VGG-16: without the last pooling and the
    fully connected layers; a 3x3 convolution to 1024 channels, ReLU, global average pooling and the
    classifier instead. A 14x14 map of 224 px images."""

    def make(self, num_classes: int) -> nn.Module:
        from torchvision.models.vgg import cfgs, make_layers

        name, _, norm = self.architecture.partition(".")[0].partition("_")
        if name not in LAYERS:
            raise ValueError(
                f"{self.architecture} is no VGG; choose one, such as model.architecture=vgg16"
            )
        # Not the whole network: its fully connected layers have 120 million weights.
        features = make_layers(cfgs[LAYERS[name]], batch_norm=norm == "bn")[:-1]
        if self.head is None:
            return GapNetwork(features, num_classes)
        assert self.image_size is not None, "resolve() comes first"
        initialise(features)
        return HeadedVgg(features, self.head, num_classes, self.image_size)


class GapNetwork(nn.Module):
    """Features, a 3x3 convolution with ReLU, global average pooling, classifier.

    Attributes:
        new_layers: that the published weights do not have.
    """

    new_layers = ("conv6", "fc")

    def __init__(self, features: nn.Sequential, num_classes: int) -> None:
        super().__init__()
        self.features = features
        channels = [m.out_channels for m in features if isinstance(m, nn.Conv2d)][-1]
        self.conv6 = nn.Conv2d(channels, 1024, 3, padding=1)
        self.relu = nn.ReLU()
        self.fc = nn.Linear(1024, num_classes)
        initialise(self)

    def forward(self, images: Tensor) -> Tensor:
        return self.fc(self.relu(self.conv6(self.features(images))).mean((2, 3)))

"""Heads that learn to localise (paper Table 9): what follows a backbone, and what it learns from."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from cutmix_exp.models.base import AuxiliaryNetwork, Criterion
from cutmix_exp.schema import Part

Stages = tuple[Tensor, Tensor, Tensor]
"""Maps [n, C, h, w] of a backbone, of one height and width: an earlier one, a later one, the last."""


class LocalizationHead(nn.Module):
    """A head on the stages of a backbone.

    `head(stages)` returns logits [n, K]; `head(stages, targets)` what an `AuxiliaryNetwork` answers
    in training. Soft targets stand for one class where a map of one is needed: that of the largest
    share, the first of equal ones.
    """

    def forward(self, stages: Stages, targets: Tensor | None = None) -> Tensor | tuple[Tensor, ...]:
        raise NotImplementedError

    def auxiliary_losses(
        self, others: tuple[Tensor, ...], targets: Tensor, criterion: Criterion
    ) -> Tensor:
        """See `AuxiliaryNetwork.auxiliary_losses`."""
        raise NotImplementedError


class MappingHead(LocalizationHead):
    """A head whose map of a class is not the one that the weights of its classifier give."""

    def maps(self, last: Tensor, classes: Tensor) -> Tensor:
        """Maps float32 [n, h, w] of one class int64 [n] for each image, without gradients.

        Args:
            last: the backbone's last map, float32 [n, C, h, w].
        """
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True)
class Head(Part):
    """The field `head` of a model for localisation."""

    def build(self, widths: tuple[int, int, int], num_classes: int, side: int) -> LocalizationHead:
        """A head with random weights.

        Args:
            widths: channels of the stages.
            side: of the training images in pixels.
        """
        raise NotImplementedError


class HeadedNetwork(AuxiliaryNetwork):
    """A backbone and a localisation head.

    Attributes:
        new_layers: that the published weights do not have.
    """

    new_layers = ("head",)
    head: LocalizationHead

    def stages_of(self, images: Tensor) -> Stages:
        raise NotImplementedError

    def forward(self, images: Tensor, targets: Tensor | None = None) -> Tensor | tuple[Tensor, ...]:
        answer: Tensor | tuple[Tensor, ...] = self.head(self.stages_of(images), targets)
        return answer

    def auxiliary_losses(
        self, others: tuple[Tensor, ...], targets: Tensor, criterion: Criterion
    ) -> Tensor:
        return self.head.auxiliary_losses(others, targets, criterion)


class HeadedVgg(HeadedNetwork):
    """The features of torchvision's VGG without the last pooling; the earlier stage is the map after
    the pooling before it, the later one is the last."""

    def __init__(self, features: nn.Sequential, head: Head, num_classes: int, side: int) -> None:
        super().__init__()
        self.features = features
        self.pool = [i for i, m in enumerate(features) if isinstance(m, nn.MaxPool2d)][-1]
        channels = [m.out_channels for m in features if isinstance(m, nn.Conv2d)]
        before = [m for m in features[: self.pool] if isinstance(m, nn.Conv2d)][-1]
        widths = (before.out_channels, channels[-1], channels[-1])
        self.head = head.build(widths, num_classes, side)

    def stages_of(self, images: Tensor) -> Stages:
        maps = earlier = images
        for number, layer in enumerate(self.features):
            maps = layer(maps)
            if number == self.pool:
                earlier = maps
        return earlier, maps, maps


class HeadedResNet(HeadedNetwork):
    """A ResNet of torchvision whose last stage has stride 1, without its head; the earlier stage is
    the map after the first block of the last stage but one, the later one after its last block.

    Attributes:
        feature_points: where features can be mixed: not in the middle of the stage that is cut.
    """

    feature_points = ("bn1", "layer1", "layer2")
    layer3: nn.Sequential
    layer4: nn.Module

    def __init__(self, resnet: nn.Module, head: Head, num_classes: int, side: int) -> None:
        super().__init__()
        for name, child in resnet.named_children():
            if name not in ("avgpool", "fc"):
                self.add_module(name, child)
        last: int = resnet.fc.in_features  # type: ignore[union-attr, assignment]
        self.head = head.build((last // 2, last // 2, last), num_classes, side)

    def stages_of(self, images: Tensor) -> Stages:
        maps = images
        for name in ("conv1", "bn1", "relu", "maxpool", "layer1", "layer2"):
            maps = getattr(self, name)(maps)
        first, *others = self.layer3
        later = earlier = first(maps)
        for block in others:
            later = block(later)
        return earlier, later, self.layer4(later)


def conv_relu(inputs: int, outputs: int) -> nn.Sequential:
    """A 3x3 convolution that keeps H and W, with a bias, and ReLU."""
    return nn.Sequential(nn.Conv2d(inputs, outputs, 3, padding=1), nn.ReLU())


def initialise_head(head: nn.Module) -> None:
    """Xavier's uniform initialisation of convolutions, zero biases, as in the code of the heads'
    authors. He's by the fan-out would make a layer with one output 30 times as strong."""
    for module in head.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            nn.init.xavier_uniform_(module.weight)
            assert module.bias is not None
            nn.init.zeros_(module.bias)

"""Gather-Excite ResNets (Hu et al., 1810.12348; hujie-frank/GENet): timm's ResNets with the
authors' module at the end of each branch. timm's own layer pads its global convolution, so that it
is none, and in 1.0.31 cannot be made with parameters at all."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

from torch import Tensor, nn

from cutmix_exp.errors import UserError
from cutmix_exp.models.library import TimmModel

REDUCTION = 16


class GatherExcite(nn.Module):
    """Multiplies maps [n, C, H, W] by a gate of each channel, which is made from the whole map.

    Args:
        channels: C.
        extent: H and W that the module is made for; None: any, without parameters (GE-theta-minus:
            the gate is the sigmoid of the mean). With one (GE-theta-plus), the map is gathered by a
            convolution of each channel over all of it, BatchNorm and ReLU, and the gate is the
            sigmoid of two 1x1 convolutions with a ReLU between them.
        factory: device and dtype of the parameters, which timm gives.
    """

    def __init__(self, channels: int, extent: int | None, **factory: Any) -> None:
        super().__init__()
        self.extent = extent
        self.gather: nn.Module
        if extent is None:
            self.gather, self.excite = nn.AdaptiveAvgPool2d(1), nn.Sequential(nn.Sigmoid())
            return
        self.gather = nn.Sequential(
            nn.Conv2d(channels, channels, extent, groups=channels, bias=False, **factory),
            nn.BatchNorm2d(channels, **factory),
            nn.ReLU(inplace=True),
        )
        self.excite = nn.Sequential(
            nn.Conv2d(channels, channels // REDUCTION, 1, **factory),
            nn.ReLU(inplace=True),
            nn.Conv2d(channels // REDUCTION, channels, 1, **factory),
            nn.Sigmoid(),
        )

    def reset_parameters(self) -> None:
        """Initial values of the authors' prototxt."""
        if self.extent is None:
            return
        nn.init.kaiming_normal_(self.gather[0].weight, nonlinearity="relu")  # type: ignore[index]
        for convolution in (self.excite[0], self.excite[2]):
            assert isinstance(convolution, nn.Conv2d) and convolution.bias is not None
            nn.init.normal_(convolution.weight, std=0.01)
            nn.init.zeros_(convolution.bias)

    def forward(self, maps: Tensor) -> Tensor:
        if self.extent is not None and maps.shape[2:] != (self.extent, self.extent):
            height, width = maps.shape[2:]
            raise UserError(
                f"Gather-Excite was made for maps of {self.extent}x{self.extent}, not {height}x{width}: "
                "test images have another size than training images; leave dataset.eval_size out, or "
                "take model.variant=theta_minus"
            )
        return maps * self.excite(self.gather(maps))


@dataclass(frozen=True, kw_only=True)
class GEResNet(TimmModel):
    """A bottleneck ResNet of timm with Gather-Excite modules of global extent.

    Attributes:
        variant: `theta_plus` (the rows of the paper's Table 3) or `theta_minus`, without
            parameters; the names are the authors'.
    """

    architecture: Literal["resnet50", "resnet101", "resnet152"] = "resnet50"
    variant: Literal["theta_plus", "theta_minus"] = "theta_plus"

    def resolve(self, image_size: int) -> GEResNet:
        """Raises UserError: pretrained weights are asked for."""
        if self.pretrained:
            raise UserError(
                "model.pretrained=true: nobody publishes weights of this network; "
                "leave it out, or take model=timm"
            )
        resolved = super().resolve(image_size)
        assert isinstance(resolved, GEResNet)
        named = resolved.name != "ge_resnet"
        return resolved if named else replace(resolved, name=f"ge_{self.architecture}")

    def make(self, num_classes: int) -> nn.Module:
        network = super().make(num_classes)
        for module in network.modules():
            if isinstance(module, GatherExcite):
                module.reset_parameters()
        return network

    def _arguments(self) -> dict[str, Any]:
        return {**super()._arguments(), "block_args": {"attn_layer": self._attention}}

    def _attention(self, channels: int, **factory: Any) -> GatherExcite:
        """The module after a block's last BatchNorm. A stage halves the map and doubles the
        channels: 256 of them are on maps of a quarter of the image's side, rounded up."""
        assert self.image_size is not None
        extent = -(-64 * self.image_size // channels) if self.variant == "theta_plus" else None
        return GatherExcite(channels, extent, **factory)

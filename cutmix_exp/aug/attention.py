"""Slot `network`: attention-based dropout, one of the methods that localise (paper Table 9)."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from cutmix_exp.aug.base import NetworkOp
from cutmix_exp.errors import UserError
from cutmix_exp.schema import option


@dataclass(frozen=True, kw_only=True)
class Adl(NetworkOp):
    """ADL (Choe and Shim, CVPR 2019; clovaai/wsolevaluation): in training, a feature map is
    multiplied by a map of one number for each pixel, made of its own mean over the channels: with
    probability `rate` by the drop mask, which is 0 where that mean is near its maximum and 1
    elsewhere, else by the importance map, the mean's sigmoid. One coin for the whole batch and
    each place. In the test nothing happens.

    Attributes:
        rate: probability of the drop mask.
        threshold: share of the maximum from which on a pixel is dropped.
        places: names of the modules whose output is multiplied. None is, as in wsolevaluation, the
            first block of each of the last two stages of a residual network and its last block; in
            VGG after the third pooling, before the fourth, and at the end.
    """

    rate: float = option(0.75, ge=0, le=1)
    threshold: float = option(0.9, ge=0, le=1)
    places: tuple[str, ...] | None = None

    def attach(self, model: nn.Module) -> nn.Module:
        known = dict(model.named_modules())
        for place in usual_places(model) if self.places is None else self.places:
            if place not in known:
                raise UserError(
                    f"aug.network.adl.places: {type(model).__name__} has no module '{place}'; modules "
                    f"of it: {', '.join(name for name, _ in model.named_children())} and those inside"
                )
            hook = partial(attend, rate=self.rate, threshold=self.threshold)
            known[place].register_forward_hook(hook)
        return model


def usual_places(model: nn.Module) -> list[str]:
    """The names of the modules after which ADL acts where none are given.

    Raises:
        UserError: it is not known for such a network.
    """
    stages: Any = getattr(model, "stages", ()) or ("layer3", "layer4")
    features = getattr(model, "features", None)
    if all(isinstance(getattr(model, stage, None), nn.Sequential) for stage in stages):
        last = len(getattr(model, stages[-1])) - 1
        return [f"{stages[-2]}.0", *dict.fromkeys((f"{stages[-1]}.0", f"{stages[-1]}.{last}"))]
    if isinstance(features, nn.Sequential):
        pools = [i for i, layer in enumerate(features) if isinstance(layer, nn.MaxPool2d)]
        if len(pools) >= 4:
            end = pools[4] if len(pools) > 4 else len(features)
            return [f"features.{i}" for i in (pools[2], pools[3] - 1, end - 1)]
    raise UserError(
        f"where ADL acts in {type(model).__name__} is not known; name the modules by "
        "aug.network.adl.places=[layer3.0,layer4.0], or use model=resnet, resnet_gap or vgg_gap"
    )


def attend(module: nn.Module, _: Any, features: Tensor, *, rate: float, threshold: float) -> Tensor:
    """A forward hook: features [n, C, H, W] times the drop mask or the importance map."""
    if not module.training:
        return features
    attention = features.mean(1, keepdim=True)
    kept = attention < threshold * attention.amax((2, 3), keepdim=True)
    # A tensor and no bool, so that a compiled network stays compiled.
    drops = torch.rand((), device=features.device) < rate
    chosen = torch.where(drops, kept.to(features.dtype), attention.sigmoid())
    return features * chosen

"""Maps of classes: what networks learn from and what evaluations look at."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def class_maps(weights: Tensor, features: Tensor, classes: Tensor) -> Tensor:
    """Activation maps [n, h, w] of one class int64 [n] for each image, of features [n, C, h, w] that
    are averaged and then classified with weights [K, C] (Zhou et al., 1512.04150): the mean of a map
    is the class's logit without its bias."""
    return torch.einsum("nc,nchw->nhw", weights[classes], features)


@torch.no_grad()
def own_class_maps(fc: nn.Linear, features: Tensor, classes: Tensor) -> Tensor:
    """`class_maps` for a network that learns from them: without gradients, and in float32 or better
    under autocast too, since they are compared with thresholds."""
    kind = "cpu" if features.is_meta else features.device.type  # shapes alone have no autocast
    with torch.autocast(kind, enabled=False):
        exact = torch.promote_types(features.dtype, torch.float32)
        return class_maps(fc.weight.to(exact), features.to(exact), classes)


def normalized(maps: Tensor, way: str) -> Tensor:
    """Maps [n, H, W] in [0, 1]: the positive part over its maximum (`max`), or from minimum to
    maximum (`minmax`); a map without a positive part, or without differences, becomes zero."""
    low = maps.amin((1, 2), keepdim=True) if way == "minmax" else torch.zeros_like(maps[:, :1, :1])
    span = maps.amax((1, 2), keepdim=True) - low
    return torch.where(span > 0, (maps - low) / span, 0.0).clamp(0, 1)

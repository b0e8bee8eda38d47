"""Slot `mix`, inside the network: Manifold Mixup and Feature CutMix.

The image mixers, applied to the features after a layer that is drawn for each batch. All ranks
draw the same layer; the images that meet are those of one forward pass.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor, nn

from cutmix_exp.aug.base import BatchShape, Mixer, MixPlan, PlanReceiver
from cutmix_exp.aug.mix import CutMix, Mixup
from cutmix_exp.errors import UserError
from cutmix_exp.schema import option


@dataclass(frozen=True, kw_only=True)
class FeatureMixer(Mixer):
    """Makes an image mixer act after a random layer.

    Attributes:
        layers: among which one is drawn, uniformly, for each batch: 0 is the image, 1 after the
            stem (the first convolution and BatchNorm), k after stage k-1 (paper, Figure 3 right).
            One number fixes the layer.
    """

    layers: tuple[int, ...] = option((0, 2, 3), ge=0)

    def __post_init__(self) -> None:
        if not self.layers:
            raise UserError("layers=[] leaves no place to mix at; give one or more, e.g. [0,2,3]")
        if self.wants_guests and any(self.layers):
            raise UserError("partner=dataset has no features to mix; use partner=permutation")
        inherited = getattr(super(), "__post_init__", None)
        if inherited is not None:
            inherited()

    @property
    def mixes_features(self) -> bool:
        return True

    def attach(self, network: nn.Module) -> PlanReceiver:
        return FeatureMixing(self, network)

    def sample(self, shape: BatchShape, progress: float, rng: np.random.Generator) -> MixPlan:
        layer = self.layers[int(rng.integers(len(self.layers)))]
        height, width = shape.maps[layer] if layer else (shape.height, shape.width)
        there = replace(shape, height=height, width=width)
        return replace(super().sample(there, progress, rng), layer=layer)

    def apply(self, plan: MixPlan, sources: list[Tensor]) -> Tensor:
        return sources[0] if plan.layer else super().apply(plan, sources)

    def apply_to_features(self, plan: MixPlan, features: Tensor, partners: Tensor) -> Tensor:
        """Mix features [n, C, h, w] with those at `partners` (int64 [n], rows of `features`)."""
        return super().apply(plan, [features, features[partners]])


@dataclass(frozen=True, kw_only=True)
class ManifoldMixup(FeatureMixer, Mixup):
    """Manifold Mixup (Verma et al., 1806.05236; vikasverma1077/manifold_mixup): `Mixup` after a
    random layer, of the image, the first and the second stage by default, as in its authors' code;
    the CutMix paper does not name its layers."""


@dataclass(frozen=True, kw_only=True)
class FeatureCutMix(FeatureMixer, CutMix):
    """Feature CutMix (CutMix paper, Table 3 and Figure 3): `CutMix` after a random layer; boxes are
    drawn, and labels weighted, in pixels of that layer's map."""


class FeatureMixing(PlanReceiver):
    """Forward hooks that mix the features of the current forward pass. In evaluation mode they do
    nothing. Under torch.compile the hook is left to Python: a break of the graph at its layer."""

    def __init__(self, mixer: FeatureMixer, network: nn.Module) -> None:
        self.mixer = mixer
        self.plan: MixPlan | None = None
        self.partners = np.empty(0, np.int64)
        names = feature_points(network)
        if max(mixer.layers) > len(names):
            raise UserError(
                f"aug.mix.layers={list(mixer.layers)}: this network has the layers 0 (the image) to "
                f"{len(names)}"
                + (f" ({', '.join(names)})" if names else "; use aug.mix.layers=[0]")
            )
        for number, name in enumerate(names, start=1):
            if number in mixer.layers:
                network.get_submodule(name).register_forward_hook(self._hook(number))

    def set(self, plan: MixPlan, positions: np.ndarray) -> None:
        self.plan = None
        if plan.layer and plan.num_sources > 1:
            self.plan = plan
            self.partners = np.searchsorted(positions, plan.partners[0])
            if len(positions) == 1:  # also the borrowed image of a rank that has none of its own
                self.partners = np.zeros(1, np.int64)
            else:
                met = positions[self.partners.clip(max=len(positions) - 1)]
                assert np.array_equal(met, plan.partners[0]), "a partner of another forward pass"

    def _hook(self, number: int):  # type: ignore[no-untyped-def]
        @torch.compiler.disable
        def mix(module: nn.Module, inputs: object, features: Tensor) -> Tensor:
            if self.plan is None or self.plan.layer != number or not module.training:
                return features
            partners = torch.from_numpy(self.partners).to(features.device)
            return self.mixer.apply_to_features(self.plan, features, partners)

        return mix


def feature_points(network: nn.Module) -> tuple[str, ...]:
    """Names of the modules after which features can be mixed: the stem, then each stage; none where
    a library's network has no such names."""
    usual = ("bn1", "layer1", "layer2", "layer3", "layer4")  # the ResNets of torchvision and timm
    found = usual if all(hasattr(network, name) for name in usual) else ()
    return tuple(getattr(network, "feature_points", found))


@torch.no_grad()
def feature_maps(network: nn.Module, image_size: int) -> tuple[tuple[int, int], ...]:
    """Height and width of the maps at layer 0 (the image), 1 (after the stem), ...; none where the
    network names no layers."""
    found = [(image_size, image_size)]

    def note(module: nn.Module, inputs: object, features: Tensor) -> None:
        found.append((features.shape[2], features.shape[3]))

    names = feature_points(network)
    hooks = [network.get_submodule(name).register_forward_hook(note) for name in names]
    was_training = network.training
    parameter = next(network.parameters())
    network.eval()
    network(parameter.new_zeros(1, 3, image_size, image_size))
    network.train(was_training)
    for hook in hooks:
        hook.remove()
    return tuple(found)

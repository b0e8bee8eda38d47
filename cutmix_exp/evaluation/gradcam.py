"""Grad-CAM (Selvaraju et al., 1610.02391) and its kin: where a network sees a class, by the gradient of
the class's logit at a feature map, so that the network need not end as class activation maps want it.

The formulas are those of the library grad-cam (the extra `cam`). The passes are ours: the library
hooks outputs of modules alone, keeps the graph of the whole backbone, and stretches each map before
it is enlarged, where these maps are enlarged and normalised as class activation maps are.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cutmix_exp.errors import UserError, installing
from cutmix_exp.evaluation.base import Subject
from cutmix_exp.evaluation.cam import CamHead, MapHead, find_head, noise

Method = Literal["gradcam", "gradcam++", "xgradcam", "hirescam", "layercam"]

CLASSES: dict[Method, str] = {
    "gradcam": "GradCAM",
    "gradcam++": "GradCAMPlusPlus",
    "xgradcam": "XGradCAM",
    "hirescam": "HiResCAM",
    "layercam": "LayerCAM",
}
"""The library's names."""

Formula = Callable[[np.ndarray, np.ndarray], np.ndarray]
"""A feature map and the gradient at it, float32 [n, C, h, w], to maps float32 [n, h, w]."""


def formula(method: Method) -> Formula:
    """The library's formula, without the ReLU that follows it.

    Raises:
        UserError: the library is not installed.
    """
    try:
        import pytorch_grad_cam
    except ImportError as error:
        raise UserError(
            f"suite.method={method} is of the library grad-cam, which cannot be imported ({error}); "
            f"{installing('cam')}"
        ) from error
    # It wants a module that has parameters, of which it watches no layer.
    held = getattr(pytorch_grad_cam, CLASSES[method])(nn.Linear(1, 1), [])
    return lambda features, gradients: held.get_cam_image(
        None, None, None, features, gradients, False
    )


@dataclass(frozen=True)
class Tap:
    """Where in a network the feature map is.

    Attributes:
        name, module: of the module that the map enters or leaves.
        entering: the map is what enters the module; else what leaves it.
        staged: what enters is a tuple, whose last item is the map.
        rectified: the map is the positive part of that, which the network takes next.
    """

    name: str
    module: nn.Module
    entering: bool = False
    staged: bool = False
    rectified: bool = False

    @classmethod
    def at(cls, head: MapHead) -> Tap:
        """Where the map is of which the head makes class activation maps."""
        if isinstance(head, CamHead):
            return cls(head.name, head.module, head.entering, rectified=head.rectified)
        return cls(head.name, head.module, entering=True, staged=True)

    def gradient(self, logits: Tensor, classes: Tensor, leaf: Tensor) -> Tensor:
        """The gradient float32 [n, C, h, w], at the map `leaf`, of one logit for each image.

        Args:
            logits: [n, K].
            classes: int64 [n].

        Raises:
            UserError: the logits do not depend on the map.
        """
        found = None
        with torch.enable_grad():
            score = logits.gather(1, classes[:, None]).sum()
        if score.requires_grad:
            (found,) = torch.autograd.grad(score, leaf, allow_unused=True)
        if found is None:
            side = "what enters" if self.entering else "the output of"
            raise UserError(
                f"the logits do not depend on {side} the layer '{self.name}'; name another one: "
                "suite.layer=NAME"
            )
        return found


@contextmanager
def tapped(tap: Tap) -> Iterator[list[Tensor]]:
    """While it is open, each forward pass with gradients enabled appends the feature map, float32
    [n, C, h, w], to the list, as a leaf of the graph: what comes before it needs no gradient, and
    neither do parameters. The values that the network computes stay the same."""
    leaves: list[Tensor] = []

    def replaced(found: Tensor) -> Tensor:
        shown = F.relu(found) if tap.rectified else found
        leaf = shown.detach().to(torch.float32, copy=True).requires_grad_()
        leaves.append(leaf)
        passed = leaf.to(found.dtype, copy=True)  # layers that follow may work in place
        # The network's own ReLU comes next: it must let the gradient through at each pixel.
        return passed + torch.finfo(found.dtype).tiny if tap.rectified else passed

    def before(_: nn.Module, inputs: Any) -> Any:
        first, *others = inputs
        if tap.staged:
            return ((*first[:-1], replaced(first[-1])), *others)
        return (replaced(first), *others)

    def after(_: nn.Module, inputs: Any, output: Any) -> Any:
        return replaced(output)

    handle = (
        tap.module.register_forward_pre_hook(before)
        if tap.entering
        else tap.module.register_forward_hook(after)
    )
    try:
        yield leaves
    finally:
        handle.remove()


@dataclass(frozen=True)
class ByGradient:
    """Maps by one of the methods."""

    tap: Tap
    formula: Formula

    @property
    def protocol(self) -> dict[str, str]:
        return {"features": self.tap.name, "library": f"grad-cam {version('grad-cam')}"}

    def look(
        self, subject: Subject, images: Tensor, classes: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """See `cam.Mapper`."""
        with tapped(self.tap) as leaves:
            logits = subject.logits_of(images, gradients=True)
        (leaf,) = leaves
        shown = logits.detach().argmax(1) if classes is None else classes
        return logits.detach(), self.maps(logits, shown, leaf)

    def maps(self, logits: Tensor, classes: Tensor, leaf: Tensor) -> Tensor:
        """Maps float32 [n, h, w]; see `Tap.gradient`."""
        gradient = self.tap.gradient(logits, classes, leaf)
        found = self.formula(leaf.detach().cpu().numpy(), gradient.cpu().numpy())
        return torch.from_numpy(found).to(leaf)


def by_gradient(
    method: Method, layer: str | None, network: nn.Module, side: int, device: torch.device
) -> ByGradient:
    """A method at a layer of a network, which is shown two images of noise.

    Args:
        layer: a module whose output is a map; None: where class activation maps have theirs.
        network: in evaluation mode; it is not changed.
        side: of the images in pixels.

    Raises:
        UserError: the library is not installed; the network has no such layer, or one that gives no
            map; or no layer is named, and the network does not end as class activation maps want it.
    """
    known = formula(method)
    if layer is not None:
        tap = find_layer(network, layer, side, device)
    else:
        try:
            tap = Tap.at(find_head(network, side, device))
        except UserError as error:
            raise UserError(f"{error}; {method} can look elsewhere: suite.layer=NAME") from error
    with torch.enable_grad(), tapped(tap) as leaves:
        logits = network(noise(side, device))
    tap.gradient(logits, torch.zeros_like(logits[:, 0], dtype=torch.int64), leaves[-1])
    return ByGradient(tap, known)


@torch.no_grad()
def find_layer(network: nn.Module, name: str, side: int, device: torch.device) -> Tap:
    """See `by_gradient`."""
    modules = dict(network.named_modules())
    if name not in modules:
        near = difflib.get_close_matches(name, modules, 3, 0.4) or [
            n for n, _ in network.named_children()
        ]
        raise UserError(
            f"suite.layer={name}: {type(network).__name__} has no such layer; some that it has: "
            f"{', '.join(near)}"
        )
    outputs: list[Any] = []
    handle = modules[name].register_forward_hook(lambda _m, _i, output: outputs.append(output))
    try:
        network(noise(side, device))
    finally:
        handle.remove()
    if len(outputs) != 1:
        raise UserError(
            f"suite.layer={name}: in a forward pass it is called {len(outputs)} times, expected once"
        )
    shape = list(outputs[0].shape) if isinstance(outputs[0], Tensor) else type(outputs[0]).__name__
    # A map of square images is square; that of a network which puts channels last does not look so.
    if not isinstance(shape, list) or len(shape) != 4 or not 1 < shape[2] == shape[3]:
        raise UserError(
            f"suite.layer={name}: its output for two images of {side} px is {shape}, expected a map "
            "[2, channels, height, width] of more than one pixel"
        )
    return Tap(name, modules[name])

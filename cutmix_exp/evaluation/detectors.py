"""Detectors: how much an image looks like those that a network was trained on.

Each is a part of a suite's YAML, and gives a score: the higher, the more familiar the image. Images
come as float32 pixels in [0, 1]; the normalisation is inside, so that a perturbation is in pixels.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cutmix_exp.errors import UserError, installing
from cutmix_exp.evaluation.base import Subject
from cutmix_exp.models.base import StagedNetwork
from cutmix_exp.schema import Part, option
from cutmix_exp.seeding import stream

Score = Callable[[Tensor], Tensor]
"""Pixels float32 [n, 3, H, W] to scores float64 [n]."""


@dataclass(frozen=True, kw_only=True)
class Detector(Part):
    """The field `detector` of the suite."""

    def lacks(self, subject: Subject) -> str:
        """Why this detector cannot be used on this network; empty if it can."""
        return ""

    def prepare(self, subject: Subject) -> Score:
        """The score, fitted to training images where it must be. On every rank."""
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True)
class LogitDetector(Detector):
    """Scores that are read off the logits."""

    def of_logits(self, logits: Tensor) -> Tensor:
        """Logits float64 [n, K] to scores [n]."""
        raise NotImplementedError

    def prepare(self, subject: Subject) -> Score:
        def score(pixels: Tensor) -> Tensor:
            with torch.no_grad():
                return self.of_logits(subject.logits(pixels).double())

        return score


@dataclass(frozen=True, kw_only=True)
class MaxSoftmax(LogitDetector):
    """The softmax of the predicted class (Hendrycks and Gimpel, 1610.02136): the paper's baseline.

    Computed in float64, where it saturates at 1 - 1e-16 and not at 1 - 6e-8.

    Attributes:
        temperature: the logits are divided by it.
    """

    temperature: float = option(1.0, gt=0)

    def of_logits(self, logits: Tensor) -> Tensor:
        return (logits / self.temperature).softmax(1).amax(1)


@dataclass(frozen=True, kw_only=True)
class Energy(LogitDetector):
    """The negative energy T log sum exp(logits / T) (Liu et al., 2010.03759)."""

    temperature: float = option(1.0, gt=0)

    def of_logits(self, logits: Tensor) -> Tensor:
        return self.temperature * torch.logsumexp(logits / self.temperature, 1)


@dataclass(frozen=True, kw_only=True)
class MaxLogit(LogitDetector):
    """The largest logit (Hendrycks et al., 1911.11132)."""

    def of_logits(self, logits: Tensor) -> Tensor:
        return logits.amax(1)


@dataclass(frozen=True, kw_only=True)
class Odin(Detector):
    """ODIN (Liang et al., 1706.02690): max softmax at a high temperature of an image that was moved
    so as to raise it. As in the authors' code the sign of a zero gradient is +1, and nothing is
    clipped: they add magnitude * sign / std to the normalised image, magnitude * sign to pixels.

    Attributes:
        temperature: of the softmax, also of the loss whose gradient is taken.
        magnitude: of the perturbation, in units of the pixel range. The authors choose it for each
            network and set, by images of the set that is to be detected: 0.0014 to 0.0048 on
            CIFAR-100. One value for all sets uses no such images.
    """

    temperature: float = option(1000.0, gt=0)
    magnitude: float = option(0.0014, ge=0)

    def prepare(self, subject: Subject) -> Score:
        def loss(pixels: Tensor) -> Tensor:
            logits = subject.logits(pixels) / self.temperature
            return F.cross_entropy(logits, logits.detach().argmax(1), reduction="sum")

        def score(pixels: Tensor) -> Tensor:
            moved = descended(pixels, loss, self.magnitude)
            with torch.no_grad():
                logits = subject.logits(moved).double()
            return (logits / self.temperature).softmax(1).amax(1)

        return score


def descended(pixels: Tensor, loss: Callable[[Tensor], Tensor], magnitude: float) -> Tensor:
    """The images, each pixel moved by `magnitude` so that the loss falls."""
    if not magnitude:
        return pixels
    with torch.enable_grad():
        wanted = pixels.detach().clone().requires_grad_()
        (gradient,) = torch.autograd.grad(loss(wanted), wanted)
    return pixels - magnitude * torch.where(gradient >= 0, 1.0, -1.0)


# ------------------------------------------------------------------------------- features


def classifier_of(network: nn.Module, num_classes: int) -> nn.Linear | None:
    """The last linear layer with an output for each class."""
    linear = [m for m in network.modules() if isinstance(m, nn.Linear)]
    fitting = [m for m in linear if m.out_features == num_classes]
    return fitting[-1] if fitting else None


def lacks_classifier(subject: Subject) -> str:
    if classifier_of(subject.network, subject.num_classes) is not None:
        return ""
    return (
        f"{subject.config.model.name} has no linear layer with {subject.num_classes} outputs, in "
        "front of which this detector takes the features"
    )


@dataclass(frozen=True)
class Features:
    """What a network holds of images: the input of its classifier, or averages of its stages.

    Attributes:
        stages: the mean over H and W after the stem and each stage instead.
    """

    subject: Subject
    stages: bool = False

    def __call__(self, pixels: Tensor) -> tuple[list[Tensor], Tensor]:
        """Features float32 [n, D], one tensor for each layer, and logits float32 [n, K]."""
        network = self.subject.network
        held: list[Tensor] = []
        hooks = []
        if self.stages:
            assert isinstance(network, StagedNetwork)
            for name in network.feature_points:
                module = network.get_submodule(name)
                hooks.append(module.register_forward_hook(lambda _m, _i, out: held.append(out)))
        else:
            classifier = classifier_of(network, self.subject.num_classes)
            assert classifier is not None, "lacks() comes first"
            hooks.append(classifier.register_forward_pre_hook(lambda _m, i: held.append(i[0])))
        try:
            logits = self.subject.logits(pixels)
        finally:
            for hook in hooks:
                hook.remove()
        return [f.float().mean((2, 3)) if f.ndim == 4 else f.float() for f in held], logits

    def of_training(self, limit: int | None, seed: int) -> tuple[list[np.ndarray], np.ndarray]:
        """Features float32 [N, D] of each layer and labels int64 [N] of training images, without
        augmentation: of all, or of `limit` that are drawn."""
        train = self.subject.splits.train
        if limit is not None and limit < len(train):
            drawn = stream(seed, "ood/fit").permutation(len(train))[:limit]
            train = train.at(np.sort(drawn))

        def read(images: Tensor, labels: Tensor, _index: np.ndarray) -> dict[str, Tensor]:
            with torch.no_grad():
                features, _ = self(self.subject.normalize.unit(images))
            return {"label": labels, **{f"layer{i}": f for i, f in enumerate(features)}}

        columns = self.subject.over(self.subject.at_hand(train), read)
        known = columns.pop("label")
        return list(columns.values()), known


@dataclass(frozen=True, kw_only=True)
class Mahalanobis(Detector):
    """Mahalanobis distance to the nearest class (Lee et al., 1807.03888): class means and one
    covariance of the features of training images; score: minus half the squared distance.

    The authors weigh the layers by a logistic regression on images of the set that is to be
    detected. Here no such image is used: the last layer alone, or the plain sum.

    Attributes:
        layers: `last` (in front of the classifier), or `stages` (the sum over the stem and the
            stages, spatial means).
        magnitude: of the perturbation, as in ODIN, towards the nearest class.
        fit_images: training images that are used; null is all.
        seed: draws them.
    """

    layers: Literal["last", "stages"] = "last"
    magnitude: float = option(0.0, ge=0)
    fit_images: int | None = option(50_000, ge=1)
    seed: int = option(0, ge=0)

    def lacks(self, subject: Subject) -> str:
        if self.layers == "last":
            return lacks_classifier(subject)
        if isinstance(subject.network, StagedNetwork):
            return ""
        return f"{subject.config.model.name} has no stages; set layers=last in suite.detector"

    def prepare(self, subject: Subject) -> Score:
        features = Features(subject, stages=self.layers == "stages")
        layers, labels = features.of_training(self.fit_images, self.seed)
        device = subject.world.device
        fitted = [Gaussians.fit(layer, labels).to(device) for layer in layers]

        def of_pixels(pixels: Tensor) -> Tensor:
            held, _ = features(pixels)
            return torch.stack([g(f.double()) for g, f in zip(fitted, held, strict=True)]).sum(0)

        def score(pixels: Tensor) -> Tensor:
            moved = descended(pixels, lambda x: -of_pixels(x).sum(), self.magnitude)
            with torch.no_grad():
                return of_pixels(moved)

        return score


@dataclass(frozen=True)
class Gaussians:
    """Classes as Gaussians of one covariance.

    Attributes:
        whitening: float64 [D, R], maps features to where the covariance is the unit matrix; R is
            its rank.
        means: float64 [C, R], of the classes that have images, there.
    """

    whitening: Tensor
    means: Tensor

    @classmethod
    def fit(cls, features: np.ndarray, labels: np.ndarray) -> Gaussians:
        """Of features [N, D] and labels [N]; the covariance is divided by N."""
        x = features.astype(np.float64)
        classes, place = np.unique(labels, return_inverse=True)
        means = np.stack([x[labels == label].mean(0) for label in classes])
        centred = x - means[place]
        values, vectors = np.linalg.eigh(centred.T @ centred / len(x))
        kept = values > values[-1] * len(values) * np.finfo(np.float64).eps
        whitening = vectors[:, kept] / np.sqrt(values[kept])
        return cls(torch.from_numpy(whitening), torch.from_numpy(means @ whitening))

    def to(self, device: torch.device) -> Gaussians:
        return Gaussians(self.whitening.to(device), self.means.to(device))

    def __call__(self, features: Tensor) -> Tensor:
        """Features float64 [n, D] to minus half the least squared distance [n]."""
        distances = torch.cdist(
            features @ self.whitening,
            self.means,
            compute_mode="donot_use_mm_for_euclid_dist",
        )
        return -0.5 * distances.square().amin(1)


# ---------------------------------------------------------------------------- pytorch-ood

Method = Literal[
    "ASH", "DICE", "Entropy", "fDBD", "GEN", "KLMatching", "KNN", "NCI", "NNGuide", "RMD",
    "ReAct", "SCALE", "SHE", "VRA", "ViM",
]  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class PytorchOod(Detector):
    """A detector of the library pytorch-ood (the extra `ood`), on the features in front of the
    classifier and the logits, in float32. Those that shape activations (ASH, ReAct, SCALE, VRA) do
    so with the pooled features.

    Attributes:
        method: the library's name of it.
        options: numbers for its constructor; the library's defaults else. ViM's dimension `d` is
            the paper's by default: 1000 of 2048 features, 512 of 768, half of fewer.
        fit_images, seed: as for Mahalanobis; only where it must be fitted.
    """

    method: Method
    options: dict[str, float] | None = None
    fit_images: int | None = option(50_000, ge=1)
    seed: int = option(0, ge=0)

    def lacks(self, subject: Subject) -> str:
        try:
            import pytorch_ood  # noqa: F401
        except ImportError:
            return (
                f"the detector {self.method} is pytorch-ood's, which is not installed; "
                f"{installing('ood')}"
            )
        return lacks_classifier(subject)

    def prepare(self, subject: Subject) -> Score:
        features = Features(subject)
        classifier = classifier_of(subject.network, subject.num_classes)
        assert classifier is not None, "lacks() comes first"
        head = copy.deepcopy(classifier).float().cpu()
        found = self._construct(head)
        kind = self._kind(found)
        if found.requires_fit:
            (known,), labels = features.of_training(self.fit_images, self.seed)
            with torch.no_grad():
                given = as_input(torch.from_numpy(known), kind, head)
            getattr(found, f"fit_{kind}")(given, torch.from_numpy(labels))
        found.to(subject.world.device)
        predict = getattr(found, f"predict_{kind}")
        head.to(subject.world.device)

        def score(pixels: Tensor) -> Tensor:
            with torch.no_grad():
                (held,), _ = features(pixels)
                # The library's scores grow with strangeness.
                return -predict(as_input(held, kind, head)).double()

        return score

    @staticmethod
    def _kind(found: Any) -> str:
        """What the detector is given: `logits`, `features` or `feature_maps`."""
        return next(
            k for k in ("logits", "features", "feature_maps") if hasattr(found, f"predict_{k}")
        )

    def _construct(self, head: nn.Linear) -> Any:
        """The library's detector, with those of its arguments that the network answers."""
        import pytorch_ood.detector

        cls = getattr(pytorch_ood.detector, self.method)
        width = head.in_features
        given = {
            "model": None,
            "encoder": nn.Identity(),
            "backbone": nn.Identity(),
            "head": nn.Sequential(nn.Flatten(), head)
            if self._kind(cls) == "feature_maps"
            else head,
            "w": head.weight.detach(),
            "b": torch.zeros(head.out_features) if head.bias is None else head.bias.detach(),
            "d": 1000 if width >= 2048 else 512 if width >= 768 else width // 2,
            "p": 0.9,
        }
        wanted = inspect.signature(cls).parameters
        options = {k: int(v) if v.is_integer() else v for k, v in (self.options or {}).items()}
        unknown = sorted(options.keys() - wanted.keys())
        if unknown:
            raise UserError(
                f"detector.options: {self.method} of pytorch-ood has no {', '.join(unknown)}; it "
                f"takes {', '.join(sorted(wanted.keys() - given.keys() | {'d', 'p'} & wanted.keys()))}"
            )
        return cls(**{k: v for k, v in given.items() if k in wanted} | options)


def as_input(features: Tensor, kind: str, head: nn.Linear) -> Tensor:
    """Features [n, D] as a detector takes them: maps are [n, D, 1, 1]."""
    if kind == "logits":
        return head(features)
    return features[:, :, None, None] if kind == "feature_maps" else features

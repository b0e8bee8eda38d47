"""White-box attacks: how few of the images are still classified rightly when each pixel may be
moved by a little against the network (Table 11).

Pixels are in [0, 1], the normalisation is inside the network, and the size of an attack is given in
1/255, a step of an 8-bit pixel.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from cutmix_exp.evaluation.base import Findings, Subject, Suite
from cutmix_exp.evaluation.classification import read_off
from cutmix_exp.evaluation.sampling import limited
from cutmix_exp.schema import option
from cutmix_exp.seeding import stream

LEVEL = 1 / 255
Logits = Callable[[Tensor], Tensor]
"""Pixels float32 [n, 3, H, W] in [0, 1] to logits float32 [n, K]."""


def ascent(logits: Logits, pixels: Tensor, labels: Tensor) -> Tensor:
    """The sign of the gradient of each image's cross-entropy by its pixels, float32 like `pixels`.

    The images do not see each other (the network evaluates), so the sum of the losses gives each
    image its own gradient.
    """
    with torch.enable_grad():
        leaf = pixels.detach().requires_grad_(True)
        loss = F.cross_entropy(logits(leaf), labels, reduction="sum")
        return torch.autograd.grad(loss, leaf)[0].sign()


def bounded(pixels: Tensor, clip: bool) -> Tensor:
    return pixels.clamp(0, 1) if clip else pixels


def fgsm(pixels: Tensor, direction: Tensor, eps: float, clip: bool = True) -> Tensor:
    """The fast gradient sign method (Goodfellow et al. 2015): one step of `eps` along
    `ascent(...)`."""
    return bounded(pixels + eps * direction, clip)


def pgd(
    logits: Logits,
    pixels: Tensor,
    labels: Tensor,
    *,
    eps: float,
    step: float,
    steps: int,
    start: Tensor | None = None,
    clip: bool = True,
) -> Tensor:
    """Projected gradient descent (Madry et al. 2018) in the maximum norm.

    Args:
        eps, step: the ball's radius and the size of a step, for pixels in [0, 1].
        start: in [-1, 1] like `pixels`, where in the ball the attack begins; None: its centre.
    """
    moved = pixels if start is None else bounded(pixels + eps * start, clip)
    for _ in range(steps):
        moved = moved + step * ascent(logits, moved, labels)
        moved = bounded(pixels + (moved - pixels).clamp(-eps, eps), clip)
    return moved


def random_starts(index: np.ndarray, shape: torch.Size, seed: int) -> Tensor:
    """Float32 [n, *shape], uniform in [-1, 1]; of each image by its index, whatever batch or process
    it is in."""
    drawn = [stream(seed, "pgd/start", step=int(i)).random(shape, np.float32) for i in index]
    return torch.from_numpy(np.stack(drawn)) * 2 - 1


@dataclass(frozen=True, kw_only=True)
class Attack(Suite):
    """What the attacks have in common.

    An attacked image is judged in the run's precision and in the same batches as in the training's
    own evaluation, so that `eps=0` gives its error exactly.

    Attributes:
        eps: how far a pixel may be moved, in 1/255.
        clip: keep attacked pixels within [0, 1].
        gradient: the precision of the gradient. In bf16 many of its signs are those of rounding
            errors, so a network looks more robust than it is.
        gradient_batch: images whose gradients are computed at once; less of it needs less memory.
        limit: number of images, a fixed stratified subset; None: all.
    """

    eps: float = option(8.0, ge=0)
    clip: bool = True
    gradient: Literal["fp32", "run"] = "fp32"
    gradient_batch: int = option(250, ge=1)
    limit: int | None = option(None, ge=1)

    def source(self, subject: Subject) -> Logits:
        """The network that is differentiated."""
        if self.gradient == "run":
            return subject.logits
        mean, std = subject.normalize.mean, subject.normalize.std
        return lambda pixels: subject.network((pixels - mean) / std)

    def in_parts(
        self, attack: Callable[[Tensor, Tensor, np.ndarray], Tensor]
    ) -> Callable[[Tensor, Tensor, np.ndarray], Tensor]:
        """The attack on a batch in parts of `gradient_batch` images."""

        def attack_all(pixels: Tensor, labels: Tensor, index: np.ndarray) -> Tensor:
            size = self.gradient_batch
            starts = range(0, len(labels), size)
            parts = [
                attack(pixels[i : i + size], labels[i : i + size], index[i : i + size])
                for i in starts
            ]
            return torch.cat(parts)

        return attack_all

    def protocol(self, subject: Subject) -> dict[str, object]:
        precision = subject.config.precision
        return {
            "eps": self.eps,
            "space": "pixels in [0, 1], normalisation inside",
            "norm": "Linf",
            "loss": "cross-entropy with the true label",
            "clip": self.clip,
            "gradient_precision": "fp32" if self.gradient == "fp32" else precision,
            "precision": precision,
            "limit": self.limit,
        }


def right(subject: Subject, pixels: Tensor, labels: Tensor) -> Tensor:
    """Bool [n]: which images [n, 3, H, W] in [0, 1] get their label."""
    with torch.no_grad():
        return read_off(subject.logits(pixels), labels)["in_top1"]


def percent(hits: np.ndarray) -> float:
    return 100.0 * int(hits.sum()) / len(hits)


def accuracies(clean: np.ndarray, attacked: np.ndarray) -> dict[str, float]:
    """Of bool [N] each: accuracies, the paper's reading, and errors, in percent."""
    return {
        "top1_accuracy": percent(attacked),
        "top1_error": percent(~attacked),
        "clean_top1_error": percent(~clean),
    }


@dataclass(frozen=True, kw_only=True)
class Fgsm(Attack):
    """The fast gradient sign method with the true label: the accuracy at `eps`, and the curve.

    Attributes:
        eps_curve: more sizes, in 1/255. They share one gradient, so they cost little.
    """

    eps_curve: tuple[float, ...] = option((0.0, 1.0, 2.0, 4.0, 8.0, 16.0), ge=0)

    def run(self, subject: Subject) -> Findings:
        data, index = limited(subject, self.limit)
        sizes = sorted({0.0, self.eps, *self.eps_curve})
        source = self.source(subject)
        direct = self.in_parts(lambda pixels, labels, _: ascent(source, pixels, labels))

        def attack(images: Tensor, labels: Tensor, rows: np.ndarray) -> dict[str, Tensor]:
            pixels = subject.normalize.unit(images)
            direction = direct(pixels, labels, rows)
            hits = [
                right(subject, fgsm(pixels, direction, eps * LEVEL, self.clip), labels)
                for eps in sizes
            ]
            still = direction.flatten(1).abs().amax(1) == 0
            return {"hits": torch.stack(hits, 1), "no_gradient": still}

        columns = subject.over(data, attack)
        hits = columns["hits"]
        clean, attacked = hits[:, 0], hits[:, sizes.index(self.eps)]
        curve = {
            "eps": sizes,
            "top1_accuracy": [percent(column) for column in hits.T],
            "top1_error": [percent(~column) for column in hits.T],
        }
        return Findings(
            metrics={
                **accuracies(clean, attacked),
                "images_without_gradient": percent(columns["no_gradient"]),
            },
            curves={"fgsm": curve},
            protocol={**self.protocol(subject), "attack": "FGSM"},
            per_image={"index": index, "correct": attacked, "clean_correct": clean},
        )


@dataclass(frozen=True, kw_only=True)
class Pgd(Attack):
    """Projected gradient descent in the maximum norm, from a random start.

    Attributes:
        step: in 1/255.
        steps: number of steps.
        random_start: begin at a uniform place in the ball rather than at the image.
        seed: of the starts, which all networks share.
    """

    step: float = option(2.0, ge=0)
    steps: int = option(10, ge=1)
    random_start: bool = True
    seed: int = option(0, ge=0)

    def run(self, subject: Subject) -> Findings:
        data, index = limited(subject, self.limit)
        source = self.source(subject)

        def moved(pixels: Tensor, labels: Tensor, rows: np.ndarray) -> Tensor:
            start = None
            if self.random_start:
                start = random_starts(index[rows], pixels.shape[1:], self.seed).to(pixels.device)
            return pgd(
                source,
                pixels,
                labels,
                eps=self.eps * LEVEL,
                step=self.step * LEVEL,
                steps=self.steps,
                start=start,
                clip=self.clip,
            )

        everywhere = self.in_parts(moved)

        def attack(images: Tensor, labels: Tensor, rows: np.ndarray) -> dict[str, Tensor]:
            pixels = subject.normalize.unit(images)
            attacked = everywhere(pixels, labels, rows)
            return {
                "clean": right(subject, pixels, labels),
                "attacked": right(subject, attacked, labels),
            }

        columns = subject.over(data, attack)
        clean, attacked = columns["clean"], columns["attacked"]
        return Findings(
            metrics=accuracies(clean, attacked),
            protocol={
                **self.protocol(subject),
                "attack": "PGD",
                "step": self.step,
                "steps": self.steps,
                "random_start": self.random_start,
                "seed": self.seed,
            },
            per_image={"index": index, "correct": attacked, "clean_correct": clean},
        )

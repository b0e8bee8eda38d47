"""The loss of logits against soft labels, and what a network adds to it."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from cutmix_exp.config import Schedule
from cutmix_exp.models.base import AuxiliaryNetwork, Criterion


def soft_losses(
    schedule: Schedule, logits: Tensor, targets: Tensor, smoothing: float = 0.0
) -> Tensor:
    """Loss [n] of logits [n, K] with soft targets [n, K], rows summing to 1.

    `bce` is timm's (arXiv 2110.00476): the mean over the classes of the binary cross-entropies,
    after smoothing t to (1 - s) t + s / K and then thresholding.
    """
    if schedule.loss == "cross_entropy":
        return F.cross_entropy(logits, targets, reduction="none", label_smoothing=smoothing)
    targets = (1 - smoothing) * targets + smoothing / targets.shape[1]
    if schedule.bce_target_threshold is not None:
        targets = (targets > schedule.bce_target_threshold).to(logits.dtype)
    return F.binary_cross_entropy_with_logits(logits, targets, reduction="none").mean(1)


class LogitsAlone:
    """How a network is asked in training that learns from its logits."""

    def ask(self, network: nn.Module, images: Tensor, targets: Tensor) -> tuple[Tensor, ...]:
        """What the network, as it is trained (compiled, under DDP), answers: logits [n, K] first."""
        return (network(images),)

    def losses(self, answer: tuple[Tensor, ...], targets: Tensor, criterion: Criterion) -> Tensor:
        """The loss [n] of an answer."""
        return criterion(answer[0], targets)


class WithAuxiliaryLosses(LogitsAlone):
    """Of a network that has losses of its own."""

    def __init__(self, model: AuxiliaryNetwork) -> None:
        self.model = model

    def ask(self, network: nn.Module, images: Tensor, targets: Tensor) -> tuple[Tensor, ...]:
        answer: tuple[Tensor, ...] = network(images, targets)
        return answer

    def losses(self, answer: tuple[Tensor, ...], targets: Tensor, criterion: Criterion) -> Tensor:
        added = self.model.auxiliary_losses(answer[1:], targets, criterion)
        return super().losses(answer, targets, criterion) + added


def lesson_of(model: nn.Module) -> LogitsAlone:
    """How the model is taught."""
    return WithAuxiliaryLosses(model) if isinstance(model, AuxiliaryNetwork) else LogitsAlone()

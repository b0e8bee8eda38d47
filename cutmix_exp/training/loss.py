"""The loss of logits against soft labels."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from cutmix_exp.config import Schedule


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

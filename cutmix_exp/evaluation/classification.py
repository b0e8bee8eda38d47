"""Classification: loss, top-1 and top-5 error of a set, each image counted once.

Fixed whole batches are dealt to the ranks, the last one padded, so every image meets the same
batch whatever the number of processes; and the sums are taken in the order of the images.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cutmix_exp.data.pipeline import Normalizer
from cutmix_exp.distributed import World
from cutmix_exp.evaluation.base import Count, EvaluationSet, Findings, Subject, Suite, over_images


@dataclass(frozen=True)
class Predictions:
    """What a network says of each of N images.

    Attributes:
        loss: float32 [N], cross-entropy with the true label, in nats.
        label, predicted: int64 [N].
        confidence: float32 [N], the softmax of the predicted class.
        in_top1, in_top5: bool [N], whether the true label is among the best one or five.
    """

    loss: np.ndarray
    label: np.ndarray
    predicted: np.ndarray
    confidence: np.ndarray
    in_top1: np.ndarray
    in_top5: np.ndarray

    def metrics(self) -> dict[str, float]:
        """`loss`, and `top1_error` and `top5_error` in percent."""
        return {
            "loss": float(self.loss.astype(np.float64).mean()),
            "top1_error": 100.0 * int((~self.in_top1).sum()) / len(self.label),
            "top5_error": 100.0 * int((~self.in_top5).sum()) / len(self.label),
        }


@torch.no_grad()
def predict(
    network: nn.Module,
    data: EvaluationSet,
    normalize: Normalizer,
    world: World,
    dtype: torch.dtype,
    count: Count = range,
) -> Predictions:
    """Predictions for all images of a set that is on the device; every rank gets all of them.

    The network's training mode is restored. A non-finite output counts as an error.
    """
    was_training = network.training
    network.eval()

    def judge(images: Tensor, labels: Tensor, _: np.ndarray) -> dict[str, Tensor]:
        with torch.autocast(world.device.type, dtype, enabled=dtype != torch.float32):
            logits = network(normalize(images))
        return read_off(logits.float(), labels)

    columns = over_images(data, world, judge, count=count)
    network.train(was_training)
    return Predictions(**columns)


def read_off(logits: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """The columns of `Predictions` of logits float32 [n, K] and labels int64 [n]."""
    best = logits.topk(min(5, logits.shape[1]), dim=1).indices
    hits = (best == labels[:, None]) & logits.isfinite().all(1, keepdim=True)
    return {
        "loss": F.cross_entropy(logits, labels, reduction="none"),
        "label": labels,
        "predicted": best[:, 0],
        "confidence": logits.softmax(1).amax(1),
        "in_top1": hits[:, 0],
        "in_top5": hits.any(1),
    }


@dataclass(frozen=True, kw_only=True)
class Classification(Suite):
    """Errors and loss on the test set, and what the network says of each image."""

    def run(self, subject: Subject) -> Findings:
        found = predict(
            subject.network,
            subject.test,
            subject.normalize,
            subject.world,
            subject.config.dtype,
            subject.count,
        )
        columns = {"correct": found.in_top1, **asdict(found)}
        return Findings(metrics=found.metrics(), per_image=columns)

"""Classification: loss, top-1 and top-5 error of a set, each image counted once.

Fixed whole batches are dealt to the ranks, the last one padded, so every image meets the same
batch whatever the number of processes; and the sums are taken in the order of the images.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cutmix_exp.data.pipeline import Normalizer
from cutmix_exp.distributed import World

BATCH = 250


class EvaluationSet(Protocol):
    """Images to be judged: an `ImageSet` on the device, or a `StreamedSet`.

    Attributes:
        labels: int64 [N].
    """

    @property
    def labels(self) -> Tensor: ...
    def __len__(self) -> int: ...
    def batches(self, indices: list[np.ndarray]) -> Iterator[Tensor]:
        """The images uint8 [n, 3, H, W], on the device, of each list of indices."""
        ...


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
) -> Predictions:
    """Predictions for all images of a set that is on the device; every rank gets all of them.

    The network's training mode is restored. A non-finite output counts as an error.
    """
    was_training = network.training
    network.eval()
    size, batch = len(data), min(BATCH, len(data))
    numbers = range(world.rank, -(-size // batch), world.size)
    # The last batch is filled up with its last image.
    indices = [np.minimum(np.arange(n * batch, (n + 1) * batch), size - 1) for n in numbers]
    mine: list[tuple[int, dict[str, np.ndarray]]] = []
    for number, index, images in zip(numbers, indices, data.batches(indices), strict=True):
        with torch.autocast(world.device.type, dtype, enabled=dtype != torch.float32):
            logits = network(normalize(images))
        real = min(batch, size - number * batch)
        labels = data.labels[torch.from_numpy(index[:real])].to(world.device)
        mine.append((number, _read_off(logits.float()[:real], labels)))
    network.train(was_training)
    batches = sorted(
        (item for part in world.gather(mine) for item in part), key=lambda item: item[0]
    )
    columns = {name: np.concatenate([b[name] for _, b in batches]) for name in batches[0][1]}
    return Predictions(**columns)


def _read_off(logits: Tensor, labels: Tensor) -> dict[str, np.ndarray]:
    best = logits.topk(min(5, logits.shape[1]), dim=1).indices
    hits = (best == labels[:, None]) & logits.isfinite().all(1, keepdim=True)
    out = {
        "loss": F.cross_entropy(logits, labels, reduction="none"),
        "label": labels,
        "predicted": best[:, 0],
        "confidence": logits.softmax(1).amax(1),
        "in_top1": hits[:, 0],
        "in_top5": hits.any(1),
    }
    return {name: value.cpu().numpy() for name, value in out.items()}

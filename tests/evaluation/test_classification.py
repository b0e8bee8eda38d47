"""Classification metrics: cases worked out by hand, and exactness over any number of ranks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from cutmix_exp.data.pipeline import Normalizer
from cutmix_exp.data.sources import ImageSet
from cutmix_exp.distributed import World
from cutmix_exp.evaluation import base
from cutmix_exp.evaluation.classification import predict
from tests.helpers import config_of

CPU = torch.device("cpu")
ALONE = World(0, 1, CPU)
DATASET = config_of("dataset=digits", "model=resnet").dataset


class Told(nn.Module):
    """Returns the logits that the first pixels of an image name."""

    def __init__(self, logits: Tensor) -> None:
        super().__init__()
        self.logits = logits
        self.batches: list[int] = []

    def forward(self, images: Tensor) -> Tensor:
        assert not self.training
        self.batches.append(len(images))
        raw = Normalizer(DATASET, CPU).inverse(images) * 255
        return self.logits[raw[:, 0, 0, 0].round().long()]


def data(labels: list[int]) -> ImageSet:
    images = torch.zeros(len(labels), 3, 8, 8, dtype=torch.uint8)
    images[:, 0, 0, 0] = torch.arange(len(labels))
    return ImageSet(images, torch.tensor(labels))


def scores(logits: list[list[float]], labels: list[int]) -> Any:
    return predict(
        Told(torch.tensor(logits)), data(labels), Normalizer(DATASET, CPU), ALONE, torch.float32
    )


def test_by_hand() -> None:
    rows = [
        [9.0, 1, 2, 3, 4, 5, 6],  # right
        [9.0, 1, 2, 3, 4, 5, 6],  # label 3 is fourth of the best: 0, 6, 5, 4, 3
        [9.0, 1, 2, 3, 4, 5, 6],  # label 1 is not among the best five
        [0.0, 0, 0, 0, 0, 0, 8],  # right
    ]
    got = scores(rows, [0, 3, 1, 6])
    assert got.predicted.tolist() == [0, 0, 0, 6]
    assert got.in_top1.tolist() == [True, False, False, True]
    assert got.in_top5.tolist() == [True, True, False, True]
    metrics = got.metrics()
    assert (metrics["top1_error"], metrics["top5_error"]) == (50.0, 25.0)
    by_hand = np.mean(
        [np.log(np.exp(row).sum()) - row[y] for row, y in zip(rows, [0, 3, 1, 6], strict=True)]
    )
    assert metrics["loss"] == pytest.approx(by_hand, rel=1e-6)
    assert got.confidence[3] == pytest.approx(np.exp(8) / (np.exp(8) + 6), rel=1e-6)


def test_fewer_than_five_classes() -> None:
    assert scores([[1.0, 0.0], [1.0, 0.0]], [0, 1]).metrics()["top5_error"] == 0.0


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_outputs_that_are_not_finite_are_errors(value: float) -> None:
    metrics = scores([[value] * 6, [0.0, 9, 0, 0, 0, 0]], [0, 1]).metrics()
    assert (metrics["top1_error"], metrics["top5_error"]) == (50.0, 50.0)


@dataclass(frozen=True)
class Pretend(World):
    """A rank whose fellows' parts are given: gathers them all."""

    others: tuple[Any, ...] = ()

    def gather(self, value: Any) -> list[Any]:
        return [*self.others, value]


@pytest.mark.parametrize("size", [1, 2, 3, 5])
@pytest.mark.parametrize("count", [1, 7, 20, 23])
def test_each_image_once_in_order_at_any_world_size(
    size: int, count: int, monkeypatch: Any
) -> None:
    monkeypatch.setattr(base, "BATCH", 5)
    rng = np.random.default_rng(0)
    logits = torch.tensor(rng.normal(size=(count, 10)), dtype=torch.float32)
    images = data(rng.integers(0, 10, count).tolist())
    network = Told(logits)
    alone = predict(network, images, Normalizer(DATASET, CPU), ALONE, torch.float32)
    assert set(network.batches) == {min(5, count)}  # whole batches, the last one padded
    assert alone.label.tolist() == images.labels.tolist()

    parts: list[Any] = []

    @dataclass(frozen=True)
    class Keep(World):
        def gather(self, value: Any) -> list[Any]:
            parts.append(value)
            return [[*value] or [(0, {})]]

    for rank in range(size - 1):
        predict_part(network, images, Keep(rank, size, CPU))
    last = Pretend(size - 1, size, CPU, others=tuple(parts))
    together = predict(network, images, Normalizer(DATASET, CPU), last, torch.float32)
    for name in ("loss", "label", "predicted", "confidence", "in_top1", "in_top5"):
        assert np.array_equal(getattr(together, name), getattr(alone, name)), name


def predict_part(network: nn.Module, images: ImageSet, world: World) -> None:
    try:
        predict(network, images, Normalizer(DATASET, CPU), world, torch.float32)
    except TypeError:
        assert world.rank >= -(-len(images) // 5)  # a rank without a batch has nothing to join


def test_the_networks_mode_is_restored() -> None:
    network = Told(torch.zeros(2, 6)).train()
    predict(network, data([0, 1]), Normalizer(DATASET, CPU), ALONE, torch.float32)
    assert network.training

"""FGSM and PGD: a linear network worked out by hand, torchattacks where it is installed, and what must
hold for any network."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from cutmix_exp.data.sources import ImageSet, Splits
from cutmix_exp.evaluation import base
from cutmix_exp.evaluation.attacks import ascent, fgsm, pgd, random_starts
from cutmix_exp.evaluation.base import Findings, Subject, load_suite
from cutmix_exp.evaluation.classification import predict
from tests.evaluation.subjects import ALONE, CPU, Linear, Small, agreed, images_of, subject_of

NETWORK = Small()
IMAGES = agreed(NETWORK, images_of(40, 8, 10))
SUBJECT = subject_of(NETWORK, IMAGES, "dataset.num_classes=10")


def found(name: str, subject: Any = SUBJECT, **changes: Any) -> Findings:
    return load_suite(name, changes).run(subject)


def clean_error(subject: Any = SUBJECT) -> float:
    scores = predict(
        subject.network, subject.test, subject.normalize, subject.world, subject.config.dtype
    )
    return scores.metrics()["top1_error"]


def softmax(rows: np.ndarray) -> np.ndarray:
    powers = np.exp(rows - rows.max(1, keepdims=True))
    return powers / powers.sum(1, keepdims=True)


def test_a_linear_network_by_hand() -> None:
    """d loss / d pixel = W^T (p - y) / std; the whole attack in float64 by NumPy."""
    size, eps = 4, 6 / 255
    network, test = Linear(3, size), images_of(30, size, 3)
    subject = subject_of(network, test)
    x = test.images.numpy().astype(np.float64) / 255
    mean, std = (
        np.array(v)[:, None, None]
        for v in (subject.config.dataset.mean,) * 1 + (subject.config.dataset.std,)
    )
    weight = network.weight.numpy().astype(np.float64)

    def logits(pixels: np.ndarray) -> np.ndarray:
        return ((pixels - mean) / std).reshape(len(pixels), -1) @ weight.T

    labels = test.labels.numpy()
    blame = softmax(logits(x)) - np.eye(3)[labels]
    gradient = (blame @ weight).reshape(x.shape) / std
    assert (np.abs(gradient) > 1e-7).all()
    attacked = np.clip(x + eps * np.sign(gradient), 0, 1)
    mine = fgsm(
        torch.tensor(x, dtype=torch.float32),
        ascent(subject.logits, torch.tensor(x, dtype=torch.float32), test.labels),
        eps,
    )
    assert np.allclose(mine.numpy(), attacked, atol=1e-6)
    by_hand = (logits(attacked).argmax(1) == labels).mean() * 100
    scores = found("fgsm", subject, eps=6, eps_curve=[0])
    assert scores.metrics["top1_accuracy"] == pytest.approx(by_hand)
    assert scores.per_image["correct"].tolist() == (logits(attacked).argmax(1) == labels).tolist()
    outside = fgsm(torch.ones(1, 3, 1, 1), torch.ones(1, 3, 1, 1), eps, clip=False)
    assert torch.allclose(outside, torch.tensor(1 + eps))


def test_pgd_on_a_linear_network_ends_in_the_corner_of_the_ball() -> None:
    """Two classes and a linear network: the gradient's sign never changes, so PGD with enough steps ends
    where FGSM does, from any start."""
    network, test = Linear(2, 4), images_of(20, 4, 2)
    subject = subject_of(network, test)
    pixels = test.images.float() / 255
    eps = 4 / 255
    goal = fgsm(pixels, ascent(subject.logits, pixels, test.labels), eps)
    start = random_starts(np.arange(20), pixels.shape[1:], 0)
    for begin in (None, start):
        end = pgd(subject.logits, pixels, test.labels, eps=eps, step=1 / 255, steps=9, start=begin)
        assert torch.allclose(end, goal, atol=1e-6)


@pytest.mark.parametrize("clip", [True, False])
def test_pgd_stays_in_the_ball(clip: bool) -> None:
    pixels = IMAGES.images.float() / 255
    start = random_starts(np.arange(40), pixels.shape[1:], 0)
    assert start.min() < -0.99 and start.max() > 0.99
    end = pgd(
        SUBJECT.logits,
        pixels,
        IMAGES.labels,
        eps=8 / 255,
        step=0.1,
        steps=3,
        start=start,
        clip=clip,
    )
    assert (end - pixels).abs().max() <= 8 / 255 + 1e-6
    outside = ((end < 0) | (end > 1)).any()
    assert bool(outside) is not clip


@pytest.mark.parametrize("name", ["fgsm", "pgd"])
def test_eps_0_is_the_clean_error_exactly(name: str) -> None:
    scores = found(name, eps=0)
    assert scores.metrics["top1_error"] == scores.metrics["clean_top1_error"] == clean_error()
    assert 0 < clean_error() < 100
    assert scores.per_image["correct"].tolist() == scores.per_image["clean_correct"].tolist()


def test_bf16_networks_are_judged_in_bf16_and_attacked_in_fp32() -> None:
    """On images whose class hangs on the precision, labelled as bf16 sees them."""
    many = images_of(3000, 8, 10, seed=1)
    fp32 = subject_of(NETWORK, many, "dataset.num_classes=10")
    bf16 = replace(fp32, config=replace(fp32.config, precision="bf16"))

    def first(subject: Subject, images: torch.Tensor) -> torch.Tensor:
        return subject.logits_of(images).topk(5).indices[:, 0]  # of equals, that of the suites

    some = many.images[first(fp32, many.images) != first(bf16, many.images)]
    test = ImageSet(some, first(bf16, some))
    assert len(test) > 2 and (first(fp32, some) != test.labels).any()
    subject = replace(bf16, splits=Splits(test, None, test, bf16.splits.class_names))
    scores = found("fgsm", subject, eps=0)
    assert scores.metrics["top1_error"] == scores.metrics["clean_top1_error"] == 0.0
    assert scores.protocol["precision"] == "bf16"
    assert scores.protocol["gradient_precision"] == "fp32"
    # Enough images that some sign hangs on the precision, whatever the processor's rounding.
    pixels, labels = many.images[:500].float() / 255, many.labels[:500]
    exact = ascent(load_suite("fgsm").source(subject), pixels, labels)
    rough = ascent(load_suite("fgsm", {"gradient": "run"}).source(subject), pixels, labels)
    assert torch.equal(exact, ascent(fp32.logits, pixels, labels))
    assert not torch.equal(exact, rough)


@pytest.mark.parametrize(("name", "changes"), [("fgsm", {"eps_curve": []}), ("pgd", {})])
def test_pixels_move_by_eps_in_255ths(name: str, changes: dict[str, Any]) -> None:
    """What the network was shown last is the attacked image."""
    shown: list[torch.Tensor] = []

    class Watched(Small):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            shown.append(images.detach())
            return super().forward(images)

    found(name, subject_of(Watched(), IMAGES, "dataset.num_classes=10"), eps=8, **changes)
    pixels = SUBJECT.normalize.inverse(shown[-1])
    moved = (pixels - IMAGES.images.float() / 255).abs().max()
    assert float(moved) == pytest.approx(8 / 255, abs=1e-5)


def test_attacks_hurt_more_with_eps_and_with_steps() -> None:
    curve = found("fgsm", eps_curve=[0, 2, 8, 32]).curves["fgsm"]
    assert curve["eps"] == [0.0, 2.0, 8.0, 32.0]
    assert curve["top1_accuracy"] == sorted(curve["top1_accuracy"], reverse=True)
    assert curve["top1_accuracy"][0] > curve["top1_accuracy"][-1]
    assert [a + e for a, e in zip(curve["top1_accuracy"], curve["top1_error"], strict=True)] == [
        100
    ] * 4
    weak, strong = (found("pgd", steps=n, step=1).metrics["top1_accuracy"] for n in (1, 20))
    assert strong <= weak
    assert strong <= curve["top1_accuracy"][2]


@pytest.mark.parametrize("name", ["fgsm", "pgd"])
def test_batches_and_subsets_do_not_matter_to_an_image(name: str, monkeypatch: Any) -> None:
    whole = found(name)
    monkeypatch.setattr(base, "BATCH", 7)
    parts = found(name, gradient_batch=3)
    assert parts.per_image["correct"].tolist() == whole.per_image["correct"].tolist()
    some = found(name, limit=12)
    index = some.per_image["index"]
    assert len(index) == 12
    assert some.per_image["correct"].tolist() == whole.per_image["correct"][index].tolist()


def test_a_start_depends_on_seed_and_image_alone() -> None:
    shape = torch.Size([3, 4, 4])
    together = random_starts(np.arange(5), shape, 1)
    assert torch.equal(random_starts(np.array([3]), shape, 1)[0], together[3])
    assert not torch.equal(random_starts(np.array([3]), shape, 2)[0], together[3])
    assert not torch.equal(together[0], together[1])


def test_a_network_without_gradient_is_told() -> None:
    class Blind(Small):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return super().forward(images) * 0 + torch.tensor([1.0, *[0.0] * 9])

    test = ImageSet(IMAGES.images, torch.zeros(40, dtype=torch.int64))
    scores = found("fgsm", subject_of(Blind(), test, "dataset.num_classes=10"))
    assert scores.metrics["images_without_gradient"] == 100.0
    assert scores.metrics["top1_accuracy"] == 100.0
    assert found("fgsm").metrics["images_without_gradient"] == 0.0


@pytest.mark.parametrize("attack", ["fgsm", "pgd"])
def test_equal_to_torchattacks(attack: str) -> None:
    torchattacks = pytest.importorskip(
        "torchattacks",
        reason="an oracle that no one needs to run an experiment: pip install --no-deps",
    )

    class InPixels(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = NETWORK

        def forward(self, pixels: torch.Tensor) -> torch.Tensor:
            mean, std = SUBJECT.normalize.mean, SUBJECT.normalize.std
            return self.inner((pixels - mean) / std)

    pixels, labels = IMAGES.images.float() / 255, IMAGES.labels
    network = InPixels().to(CPU).eval()
    eps = 8 / 255
    if attack == "fgsm":
        theirs = torchattacks.FGSM(network, eps=eps)(pixels, labels)
        mine = fgsm(pixels, ascent(SUBJECT.logits, pixels, labels), eps)
    else:
        step = 2 / 255
        oracle = torchattacks.PGD(network, eps=eps, alpha=step, steps=10, random_start=False)
        theirs = oracle(pixels, labels)
        mine = pgd(SUBJECT.logits, pixels, labels, eps=eps, step=step, steps=10)
    assert (mine - pixels).abs().max() > 0.9 * eps
    assert torch.allclose(mine, theirs, atol=1e-6)
    assert ALONE.size == 1

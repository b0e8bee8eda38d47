"""Detectors against their definitions, computed by other means."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.special import logsumexp, softmax
from sklearn.covariance import EmpiricalCovariance
from torch import nn

from cutmix_exp.errors import UserError
from cutmix_exp.evaluation.base import Subject
from cutmix_exp.evaluation.detectors import (
    Detector,
    Energy,
    Features,
    Gaussians,
    Mahalanobis,
    MaxLogit,
    MaxSoftmax,
    Odin,
    PytorchOod,
)
from tests.evaluation.hand_made import digits_subject, subject_of


@pytest.fixture(scope="module")
def digits() -> Subject:
    return digits_subject(test=24, train=150)


def pixels_of(subject: Subject) -> torch.Tensor:
    return subject.normalize.unit(subject.splits.test.images)  # type: ignore[union-attr]


def scores(detector: Detector, subject: Subject) -> np.ndarray:
    assert not detector.lacks(subject)
    return detector.prepare(subject)(pixels_of(subject)).numpy()


def logits(subject: Subject) -> np.ndarray:
    with torch.no_grad():
        return subject.logits(pixels_of(subject)).double().numpy()


def test_scores_of_logits(digits: Subject) -> None:
    given = logits(digits)
    assert scores(MaxSoftmax(), digits) == pytest.approx(softmax(given, axis=1).max(1))
    at_ten = softmax(given / 10, axis=1).max(1)
    assert scores(MaxSoftmax(temperature=10.0), digits) == pytest.approx(at_ten)
    assert scores(Energy(), digits) == pytest.approx(logsumexp(given, axis=1))
    at_two = 2 * logsumexp(given / 2, axis=1)
    assert scores(Energy(temperature=2.0), digits) == pytest.approx(at_two)
    assert scores(MaxLogit(), digits) == pytest.approx(given.max(1))


def test_the_softmax_saturates_late() -> None:
    of_logits = MaxSoftmax().of_logits(torch.tensor([[30.0, 0.0], [33.0, 0.0]]).double())
    assert of_logits[0] < of_logits[1] < 1


def test_odin_without_perturbation_is_the_softmax(digits: Subject) -> None:
    plain = scores(MaxSoftmax(temperature=1000.0), digits)
    assert np.array_equal(scores(Odin(temperature=1000.0, magnitude=0.0), digits), plain)


def test_odin_is_its_authors(digits: Subject) -> None:
    """Image by image and with normalised images, as their code has it: the sign of the gradient
    over the standard deviation."""
    std = torch.tensor(digits.config.dataset.std)[:, None, None]
    found = scores(Odin(temperature=100.0, magnitude=0.01), digits)
    expected = []
    for pixels in pixels_of(digits):
        image = ((pixels - digits.normalize.mean) / std)[None].requires_grad_()
        given = digits.network(image)
        F.cross_entropy(given / 100.0, given.argmax(1)).backward()
        assert image.grad is not None
        sign = (torch.ge(image.grad, 0).float() - 0.5) * 2
        with torch.no_grad():
            moved = digits.network(image - 0.01 * sign / std).double()
        expected.append(float((moved / 100.0).softmax(1).max()))
    assert found == pytest.approx(expected, abs=2e-6)
    assert (found > scores(MaxSoftmax(temperature=100.0), digits)).mean() > 0.9


def test_features_are_what_the_classifier_sees(digits: Subject) -> None:
    (held,), given = Features(digits)(pixels_of(digits))
    assert torch.allclose(digits.network.head.fc(held), given, atol=1e-5)  # type: ignore[union-attr]
    stages, _ = Features(digits, stages=True)(pixels_of(digits))
    assert [layer.shape[1] for layer in stages] == [16, 16, 32, 64]
    assert torch.allclose(stages[-1], held, atol=1e-5)
    (known,), labels = Features(digits).of_training(50, seed=0)
    assert known.shape == (50, 64) and len(labels) == 50
    assert not np.array_equal(labels, Features(digits).of_training(50, seed=1)[1])


def test_gaussians_are_scikit_learns() -> None:
    rng = np.random.default_rng(0)
    labels = rng.permutation(np.arange(90) % 3) * 2  # classes 0, 2, 4; none of 1 and 3
    known = rng.normal(size=(90, 5)) + labels[:, None]
    known = np.concatenate([known, known[:, :1] * 2], 1)  # a singular covariance
    means = {label: known[labels == label].mean(0) for label in (0, 2, 4)}
    centred = known - np.stack([means[label] for label in labels])
    precision = EmpiricalCovariance(assume_centered=False).fit(centred).precision_
    shown = np.concatenate([rng.normal(size=(7, 5)) * 3, np.zeros((7, 1))], 1)
    shown[:, 5] = 2 * shown[:, 0]
    expected = [
        max(-0.5 * (x - mean) @ precision @ (x - mean) for mean in means.values()) for x in shown
    ]
    found = Gaussians.fit(known.astype(np.float32), labels)
    assert found.whitening.shape == (6, 5)
    assert found(torch.from_numpy(shown)).numpy() == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("layers", ["last", "stages"])
def test_mahalanobis_prefers_training_images(digits: Subject, layers: Any) -> None:
    detector = Mahalanobis(layers=layers, fit_images=None)
    score = detector.prepare(digits)
    known = digits.normalize.unit(digits.splits.train.images[:40])  # type: ignore[union-attr]
    noise = torch.rand(40, 3, 32, 32)
    assert score(known).min() > score(noise).max()
    moved = replace(detector, magnitude=0.0002).prepare(digits)
    assert (moved(known) > score(known)).double().mean() > 0.9


def test_networks_that_do_not_fit(digits: Subject) -> None:
    class NoHead(nn.Module):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return images.mean((2, 3))

    other = subject_of(digits.config, digits.splits, NoHead())
    assert "no linear layer with 10 outputs" in Mahalanobis().lacks(other)
    assert "has no stages" in Mahalanobis(layers="stages").lacks(other)
    assert not MaxSoftmax().lacks(other)


def test_without_the_library(digits: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "pytorch_ood", None)
    assert "pip install -c constraints.txt -e '.[ood]'" in PytorchOod(method="ViM").lacks(digits)


METHODS = [
    ("ASH", None), ("DICE", None), ("Entropy", None), ("fDBD", None), ("GEN", None),
    ("KLMatching", None), ("KNN", {"k": 5.0}), ("NCI", None), ("NNGuide", None), ("RMD", None),
    ("ReAct", None), ("SCALE", None), ("SHE", None), ("VRA", None), ("ViM", {"d": 8.0}),
]  # fmt: skip


@pytest.mark.parametrize(("method", "options"), METHODS, ids=[m for m, _ in METHODS])
def test_pytorch_oods_detectors(digits: Subject, method: Any, options: Any) -> None:
    pytest.importorskip("pytorch_ood", reason="the extra `ood` is not installed")
    trained = trained_head(digits)
    found = scores(PytorchOod(method=method, options=options, fit_images=None), trained)
    assert found.shape == (24,) and np.isfinite(found).all() and len(np.unique(found)) > 1


def trained_head(subject: Subject) -> Subject:
    """The subject with a classifier that knows its training images: SHE wants each class."""
    (known,), labels = Features(subject).of_training(None, 0)
    target = F.one_hot(torch.from_numpy(labels), 10).float()
    features = torch.cat([torch.from_numpy(known), torch.ones(len(known), 1)], 1)
    fitted = torch.linalg.lstsq(features.double(), 10 * target.double()).solution.float()
    head = subject.network.head.fc  # type: ignore[union-attr]
    head.weight.data.copy_(fitted[:-1].T)  # type: ignore[union-attr]
    head.bias.data.copy_(fitted[-1])  # type: ignore[union-attr]
    return subject


def test_pytorch_oods_scores_are_turned(digits: Subject) -> None:
    """The library's grow with strangeness, ours with familiarity."""
    pytest.importorskip("pytorch_ood", reason="the extra `ood` is not installed")
    given = logits(digits)
    p = softmax(given, axis=1)
    entropy = -(p * np.log(p)).sum(1)
    assert scores(PytorchOod(method="Entropy"), digits) == pytest.approx(-entropy, rel=1e-3)
    (known,), _ = Features(digits).of_training(None, 0)
    (held,), _ = Features(digits)(pixels_of(digits))
    limit = np.percentile(known, 90)
    clipped = held.clip(max=float(limit))
    energy = digits.network.head.fc(clipped).logsumexp(1)  # type: ignore[union-attr]
    assert scores(PytorchOod(method="ReAct", fit_images=None), digits) == pytest.approx(
        energy.numpy(), rel=1e-4
    )


def test_options_that_a_method_does_not_have(digits: Subject) -> None:
    pytest.importorskip("pytorch_ood", reason="the extra `ood` is not installed")
    with pytest.raises(UserError, match=r"KNN of pytorch-ood has no percentile; it takes k, "):
        PytorchOod(method="KNN", options={"percentile": 0.9}).prepare(digits)

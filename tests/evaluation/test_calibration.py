"""Calibration and selective prediction: cases worked out by hand, simulation, scikit-learn."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from scipy import stats
from scipy.special import softmax
from sklearn.metrics import log_loss

from cutmix_exp.errors import UserError
from cutmix_exp.evaluation import calibration
from cutmix_exp.evaluation.base import Findings, Subject, load_suite
from cutmix_exp.evaluation.calibration import (
    Bins,
    Calibration,
    best_risks,
    best_temperature,
    equal_mass,
    equal_width,
    risks,
    selective,
    swept_error,
)
from tests.evaluation.hand_made import told_subject

CONFIDENCE = np.array([0.95, 0.85, 0.55, 0.65])
CORRECT = np.array([True, False, True, False])


def test_bins_by_hand() -> None:
    # Fifths: 0.55 alone (gap 0.45), 0.65 alone (0.65), 0.85 and 0.95 (0.9 against 1/2).
    found = equal_width(CONFIDENCE, CORRECT, 5)
    assert found.count.tolist() == [1, 1, 2]
    assert found.error() == pytest.approx((0.45 + 0.65 + 2 * 0.4) / 4)
    # Halves of the images: 0.6 against 1/2, 0.9 against 1/2.
    found = equal_mass(CONFIDENCE, CORRECT, 2)
    assert found.confidence == pytest.approx([0.6, 0.9])
    assert found.error() == pytest.approx((0.1 + 0.4) / 2)
    # In thirds (two, one, one) the accuracies are 1/2, 0, 1, which fall: two bins are kept.
    assert swept_error(CONFIDENCE, CORRECT) == pytest.approx(0.25)
    assert swept_error(np.array([0.6, 0.8]), np.array([True, True])) == pytest.approx(0.3)


def test_edges_belong_to_the_bin_below() -> None:
    found = equal_width(np.array([0.5, 0.5001, 1.0, 0.0]), np.array([1, 0, 1, 0], bool), 2)
    assert found.count.tolist() == [2, 2]
    assert found.confidence == pytest.approx([0.25, 0.75005])


def test_equal_mass_bins_differ_by_one_image() -> None:
    rng = np.random.default_rng(0)
    counts = equal_mass(rng.random(47), rng.random(47) < 0.5, 15).count
    assert counts.sum() == 47 and set(counts.tolist()) == {3, 4}
    assert equal_mass(rng.random(3), np.ones(3, bool), 15).count.tolist() == [1, 1, 1]


def test_the_bias_that_is_taken_off_is_that_of_normal_accuracies() -> None:
    bins = Bins(np.array([50, 200]), np.array([0.7, 0.9]), np.array([0.68, 0.8]))
    std = np.sqrt(bins.accuracy * (1 - bins.accuracy) / bins.count)
    drawn = stats.norm(bins.accuracy, std).rvs((200_000, 2), random_state=0)
    noisy = np.average(np.abs(drawn - bins.confidence), axis=1, weights=bins.count).mean()
    assert bins.debiased_error() == pytest.approx(2 * bins.error() - noisy, abs=2e-4)


def test_what_chance_shows_of_a_calibrated_network() -> None:
    """Squares are free of it; of the plain error, which is |N(0, s)| in each bin, debiasing leaves
    2 - sqrt(2) = 0.59."""
    rng = np.random.default_rng(0)
    found = []
    for _ in range(300):
        confidence = rng.uniform(0.1, 1.0, 1_000)
        bins = equal_width(confidence, rng.random(1_000) < confidence, 15)
        squares = [bins.squared_error(), bins.squared_error(debiased=True)]
        found.append([bins.error(), bins.debiased_error(), *squares])
    plain, debiased, square, unbiased = np.mean(found, axis=0)
    assert plain > 0.03  # though the network is perfect
    assert debiased / plain == pytest.approx(2 - np.sqrt(2), abs=0.05)
    assert abs(unbiased) < 0.05 * square


def test_squares_by_hand() -> None:
    bins = Bins(np.array([4, 1]), np.array([0.7, 0.4]), np.array([0.5, 1.0]))
    assert bins.squared_error() == pytest.approx((4 * 0.2**2 + 0.6**2) / 5)
    # 0.5 * 0.5 / 3 is taken off the first bin; the second has one image, and no part.
    assert bins.squared_error(debiased=True) == pytest.approx(4 * (0.2**2 - 0.25 / 3) / 5)


def test_risks_by_hand() -> None:
    confidence, correct = np.array([0.7, 0.9, 0.6, 0.8]), np.array([False, True, True, True])
    assert risks(confidence, correct) == pytest.approx([0, 0, 1 / 3, 1 / 4])
    assert best_risks(1, 4) == pytest.approx([0, 0, 0, 1 / 4])
    found = selective(confidence, correct)
    assert found["aurc"] == pytest.approx(100 * (1 / 3 + 1 / 4) / 4)
    assert found["e_aurc"] == pytest.approx(100 / 12)
    assert found["misclassification/auroc"] == pytest.approx(100 * 2 / 3)
    assert found["coverage50/accuracy"] == 100
    assert found["coverage70/accuracy"] == pytest.approx(100 * 2 / 3)  # three of four
    assert found["coverage100/accuracy"] == 75


def test_equal_confidences_are_averaged_over_orders() -> None:
    confidence = np.array([0.9, 0.5, 0.5, 0.5, 0.1])
    correct = np.array([True, False, True, False, True])
    orders = [(0, *middle, 4) for middle in itertools.permutations((1, 2, 3))]
    each = [np.cumsum(~correct[list(order)]) / np.arange(1, 6) for order in orders]
    assert risks(confidence, correct) == pytest.approx(np.mean(each, axis=0))


def test_ends_of_selective_prediction() -> None:
    confidence = np.linspace(0.2, 0.9, 8)
    perfect = selective(confidence, np.arange(8) >= 3)
    assert perfect["e_aurc"] == pytest.approx(0) and perfect["misclassification/auroc"] == 100
    assert selective(confidence, np.arange(8) < 5)["misclassification/auroc"] == 0
    right = selective(confidence, np.ones(8, bool))
    assert right["aurc"] == 0 and "misclassification/auroc" not in right
    wrong = selective(confidence, np.zeros(8, bool))
    assert wrong["aurc"] == 100 and wrong["e_aurc"] == 0


def sampled(size: int, temperature: float, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Logits, and labels that are drawn from their softmax at a temperature."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(0, 3, (size, 10))
    p = softmax(logits / temperature, axis=1)
    return logits, (rng.random((size, 1)) > p.cumsum(1)).sum(1).clip(0, 9)


@pytest.mark.parametrize("true", [0.6, 1.0, 2.5])
def test_the_temperature_is_found(true: float) -> None:
    logits, labels = sampled(4_000, true)
    found = best_temperature(logits, labels)
    assert found == pytest.approx(true, rel=0.08)
    least = log_loss(labels, softmax(logits / found, axis=1), labels=range(10))
    for other in (0.97 * found, 1.03 * found):
        assert least < log_loss(labels, softmax(logits / other, axis=1), labels=range(10))


# -------------------------------------------------------------------------------- the suite


def examined(subject: Subject, **changes: Any) -> Findings:
    return load_suite("calibration", changes).run(subject)


@pytest.fixture(scope="module")
def overconfident() -> Subject:
    logits, labels = sampled(250, 3.0)
    return told_subject(logits, labels.tolist(), val=100)


def test_the_suite(overconfident: Subject) -> None:
    logits, labels = sampled(250, 3.0)
    found = examined(overconfident)
    metrics, columns = found.metrics, found.per_image
    p = softmax(logits[:150].astype(np.float32).astype(np.float64), axis=1)
    assert metrics["nll"] == pytest.approx(log_loss(labels[:150], p, labels=range(10)), rel=1e-5)
    squares = [((np.eye(10)[y] - row) ** 2).sum() for y, row in zip(labels, p, strict=False)]
    assert metrics["brier"] == pytest.approx(np.mean(squares), rel=1e-5)
    assert np.array_equal(columns["correct"], p.argmax(1) == labels[:150])
    assert metrics["accuracy"] == pytest.approx(100 * columns["correct"].mean())
    assert metrics["overconfidence"] == pytest.approx(
        100 * (p.max(1).mean() - columns["correct"].mean()), rel=1e-4
    )
    assert metrics["scaled_val/ece"] < metrics["ece"] and metrics["scaled_val/nll"] < metrics["nll"]
    fitted = best_temperature(logits[150:], labels[150:])  # by the validation images alone
    assert metrics["scaled_val/temperature"] == pytest.approx(fitted, rel=1e-3)
    assert not found.skipped and "validation" in found.protocol["temperature_fitted"]
    assert "scaled_val/accuracy" not in metrics
    assert sum(found.curves["reliability"]["share"]) == pytest.approx(100)
    curve = found.curves["risk_coverage"]
    assert curve["error"][-1] == pytest.approx(100 - metrics["accuracy"])
    assert curve["error"][79] == pytest.approx(100 - metrics["coverage80/accuracy"])
    assert all(picture.startswith(b"\x89PNG") for picture in found.pictures.values())


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calibration, "draw_reliability", lambda *_: b"")
    monkeypatch.setattr(calibration, "draw_risks", lambda *_: b"")


@pytest.mark.usefixtures("undrawn")
def test_halves_of_the_test_images(overconfident: Subject) -> None:
    """The temperature of an image is not fitted on it."""
    without = replace(overconfident, splits=replace(overconfident.splits, val=None))
    found = examined(without)
    suite = load_suite("calibration")
    assert isinstance(suite, Calibration)
    first = suite.halves(150)
    assert first.sum() == 75
    logits, labels = (part[:150] for part in sampled(250, 3.0))
    other = best_temperature(logits[~first], labels[~first])
    p = softmax(logits[first] / other, axis=1).max(1)
    assert found.per_image["confidence_crossfit"][first] == pytest.approx(p, rel=1e-3)
    assert "scaled_crossfit/ece" in found.metrics and "scaled_val/ece" not in found.metrics
    assert (
        found.protocol["temperature_fitted"] == "on each half of the test images for the other half"
    )
    seeded = examined(without, seed=1).metrics["scaled_crossfit/ece"]
    assert seeded != found.metrics["scaled_crossfit/ece"]


@pytest.mark.usefixtures("undrawn")
def test_what_is_not_possible_is_said(overconfident: Subject) -> None:
    without = replace(overconfident, splits=replace(overconfident.splits, val=None))
    found = examined(without, temperature="val")
    assert "dataset.val_size=0" in found.skipped["temperature"]
    assert not [name for name in found.metrics if name.startswith("scaled")]
    assert examined(overconfident, temperature="none").skipped
    forced = examined(overconfident, temperature="crossfit").metrics
    assert "scaled_crossfit/temperature" in forced
    broken = told_subject(np.full((4, 10), np.nan), [0, 1, 2, 3])
    with pytest.raises(UserError, match="4 of 4 test images are not finite"):
        examined(broken)


@pytest.mark.usefixtures("undrawn")
def test_a_network_that_knows_all() -> None:
    found = examined(told_subject(30 * np.eye(10), list(range(10))))
    assert found.metrics["accuracy"] == 100
    for name in ("ece", "ece_debiased", "ece_adaptive", "ece_sweep", "nll", "brier", "aurc"):
        assert found.metrics[name] == pytest.approx(0, abs=1e-6), name
    assert np.isfinite(list(found.metrics.values())).all()

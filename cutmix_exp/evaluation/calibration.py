"""Calibration and selective prediction: whether a network's confidence is its accuracy, and what is
gained by leaving out what it is not sure of.

Confidence is the softmax of the predicted class. Errors of calibration, accuracies and areas are in
percent; the negative log-likelihood is in nats, the Brier score is the sum over the classes (0 to 2).
"""

from __future__ import annotations

import io
import math
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from scipy.optimize import minimize_scalar
from scipy.special import log_softmax
from scipy.stats import norm
from torch import Tensor

from cutmix_exp.errors import UserError
from cutmix_exp.evaluation.base import EvaluationSet, Findings, Subject, Suite
from cutmix_exp.schema import option
from cutmix_exp.seeding import stream

COVERAGES = (50, 70, 80, 90, 95, 100)
"""In percent, for which the accuracy of what is answered is given."""
TEMPERATURES = (0.05, 20.0)
"""The range in which a temperature is sought."""


# -------------------------------------------------------------------------------- metrics


@dataclass(frozen=True)
class Bins:
    """Images by confidence, bins without images left out.

    Attributes:
        count: int64 [B].
        confidence, accuracy: float64 [B], means in [0, 1].
    """

    count: np.ndarray
    confidence: np.ndarray
    accuracy: np.ndarray

    @classmethod
    def of(cls, place: np.ndarray, confidence: np.ndarray, correct: np.ndarray) -> Bins:
        """`place` int64 [N] is each image's bin."""
        count = np.bincount(place)
        held = count > 0
        means = [
            np.bincount(place, weights=values.astype(np.float64))[held] / count[held]
            for values in (confidence, correct)
        ]
        return cls(count[held], *means)

    @property
    def gaps(self) -> np.ndarray:
        return np.abs(self.accuracy - self.confidence)

    def error(self) -> float:
        """The expected calibration error: the mean gap, each image counted once."""
        return float(np.average(self.gaps, weights=self.count))

    def debiased_error(self) -> float:
        """The same less a part of what chance gives, by the code of Kumar et al. (1909.10155).

        The bins' accuracies are taken as normal with standard deviation sqrt(a (1 - a) / n); by how
        much such noise raises the error on average (the mean of a folded normal, in closed form) is
        subtracted. Of what a calibrated network shows by chance, that is four tenths.
        """
        std = np.sqrt(self.accuracy * (1 - self.accuracy) / self.count)
        with np.errstate(divide="ignore", invalid="ignore"):
            z = np.where(std > 0, self.gaps / std, np.inf)
        folded = std * np.sqrt(2 / np.pi) * np.exp(-0.5 * z**2) + self.gaps * (2 * norm.cdf(z) - 1)
        return float(np.average(2 * self.gaps - folded, weights=self.count))

    def squared_error(self, *, debiased: bool = False) -> float:
        """The mean squared gap; debiased by a (1 - a) / (n - 1), which makes its expectation that
        of the true gaps (Kumar et al., definition 5.2; bins of one image have no such term and no
        part). May be negative."""
        squares = self.gaps**2
        if debiased:
            several = self.count > 1
            noise = self.accuracy * (1 - self.accuracy) / np.maximum(1, self.count - 1)
            squares = np.where(several, squares - noise, 0.0)
        return float(np.average(squares, weights=self.count))


def equal_width(confidence: np.ndarray, correct: np.ndarray, bins: int) -> Bins:
    """Bins (i/B, (i+1)/B], as in Guo et al. (1706.04599)."""
    place = np.ceil(confidence.astype(np.float64) * bins).astype(np.int64) - 1
    return Bins.of(place.clip(0, bins - 1), confidence, correct)


def equal_mass(confidence: np.ndarray, correct: np.ndarray, bins: int) -> Bins:
    """Bins of as many images each, up to one, in the order of confidence."""
    order = np.argsort(confidence, kind="stable")
    place = np.empty(len(order), dtype=np.int64)
    place[order] = np.arange(len(order)) * bins // len(order)
    return Bins.of(place, confidence, correct)


def swept_error(confidence: np.ndarray, correct: np.ndarray) -> float:
    """ECE_sweep (Roelofs et al., 2012.08668): equal-mass bins, as many as keep the bins' accuracies
    from falling while confidence rises."""
    found = equal_mass(confidence, correct, 1)
    if len(np.unique(correct)) == 1:  # never falls; with single images the error is the same
        return found.error()
    for bins in range(2, len(confidence) + 1):
        more = equal_mass(confidence, correct, bins)
        if (np.diff(more.accuracy) < 0).any():
            break
        found = more
    return found.error()


def risks(confidence: np.ndarray, correct: np.ndarray) -> np.ndarray:
    """The error among the k most confident images, float64 [N], for k = 1 ... N, in [0, 1].

    Images of equal confidence come in no order: what is expected of a random one.
    """
    distinct, place = np.unique(-confidence.astype(np.float64), return_inverse=True)
    size = np.bincount(place, minlength=len(distinct))
    wrong = np.bincount(place, weights=~correct.astype(bool), minlength=len(distinct))
    each = np.repeat(wrong / size, size)
    return np.cumsum(each) / np.arange(1, len(each) + 1)


def best_risks(errors: int, size: int) -> np.ndarray:
    """`risks` of a confidence that puts every error last."""
    k = np.arange(1, size + 1)
    return np.maximum(0, k - (size - errors)) / k


def selective(confidence: np.ndarray, correct: np.ndarray) -> dict[str, float]:
    """Selective prediction, in percent.

    * aurc: the mean of `risks` (Geifman and El-Yaniv, 1705.08500); e_aurc: less that of the best
      confidence with as many errors (Geifman et al., 1805.08206).
    * misclassification/auroc: the probability that a right prediction is more confident than a
      wrong one; left out if all are right or all are wrong.
    * coverage<c>/accuracy: of the c percent (rounded up) most confident images.
    """
    from sklearn.metrics import roc_auc_score

    size, wrong = len(correct), int((~correct.astype(bool)).sum())
    curve = risks(confidence, correct)
    aurc, best = 100.0 * curve.mean(), 100.0 * best_risks(wrong, size).mean()
    found = {"aurc": float(aurc), "e_aurc": float(aurc - best)}
    if 0 < wrong < size:
        found["misclassification/auroc"] = 100.0 * float(roc_auc_score(correct, confidence))
    for coverage in COVERAGES:
        last = -(-coverage * size // 100)
        found[f"coverage{coverage}/accuracy"] = 100.0 * float(1 - curve[last - 1])
    return found


def calibration(logits: np.ndarray, labels: np.ndarray, bins: int) -> dict[str, float]:
    """Of logits float64 [N, K] and labels int64 [N]: `accuracy`, `confidence` (its mean),
    `overconfidence` (their difference), `ece` (equal width), `ece_debiased` (of the same bins),
    `ece_adaptive` (equal mass), `ece_sweep`, `mce` (the largest gap), `rmsce` and `rmsce_debiased`
    (root of the mean squared gap), `nll`, `brier`."""
    columns = per_image(logits, labels)
    confidence, correct = columns["confidence"], columns["correct"]
    width = equal_width(confidence, correct, bins)
    accuracy, mean = float(correct.mean()), float(confidence.mean())
    percent = {
        "accuracy": accuracy,
        "confidence": mean,
        "overconfidence": mean - accuracy,
        "ece": width.error(),
        "ece_debiased": width.debiased_error(),
        "ece_adaptive": equal_mass(confidence, correct, bins).error(),
        "ece_sweep": swept_error(confidence, correct),
        "mce": float(width.gaps.max()),
        "rmsce": math.sqrt(width.squared_error()),
        "rmsce_debiased": math.sqrt(max(0.0, width.squared_error(debiased=True))),
    }
    return {name: 100.0 * value for name, value in percent.items()} | {
        "nll": float(columns["nll"].mean()),
        "brier": float(columns["brier"].mean()),
    }


def per_image(logits: np.ndarray, labels: np.ndarray) -> dict[str, np.ndarray]:
    """Columns of N rows: `correct`, `predicted`, `label`, `confidence`, `nll`, `brier`."""
    log_p = log_softmax(logits, axis=1)
    p = np.exp(log_p)
    own = np.arange(len(labels))
    predicted = logits.argmax(1)
    return {
        "correct": predicted == labels,
        "predicted": predicted,
        "label": labels,
        "confidence": p[own, predicted],
        "nll": -log_p[own, labels],
        "brier": (p**2).sum(1) - 2 * p[own, labels] + 1,
    }


def best_temperature(logits: np.ndarray, labels: np.ndarray) -> float:
    """The temperature of least negative log-likelihood (Guo et al., 1706.04599), within
    TEMPERATURES; convex in its inverse."""
    own = np.arange(len(labels))

    def nll(inverse: float) -> float:
        return -float(log_softmax(logits * inverse, axis=1)[own, labels].mean())

    low, high = 1 / TEMPERATURES[1], 1 / TEMPERATURES[0]
    return 1 / float(minimize_scalar(nll, bounds=(low, high), method="bounded").x)


# -------------------------------------------------------------------------------- the suite


@dataclass(frozen=True, kw_only=True)
class Calibration(Suite):
    """Calibration of the test images, before and after temperature scaling, and selective prediction.

    Attributes:
        bins: of equal width or equal mass.
        temperature: fitted on the `val` split; or by `crossfit`: each half of the test images, drawn
            by `seed` and not by class, has the temperature that fits the other half; `auto` is `val`
            where the run has a validation split, else `crossfit`. The metrics are named after it:
            scaled_val/ece or scaled_crossfit/ece. `none`: no scaling.
        seed: draws the halves.
        batch_size: images that the network sees at once; null is the usual number.
    """

    bins: int = option(15, ge=1)
    temperature: Literal["auto", "val", "crossfit", "none"] = "auto"
    seed: int = option(0, ge=0)
    batch_size: int | None = option(None, ge=1)

    def run(self, subject: Subject) -> Findings:
        logits, labels = self._logits(subject, subject.test, "test")
        columns = per_image(logits, labels)
        confidence, correct = columns["confidence"], columns["correct"]
        metrics = calibration(logits, labels, self.bins) | selective(confidence, correct)
        scaling, skipped = self._temperatures(subject, logits, labels)
        bins = {"unscaled": equal_width(confidence, correct, self.bins)}
        for name, temperatures in scaling.items():
            scaled = logits / temperatures[:, None]
            found = calibration(scaled, labels, self.bins)
            del found["accuracy"]  # a temperature changes no prediction
            metrics |= {f"scaled_{name}/{what}": value for what, value in found.items()}
            metrics[f"scaled_{name}/temperature"] = float(temperatures.mean())
            columns[f"confidence_{name}"] = per_image(scaled, labels)["confidence"]
            bins[f"scaled ({name})"] = equal_width(
                columns[f"confidence_{name}"], correct, self.bins
            )
        return Findings(
            metrics=metrics,
            curves={"reliability": reliability_curve(bins["unscaled"])}
            | {"risk_coverage": risk_curve(risks(confidence, correct))},
            protocol=self._protocol(subject, scaling),
            per_image=columns,
            pictures={
                "reliability": draw_reliability(bins, subject.name),
                "risk_coverage": draw_risks(confidence, correct, subject.name),
            },
            skipped=skipped,
        )

    def _logits(
        self, subject: Subject, images: EvaluationSet, name: str
    ) -> tuple[np.ndarray, np.ndarray]:
        """Logits float64 [N, K] and labels int64 [N]. Raises UserError: some are not finite."""

        def judge(shown: Tensor, labels: Tensor, _index: np.ndarray) -> dict[str, Tensor]:
            return {"logits": subject.logits_of(shown), "label": labels}

        found = subject.over(images, judge, self.batch_size)
        bad = int((~np.isfinite(found["logits"])).any(1).sum())
        if bad:
            raise UserError(
                f"the outputs for {bad:,} of {len(found['label']):,} {name} images are not finite: "
                "they have no confidence (precision=fp32 may help)"
            )
        return found["logits"].astype(np.float64), found["label"]

    def _temperatures(
        self, subject: Subject, logits: np.ndarray, labels: np.ndarray
    ) -> tuple[dict[str, np.ndarray], dict[str, str]]:
        """The temperature of each test image, float64 [N], by how it was found."""
        kind = self._kind(subject)
        if kind == "val":
            if subject.splits.val is None:
                return {}, {
                    "temperature": "the run has no validation split (dataset.val_size=0); "
                    "suite.temperature=crossfit fits on halves of the test images"
                }
            held_out = subject.at_hand(subject.splits.val)
            fitted = best_temperature(*self._logits(subject, held_out, "validation"))
            return {"val": np.full(len(labels), fitted)}, {}
        if kind == "crossfit":
            if len(labels) < 2:
                return {}, {"temperature": "a single test image has no halves"}
            first = self.halves(len(labels))
            out = np.empty(len(labels))
            out[first] = best_temperature(logits[~first], labels[~first])
            out[~first] = best_temperature(logits[first], labels[first])
            return {"crossfit": out}, {}
        return {}, {"temperature": "suite.temperature=none"}

    def _kind(self, subject: Subject) -> str:
        if self.temperature != "auto":
            return self.temperature
        return "crossfit" if subject.splits.val is None else "val"

    def halves(self, size: int) -> np.ndarray:
        """bool [N]: the images of the first half."""
        drawn = stream(self.seed, "calibration/halves").permutation(size)
        return drawn < size // 2

    def _protocol(self, subject: Subject, scaling: dict[str, np.ndarray]) -> dict[str, Any]:
        fitted = {
            "val": "on the validation split",
            "crossfit": "on each half of the test images for the other half",
        }
        return {
            "confidence": "softmax of the predicted class",
            "bins": f"{self.bins} of equal width (ece, mce), of equal mass (ece_adaptive)",
            "debiased": "Kumar et al. 2019: ece by normal noise, rmsce by the unbiased square",
            "temperature_fitted": " ".join(fitted[name] for name in scaling) or "not",
            "equal_confidence": "in random order",
            "val_images": 0 if subject.splits.val is None else len(subject.splits.val),
        }


def reliability_curve(bins: Bins) -> dict[str, list[float]]:
    """In percent, with the share of the images."""
    return {
        "confidence": (100 * bins.confidence).tolist(),
        "accuracy": (100 * bins.accuracy).tolist(),
        "share": (100 * bins.count / bins.count.sum()).tolist(),
    }


def risk_curve(curve: np.ndarray) -> dict[str, list[float]]:
    """At each percent of coverage."""
    places = [-(-c * len(curve) // 100) - 1 for c in range(1, 101)]
    return {
        "coverage": [float(c) for c in range(1, 101)],
        "error": (100 * curve[places]).tolist(),
    }


# -------------------------------------------------------------------------------- pictures


def draw_reliability(bins: dict[str, Bins], title: str) -> bytes:
    """A PNG: accuracy by confidence, before and after scaling, over the shares of the images."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(3.6 * len(bins) + 0.4, 5.2), layout="constrained")
    axes = figure.subplots(2, len(bins), squeeze=False, sharex=True, height_ratios=[3, 1])
    for (upper, lower), (name, found) in zip(axes.T, bins.items(), strict=True):
        upper.plot([0, 100], [0, 100], color="0.6", linewidth=1, linestyle="--")
        upper.plot(100 * found.confidence, 100 * found.accuracy, "o-", markersize=4)
        upper.vlines(
            100 * found.confidence,
            100 * found.confidence,
            100 * found.accuracy,
            color="C3",
            linewidth=1.5,
        )
        upper.set_title(f"{name}: ECE {100 * found.error():.2f}", fontsize=9)
        upper.set(xlim=(0, 100), ylim=(0, 100))
        shares = 100 * found.count / found.count.sum()
        lower.bar(100 * found.confidence, shares, width=3, color="0.5")
    axes[0][0].set_ylabel("accuracy (%)", fontsize=9)
    axes[1][0].set_ylabel("images (%)", fontsize=9)
    figure.supxlabel("confidence (%)", fontsize=9)
    figure.suptitle(title, fontsize=10)
    return as_png(figure)


def draw_risks(confidence: np.ndarray, correct: np.ndarray, title: str) -> bytes:
    """A PNG: the error of what is answered, by coverage."""
    from matplotlib.figure import Figure

    size, wrong = len(correct), int((~correct.astype(bool)).sum())
    figure = Figure(figsize=(5.2, 3.8), layout="constrained")
    axes = figure.subplots()
    coverage = 100 * np.arange(1, size + 1) / size
    axes.plot(coverage, 100 * risks(confidence, correct), label="confidence")
    axes.plot(coverage, 100 * best_risks(wrong, size), color="0.4", linestyle="--", label="best")
    axes.axhline(100 * wrong / size, color="C3", linewidth=1, label="random order")
    axes.set(xlabel="coverage (%)", ylabel="error of what is answered (%)", xlim=(0, 100), ylim=0)
    axes.set_title(title, fontsize=10)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    return as_png(figure)


def as_png(figure: Any) -> bytes:
    out = io.BytesIO()
    figure.savefig(out, format="png", dpi=110)
    return out.getvalue()

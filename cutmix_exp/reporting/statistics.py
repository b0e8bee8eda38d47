"""What a few seeds say, and what they do not. Errors and differences are in percentage points.

A quantity that the data do not give is NaN: an interval of one seed, a p-value of equal values.
Equal values show no spread, but not that there is none, so nothing is concluded from them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from scipy import stats

from cutmix_exp.seeding import stream

LEVEL = 0.05
"""Of every test; intervals have confidence 1 - LEVEL."""
POWER = 0.8
"""Probability with which the number of seeds that is asked for would settle the matter."""
MAX_SEEDS = 200
ROUNDING = 1e-9
"""Values (or differences) that agree to this many points count as equal."""
FEW_VALUES = 100
"""Up to so many distinct values are resampled together."""

Verdict = Literal["reproduced", "differs", "too few seeds"]


@dataclass(frozen=True)
class Summary:
    """n values: mean, sample standard deviation (n-1) and the mean's t-interval [low, high]."""

    n: int
    mean: float = math.nan
    std: float = math.nan
    low: float = math.nan
    high: float = math.nan


@dataclass(frozen=True)
class Difference:
    """A row minus its baseline, paired by seed; `p` is of the two-sided paired t-test."""

    n: int
    mean: float = math.nan
    low: float = math.nan
    high: float = math.nan
    p: float = math.nan


@dataclass(frozen=True)
class Comparison:
    """Our mean minus a published number, and what follows.

    Attributes:
        p_within: of the two one-sided t-tests: small if the true difference is inside the margin.
        p_beyond: small if it is outside.
        seeds_needed: that would settle it with probability POWER, if the true mean is the observed
            one; None: more than MAX_SEEDS.
    """

    difference: float
    p_within: float
    p_beyond: float
    verdict: Verdict
    seeds_needed: int | None


def has_spread(values: Sequence[float]) -> bool:
    return len(values) > 1 and float(np.ptp(values)) > ROUNDING


def summarize(values: Sequence[float]) -> Summary:
    """Mean, standard deviation and t-interval of the values of one table cell."""
    n = len(values)
    if n == 0:
        return Summary(0)
    mean = float(np.mean(values))
    if n == 1:
        return Summary(1, mean)
    if not has_spread(values):
        return Summary(n, mean, 0.0)
    low, high = stats.t.interval(1 - LEVEL, n - 1, loc=mean, scale=stats.sem(values))
    return Summary(n, mean, float(np.std(values, ddof=1)), float(low), float(high))


def paired_difference(ours: Mapping[int, float], baseline: Mapping[int, float]) -> Difference:
    """Difference of two rows over the seeds that both have; the mappings are seed to error."""
    seeds = sorted(ours.keys() & baseline.keys())
    a, b = [ours[s] for s in seeds], [baseline[s] for s in seeds]
    differences = [x - y for x, y in zip(a, b, strict=True)]
    if not seeds:
        return Difference(0)
    mean = float(np.mean(differences))
    if not has_spread(differences):
        return Difference(len(seeds), mean)
    test = stats.ttest_rel(a, b)
    interval = test.confidence_interval(1 - LEVEL)
    return Difference(
        len(seeds), mean, float(interval.low), float(interval.high), float(test.pvalue)
    )


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's step-down correction (1979) of a family of p-values; NaNs stay and do not count.

    The i-th smallest of m (from 0) is multiplied by m - i; the result never falls and is at
    most 1. SciPy has Benjamini and Hochberg's correction only.
    """
    known = sorted((p, i) for i, p in enumerate(p_values) if not math.isnan(p))
    out = [math.nan] * len(p_values)
    highest = 0.0
    for rank, (p, i) in enumerate(known):
        highest = max(highest, min(1.0, (len(known) - rank) * p))
        out[i] = highest
    return out


def compare(
    values: Sequence[float], published: float, margin: float, assumed_std: float
) -> Comparison | None:
    """Whether our mean reproduces a published number, taken as a constant; None without values.

    Two one-sided t-tests against `published` - and + `margin` decide for `reproduced` if both
    say that the mean lies inside, for `differs` if one says that it lies outside, each at LEVEL.

    Args:
        assumed_std: standard deviation over seeds that `seeds_needed` takes where none is seen.
    """
    if not values:
        return None
    difference = float(np.mean(values)) - published
    spread = has_spread(values)
    p_within = p_beyond = math.nan
    if spread:
        low = stats.ttest_1samp(values, published - margin, alternative="greater")
        high = stats.ttest_1samp(values, published + margin, alternative="less")
        p_within = float(max(low.pvalue, high.pvalue))
        p_beyond = 1 - p_within  # of the opposite test against the nearer bound
    verdict: Verdict = "too few seeds"
    if p_within < LEVEL:
        verdict = "reproduced"
    elif p_beyond < LEVEL:
        verdict = "differs"
    std = float(np.std(values, ddof=1)) if spread else assumed_std
    return Comparison(
        difference, p_within, p_beyond, verdict, seeds_needed(difference, std, margin)
    )


def seeds_needed(difference: float, std: float, margin: float) -> int | None:
    """The least number of seeds (2 or more) with which `compare` would reach the right verdict
    with probability POWER, if `difference` and `std` were the true ones; None: over MAX_SEEDS.

    The power of one t-test is that of the noncentral t-distribution; that of both together is
    bounded from below by the sum of the two less 1.
    """
    n = np.arange(2, MAX_SEEDS + 1)
    critical = stats.t.ppf(1 - LEVEL, n - 1)

    def power(distance: float) -> np.ndarray:
        shift = np.minimum(distance / std * np.sqrt(n), 30.0)  # beyond, the power is 1
        return np.asarray(stats.nct.sf(critical, n - 1, shift))

    size = abs(difference)
    if size < margin:
        enough = power(margin - size) + power(margin + size) - 1 >= POWER
    else:
        enough = power(size - margin) >= POWER
    return int(n[np.argmax(enough)]) if enough.any() else None


@dataclass(frozen=True)
class McNemar:
    """Two networks on the same images.

    Attributes:
        only_a, only_b: number of images that one of them alone gets right.
        p: of the exact two-sided test that both are as likely; NaN if there are none.
    """

    only_a: int
    only_b: int
    p: float = math.nan


def mcnemar(correct_a: np.ndarray, correct_b: np.ndarray) -> McNemar:
    """McNemar's exact test (1947): of the images on which the two differ, each is as likely to be
    right. Pairs by place.

    Args:
        correct_a, correct_b: bool [N].

    Raises:
        ValueError: the columns differ in length.
    """
    a, b = (column.astype(bool) for column in _paired(correct_a, correct_b))
    only_a, only_b = int((a & ~b).sum()), int((~a & b).sum())
    if not only_a + only_b:
        return McNemar(0, 0)
    p = stats.binomtest(only_a, only_a + only_b, 0.5).pvalue
    return McNemar(only_a, only_b, float(p))


@dataclass(frozen=True)
class Bootstrap:
    """A mean over n images and its percentile interval over resampled images."""

    n: int
    mean: float = math.nan
    low: float = math.nan
    high: float = math.nan


def paired_bootstrap(a: np.ndarray, b: np.ndarray, seed: int, resamples: int = 10_000) -> Bootstrap:
    """The mean of a - b over images, in their unit, with a bootstrap interval over the images.

    What training again would change is not in it: that takes seeds.

    Args:
        a, b: [N], of the same images in the same order; bool counts as 0 and 1.

    Raises:
        ValueError: the columns differ in length.
    """
    a, b = _paired(a, b)
    return bootstrap_mean(a.astype(np.float64) - b.astype(np.float64), seed, resamples)


def bootstrap_mean(values: np.ndarray, seed: int, resamples: int = 10_000) -> Bootstrap:
    """The mean of one number for each image, and its percentile interval of confidence 1 - LEVEL.

    Where the values are few, as right and wrong are, images with equal values are drawn together, by
    a multinomial law: the same as that of drawing images with replacement, and faster.
    """
    values = np.asarray(values, dtype=np.float64)
    n = len(values)
    if n == 0:
        return Bootstrap(0)
    mean = float(values.mean())
    if n == 1 or float(np.ptp(values)) <= ROUNDING:
        return Bootstrap(n, mean)
    distinct, counts = np.unique(values, return_counts=True)
    rng = stream(seed, "bootstrap")
    if len(distinct) <= FEW_VALUES:
        means = rng.multinomial(n, counts / n, size=resamples) @ distinct / n
    else:
        means = np.array([values[rng.integers(0, n, n)].mean() for _ in range(resamples)])
    low, high = np.quantile(means, [LEVEL / 2, 1 - LEVEL / 2])
    return Bootstrap(n, mean, float(low), float(high))


def _paired(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    a, b = np.asarray(a), np.asarray(b)
    if a.shape != b.shape or a.ndim != 1:
        raise ValueError(f"columns of {a.shape} and {b.shape} values are not of the same images")
    return a, b

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

LEVEL = 0.05
"""Of every test; intervals have confidence 1 - LEVEL."""
POWER = 0.8
"""Probability with which the number of seeds that is asked for would settle the matter."""
MAX_SEEDS = 200
ROUNDING = 1e-9
"""Values (or differences) that agree to this many points count as equal."""

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

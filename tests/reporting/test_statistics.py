"""Statistics against cases worked out by hand, printed t-tables and simulation."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from cutmix_exp.reporting import statistics
from cutmix_exp.reporting.statistics import (
    Comparison,
    bootstrap_mean,
    compare,
    holm,
    mcnemar,
    paired_bootstrap,
    paired_difference,
    seeds_needed,
    summarize,
)

T975 = {1: 12.706, 2: 4.303, 3: 3.182}
"""Two-sided 5% points of Student's t, from a printed table, by degrees of freedom."""


def test_a_cell_by_hand() -> None:
    found = summarize([14.0, 15.0, 16.0])
    half = T975[2] * 1.0 / math.sqrt(3)
    assert (found.n, found.mean, found.std) == (3, 15.0, 1.0)
    assert (found.low, found.high) == pytest.approx((15 - half, 15 + half), abs=1e-3)
    two = summarize([14.0, 15.0])
    assert two.high - two.mean == pytest.approx(T975[1] * math.sqrt(0.5) / math.sqrt(2), abs=1e-3)


def test_what_seeds_do_not_give_is_not_a_number() -> None:
    none, one, equal = summarize([]), summarize([14.5]), summarize([0.1, 0.1, 0.1])
    assert none.n == 0 and math.isnan(none.mean) and math.isnan(none.low)
    assert (one.n, one.mean) == (1, 14.5) and math.isnan(one.std) and math.isnan(one.high)
    assert (equal.n, equal.std) == (3, 0.0) and math.isnan(equal.low)


def test_a_paired_difference_by_hand() -> None:
    # Differences -1, -2, -3: mean -2, standard deviation 1, t = -2 / (1 / sqrt(3)) = -3.4641;
    # with two degrees of freedom p = 1 - t / sqrt(2 + t^2) = 1 - 3.4641 / 3.7417 = 0.0742.
    ours, baseline = {0: 14.0, 1: 14.0, 2: 14.0}, {0: 15.0, 1: 16.0, 2: 17.0}
    found = paired_difference(ours, baseline)
    half = T975[2] / math.sqrt(3)
    assert (found.n, found.mean) == (3, -2.0)
    assert (found.low, found.high) == pytest.approx((-2 - half, -2 + half), abs=1e-3)
    assert found.p == pytest.approx(1 - 3.4641 / math.sqrt(14), abs=1e-4)
    assert found.p == pytest.approx(stats.ttest_rel([14, 14, 14], [15, 16, 17]).pvalue)


def test_only_common_seeds_are_paired() -> None:
    # An unpaired mean would be 14 - 60; seeds 0 and 1 alone say -1.5.
    found = paired_difference({0: 14.0, 1: 15.0, 5: 0.0}, {1: 17.0, 0: 15.0, 7: 200.0})
    assert (found.n, found.mean) == (2, -1.5)
    alone = paired_difference({0: 14.0}, {0: 15.0, 1: 16.0})
    assert (alone.n, alone.mean) == (1, -1.0) and math.isnan(alone.p)
    none = paired_difference({0: 14.0}, {1: 15.0})
    assert none.n == 0 and math.isnan(none.mean)


def test_equal_differences_are_no_evidence() -> None:
    """In floating point they differ in the last digit, which would give a p-value of 1e-16."""
    ours, baseline = {0: 0.3, 1: 0.7, 2: 1.1}, {0: 0.1, 1: 0.5, 2: 0.9}
    assert len({ours[s] - baseline[s] for s in ours}) > 1
    found = paired_difference(ours, baseline)
    assert found.mean == pytest.approx(0.2) and math.isnan(found.p) and math.isnan(found.low)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ([], []),
        ([0.03], [0.03]),
        ([0.01, 0.04, 0.03, 0.005], [0.03, 0.06, 0.06, 0.02]),  # Holm's own scheme: x4 x3 x2 x1
        ([0.5, 0.6, 0.7], [1.0, 1.0, 1.0]),  # 1.5, 1.2, 0.7: at most 1, never falling
        ([0.02, math.nan, 0.02], [0.04, math.nan, 0.04]),  # an untested row is not in the family
    ],
)
def test_holm_by_hand(given: list[float], expected: list[float]) -> None:
    assert holm(given) == pytest.approx(expected, nan_ok=True)


def compared(values: list[float], published: float = 15.0, margin: float = 0.5) -> Comparison:
    found = compare(values, published, margin, assumed_std=0.4)
    assert found is not None
    return found


@pytest.mark.parametrize(
    ("values", "verdict"),
    [
        ([14.9, 15.0, 15.1], "reproduced"),
        ([14.9, 15.0, 15.1, 15.6], "too few seeds"),
        ([16.0, 16.1, 16.2], "differs"),
        ([13.8, 13.9, 14.0], "differs"),
        ([15.4, 15.5, 15.6], "too few seeds"),  # at the margin: no number of seeds settles it
        ([15.2, 15.21, 15.22, 15.19], "reproduced"),  # surely not 15, but within half a point
        ([15.0], "too few seeds"),
        ([15.0, 15.0, 15.0], "too few seeds"),  # equal values show no spread
        ([25.0, 25.0], "too few seeds"),
    ],
)
def test_verdicts(values: list[float], verdict: str) -> None:
    assert compared(values).verdict == verdict


def test_equivalence_by_hand() -> None:
    # Mean 15.1, standard deviation 0.1, standard error 0.1 / sqrt(3). The nearer bound, 15.5, is
    # t = 0.4 / 0.057735 = 6.9282 away; one-sided, two degrees of freedom: (1 - t/sqrt(2+t^2)) / 2.
    found = compared([15.0, 15.1, 15.2])
    t = 0.4 * math.sqrt(3) / 0.1
    assert found.difference == pytest.approx(0.1)
    assert found.p_within == pytest.approx((1 - t / math.sqrt(2 + t * t)) / 2, rel=1e-6)
    assert found.p_beyond == pytest.approx(1 - found.p_within)
    # 90% intervals inside (outside) the margin are the same rule.
    low, high = stats.t.interval(0.90, 2, loc=15.1, scale=0.1 / math.sqrt(3))
    assert (found.verdict == "reproduced") == (low > 14.5 and high < 15.5)


def test_no_values_no_verdict() -> None:
    assert compare([], 15.0, 0.5, 0.4) is None


def test_one_seed_plans_with_the_assumed_spread() -> None:
    assert compared([15.0]).seeds_needed == seeds_needed(0.0, 0.4, 0.5)
    assert compared([15.0, 15.0]).seeds_needed == seeds_needed(0.0, 0.4, 0.5)
    assert compared([15.0, 15.2]).seeds_needed == seeds_needed(0.1, math.sqrt(0.02), 0.5)
    assert seeds_needed(0.5, 0.4, 0.5) is None


@pytest.mark.parametrize(("difference", "std"), [(0.0, 0.4), (0.3, 0.4), (1.1, 0.5), (-1.1, 0.5)])
def test_the_number_of_seeds_settles_it_in_four_cases_of_five(
    difference: float, std: float
) -> None:
    """Simulated: with that many seeds the verdict is right in at least 80% of all cases (2% for
    chance), with two fewer in less than that (5% for the bound of the two-sided case)."""
    number = seeds_needed(difference, std, 0.5)
    assert number is not None

    def share(n: int) -> float:
        drawn = np.random.default_rng(0).normal(difference, std, (20_000, n))
        mean, error = drawn.mean(1), drawn.std(1, ddof=1) / math.sqrt(n)
        reach = stats.t.ppf(0.95, n - 1) * error
        inside = (mean + reach < 0.5) & (mean - reach > -0.5)
        outside = (mean - reach > 0.5) | (mean + reach < -0.5)
        return float((inside if abs(difference) < 0.5 else outside).mean())

    assert share(number) > 0.78
    assert share(number - 2) < 0.82


def test_mcnemar_by_hand() -> None:
    # Nine images on which they differ, eight of them for a: 2 * (C(9,8) + C(9,9)) / 2^9 = 20 / 512.
    a = np.array([True] * 8 + [False] + [True] * 5 + [False] * 6)
    b = np.array([False] * 8 + [True] + [True] * 5 + [False] * 6)
    found = mcnemar(a, b)
    assert (found.only_a, found.only_b) == (8, 1)
    assert found.p == pytest.approx(20 / 512)
    other = mcnemar(b.astype(np.int64), a.astype(np.int64))  # ones and zeros will do
    assert (other.only_a, other.only_b, other.p) == (1, 8, found.p)


def test_mcnemar_of_equal_or_unpaired_columns() -> None:
    found = mcnemar(np.array([True, False]), np.array([True, False]))
    assert (found.only_a, found.only_b) == (0, 0) and math.isnan(found.p)
    with pytest.raises(ValueError, match="not of the same images"):
        mcnemar(np.array([True]), np.array([True, False]))
    with pytest.raises(ValueError, match="not of the same images"):
        paired_bootstrap(np.zeros(3), np.zeros(1), seed=0)


def test_the_bootstrap_of_two_images_by_hand() -> None:
    """Resampled means of 0 and 1 are 0, 1/2 and 1 in the proportion 1 : 2 : 1, so that the 2.5%
    and 97.5% points are 0 and 1; of a - b = 1, 1, 1, 1, -1 the law is binomial."""
    found = bootstrap_mean(np.array([0.0, 1.0]), seed=0)
    assert (found.n, found.mean, found.low, found.high) == (2, 0.5, 0.0, 1.0)
    a, b = np.array([True] * 4 + [False]), np.array([False] * 4 + [True])
    found = paired_bootstrap(a, b, seed=0)
    low, high = stats.binom.ppf([0.025, 0.975], 5, 0.8)
    assert (found.mean, found.low, found.high) == pytest.approx(
        (0.6, 2 * low / 5 - 1, 2 * high / 5 - 1)
    )


@pytest.mark.parametrize("few", [100, 1_000])
def test_the_bootstrap_agrees_with_scipy_and_hangs_on_the_seed(
    few: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(statistics, "FEW_VALUES", few)  # 200 values are many, or few
    rng = np.random.default_rng(0)
    a, b = rng.normal(1.0, 1.0, 200), rng.normal(0.0, 1.0, 200)
    found = paired_bootstrap(a, b, seed=1, resamples=4_000)
    scipy = stats.bootstrap(
        (a - b,), np.mean, n_resamples=4_000, method="percentile", vectorized=True
    ).confidence_interval
    assert (found.low, found.high) == pytest.approx((scipy.low, scipy.high), abs=0.03)
    assert found == paired_bootstrap(a, b, seed=1, resamples=4_000)
    assert found != paired_bootstrap(a, b, seed=2, resamples=4_000)


def test_a_bootstrap_without_spread() -> None:
    none, one = bootstrap_mean(np.array([]), seed=0), bootstrap_mean(np.array([3.0]), seed=0)
    assert none.n == 0 and math.isnan(none.mean)
    assert (one.n, one.mean) == (1, 3.0) and math.isnan(one.low)

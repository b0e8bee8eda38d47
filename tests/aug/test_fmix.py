"""FMix: masks against a slow reference, their spectrum and symmetry, and the label weights."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats

from cutmix_exp.aug.base import BatchShape
from cutmix_exp.aug.fmix import FMix, low_frequency_noise, share_mask
from cutmix_exp.seeding import stream
from tests.aug.test_patch import SHAPE, draw, mix_all, some
from tests.oracles import mixing


@pytest.mark.parametrize(("count", "soft"), [(0, 0), (54, 0), (20, 0), (20, 5), (6, 6), (50, 4)])
def test_masks_equal_the_reference(count: int, soft: int) -> None:
    noise = np.random.default_rng(0).standard_normal((3, 6, 9))
    found = share_mask(noise, np.full(3, count), np.full(3, soft))
    for mask, grey in zip(found, noise, strict=True):
        np.testing.assert_allclose(mask, mixing.fmix_mask(grey, count, soft), atol=1e-7)


@pytest.mark.parametrize("max_soft", [0.0, 0.2])
@pytest.mark.parametrize("granularity", ["batch", "sample"])
def test_fmix_mixes_by_its_mask(granularity: Any, max_soft: float) -> None:
    images, labels = some()
    mixer = FMix(prob=1.0, granularity=granularity, max_soft=max_soft)
    plan = draw(mixer)
    found, targets = mix_all(mixer, plan, images, labels)
    own = plan.weights[0].astype(float)
    for i in range(7):
        mask, j = plan.arrays["mask"][i].astype(float), plan.partners[0, i]
        wanted = images[i].numpy() * mask + images[j].numpy() * (1 - mask)
        np.testing.assert_allclose(found[i], wanted, atol=1e-6)
        np.testing.assert_allclose(targets[i], own[i] * labels[i] + (1 - own[i]) * labels[j])
        assert mask.mean() == pytest.approx(own[i], abs=1 / 54)
    distinct = len(np.unique(plan.arrays["mask"], axis=0))
    assert distinct == 1 if granularity == "batch" else distinct == 7


def test_labels_follow_lambda_or_the_mask() -> None:
    shape = BatchShape(4_000, 8, 8)
    drawn, corrected = (
        draw(FMix(prob=1.0, granularity="sample", correct_lambda=c), shape) for c in (False, True)
    )
    assert stats.kstest(drawn.weights[0], "uniform").pvalue > 0.001
    np.testing.assert_array_equal(corrected.weights[0], corrected.arrays["mask"].mean((1, 2)))
    np.testing.assert_array_equal(drawn.arrays["mask"], corrected.arrays["mask"])
    # ceil or floor, each half of the time: on average the share is lambda
    rounded = corrected.weights[0].astype(float) - drawn.weights[0]
    assert abs(rounded).max() < 1 / 64
    assert (rounded > 0).mean() == pytest.approx(0.5, abs=0.04)


def test_the_official_spectrum_is_the_authors_and_symmetric_about_a_point() -> None:
    noise = low_frequency_noise(2, 8, 10, 3.0, "official", stream(0, "mix"))
    # As the authors' code: scale, draw, reshape, and NumPy's irfftn of the reals.
    fx = np.fft.fftfreq(10)[:6]
    frequency = np.sqrt(fx * fx + np.fft.fftfreq(8)[:, None] ** 2)
    scale = 1 / np.maximum(frequency, 1 / 10) ** 3.0
    parts = scale[..., None] * stream(0, "mix").standard_normal((2, 8, 6, 2))
    for found, drawn in zip(noise, parts, strict=True):
        wanted = np.fft.irfftn(drawn.reshape(8, -1), (8, 10), axes=(0, 1))
        np.testing.assert_allclose(found, wanted, atol=1e-9)
        turned = np.roll(found[::-1, ::-1], (1, 1), (0, 1))
        np.testing.assert_allclose(found, turned, atol=1e-9)


def test_the_complex_spectrum_falls_with_the_frequency() -> None:
    noise = low_frequency_noise(4_000, 16, 16, 3.0, "complex", stream(0, "mix"))
    power = (abs(np.fft.fft2(noise)) ** 2).mean(0)
    for row, column in ((0, 2), (3, 3), (1, 5)):
        frequency = np.hypot(row, column) / 16
        assert power[row, column] == pytest.approx(2 / frequency**6, rel=0.1)
    assert not np.allclose(noise[0], np.roll(noise[0, ::-1, ::-1], (1, 1), (0, 1)), atol=1e-3)


def test_unmixed_samples_stay_as_they_are() -> None:
    images, labels = some()
    mixer = FMix(prob=0.5, granularity="sample")
    plan = draw(mixer)
    found, _ = mix_all(mixer, plan, images, labels)
    whole = plan.arrays["mask"].all((1, 2))
    assert 0 < whole.sum() < 7
    assert torch.equal(torch.from_numpy(found[whole]), images[whole])
    assert SHAPE.batch == len(found)

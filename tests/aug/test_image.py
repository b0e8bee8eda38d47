"""Cutout against a slow reference, and the law of its draws."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from scipy.stats import chisquare

from cutmix_exp.aug.base import BatchShape
from cutmix_exp.aug.image import Cutout, cut_out
from cutmix_exp.seeding import stream
from tests.oracles import mixing


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 9, 10, 100])
@pytest.mark.parametrize(("height", "width"), [(5, 9), (8, 8)])
def test_cutout_equals_the_reference_at_every_centre(size: int, height: int, width: int) -> None:
    """All centres: corners and borders, where the hole is clipped, are among them."""
    centres = list(itertools.product(range(height), range(width)))
    images = torch.randn(len(centres), 2, height, width)
    found = Cutout(size=size).apply(np.array(centres), images)
    assert found.dtype == images.dtype
    np.testing.assert_array_equal(found.numpy(), mixing.cutout(images.numpy(), centres, size))


def test_an_odd_size_loses_a_pixel() -> None:
    images, centres = torch.ones(1, 1, 9, 9), torch.tensor([[4, 4]])
    assert int((cut_out(images, centres, 5) == 0).sum()) == 16


def test_a_hole_larger_than_the_image_hides_all_of_it() -> None:
    images = torch.ones(2, 3, 5, 9)
    found = Cutout(size=40).apply(np.array([[0, 0], [4, 8]]), images)
    assert torch.equal(found, torch.zeros_like(images))


def test_apply_leaves_its_inputs_alone() -> None:
    images, plan = torch.randn(3, 3, 8, 8), np.array([[0, 0], [4, 4], [7, 7]])
    kept, kept_plan = images.clone(), plan.copy()
    found = Cutout(size=4).apply(plan, images)
    assert torch.equal(images, kept)
    np.testing.assert_array_equal(plan, kept_plan)
    assert not torch.equal(found, kept)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_the_result_has_the_dtype_of_the_images(dtype: torch.dtype) -> None:
    images = torch.randn(3, 3, 8, 8).to(dtype)
    assert Cutout(size=4).apply(np.array([[1, 2]] * 3), images).dtype == dtype


def test_channels_last_images_give_the_same() -> None:
    images, plan = torch.randn(3, 3, 8, 6), np.array([[0, 0], [4, 4], [7, 5]])
    other = images.contiguous(memory_format=torch.channels_last)
    op = Cutout(size=4)
    assert torch.equal(op.apply(plan, images), op.apply(plan, other))


@pytest.mark.parametrize(("side", "size"), [(32, 16), (224, 112), (64, 32)])
def test_the_hole_follows_the_image_size(side: int, size: int) -> None:
    assert Cutout().resolve(side) == Cutout(size=size)


@pytest.mark.parametrize("side", [32, 224])
def test_an_explicit_size_wins(side: int) -> None:
    assert Cutout(size=8).resolve(side) == Cutout(size=8)


def test_centres_are_uniform_over_all_pixels() -> None:
    height, width, draws = 5, 9, 45_000
    plan = Cutout(size=2).sample(BatchShape(draws, height, width), 0.0, stream(0, "image/cutout"))
    assert plan.shape == (draws, 2)
    counts = np.zeros((height, width), int)
    np.add.at(counts, (plan[:, 0], plan[:, 1]), 1)
    assert (counts > 0).all()
    assert chisquare(counts.ravel()).pvalue > 0.001


def test_a_slice_of_the_plan_gives_a_slice_of_the_result() -> None:
    op, images = Cutout(size=4), torch.randn(10, 3, 8, 6)
    plan = op.sample(BatchShape(10, 8, 6), 0.0, stream(0, "image/cutout"))
    whole = op.apply(plan, images)
    for positions in (np.arange(3), np.arange(3, 10), np.array([7, 0, 7])):
        assert torch.equal(op.apply(plan[positions], images[positions]), whole[positions])

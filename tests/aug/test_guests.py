"""Partners from the whole data set: guests of the batch, made like its own images."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare
from torch.nn import functional as F

from cutmix_exp.aug.base import MixPlan, Regularizer, exact_weights
from cutmix_exp.aug.image import Cutout
from cutmix_exp.aug.mix import CutMix, Mixup
from cutmix_exp.data.pipeline import ResidentPipeline
from cutmix_exp.distributed import share
from tests.data.test_pipeline import CLASSES, DATASET, noise, reference_images
from tests.oracles import mixing


def pipeline(partner: Any, *, size: int = 23, kind: Any = CutMix) -> ResidentPipeline:
    aug = Regularizer(
        atoms={"cutout": "image", "mixer": "mix"},
        image={"cutout": Cutout(size=6)},
        mix=kind(prob=1.0, partner=partner),
    )
    return ResidentPipeline(
        noise(size), DATASET, aug, seed=0, batch_size=8, device=torch.device("cpu")
    )


@pytest.mark.parametrize("step", [0, 2])
def test_guests_shift_no_draw_of_the_batch(step: int) -> None:
    """The last step of the epoch has 7 images."""
    plain, other = (pipeline(kind).plan(1, step) for kind in ("permutation", "dataset"))
    batch = len(plain)
    assert len(other) == batch
    for draw in ("index", "crop", "mirrored"):
        assert len(getattr(other, draw)) == 2 * batch
        np.testing.assert_array_equal(getattr(other, draw)[:batch], getattr(plain, draw))
    np.testing.assert_array_equal(other.image["cutout"][:batch], plain.image["cutout"])
    np.testing.assert_array_equal(other.mix.boxes, plain.mix.boxes)
    np.testing.assert_array_equal(other.mix.partners[0], batch + np.arange(batch))


def test_a_batch_with_guests_equals_the_reference() -> None:
    source, train = pipeline("dataset"), noise(23)
    plan = source.plan(0, 1)
    both, batch = np.arange(16), np.arange(8)
    assert plan.mix.boxes is not None
    centres = [(int(y), int(x)) for y, x in plan.image["cutout"]]
    images = mixing.cutout(reference_images(train, plan, both), centres, 6)
    labels = F.one_hot(train.labels[plan.index], CLASSES).numpy()
    boxes = [(int(t), int(le), int(b), int(r)) for t, le, b, r in plan.mix.boxes]
    wanted, targets = mixing.cutmix(
        images, labels, [*range(8, 16), *range(8)], boxes * 2, 0.0, correct_lambda=True
    )
    found = source.batch(plan, batch)
    np.testing.assert_array_equal(found.images.numpy(), wanted[:8])
    np.testing.assert_allclose(found.targets.numpy(), targets[:8], atol=2**-24)
    assert found.global_size == 8


@pytest.mark.parametrize("kind", [CutMix, Mixup])
def test_ranks_with_guests_make_the_batch_of_one_process(kind: Any) -> None:
    source = pipeline("dataset", kind=kind)
    plan = source.plan(0, 2)
    whole = source.batch(plan, np.arange(7))
    ranks = [source.batch(plan, share(7, rank, 3)) for rank in range(3)]
    assert torch.equal(torch.cat([r.images for r in ranks]), whole.images)
    assert torch.equal(torch.cat([r.targets for r in ranks]), whole.targets)


def test_guests_are_uniform_over_the_data_set() -> None:
    source = pipeline("dataset")
    plans = [source.plan(epoch, step) for epoch in range(200) for step in range(3)]
    drawn = np.concatenate([plan.index[len(plan) :] for plan in plans])
    assert chisquare(np.bincount(drawn, minlength=23)).pvalue > 0.001


def test_arrays_of_a_plan_are_sliced_with_it() -> None:
    plan = MixPlan(np.zeros((1, 3), int), np.full((2, 3), 0.5), arrays={"mask": np.eye(3)})
    np.testing.assert_array_equal(plan.at(np.array([2, 0])).arrays["mask"], np.eye(3)[[2, 0]])


@given(st.lists(st.lists(st.floats(1e-9, 1), min_size=4, max_size=4), min_size=1, max_size=6))
@settings(max_examples=300, deadline=None, derandomize=True)
def test_exact_weights_sum_to_one_in_any_order(columns: list[list[float]]) -> None:
    shares = np.array(columns).T
    shares /= shares.sum(0)
    weights = exact_weights(shares)
    assert weights.dtype == np.float32
    assert (weights >= 0).all()
    np.testing.assert_allclose(weights, shares, atol=4 * 2**-25)
    for order in ([0, 1, 2, 3], [3, 1, 0, 2]):
        total = np.zeros(len(columns), np.float32)
        for source in order:
            total += weights[source]
        np.testing.assert_array_equal(total, np.float32(1))

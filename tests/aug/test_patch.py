"""RICAP, ResizeMix and concatenation against slow references, and the laws of their draws."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor
from torch.nn import functional as F

from cutmix_exp.aug.base import BatchShape, Mixer, MixPlan, mix_targets, unmixed
from cutmix_exp.aug.patch import Concat, ResizeMix, Ricap
from cutmix_exp.errors import UserError
from cutmix_exp.seeding import stream
from tests.oracles import mixing

SHAPE = BatchShape(7, 6, 9)


def some(shape: BatchShape = SHAPE) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(shape.batch, 3, shape.height, shape.width, generator=generator)
    return images, F.one_hot(torch.arange(shape.batch) % 4, 4).float()


def draw(mixer: Mixer, shape: BatchShape = SHAPE, step: int = 0) -> MixPlan:
    return mixer.sample(shape, 0.0, stream(0, "mix", step=step))


def mix_all(mixer: Mixer, plan: MixPlan, images: Tensor, labels: Tensor) -> tuple[Any, Any]:
    return (
        mixer.apply(plan, [images, *(images[p] for p in plan.partners)]).numpy(),
        mix_targets(plan, [labels, *(labels[p] for p in plan.partners)]).numpy(),
    )


# -------------------------------------------------------------------------------------- RICAP

SECOND = np.array([[0, 0], [0, 1], [1, 0], [1, 1]])


@pytest.mark.parametrize("granularity", ["batch", "sample"])
def test_ricap_equals_the_reference(granularity: Any) -> None:
    images, labels = some()
    mixer = Ricap(granularity=granularity, alpha=1.0)
    for step in range(6):
        plan = draw(mixer, step=step)
        found, targets = mix_all(mixer, plan, images, labels)
        sources = np.stack([np.arange(7), *plan.partners]).T
        for i in range(7):
            y, x = (int(v) for v in plan.arrays["boundary"][i])
            crops = plan.arrays["shift"][i] + SECOND * (y, x)
            wanted, wanted_targets = mixing.ricap(
                images.numpy(),
                labels.numpy(),
                sources.tolist(),
                (y, x),
                [(int(a), int(b)) for a, b in crops],
            )
            np.testing.assert_array_equal(found[i], wanted[i])
            np.testing.assert_allclose(targets[i], wanted_targets[i], atol=2**-22)


def test_ricap_draws_boundaries_from_beta_and_crops_from_where_they_fit() -> None:
    shape = BatchShape(20_000, 1000, 8)
    plan = draw(Ricap(granularity="sample"), shape)
    boundary = plan.arrays["boundary"]
    # Rounding to 1000 rows moves the distribution by less than the test can see, but at its ends.
    inner = boundary[(boundary[:, 0] > 5) & (boundary[:, 0] < 995), 0] / 1000
    low, high = stats.beta(0.3, 0.3).cdf([0.0055, 0.9945])
    law = stats.beta(0.3, 0.3)
    assert stats.kstest(inner, lambda v: (law.cdf(v) - low) / (high - low)).pvalue > 0.001
    crops = plan.arrays["shift"] + SECOND * boundary[:, None]
    sides = np.where(SECOND == 1, (1000, 8) - boundary[:, None], boundary[:, None])
    free = (1000, 8) - sides
    assert ((crops >= 0) & (crops <= free)).all()
    for quarter in range(4):
        for room in (3, 7, 8):
            at = crops[free[:, quarter, 1] == room, quarter, 1]
            assert stats.chisquare(np.bincount(at, minlength=room + 1)).pvalue > 1e-4


def test_ricap_pairs_by_three_permutations() -> None:
    partners = draw(Ricap()).partners
    assert partners.shape == (3, 7)
    np.testing.assert_array_equal(np.sort(partners, axis=1), np.tile(np.arange(7), (3, 1)))
    assert len(np.unique(partners, axis=0)) == 3


def test_ricap_leaves_what_its_coin_says_alone() -> None:
    np.testing.assert_array_equal(draw(Ricap(prob=0.0)).weights, unmixed(7).weights)
    images, labels = some(BatchShape(200, 6, 9))
    mixer = Ricap(prob=0.5, granularity="sample")
    plan = draw(mixer, BatchShape(200, 6, 9))
    found, _ = mix_all(mixer, plan, images, labels)
    untouched = (found == images.numpy()).all((1, 2, 3))
    assert 60 < untouched.sum() < 150
    whole = (plan.arrays["boundary"] == (6, 9)).all(1)
    assert untouched[whole].all()


# ---------------------------------------------------------------------------------- ResizeMix


@pytest.mark.parametrize("granularity", ["batch", "sample"])
def test_resizemix_pastes_what_torch_makes_of_the_partner(granularity: Any) -> None:
    shape = BatchShape(7, 12, 16)
    images, labels = some(shape)
    mixer = ResizeMix(prob=1.0, granularity=granularity)
    for step in range(8):
        plan = draw(mixer, shape, step)
        assert plan.boxes is not None
        found, targets = mix_all(mixer, plan, images, labels)
        for i in range(7):
            wanted = images[i].clone()
            small = F.interpolate(
                images[plan.partners[0, i]][None], scale_factor=float(plan.arrays["rate"][i])
            )[0]
            top, left, bottom, right = plan.boxes[i]
            assert (bottom - top, right - left) == tuple(small.shape[1:])
            wanted[:, top:bottom, left:right] = small
            np.testing.assert_array_equal(found[i], wanted.numpy())
            own = 1 - small[0].numel() / (12 * 16)
            wanted_target = own * labels[i] + (1 - own) * labels[plan.partners[0, i]]
            np.testing.assert_allclose(targets[i], wanted_target, atol=2**-23)


def test_resizemix_draws_its_rate_and_place() -> None:
    shape = BatchShape(20_000, 32, 40)
    plan = draw(ResizeMix(prob=1.0, granularity="sample"), shape)
    assert plan.boxes is not None
    assert stats.kstest(plan.arrays["rate"], stats.uniform(0.1, 0.7).cdf).pvalue > 0.001
    sides = plan.boxes[:, 2:] - plan.boxes[:, :2]
    np.testing.assert_array_equal(sides[:, 0], (32 * plan.arrays["rate"].astype(float)).astype(int))
    assert (plan.boxes[:, :2] >= 0).all()
    assert (plan.boxes[:, 2:] <= (32, 40)).all()
    top = plan.boxes[sides[:, 0] == 10, 0]  # pixels 0..5 push it to the top, 27..31 to the bottom
    law = np.full(23, 1 / 32)
    law[0], law[-1] = 6 / 32, 5 / 32
    assert stats.chisquare(np.bincount(top, minlength=23), law * len(top)).pvalue > 0.001


def test_resizemix_shares_its_rate_but_not_its_place() -> None:
    plan = draw(ResizeMix(prob=1.0), BatchShape(64, 32, 32))
    assert plan.boxes is not None
    assert len(np.unique(plan.arrays["rate"])) == 1
    assert len(np.unique(plan.boxes, axis=0)) > 20


@pytest.mark.parametrize("switches", [{"scale_min": 0.9}, {"alpha": 0.2}], ids=str)
def test_resizemix_refuses_what_makes_no_sense(switches: dict[str, float]) -> None:
    with pytest.raises(UserError, match="scale_min"):
        ResizeMix(**switches)  # type: ignore[arg-type]


# -------------------------------------------------------------------------------- concatenation


@pytest.mark.parametrize("direction", ["vertical", "horizontal"])
def test_concat_equals_the_reference(direction: Any) -> None:
    images, labels = some()
    mixer = Concat(prob=1.0, direction=direction)
    plan = draw(mixer)
    assert plan.boxes is not None
    found, targets = mix_all(mixer, plan, images, labels)
    axis = 0 if direction == "vertical" else 1
    for i in range(7):
        cut, j = int(plan.boxes[i, axis]), plan.partners[0, i]
        wanted = mixing.concatenate(images[i].numpy(), images[j].numpy(), cut, axis == 0)
        np.testing.assert_array_equal(found[i], wanted)
        own = cut / (6, 9)[axis]
        wanted_target = own * labels[i] + (1 - own) * labels[j]
        np.testing.assert_allclose(targets[i], wanted_target, atol=2**-23)


@pytest.mark.parametrize(("direction", "axis", "side"), [("vertical", 0, 6), ("horizontal", 1, 9)])
def test_cuts_are_uniform(direction: Any, axis: int, side: int) -> None:
    plan = draw(Concat(prob=1.0, direction=direction), BatchShape(9_000, 6, 9))
    assert plan.boxes is not None
    assert stats.chisquare(np.bincount(plan.boxes[:, axis], minlength=side)).pvalue > 0.001
    np.testing.assert_array_equal(plan.boxes[:, 1 - axis], 0)

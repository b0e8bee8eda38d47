"""BC+ and the VH family against slow references, and the laws of their draws."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats

from cutmix_exp.aug.base import BatchShape
from cutmix_exp.aug.blend import BCPlus, VHMix, blend_waves
from cutmix_exp.aug.mix import Mixup
from cutmix_exp.composition import compose
from cutmix_exp.config import from_dict
from tests.aug.test_patch import SHAPE, draw, mix_all, some
from tests.oracles import mixing


def test_bc_plus_equals_the_reference() -> None:
    images, labels = some()
    images = images * torch.linspace(0.2, 3, 7)[:, None, None, None]  # of different loudness
    mixer = BCPlus(prob=1.0, partner="roll")
    plan = draw(mixer)
    found, targets = mix_all(mixer, plan, images, labels)
    for i in range(7):
        j, ratio = plan.partners[0, i], float(plan.weights[0, i])
        wanted = mixing.bc_plus(images[i].numpy(), images[j].numpy(), ratio)
        np.testing.assert_allclose(found[i], wanted, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(targets[i], ratio * labels[i] + (1 - ratio) * labels[j])


@pytest.mark.parametrize(("ratio", "kept"), [(0.0, 1), (1.0, 0)])
def test_a_wave_alone_stays_as_it_is(ratio: float, kept: int) -> None:
    pair = torch.randn(2, 5, 3, 4, 4)
    assert torch.equal(blend_waves(*pair, torch.full((5,), ratio)), pair[kept])


def test_equal_images_at_half_gain_energy_and_constant_ones_are_no_trouble() -> None:
    image = torch.randn(1, 3, 4, 4)
    half = torch.tensor([0.5])
    torch.testing.assert_close(blend_waves(image, image, half), image * 2**0.5)
    flat = blend_waves(torch.zeros(1, 3, 4, 4), torch.ones(1, 3, 4, 4), half)
    assert torch.isfinite(flat).all()


def test_bc_is_mixup_of_pairs_from_the_whole_set() -> None:
    bc = from_dict(compose(["aug=between_class"])).aug.mix
    assert bc == Mixup(partner="dataset", granularity="sample")
    plus = from_dict(compose(["aug=between_class_plus"])).aug.mix
    assert plus == BCPlus() and plus.wants_guests
    ratio = draw(BCPlus(prob=1.0), BatchShape(20_000, 2, 2)).weights[0]
    assert stats.kstest(ratio, "uniform").pvalue > 0.001


@pytest.mark.parametrize("blend", ["mixup", "waves"])
def test_vh_equals_the_reference(blend: Any) -> None:
    images, labels = some()
    mixer = VHMix(prob=1.0, blend=blend)
    for step in range(4):
        plan = draw(mixer, step=step)
        found, targets = mix_all(mixer, plan, images, labels)
        for i in range(7):
            j, ratio = plan.partners[0, i], float(plan.arrays["ratio"][i])
            row, column = (int(c) for c in plan.arrays["cut"][i])
            pair = images[i].numpy(), images[j].numpy()
            vertical = mixing.concatenate(*pair, row, True)
            horizontal = mixing.concatenate(*pair, column, False)
            if blend == "mixup":
                wanted = ratio * vertical + (1 - ratio) * horizontal
            else:
                wanted = mixing.bc_plus(vertical, horizontal, ratio)
            np.testing.assert_allclose(found[i], wanted, rtol=1e-4, atol=1e-5)
            own = ratio * row / 6 + (1 - ratio) * column / 9
            wanted_target = own * labels[i] + (1 - own) * labels[j]
            np.testing.assert_allclose(targets[i], wanted_target, atol=2**-22)


def test_vh_draws_cuts_and_ratio_uniformly() -> None:
    plan = draw(VHMix(prob=1.0), BatchShape(9_000, 6, 9))
    for axis, side in ((0, 6), (1, 9)):
        counts = np.bincount(plan.arrays["cut"][:, axis], minlength=side)
        assert stats.chisquare(counts).pvalue > 0.001
    assert stats.kstest(plan.arrays["ratio"], "uniform").pvalue > 0.001


@pytest.mark.parametrize("mixer", [VHMix(prob=0.5), VHMix(prob=0.5, blend="waves")], ids=str)
def test_unmixed_samples_stay_as_they_are(mixer: VHMix) -> None:
    images, labels = some()
    plan = draw(mixer, step=2)
    found, _ = mix_all(mixer, plan, images, labels)
    whole = (plan.arrays["cut"] == (SHAPE.height, SHAPE.width)).all(1)
    assert 0 < whole.sum() < 7
    np.testing.assert_array_equal(found[whole], images.numpy()[whole])
    np.testing.assert_array_equal(plan.weights[0, whole], 1)

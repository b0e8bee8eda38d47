"""The variants of CutMix: those of the paper's Table 8, and boxes of other laws and shapes."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from scipy import stats

from cutmix_exp.aug.base import BatchShape, Mixer, MixPlan, unmixed
from cutmix_exp.aug.mix import CutMix, Mixup, cut_sides
from cutmix_exp.composition import compose
from cutmix_exp.config import from_dict
from cutmix_exp.errors import UserError
from cutmix_exp.schema import identity_of
from cutmix_exp.seeding import stream
from tests.oracles import mixing

MANY = BatchShape(20_000, 32, 32)


def draw(mixer: Mixer, shape: BatchShape = MANY, progress: float = 0.0, step: int = 0) -> MixPlan:
    return mixer.sample(shape, progress, stream(0, "mix", step=step))


def each(**switches: Any) -> CutMix:
    """CutMix of every sample by itself, so that one plan holds many draws."""
    return CutMix(prob=1.0, granularity="sample", **switches)


def boxes_of(plan: MixPlan) -> np.ndarray:
    assert plan.boxes is not None
    return plan.boxes


# ------------------------------------------------------------------------------------- labels


@pytest.mark.parametrize("label", ["area", "one_hot", "half"])
def test_label_weights_equal_the_reference(label: Any) -> None:
    shape = BatchShape(300, 6, 8)
    plan = draw(each(label=label, alpha=0.3), shape)
    for i in range(shape.batch):
        box = tuple(int(edge) for edge in boxes_of(plan)[i])
        wanted = mixing.variant_own_weight(6, 8, box, label)  # type: ignore[arg-type]
        assert plan.weights[0, i] == pytest.approx(wanted, abs=2**-24)


def test_one_hot_gives_a_tie_to_the_host() -> None:
    """2x1 pixels: the sides of the box, 1.4 and 0.7, are rounded to 1; half the image."""
    mixer = CutMix(prob=1.0, fixed_lambda=0.5, label="one_hot", box_law="inside")
    plan = draw(mixer, BatchShape(4, 2, 1))
    np.testing.assert_array_equal(np.ptp(boxes_of(plan)[:, [0, 2]], axis=1), 1)
    np.testing.assert_array_equal(plan.weights[0], 1)


def test_labels_of_unmixed_samples_stay_whole() -> None:
    mixer = CutMix(prob=0.5, granularity="sample", label="half")
    weights = draw(mixer).weights[0]
    assert set(np.unique(weights)) == {0.5, 1.0}
    assert (weights == 0.5).mean() == pytest.approx(0.5, abs=0.02)


def test_the_label_rule_shifts_no_draw() -> None:
    plans = [draw(each(label=label)) for label in ("area", "one_hot", "half")]  # type: ignore[arg-type]
    for plan in plans[1:]:
        np.testing.assert_array_equal(boxes_of(plan), boxes_of(plans[0]))
        np.testing.assert_array_equal(plan.partners, plans[0].partners)


# -------------------------------------------------------------------------------------- boxes


@pytest.mark.parametrize("side", [32, 224, 28])
def test_fixed_size_is_half_the_side(side: int) -> None:
    boxes = boxes_of(draw(each(fixed_lambda=0.75), BatchShape(5_000, side, side)))
    whole = (boxes[:, 0] > 0) & (boxes[:, 2] < side) & (boxes[:, 1] > 0) & (boxes[:, 3] < side)
    assert 0.1 < whole.mean() < 0.5  # the others touch the border, and may be clipped
    np.testing.assert_array_equal((boxes[:, 2:] - boxes[:, :2])[whole], side // 2)


def test_fixed_size_inside_has_exactly_the_papers_lambda() -> None:
    weights = draw(each(fixed_lambda=0.75, box_law="inside")).weights
    np.testing.assert_array_equal(weights[0], np.float32(0.75))


@pytest.mark.parametrize("centre", ["uniform", "gaussian"])
def test_centres_have_their_law(centre: Any) -> None:
    """Boxes of two pixels' side end just behind their centre, clipped or not."""
    boxes = boxes_of(draw(each(fixed_lambda=1 - (2 / 32) ** 2, centre=centre)))
    edges = np.concatenate([[-np.inf], np.arange(0.5, 31), [np.inf]])
    gaussian = np.diff(stats.norm(15.5, 8).cdf(edges))
    law = {"uniform": np.full(32, 1 / 32), "gaussian": gaussian}[centre]
    for axis in (0, 1):
        counts = np.bincount(boxes[:, 2 + axis] - 1, minlength=32)
        assert stats.chisquare(counts, law * len(boxes)).pvalue > 0.001


def test_the_width_of_the_gaussian_is_a_switch() -> None:
    lam = 1 - (2 / 32) ** 2
    boxes = boxes_of(draw(each(fixed_lambda=lam, centre="gaussian", centre_std=0.1)))
    assert (boxes[:, 0] + 1).std() == pytest.approx(3.2, abs=0.1)


@pytest.mark.parametrize(("height", "width"), [(32, 32), (7, 11), (1, 5)])
def test_inside_boxes_are_never_clipped_and_lie_everywhere(height: int, width: int) -> None:
    shape = BatchShape(20_000, height, width)
    boxes = boxes_of(draw(each(box_law="inside"), shape))
    sides = boxes[:, 2:] - boxes[:, :2]
    assert (boxes[:, :2] >= 0).all()
    assert (boxes[:, 2:] <= (height, width)).all()
    lam = draw(each(correct_lambda=False), shape).weights[0].astype(float)
    wanted = np.stack([height * np.sqrt(1 - lam), width * np.sqrt(1 - lam)], axis=1)
    assert abs(sides - wanted).max() <= 0.5 + 1e-3
    for axis, side in ((0, height), (1, width)):
        free = side - sides[:, axis]
        for room in np.unique(free):
            counts = np.bincount(boxes[free == room, axis], minlength=room + 1)
            assert len(counts) == room + 1
            if room > 0 and counts.sum() > 20 * (room + 1):
                assert stats.chisquare(counts).pvalue > 1e-5


def test_aspect_is_log_uniform_and_keeps_the_area() -> None:
    shape = BatchShape(20_000, 4000, 2000)  # so large that rounding does not count
    boxes = boxes_of(draw(each(fixed_lambda=0.96, max_aspect=3, box_law="inside"), shape))
    height, width = (boxes[:, 2:] - boxes[:, :2]).T
    np.testing.assert_allclose(height * width, 0.04 * 4000 * 2000, rtol=0.01)
    logs = np.log(height / 4000 / (width / 2000)) / np.log(3)
    assert stats.kstest(logs, stats.uniform(-1, 2).cdf).pvalue > 0.001


def test_a_box_of_any_aspect_fits_the_image() -> None:
    lam = np.array([0.0, 0.01, 0.3, 0.5, 0.99, 1.0])
    for aspect in (1e-3, 0.5, 1.0, 2.0, 1e3):
        height, width = cut_sides("inside", 20, 50, lam, np.full(6, aspect))
        assert ((height >= 0) & (height <= 20) & (width >= 0) & (width <= 50)).all()
        assert (height[0], width[0], height[-1] * width[-1]) == (20, 50, 0)


# ----------------------------------------------------------------------------------- schedule


@pytest.mark.parametrize("kind", [CutMix, Mixup])
@pytest.mark.parametrize("progress", [0.0, 0.25, 0.9, 1.0])
def test_a_linear_schedule_mixes_in_proportion_to_progress(kind: Any, progress: float) -> None:
    mixer = kind(prob=0.8, prob_schedule="linear")
    shape, steps = BatchShape(4, 8, 8), 800
    mixed = sum(draw(mixer, shape, progress, step).num_sources == 2 for step in range(steps))
    low, high = stats.binom.interval(0.9999, steps, 0.8 * progress)
    assert low <= mixed <= high


def test_the_schedule_shifts_no_draw() -> None:
    shape = BatchShape(6, 32, 32)
    for step in range(30):
        scheduled = draw(CutMix(prob=1.0, prob_schedule="linear"), shape, 0.5, step)
        always = draw(CutMix(prob=1.0), shape, 0.5, step)
        wanted = always if scheduled.num_sources == 2 else unmixed(6)
        np.testing.assert_array_equal(scheduled.weights, wanted.weights)
        np.testing.assert_array_equal(scheduled.partners, wanted.partners)


# -------------------------------------------------------------------------------------- names


@pytest.mark.parametrize(
    ("name", "switches"),
    [
        ("cutmix_center_gaussian", {"centre": "gaussian"}),
        ("cutmix_fixed_size", {"fixed_lambda": 0.75}),
        ("cutmix_one_hot", {"label": "one_hot"}),
        ("cutmix_scheduled", {"prob": 1.0, "prob_schedule": "linear"}),
        ("cutmix_complete_label", {"label": "half"}),
    ],
)
def test_the_variants_of_table_8_differ_from_cutmix_in_one_thing(name: str, switches: Any) -> None:
    assert from_dict(compose([f"aug={name}"])).aug.mix == CutMix(**switches)


def test_new_switches_leave_the_identity_of_cutmix_as_it_was() -> None:
    assert identity_of(CutMix(prob=0.5)) == {
        "class": "CutMix",
        "prob": 0.5,
        "alpha": 1.0,
        "partner": "permutation",
        "granularity": "batch",
        "box_law": "official",
        "correct_lambda": True,
    }


@pytest.mark.parametrize(
    ("switches", "said"),
    [
        ({"centre_std": 0.5}, "centre=gaussian"),
        ({"box_law": "inside", "centre": "gaussian"}, "box_law=official"),
        ({"label": "half", "correct_lambda": False}, "label=half"),
        ({"fixed_lambda": 0.75, "alpha": 0.5}, "fixed_lambda"),
    ],
    ids=str,
)
def test_switches_without_effect_are_refused(switches: Any, said: str) -> None:
    with pytest.raises(UserError, match=said):
        CutMix(**switches)

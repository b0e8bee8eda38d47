"""Random Erasing and Hide-and-Seek: against slow references, and the laws of their draws."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats

from cutmix_exp.aug.base import BatchShape, ImageOp
from cutmix_exp.aug.erase import GridMask, HideAndSeek, RandomErasing
from cutmix_exp.errors import UserError
from cutmix_exp.seeding import stream
from tests.oracles import mixing


def draw(op: ImageOp, shape: BatchShape) -> np.ndarray:
    return op.sample(shape, 0.5, stream(0, "image/test"))


# ------------------------------------------------------------------------------ Random Erasing


@pytest.mark.parametrize(
    ("fill", "colour"), [("mean", (0, 0, 0)), ("official", (0.4914, 0.4822, 0.4465))]
)
def test_erasing_equals_the_reference(fill: Any, colour: tuple[float, ...]) -> None:
    op, images = RandomErasing(fill=fill), torch.randn(20, 3, 9, 12)
    plan = draw(op, BatchShape(20, 9, 12))
    boxes = [tuple(int(edge) for edge in box) for box in plan]
    wanted = mixing.erase(images.numpy(), boxes, colour)  # type: ignore[arg-type]
    np.testing.assert_allclose(op.apply(plan, images), wanted, rtol=1e-6)


def test_boxes_have_the_laws_of_area_aspect_and_place() -> None:
    """On an image so large that rounding does not count. Flat boxes are too wide for it: the law
    of area and aspect is that of boxes that fit, found here by rejection."""
    side, draws = 10_000, 20_000
    top, left, bottom, right = draw(RandomErasing(prob=1.0), BatchShape(draws, side, side)).T
    height, width = (bottom - top) / side, (right - left) / side
    assert (top >= 0).all() and (left >= 0).all() and max(bottom.max(), right.max()) <= side
    rng = np.random.default_rng(1)
    area, aspect = rng.uniform(0.02, 0.4, draws), rng.uniform(0.3, 1 / 0.3, draws)
    fits = (area * aspect < 1) & (area / aspect < 1)
    assert 0.85 < fits.mean() < 0.99
    assert stats.ks_2samp(height * width, area[fits]).pvalue > 0.001
    assert stats.ks_2samp(height / width, aspect[fits]).pvalue > 0.001
    assert stats.kstest(top / (side - bottom + top), "uniform").pvalue > 0.001
    assert stats.kstest(left / (side - right + left), "uniform").pvalue > 0.001


@pytest.mark.parametrize("prob", [0.0, 0.5, 1.0])
def test_prob_is_the_share_of_erased_images(prob: float) -> None:
    plan = draw(RandomErasing(prob=prob), BatchShape(5_000, 32, 32))
    erased = ((plan[:, 2:] - plan[:, :2]) > 0).all(1)
    low, high = stats.binom.interval(0.9999, 5_000, prob)
    assert low <= erased.sum() <= high


def test_a_box_that_never_fits_erases_nothing() -> None:
    plan = draw(RandomErasing(prob=1.0, area_min=1.0, area_max=1.0), BatchShape(50, 8, 8))
    np.testing.assert_array_equal(plan[:, 2:], plan[:, :2])


def test_areas_the_wrong_way_round_are_refused() -> None:
    with pytest.raises(UserError, match="exchange"):
        RandomErasing(area_min=0.5)


# ------------------------------------------------------------------------------- Hide-and-Seek


@pytest.mark.parametrize("cell", [1, 3, 4, 20])
def test_whole_cells_are_hidden_each_with_its_probability(cell: int) -> None:
    plan = draw(HideAndSeek(cells=(cell,), prob=0.3), BatchShape(300, 8, 10))
    grids = [mixing.hidden_cells(hidden, cell) for hidden in plan]
    assert all(grid is not None for grid in grids)
    values = np.array(grids).astype(bool)
    low, high = stats.binom.interval(0.9999, values.size, 0.3)
    assert low <= values.sum() <= high
    if values[0].size > 1:  # neighbours are independent
        flat = values.reshape(300, -1)
        table = [[np.sum((flat[:, 0] == a) & (flat[:, -1] == b)) for b in (0, 1)] for a in (0, 1)]
        assert stats.chi2_contingency(table).pvalue > 0.001


def test_each_image_draws_its_side() -> None:
    plan = draw(HideAndSeek(cells=(0, 1, 8), prob=1.0), BatchShape(3_000, 8, 8))
    hidden = plan.all((1, 2))
    assert ((plan.any((1, 2))) == hidden).all()
    low, high = stats.binom.interval(0.9999, 3_000, 2 / 3)
    assert low <= hidden.sum() <= high
    assert not draw(HideAndSeek(cells=(0,), prob=1.0), BatchShape(5, 8, 8)).any()


def test_hidden_pixels_are_zero_and_the_others_untouched() -> None:
    op, images = HideAndSeek(cells=(3,)), torch.randn(5, 3, 8, 8)
    plan, kept = draw(op, BatchShape(5, 8, 8)), images.clone()
    found = op.apply(plan, images).numpy()
    wanted = np.where(plan[:, None], 0, kept.numpy())
    np.testing.assert_array_equal(found, wanted)
    assert torch.equal(images, kept)


def test_sides_follow_the_image() -> None:
    assert HideAndSeek().resolve(224).cells == (0, 16, 32, 44, 56)
    assert HideAndSeek().resolve(32).cells == (0, 2, 5, 6, 8)
    assert HideAndSeek(cells=(4,)).resolve(32).cells == (4,)
    with pytest.raises(UserError, match="cells"):
        HideAndSeek(cells=())


@pytest.mark.parametrize("op", [RandomErasing(prob=1.0), HideAndSeek(cells=(3,))], ids=str)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_type_layout_and_slices_are_kept(op: ImageOp, dtype: torch.dtype) -> None:
    images = torch.randn(6, 3, 8, 8).to(dtype).contiguous(memory_format=torch.channels_last)
    plan = draw(op, BatchShape(6, 8, 8))
    whole = op.apply(plan, images)
    assert whole.dtype == dtype
    assert whole.is_contiguous(memory_format=torch.channels_last)
    positions = np.array([4, 0])
    assert torch.equal(op.apply(plan[positions], images[positions]), whole[positions])


# ----------------------------------------------------------------------------------- GridMask


def grid_by_hand(height: int, width: int, row: np.ndarray, ratio: float) -> np.ndarray:
    """Hidden pixels bool [H, W] of one drawn grid, pixel by pixel."""
    period, start_y, start_x, degrees = row
    if period == 0:
        return np.zeros((height, width), bool)
    kept = int(period * ratio + 0.5)
    angle = math.radians(degrees)
    hidden = np.zeros((height, width), bool)
    for y in range(height):
        for x in range(width):
            dy, dx = y - (height - 1) / 2, x - (width - 1) / 2
            v = math.cos(angle) * dy - math.sin(angle) * dx
            u = math.sin(angle) * dy + math.cos(angle) * dx
            hidden[y, x] = (v - start_y) % period >= kept and (u - start_x) % period >= kept
    return hidden


def test_grids_hide_what_a_plain_loop_hides() -> None:
    op = GridMask(prob=1.0, ramp=0.0, cell_min=3, cell_max=9)
    plan = op.sample(BatchShape(12, 14, 17), 0.0, stream(4, "image/test"))
    plan[0, 3] = 0
    got = op.apply(plan, torch.ones(12, 3, 14, 17)) == 0
    wanted = np.stack([grid_by_hand(14, 17, row, 0.6) for row in plan])
    # On the very edge of a square two roundings may differ.
    assert (got.numpy() != wanted[:, None]).mean() < 0.004
    assert np.array_equal(got[0, 0].numpy(), wanted[0])


def test_grids_hide_their_share_and_come_with_progress() -> None:
    op = GridMask(prob=0.8).resolve(32)
    assert (op.cell_min, op.cell_max) == (14, 32)
    shape = BatchShape(4000, 32, 32)
    for progress, wanted in ((0.0, 0.0), (0.4, 0.4), (0.8, 0.8), (1.0, 0.8)):
        plan = op.sample(shape, progress, stream(0, "image/test"))
        assert abs((plan[:, 0] > 0).mean() - wanted) < 0.03
    hidden = op.apply(plan, torch.ones(4000, 1, 32, 32)) == 0
    period = np.arange(14, 32)
    share = ((1 - np.floor(period * 0.6 + 0.5) / period) ** 2).mean()
    assert abs(hidden.float().mean().item() - 0.8 * share) < 0.006

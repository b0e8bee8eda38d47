"""SPG: masks and losses by hand and by loops."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from cutmix_exp.errors import UserError
from cutmix_exp.models.spg import Spg, SpgHead, enlarged, guidance, guided_losses

THRESHOLDS = ((0.6, 0.2), (0.5, 0.4), (0.55, 0.45))
UNKNOWN = 255


def masked(maps: Any, upper: float, lower: float) -> np.ndarray:
    """1, 0 or 255 [n, H, W]."""
    is_object, is_known = guidance(torch.as_tensor(maps), upper, lower)
    return np.where(is_known.numpy(), is_object.numpy(), UNKNOWN)


def by_loop(maps: np.ndarray, upper: float, lower: float) -> np.ndarray:
    mask = np.full(maps.shape, UNKNOWN)
    for image, values in enumerate(maps):
        limit = upper
        if sum(v > upper for v in values.flat) < 30 * values.size / (224 * 224):
            limit = 0.7 * values.max()
        for place in np.ndindex(values.shape):
            if values[place] > limit:
                mask[(image, *place)] = 1
            if values[place] < lower:
                mask[(image, *place)] = 0
    return mask


def test_masks_by_hand() -> None:
    """Above the upper threshold object, below the lower one background, on either or between them
    neither."""
    got = masked([[[0.0, 0.125, 0.25], [0.5, 0.75, 1.0]]], 0.75, 0.25)
    assert got.tolist() == [[[0, 0, UNKNOWN], [UNKNOWN, UNKNOWN, 1]]]


def test_where_few_pixels_are_above_the_threshold_it_follows_the_maximum() -> None:
    """Each image for itself. At 224 x 224 fewer than 30 are few; in proportion elsewhere."""
    got = masked([[[0.1, 0.2], [0.3, 0.4]], [[0.1, 0.2], [0.3, 0.8]]], 0.5, 0.15)
    assert got.tolist() == [[[0, UNKNOWN], [1, 1]], [[0, UNKNOWN], [UNKNOWN, 1]]]
    for count, marked in ((29, 29 + 100), (30, 30)):
        maps = torch.full((1, 224 * 224), 0.1)
        maps[0, :100], maps[0, 100 : 100 + count] = 0.65, 0.9
        assert int((masked(maps.view(1, 224, 224), 0.7, 0.0) == 1).sum()) == marked
    # What is below the lower threshold is background even then.
    assert masked([[[0.01, 0.02], [0.03, 0.04]]], 0.5, 0.05).tolist() == [[[0, 0], [0, 0]]]


def test_losses_by_hand() -> None:
    logits = torch.tensor([[[2.0, -1.0], [0.5, 3.0]], [[1.0, 1.0], [1.0, 1.0]]], requires_grad=True)
    is_object = torch.tensor([[[True, False], [True, False]], [[False] * 2] * 2])
    is_known = torch.tensor([[[True, True], [False, False]], [[False] * 2] * 2])
    losses = guided_losses(logits, is_object, is_known)
    by_hand = (math.log(1 + math.exp(-2.0)) + math.log(1 + math.exp(-1.0))) / 2
    assert losses.tolist() == pytest.approx([by_hand, 0.0])
    losses.sum().backward()
    assert logits.grad is not None
    assert torch.equal(logits.grad != 0, is_known)  # an image without known pixels: 0, not NaN


def test_enlarging_is_torchs_bilinear_interpolation() -> None:
    maps = torch.randn(3, 4, 7, dtype=torch.float64)
    wanted = F.interpolate(maps[:, None], size=(19, 19), mode="bilinear", align_corners=False)
    torch.testing.assert_close(enlarged(maps, 19), wanted[:, 0])


def head(thresholds: Any = THRESHOLDS, convolutions: int = 1) -> SpgHead:
    torch.manual_seed(0)
    return SpgHead((3, 4, 5), 6, 12, thresholds, convolutions, 7).double()


def stages(count: int = 4) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(3)
    earlier, later, last = (torch.randn(count, c, 3, 4, dtype=torch.float64) for c in (3, 4, 5))
    return earlier, later, last


def unused(logits: Tensor, targets: Tensor) -> Tensor:
    raise AssertionError("SPG has no further logits")


def test_who_teaches_whom_by_loops() -> None:
    """The class's map teaches B2, B2 teaches B1, and the mean of both C."""
    torch.manual_seed(4)
    names = ("b2", "b1", "c", "found")
    given = {n: 2 * torch.randn(5, 3, 4, dtype=torch.float64) for n in names}
    large = {
        n: F.interpolate(v[:, None], size=(12, 12), mode="bilinear")[:, 0].numpy()
        for n, v in given.items()
    }
    sure = {n: 1 / (1 + np.exp(-large[n])) for n in ("b1", "b2")}
    low = large["found"].min((1, 2), keepdims=True)
    found = (large["found"] - low) / (large["found"].max((1, 2), keepdims=True) - low)
    guides = {"b2": found, "b1": sure["b2"], "c": (sure["b1"] + sure["b2"]) / 2}
    wanted = np.zeros(5)
    for (name, guide), limits in zip(guides.items(), THRESHOLDS, strict=True):
        mask = by_loop(guide, *limits)
        assert {0, 1, UNKNOWN} <= set(mask.flat)
        for image in range(5):
            terms = [
                math.log(1 + math.exp(-v if m else v))
                for v, m in zip(large[name][image].flat, mask[image].flat, strict=True)
                if m != UNKNOWN
            ]
            wanted[image] += sum(terms) / len(terms)
    got = head().auxiliary_losses(tuple(given.values()), torch.zeros(5, 6), unused)
    assert np.allclose(got.numpy(), wanted, rtol=1e-10)


def test_a_teacher_learns_nothing_from_its_pupils() -> None:
    """B2's gradient is that of its own cross-entropy alone, and the class's map has none."""
    torch.manual_seed(4)
    b2, b1, c, found = (
        torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True) for _ in range(4)
    )
    made = head()
    made.auxiliary_losses((b2, b1, c, found.detach()), torch.zeros(2, 6), unused).sum().backward()
    mask = guidance(made_map(found), *THRESHOLDS[0])
    (alone,) = torch.autograd.grad(guided_losses(enlarged(b2, 12), *mask).sum(), b2)
    torch.testing.assert_close(b2.grad, alone)
    assert b1.grad is not None and b1.grad.abs().max() > 0
    assert c.grad is not None and c.grad.abs().max() > 0


def made_map(found: Tensor) -> Tensor:
    large = enlarged(found.detach(), 12)
    low, high = large.amin((1, 2), keepdim=True), large.amax((1, 2), keepdim=True)
    return (large - low) / (high - low)


def test_images_add_up_one_by_one() -> None:
    made, given, targets = head(), stages(), torch.eye(6)[[1, 0, 5, 1]]
    together = made.auxiliary_losses(made(given, targets)[1:], targets, unused)
    for image in range(4):
        one = tuple(maps[image : image + 1] for maps in given)
        told = targets[image : image + 1]
        alone = made.auxiliary_losses(made(one, told)[1:], told, unused)
        torch.testing.assert_close(alone[0], together[image])


@pytest.mark.parametrize("convolutions", [0, 2])
def test_each_branch_sees_its_stage(convolutions: int) -> None:
    made, (earlier, later, last) = head(convolutions=convolutions), stages()
    targets = 0.3 * torch.eye(6)[[1, 0, 5, 1]] + 0.1  # soft
    logits, b2, b1, c, found = made((earlier, later, last), targets)

    def conv(layer: Any, maps: Tensor) -> Tensor:
        weight, bias = layer[0].weight, layer[0].bias
        return F.conv2d(maps, weight, bias, padding=1).clamp(min=0)

    features = last
    for layer in made.convs:
        features = conv(layer, features)
    assert len(made.convs) == convolutions
    pixels = F.conv2d(features, made.fc.weight[:, :, None, None])
    torch.testing.assert_close(logits, pixels.mean((2, 3)) + made.fc.bias)
    torch.testing.assert_close(found, pixels[torch.arange(4), [1, 0, 5, 1]])
    assert not found.requires_grad
    shared, out = made.b_shared
    for got, own, stage in ((b1, made.b1, earlier), (b2, made.b2, later)):
        wanted = F.conv2d(conv(shared, conv(own, stage)), out.weight, out.bias)
        torch.testing.assert_close(got, wanted[:, 0])
    wanted = F.conv2d(conv(made.c[0], features), made.c[1].weight, made.c[1].bias)
    torch.testing.assert_close(c, wanted[:, 0])
    torch.testing.assert_close(made((earlier, later, last)), logits)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"upper": (0.7, 0.5)}, "three thresholds each"),
        ({"lower": (0.8, 0.1, 0.1)}, "must not be above"),
    ],
)
def test_thresholds_that_fit_nothing_are_refused(fields: Any, said: str) -> None:
    with pytest.raises(UserError, match=said):
        Spg(**fields)

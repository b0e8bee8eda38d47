"""Crops and colours against torchvision and against the definitions, image by image."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torchvision.transforms import v2

from cutmix_exp.data.augment import (
    crop_boxes,
    draw_colors,
    draw_crops,
    pad_images,
    recolor,
    resize_weights,
    resized_crops,
)
from cutmix_exp.data.sources import Dataset, Synthetic
from cutmix_exp.errors import UserError
from cutmix_exp.seeding import stream


def dataset(**fields: Any) -> Dataset:
    plain: dict[str, Any] = {"name": "s", "num_classes": 2, "mean": (0.5,) * 3, "std": (0.2,) * 3}
    return Synthetic(**plain | fields)


RANDOM = dataset(crop="random_resized")


def noise(count: int, height: int, width: int) -> torch.Tensor:
    values = np.random.default_rng(0).integers(0, 256, (count, 3, height, width), dtype=np.uint8)
    return torch.from_numpy(values)


# ------------------------------------------------------------------------------------- boxes


def test_boxes_have_the_law_of_torchvision() -> None:
    """Mean and spread of top, left, height and width against 4,000 draws of torchvision."""
    count, height, width = 4000, 60, 80
    ours = crop_boxes(RANDOM, draw_crops(RANDOM, count, stream(0, "crop")), height, width)
    torch.manual_seed(0)
    image = torch.zeros(3, height, width)
    drawn = (v2.RandomResizedCrop(8).make_params([image]) for _ in range(count))
    theirs = np.array([[d["top"], d["left"], d["height"], d["width"]] for d in drawn])
    error = theirs.std(0) / np.sqrt(count)
    assert (np.abs(ours.mean(0) - theirs.mean(0)) < 6 * error).all()
    np.testing.assert_allclose(ours.std(0), theirs.std(0), rtol=0.06)


def test_boxes_lie_inside_and_keep_area_and_aspect() -> None:
    boxes = crop_boxes(RANDOM, draw_crops(RANDOM, 5000, stream(1, "crop")), 64, 64)
    top, left, height, width = boxes.T
    assert (boxes >= 0).all() and (top + height <= 64).all() and (left + width <= 64).all()
    assert (height * width / 64**2).min() > 0.07 and (height * width).max() <= 64**2
    large = height * width > 900  # where rounding hardly moves the aspect
    assert (width / height)[large].min() > 0.70 and (width / height)[large].max() < 1.43


def test_a_box_worked_out_by_hand() -> None:
    # Area 0.08 + 0.92 * 0.5 = 0.54 of 100 x 200; aspect sqrt(3/4 * 4/3) = 1; side sqrt(10800) = 104
    # does not fit into 100. The second try: area 0.08 (1600), aspect 1: 40 x 40, at 0.5 of the rest.
    draws = np.zeros((1, 11, 2))
    draws[0, 0] = 0.5, 0.5
    draws[0, 1] = 0.0, 0.5
    draws[0, -1] = 0.5, 0.25
    assert crop_boxes(RANDOM, draws, 100, 200).tolist() == [[30, 40, 40, 40]]


def test_where_no_box_fits_the_largest_centred_one_is_taken() -> None:
    draws = np.zeros((1, 11, 2))
    draws[0, :-1] = 0.999, 0.5  # nearly the whole area as a square: never in 30 x 120
    assert crop_boxes(RANDOM, draws, 30, 120).tolist() == [[0, 40, 30, 40]]


@pytest.mark.parametrize("fields", [{"crop_scale": (0.5, 0.2)}, {"crop_ratio": (1.0,)}])
def test_a_range_that_is_none_is_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(UserError, match="smallest,largest"):
        dataset(**fields)


# ---------------------------------------------------------------------------------- resizing


@pytest.mark.parametrize("size", [16, 40, 64])
def test_resized_crops_are_within_a_grey_level_of_torchvision(size: int) -> None:
    images = noise(6, 40, 48)
    boxes = crop_boxes(RANDOM, draw_crops(RANDOM, 6, stream(2, "crop")), 40, 48)
    ours = resized_crops(images, torch.from_numpy(boxes), size)
    for image, box, one in zip(images, boxes.tolist(), ours, strict=True):
        theirs = v2.functional.resized_crop(image, *box, [size, size], antialias=True)
        assert one.dtype == torch.uint8
        assert (one.int() - theirs.int()).abs().max() <= 1


def test_the_whole_image_at_its_own_size_is_itself() -> None:
    images = noise(2, 12, 12)
    whole = torch.tensor([[0, 0, 12, 12]]).repeat(2, 1)
    assert torch.equal(resized_crops(images, whole, 12), images)


def test_weights_worked_out_by_hand() -> None:
    # Two pixels from pixels 1 and 2 of four: at 0.75 and 1.25 of the part's own [0, 2).
    weights = resize_weights(torch.tensor([1]), torch.tensor([2]), 4, 4)[0]
    wanted = [[0, 1, 0, 0], [0, 0.75, 0.25, 0], [0, 0.25, 0.75, 0], [0, 0, 1, 0]]
    torch.testing.assert_close(weights, torch.tensor(wanted, dtype=torch.float32))


def test_reflected_padding_is_numpys() -> None:
    images = noise(2, 5, 6)
    wanted = np.pad(images.numpy(), ((0, 0), (0, 0), (3, 3), (3, 3)), mode="reflect")
    np.testing.assert_array_equal(pad_images(images, 3, "reflect").numpy(), wanted)
    assert pad_images(images, 2, "zeros")[:, :, :2].sum() == 0


def test_reflection_by_more_than_the_image_is_refused() -> None:
    with pytest.raises(UserError, match="reflection pads by less"):
        dataset(padding_mode="reflect", crop_padding=32)


# ------------------------------------------------------------------------------------ colours


def jittered(image: np.ndarray, draw: np.ndarray) -> np.ndarray:
    """The CutMix authors' jitter and lighting, one operation after the other on pixels [H, W, 3]."""
    blends, order, noise = draw[:3], draw[3:6].astype(int), draw[6:]

    def grey(x: np.ndarray) -> np.ndarray:
        value = 0.299 * x[..., 0] + 0.587 * x[..., 1] + 0.114 * x[..., 2]
        return np.stack([value] * 3, axis=-1)

    for which in order:
        other = [np.zeros_like(image), np.full_like(image, grey(image).mean()), grey(image)][which]
        image = image * (1 - blends[which]) + other * blends[which]
    std = [0.2175, 0.0188, 0.0045]
    axes = [[-0.5675, 0.7192, 0.4009], [-0.5808, -0.0045, -0.8140], [-0.5836, -0.6948, 0.4203]]
    light = [sum(axes[c][k] * std[k] * noise[k] for k in range(3)) for c in range(3)]
    return image + np.array(light)


def test_colours_are_the_authors_chain_image_by_image() -> None:
    draws = draw_colors(dataset(color_jitter=0.4, lighting=0.1), 12, stream(3, "color"))
    images = noise(12, 7, 9).float() / 255
    ours = recolor(images, draws).permute(0, 2, 3, 1).numpy()
    wanted = [
        jittered(i.permute(1, 2, 0).double().numpy(), d) for i, d in zip(images, draws, strict=True)
    ]
    np.testing.assert_allclose(ours, np.stack(wanted), atol=2e-6)
    assert np.abs(ours - images.permute(0, 2, 3, 1).numpy()).max() > 0.1


def test_colours_have_their_laws() -> None:
    draws = draw_colors(dataset(color_jitter=0.4, lighting=0.1), 20_000, stream(4, "color"))
    assert np.abs(draws[:, :3]).max() < 0.4 and abs(draws[:, :3].std() - 0.8 / 12**0.5) < 0.003
    assert abs(draws[:, 6:].std() - 0.1) < 0.001
    orders, counts = np.unique(draws[:, 3:6], axis=0, return_counts=True)
    assert len(orders) == 6 and (np.abs(counts / 20_000 - 1 / 6) < 0.015).all()


def test_without_colour_images_stay_as_they_are() -> None:
    images = noise(3, 4, 4).float()
    assert recolor(images, draw_colors(dataset(), 3, stream(0, "color"))) is images


def test_what_is_drawn_for_an_image_does_not_depend_on_those_after_it() -> None:
    both = replace(RANDOM, color_jitter=0.4)
    for draw in (draw_crops,):
        np.testing.assert_array_equal(
            draw(both, 3, stream(5, "x")), draw(both, 8, stream(5, "x"))[:3]
        )

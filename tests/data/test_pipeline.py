"""Batches on the device against torchvision image by image, at any split over ranks."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import binom
from torch.nn import functional as F

from cutmix_exp.aug.base import Regularizer
from cutmix_exp.aug.image import Cutout
from cutmix_exp.aug.mix import CutMix, Mixup
from cutmix_exp.data import pipeline as pipeline_module
from cutmix_exp.data import sampling as sampling_module
from cutmix_exp.data.pipeline import BatchPlan, Normalizer, ResidentPipeline
from cutmix_exp.data.sources import Dataset, ImageSet
from cutmix_exp.distributed import share
from cutmix_exp.seeding import stream
from tests.helpers import config_of
from tests.oracles import mixing

CLASSES = 5
DATASET = Dataset(
    name="noise",
    num_classes=CLASSES,
    mean=(0.4913725490196078, 0.4823529411764706, 0.4466666666666667),
    std=(0.24705882352941178, 0.24352941176470588, 0.2615686274509804),
)
AUGS = {
    "baseline": Regularizer(),
    "cutmix": Regularizer(atoms={"cutmix": "mix"}, mix=CutMix(prob=1.0)),
    "cutmix_sample": Regularizer(
        atoms={"cutmix": "mix"}, mix=CutMix(prob=0.5, granularity="sample", partner="roll")
    ),
    "mixup": Regularizer(atoms={"mixup": "mix"}, mix=Mixup(prob=1.0)),
    "cutout+mixup": Regularizer(
        atoms={"cutout": "image", "mixup": "mix"},
        image={"cutout": Cutout(size=6)},
        mix=Mixup(prob=1.0),
    ),
}


def noise(size: int, height: int = 12, width: int = 12) -> ImageSet:
    rng = np.random.default_rng(3)
    images = rng.integers(0, 256, (size, 3, height, width), dtype=np.uint8)
    return ImageSet(torch.from_numpy(images), torch.from_numpy(rng.integers(0, CLASSES, size)))


def pipeline(
    aug: str = "baseline",
    *,
    train: ImageSet | None = None,
    seed: int = 0,
    batch_size: int = 8,
    **dataset: Any,
) -> ResidentPipeline:
    return ResidentPipeline(
        train or noise(23),
        dataclasses.replace(DATASET, **dataset),
        AUGS[aug],
        seed=seed,
        batch_size=batch_size,
        device=torch.device("cpu"),
    )


def every(plan: BatchPlan) -> np.ndarray:
    return np.arange(len(plan))


def reference_images(
    train: ImageSet, plan: BatchPlan, positions: np.ndarray, pad: int = 4
) -> np.ndarray:
    """What torchvision makes of the drawn crops and flips."""
    return np.stack(
        [
            mixing.pad_crop_flip_normalise(
                train.images[plan.index[p]].permute(1, 2, 0).numpy(),
                pad,
                int(plan.crop[p, 0]),
                int(plan.crop[p, 1]),
                bool(plan.mirrored[p]),
                DATASET.mean,
                DATASET.std,
            )
            for p in positions
        ]
    )


def test_the_device_and_the_host_cut_the_same_windows() -> None:
    """A GPU takes its windows from a view of all of them, and mirrors afterwards."""
    source = pipeline(train=noise(30, 10, 14), batch_size=30)
    plan = source.plan(epoch=0, step=0)
    corner = torch.from_numpy(plan.crop)
    cut = source.windows[torch.from_numpy(plan.index), :, corner[:, 0], corner[:, 1]]
    cut = pipeline_module.mirror(cut, torch.from_numpy(plan.mirrored))
    assert plan.mirrored.any()
    assert torch.equal(source.pixels(plan, every(plan)), cut)


def same_plans(one: BatchPlan, other: BatchPlan) -> bool:
    mixes = [(p.mix.partners, p.mix.weights, p.mix.boxes) for p in (one, other)]
    pairs = [
        *((getattr(one, f), getattr(other, f)) for f in ("index", "crop", "mirrored", "color")),
        *zip(*mixes, strict=True),
        *((one.image[name], other.image[name]) for name in one.image),
    ]
    equal = [(a is None and b is None) or np.array_equal(a, b) for a, b in pairs]
    return list(one.image) == list(other.image) and all(equal)


# ------------------------------------------------------------------------------------- images


@pytest.mark.parametrize("pad", [0, 1, 4])
@pytest.mark.parametrize(("height", "width"), [(32, 32), (12, 12), (6, 10)])
def test_images_equal_torchvision_bit_for_bit(height: int, width: int, pad: int) -> None:
    train = noise(200, height, width)
    source = pipeline(train=train, batch_size=200, crop_padding=pad)
    plan = source.plan(epoch=1, step=0)
    assert plan.mirrored.any()
    assert not plan.mirrored.all()
    for positions in (every(plan), np.array([199, 3, 3, 0])):
        images = source.images_at(plan, positions)
        assert images.dtype == torch.float32
        wanted = reference_images(train, plan, positions, pad)
        np.testing.assert_array_equal(images.numpy(), wanted)


def test_every_pixel_value_is_normalised_as_by_torchvision() -> None:
    grey = torch.arange(256, dtype=torch.uint8).reshape(1, 1, 16, 16).expand(1, 3, 16, 16)
    wanted = mixing.pad_crop_flip_normalise(
        grey[0].permute(1, 2, 0).numpy(), 0, 0, 0, False, DATASET.mean, DATASET.std
    )
    normalize = Normalizer(DATASET, torch.device("cpu"))
    np.testing.assert_array_equal(normalize(grey)[0].numpy(), wanted)


def test_the_inverse_of_the_normalisation_gives_the_pixels_back() -> None:
    normalize = Normalizer(DATASET, torch.device("cpu"))
    images = noise(4).images
    back = normalize.inverse(normalize(images))
    assert torch.equal((back * 255).round().to(torch.uint8), images)
    assert normalize.inverse(torch.full((1, 3, 2, 2), 99.0)).max() == 1
    assert normalize.inverse(torch.full((1, 3, 2, 2), -99.0)).min() == 0


def test_the_training_images_stay_as_they_are() -> None:
    train = noise(23)
    kept = train.images.clone()
    source = pipeline("cutout+mixup", train=train)
    plan = source.plan(0, 0)
    first = source.batch(plan, every(plan))
    assert torch.equal(train.images, kept)
    assert torch.equal(first.images, source.batch(plan, every(plan)).images)


# ------------------------------------------------------------------------------------ batches


def test_a_plain_batch_has_its_own_pixels_and_labels() -> None:
    train = noise(23)
    source = pipeline(train=train)
    plan = source.plan(0, 1)
    batch = source.batch(plan, every(plan))
    np.testing.assert_array_equal(batch.images.numpy(), reference_images(train, plan, every(plan)))
    assert torch.equal(batch.targets, F.one_hot(train.labels[plan.index], CLASSES).float())
    assert batch.global_size == 8


@pytest.mark.parametrize("aug", ["cutmix", "cutmix_sample"])
def test_a_cutmix_batch_equals_the_reference(aug: str) -> None:
    train = noise(40)
    source = pipeline(aug, train=train, batch_size=20)
    plan = source.plan(0, 1)
    assert plan.mix.boxes is not None
    assert (plan.mix.weights[0] < 1).any()
    images = reference_images(train, plan, every(plan))
    labels = F.one_hot(train.labels[plan.index], CLASSES).numpy()
    boxes = [(int(t), int(le), int(b), int(r)) for t, le, b, r in plan.mix.boxes]
    wanted_images, wanted_targets = mixing.cutmix(
        images, labels, plan.mix.partners[0].tolist(), boxes, 0.0, correct_lambda=True
    )
    batch = source.batch(plan, every(plan))
    np.testing.assert_array_equal(batch.images.numpy(), wanted_images)
    # Weights are kept as multiples of 2**-24, see two_weights.
    np.testing.assert_array_equal(batch.targets.numpy(), np.rint(wanted_targets * 2**24) / 2**24)


def test_holes_come_before_mixing_and_after_normalisation() -> None:
    train = noise(23)
    source = pipeline("cutout+mixup", train=train)
    plan = source.plan(0, 0)
    images = reference_images(train, plan, every(plan))
    centres = [(int(y), int(x)) for y, x in plan.image["cutout"]]
    holed = torch.from_numpy(mixing.cutout(images, centres, 6)).float()
    own, other = torch.from_numpy(plan.mix.weights)[:, :, None, None, None]
    partner = plan.mix.partners[0]
    batch = source.batch(plan, every(plan))
    assert torch.equal(batch.images, holed * own + holed[partner] * other)
    labels = F.one_hot(train.labels[plan.index], CLASSES).float()
    own, other = own[..., 0, 0], other[..., 0, 0]
    assert torch.equal(batch.targets, labels * own + labels[partner] * other)


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
@pytest.mark.parametrize("aug", AUGS)
def test_ranks_together_make_the_batch_of_one_process(aug: str, world_size: int) -> None:
    source = pipeline(aug)
    assert source.steps_per_epoch == 3
    sizes = []
    for step in range(3):
        plan = source.plan(epoch=2, step=step)
        whole = source.batch(plan, every(plan))
        ranks = [
            source.batch(plan, share(len(plan), rank, world_size)) for rank in range(world_size)
        ]
        assert torch.equal(torch.cat([r.images for r in ranks]), whole.images)
        assert torch.equal(torch.cat([r.targets for r in ranks]), whole.targets)
        assert {r.global_size for r in ranks} == {len(plan)}
        assert torch.equal(whole.targets.sum(1), torch.ones(len(plan)))
        sizes.append(len(plan))
    assert sizes == [8, 8, 7]


@pytest.mark.parametrize("aug", AUGS)
def test_any_positions_in_any_order_are_rows_of_the_batch(aug: str) -> None:
    source = pipeline(aug)
    plan = source.plan(0, 0)
    whole = source.batch(plan, every(plan))
    for positions in ([5], [7, 0, 3], [2, 2, 6]):
        part = source.batch(plan, np.array(positions))
        assert torch.equal(part.images, whole.images[positions])
        assert torch.equal(part.targets, whole.targets[positions])


@pytest.mark.parametrize("aug", AUGS)
def test_a_data_set_smaller_than_the_batch_is_one_batch(aug: str) -> None:
    source = pipeline(aug, batch_size=64)
    assert source.steps_per_epoch == 1
    plan = source.plan(0, 0)
    assert sorted(plan.index) == list(range(23))
    batch = source.batch(plan, every(plan))
    assert batch.images.shape == (23, 3, 12, 12)
    assert batch.global_size == 23


def test_one_training_image_can_be_mixed_with_itself() -> None:
    source = pipeline("mixup", train=noise(1))
    plan = source.plan(0, 0)
    batch = source.batch(plan, every(plan))
    assert batch.targets.max() == 1


# -------------------------------------------------------------------------------------- plans


def test_an_epoch_visits_every_image_once() -> None:
    source = pipeline()
    index = np.concatenate([source.plan(4, step).index for step in range(3)])
    assert sorted(index) == list(range(23))


@pytest.mark.parametrize("aug", AUGS)
def test_a_plan_depends_on_seed_epoch_and_step_alone(aug: str) -> None:
    wanted = pipeline(aug, seed=5).plan(epoch=2, step=1)
    used = pipeline(aug, seed=5)
    for epoch, step in ((0, 0), (2, 2), (3, 1), (1, 0)):
        used.plan(epoch, step)
    assert same_plans(used.plan(2, 1), wanted)
    assert same_plans(used.plan(2, 1, progress=0.7), wanted)
    for seed, epoch, step in ((6, 2, 1), (5, 1, 1), (5, 2, 0)):
        assert not same_plans(pipeline(aug, seed=seed).plan(epoch, step), wanted)


@pytest.mark.parametrize("change", [{"seed": 6}, {"epoch": 1}, {"step": 0}], ids=str)
def test_each_draw_changes_with_seed_epoch_and_step(change: dict[str, int]) -> None:
    at = {"seed": 5, "epoch": 2, "step": 1}
    one, other = (
        pipeline("cutout+mixup", seed=w["seed"]).plan(w["epoch"], w["step"])
        for w in (at, at | change)
    )
    for draw in ("index", "crop"):
        assert not np.array_equal(getattr(one, draw), getattr(other, draw))
    assert not np.array_equal(one.image["cutout"], other.image["cutout"])
    assert one.mix.weights[0, 0] != other.mix.weights[0, 0]


@pytest.mark.parametrize("aug", AUGS)
def test_methods_share_order_crops_and_flips(aug: str) -> None:
    """Common random numbers: what a method draws beyond these shifts none of them."""
    for step in range(3):
        plain, other = (pipeline(name, seed=1).plan(1, step) for name in ("baseline", aug))
        for draw in ("index", "crop", "mirrored", "color"):
            np.testing.assert_array_equal(getattr(plain, draw), getattr(other, draw))


def test_an_atom_draws_the_same_in_company() -> None:
    alone = Regularizer(atoms={"cutout": "image"}, image={"cutout": Cutout(size=6)})
    args: dict[str, Any] = {"seed": 0, "batch_size": 8, "device": torch.device("cpu")}
    plan = ResidentPipeline(noise(23), DATASET, alone, **args).plan(0, 0)
    together = pipeline("cutout+mixup").plan(0, 0)
    np.testing.assert_array_equal(plan.image["cutout"], together.image["cutout"])
    assert same_plans(dataclasses.replace(together, image={}), pipeline("mixup").plan(0, 0))


def test_every_purpose_has_a_stream_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[Any, ...]] = []

    def recorded(*key: Any) -> np.random.Generator:
        asked.append(key)
        return stream(*key)

    for module in (pipeline_module, sampling_module):
        monkeypatch.setattr(module, "stream", recorded)
    pipeline("cutout+mixup", seed=3).plan(epoch=1, step=2)
    at = [
        ("color", 1, 2),
        ("crop", 1, 2),
        ("flip", 1, 2),
        ("image/cutout", 1, 2),
        ("mix", 1, 2),
        ("order", 1),
    ]
    assert sorted(asked) == sorted((3, *key) for key in at)


# ----------------------------------------------------------------------------- crops and flips


def test_about_half_of_the_images_are_flipped() -> None:
    plan = pipeline(train=noise(4000, 2, 2), batch_size=4000).plan(0, 0)
    low, high = binom.interval(0.9999, 4000, 0.5)
    assert low <= plan.mirrored.sum() <= high


def test_without_flip_none_is_flipped() -> None:
    source = pipeline(train=noise(400, 2, 2), batch_size=400, flip=False)
    assert not any(source.plan(epoch, 0).mirrored.any() for epoch in range(5))


def test_digits_are_never_flipped() -> None:
    assert config_of("dataset=digits", "model=resnet").dataset.flip is False


def test_all_crop_offsets_occur_equally_often() -> None:
    plan = pipeline(train=noise(9000, 2, 2), batch_size=9000).plan(0, 0)
    assert plan.crop.shape == (9000, 2)
    low, high = binom.interval(0.99999, 9000, 1 / 9)
    for axis in (0, 1):
        values, counts = np.unique(plan.crop[:, axis], return_counts=True)
        assert values.tolist() == list(range(9))
        assert low <= counts.min()
        assert counts.max() <= high


def test_without_padding_nothing_is_cropped() -> None:
    plan = pipeline(crop_padding=0).plan(0, 0)
    np.testing.assert_array_equal(plan.crop, 0)

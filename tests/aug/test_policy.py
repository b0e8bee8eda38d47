"""Operations on bytes: torchvision's own, keyed by a seed for each image, on both paths of data."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torchvision.transforms import v2

from cutmix_exp.aug.base import BatchShape, PixelOp, Regularizer
from cutmix_exp.aug.image import Cutout
from cutmix_exp.aug.policy import AugMix, AutoAugment, RandAugment, TrivialAugmentWide
from cutmix_exp.data.pipeline import make_pipeline
from cutmix_exp.data.sources import ImageSet, Synthetic
from cutmix_exp.seeding import stream
from tests.data.test_streaming import SIDE, dataset, write_images

OPS: dict[str, tuple[PixelOp, Any]] = {
    "randaugment": (RandAugment(num_ops=3, magnitude=7), v2.RandAugment(3, 7)),
    "trivialaugment": (TrivialAugmentWide(), v2.TrivialAugmentWide()),
    "autoaugment": (AutoAugment(policy="cifar10"), v2.AutoAugment(v2.AutoAugmentPolicy.CIFAR10)),
    "augmix": (AugMix(severity=5), v2.AugMix(severity=5, all_ops=False)),
}


def image(seed: int = 0) -> torch.Tensor:
    values = np.random.default_rng(seed).integers(0, 256, (3, SIDE, SIDE), dtype=np.uint8)
    return torch.from_numpy(values)


@pytest.mark.parametrize("name", OPS)
def test_it_is_torchvisions_under_the_seed(name: str) -> None:
    op, theirs = OPS[name]
    changed = 0
    for seed in range(12):
        torch.manual_seed(seed)
        wanted = theirs(image())
        assert torch.equal(op.change(image(), seed), wanted)
        changed += not torch.equal(wanted, image())
    assert changed > 5


def test_torchs_generator_is_left_as_it_was() -> None:
    torch.manual_seed(3)
    before = torch.get_rng_state()
    OPS["randaugment"][0].change(image(), 5)
    assert torch.equal(torch.get_rng_state(), before)


def test_each_image_has_a_seed_of_its_own() -> None:
    seeds = RandAugment().sample(BatchShape(50, 8, 8), 0.0, stream(0, "image/x"))
    assert len(set(seeds.tolist())) == 50


def test_bytes_are_changed_before_all_else() -> None:
    """A hole cut before RandAugment would be moved and coloured by it."""
    images = torch.stack([image(i) for i in range(8)])
    data = Synthetic(name="s", num_classes=8, image_size=SIDE, mean=(0.5,) * 3, std=(0.2,) * 3)
    aug = Regularizer(
        atoms={"cutout": "image", "randaugment": "image"},
        image={"cutout": Cutout(size=4), "randaugment": RandAugment()},
    )
    settings: dict[str, Any] = {"seed": 0, "batch_size": 8, "device": torch.device("cpu")}
    made = make_pipeline(ImageSet(images, torch.arange(8)), data, aug, **settings)
    plan = made.plan(0, 0)
    everything = np.arange(8)
    plain = made.normalize(made.pixels(plan, everything))
    got = made.batch(plan, everything).images
    holes = Cutout(size=4).apply(plan.image["cutout"], torch.ones_like(plain)) == 0
    assert (got[holes] == 0).all() and torch.equal(got[~holes], plain[~holes])


@pytest.mark.parametrize("workers", [0, 2])
def test_both_paths_change_the_same_bytes(tmp_path: Path, workers: int) -> None:
    from PIL import Image

    files = write_images(tmp_path, 6, SIDE, SIDE)
    held = [np.asarray(Image.open(files.path(i))) for i in range(len(files))]
    images = torch.from_numpy(np.stack(held)).permute(0, 3, 1, 2).contiguous()
    aug = Regularizer(atoms={"r": "image"}, image={"r": RandAugment()})
    data = dataset(crop="pad", workers=workers)
    settings: dict[str, Any] = {"seed": 2, "batch_size": 6, "device": torch.device("cpu")}
    resident = make_pipeline(ImageSet(images, files.labels), data, aug, **settings)
    streaming = make_pipeline(files, data, aug, **settings)
    everything = np.arange(6)
    (streamed,) = streaming.plans(0, 0, 1)
    one = resident.batch(resident.plan(0, 0), everything).images
    assert torch.equal(one, streaming.batch(streamed, everything).images)

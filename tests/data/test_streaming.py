"""Files that are decoded when needed: the same images whatever the workers, ranks and path."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from cutmix_exp.aug.base import NoMix, Regularizer
from cutmix_exp.aug.mix import CutMix
from cutmix_exp.data.pipeline import BatchPlan, ResidentPipeline, make_pipeline
from cutmix_exp.data.sources import Dataset, FileSet, ImageSet, Synthetic
from cutmix_exp.data.streaming import StreamedSet, StreamingPipeline
from cutmix_exp.errors import UserError

SIDE = 16
CPU = torch.device("cpu")
CUTMIX = Regularizer(atoms={"cutmix": "mix"}, mix=CutMix(prob=1.0))


def dataset(**fields: Any) -> Dataset:
    plain: dict[str, Any] = {
        "name": "files",
        "num_classes": 3,
        "image_size": SIDE,
        "mean": (0.5,) * 3,
        "std": (0.2,) * 3,
        "crop": "random_resized",
        "workers": 0,
    }
    return Synthetic(**plain | fields)


def write_images(folder: Path, count: int, height: int, width: int) -> FileSet:
    """Smooth random PNGs, and the set of them."""
    rng = np.random.default_rng(0)
    for i in range(count):
        coarse = Image.fromarray(rng.integers(0, 256, (4, 4, 3), dtype=np.uint8))
        coarse.resize((width, height), Image.Resampling.BICUBIC).save(folder / f"{i}.png")
    names = np.array([os.fsencode(f"{i}.png") for i in range(count)])
    sizes = np.array([(folder / f"{i}.png").stat().st_size for i in range(count)])
    return FileSet(folder, names, sizes, torch.arange(count) % 3)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> FileSet:
    return write_images(tmp_path_factory.mktemp("images"), 23, 24, 30)


def pipeline(
    files: FileSet, rank: int = 0, size: int = 1, aug: Regularizer = CUTMIX, **fields: Any
) -> StreamingPipeline:
    made = make_pipeline(
        files,
        dataset(**fields),
        aug,
        seed=5,
        batch_size=8,
        device=CPU,
        shares=size,
        rank=rank,
        world_size=size,
    )
    assert isinstance(made, StreamingPipeline)
    return made


def epoch(made: StreamingPipeline, first: int = 0) -> list[tuple[BatchPlan, torch.Tensor]]:
    """All batches of an epoch, whole."""
    out = []
    for plan in made.plans(1, first, 4):
        out.append((plan, made.batch(plan, np.arange(len(plan))).images))
    return out


def test_nothing_depends_on_the_number_of_workers(files: FileSet) -> None:
    epochs = [epoch(pipeline(files, workers=workers)) for workers in (0, 1, 3)]
    assert [len(plan) for plan, _ in epochs[0]] == [8, 8, 7]
    for other in epochs[1:]:
        for (one, images), (two, others) in zip(epochs[0], other, strict=True):
            assert torch.equal(images, others)
            assert one.mix.boxes is not None and two.mix.boxes is not None
            np.testing.assert_array_equal(one.mix.boxes, two.mix.boxes)


def test_an_epoch_goes_on_where_it_stopped(files: FileSet) -> None:
    for (_, whole), (_, rest) in zip(
        epoch(pipeline(files))[1:], epoch(pipeline(files, workers=1), first=1), strict=True
    ):
        assert torch.equal(whole, rest)


def test_streamed_images_are_those_of_the_plan_made_on_the_spot(files: FileSet) -> None:
    made = pipeline(files, workers=1)
    for step, (_, streamed) in enumerate(epoch(made)):
        plan = made.plan(1, step)
        assert torch.equal(made.batch(plan, np.arange(len(plan))).images, streamed)


@pytest.mark.parametrize("crop", ["random_resized", "pad"])
def test_both_paths_make_the_same_images(tmp_path: Path, crop: str) -> None:
    """Of images that have the network's size already: within a grey level, colour and all."""
    files = write_images(tmp_path, 10, SIDE, SIDE)
    padding = {"padding_mode": "reflect"} if crop == "pad" else {}
    data = dataset(crop=crop, color_jitter=0.4, lighting=0.1, **padding)
    held = [np.asarray(Image.open(files.path(i))) for i in range(len(files))]
    images = torch.from_numpy(np.stack(held)).permute(0, 3, 1, 2).contiguous()
    settings: dict[str, Any] = {"seed": 2, "batch_size": 10, "device": CPU}
    resident = make_pipeline(ImageSet(images, files.labels), data, CUTMIX, **settings)
    streaming = make_pipeline(files, data, CUTMIX, **settings)
    assert isinstance(resident, ResidentPipeline)
    everything = np.arange(10)
    one = resident.batch(resident.plan(0, 0), everything)
    two = streaming.batch(streaming.plan(0, 0), everything)
    assert torch.equal(one.targets, two.targets)
    level = 1 / 255 / 0.2
    assert (one.images - two.images).abs().max() < 2.5 * level
    if crop == "pad":
        torch.testing.assert_close(one.images, two.images, atol=1e-6, rtol=0)


@pytest.mark.parametrize("size", [2, 3])
def test_ranks_pair_within_their_shares(files: FileSet, size: int) -> None:
    """Same order, crops, boxes and lambdas as one process; each rank decodes its share alone."""
    alone = pipeline(files)
    for step, last in ((0, False), (2, True)):
        wanted = alone.plan(1, step)
        seen: list[int] = []
        for rank in range(size):
            made = pipeline(files, rank, size)
            plan = made.plan(1, step)
            for name in ("index", "crop", "mirrored"):
                np.testing.assert_array_equal(getattr(plan, name), getattr(wanted, name))
            assert plan.mix.boxes is not None and wanted.mix.boxes is not None
            np.testing.assert_array_equal(plan.mix.boxes, wanted.mix.boxes)
            np.testing.assert_array_equal(plan.mix.weights, wanted.mix.weights)
            held = made.needed(plan).tolist()
            assert len(held) in ((7 // size, -(-7 // size)) if last else (8 // size, -(-8 // size)))
            seen += held
        assert sorted(seen) == list(range(len(wanted)))


def test_a_rank_without_images_has_one_to_compute_on(files: FileSet) -> None:
    made = pipeline(files.at(np.arange(2)), rank=0, size=3)
    plan = made.plan(0, 0)
    assert made.needed(plan).tolist() == [1]


def test_a_file_that_is_no_image_is_named(files: FileSet, tmp_path: Path) -> None:
    broken = write_images(tmp_path, 4, SIDE, SIDE)
    cut = broken.path(2).read_bytes()[:60]
    broken.path(2).write_bytes(cut)
    for workers in (0, 2):
        with pytest.raises(UserError, match=r"2\.png cannot be read as an image") as caught:
            epoch(pipeline(broken, workers=workers))
        assert "Traceback" not in str(caught.value)
        assert "dataset.bad_images=skip" in str(caught.value)
    broken.path(2).unlink()
    with pytest.raises(UserError, match=r"2\.png cannot be read: No such file .* continues"):
        epoch(pipeline(broken, workers=0))


@pytest.mark.parametrize("workers", [0, 2])
def test_test_images_are_centre_crops_each_once(files: FileSet, workers: int) -> None:
    from torchvision.transforms import v2

    fields = {"eval_size": None, "eval_resize": 20, "workers": workers}
    data = StreamedSet(files, FilesAtTwoSizes(**LARGER | fields), CPU)
    parts = [np.arange(0, 10), np.arange(10, 23)]
    got = torch.cat(list(data.batches(parts)))
    usual = v2.Compose([v2.Resize(20), v2.CenterCrop(SIDE), v2.PILToTensor()])
    wanted = torch.stack([usual(Image.open(files.path(i))) for i in range(23)])
    assert (got.int() - wanted.int()).abs().max() <= 2  # PIL and tensors round differently


def test_test_images_may_be_larger_than_training_images(files: FileSet) -> None:
    """torchvision's recipe trains at 176 px and scores at 224."""
    data = StreamedSet(files, FilesAtTwoSizes(**LARGER), CPU)
    (got,) = data.batches([np.arange(3)])
    assert got.shape == (3, 3, SIDE + 4, SIDE + 4)
    with pytest.raises(UserError, match="only sets that stream"):
        dataset(eval_size=SIDE + 4)


class FilesAtTwoSizes(Synthetic):
    @property
    def streams(self) -> bool:
        return True


LARGER: dict[str, Any] = {
    "name": "files",
    "num_classes": 3,
    "image_size": SIDE,
    "eval_size": SIDE + 4,
    "eval_resize": 24,
    "mean": (0.5,) * 3,
    "std": (0.2,) * 3,
    "workers": 0,
}


def test_the_loader_leaves_torchs_generator_alone(files: FileSet) -> None:
    torch.manual_seed(0)
    before = torch.get_rng_state()
    epoch(pipeline(files, workers=1, aug=Regularizer(mix=NoMix())))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("workers", [0, 3])
def test_the_decoding_rate_is_that_of_all_workers_on_all_ranks(
    files: FileSet, workers: int
) -> None:
    made = pipeline(files, size=2, workers=workers)
    assert made.decoding_rate == np.inf
    images = torch.zeros(10, 3, 4, 4, dtype=torch.uint8)
    for seconds in (0.5, 1.5):
        made.decoder._checked((images, seconds))
    # 20 images took one worker two seconds: 10 a second, from each worker of each rank.
    assert made.decoding_rate == 10 * max(workers, 1) * 2


def test_workers_say_how_long_they_took(files: FileSet) -> None:
    made = pipeline(files, workers=2)
    images = sum(len(plan) for plan, _ in epoch(made))
    assert made.decoder.decoded == images
    assert 0 < made.decoder.seconds < np.inf

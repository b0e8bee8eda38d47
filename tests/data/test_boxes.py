"""True boxes in their published layouts, and where they lie in the images that are evaluated."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cutmix_exp.data.boxes import Framing
from cutmix_exp.data.decoding import fit
from cutmix_exp.data.sources import Dataset, FileSet, ImageSet
from cutmix_exp.data.streaming import StreamedSet, framed
from cutmix_exp.errors import UserError
from tests.data import trees
from tests.helpers import config_of

CPU = torch.device("cpu")


def dataset(name: str, root: Path, *more: str) -> Any:
    return config_of(f"dataset={name}", "model=resnet", f"dataset.root={root}", *more).dataset


# ------------------------------------------------------------------------------------- framing


@given(
    height=st.integers(40, 120),
    width=st.integers(40, 120),
    resized=st.integers(24, 64),
    size=st.integers(16, 48),
    stretch=st.booleans(),
)
def test_a_box_goes_where_its_pixels_go(
    height: int, width: int, resized: int, size: int, stretch: bool
) -> None:
    """The oracle is the image itself: a white rectangle, found again after torchvision's resize and
    crop (which pads where the image is smaller than the crop)."""
    box = np.array([[height // 4, width // 5, height // 4 + 20, width // 5 + 20]], dtype=float)
    image = torch.zeros(3, height, width, dtype=torch.uint8)
    (top, left, bottom, right) = box[0].astype(int)
    image[:, top:bottom, left:right] = 255
    framing = Framing(resized, size, stretch)
    seen = framed(image, framing)[0] >= 128
    moved = framing.boxes(box, height, width)
    assert seen.shape == (size, size)
    if not seen.any():  # cut away, or thinner than a pixel
        assert not len(moved) or (moved[:, 2:] - moved[:, :2]).min() < 1.5
        return
    rows, columns = (np.flatnonzero(seen.numpy().any(axis)) for axis in (1, 0))
    found = [rows[0], columns[0], rows[-1] + 1, columns[-1] + 1]
    assert np.abs(moved[0] - found).max() <= 1.0  # interpolation blurs the edge


def test_what_is_outside_of_the_crop_is_cut_or_dropped() -> None:
    framing = Framing(resized=40, size=20)  # of a 40x80 image: rows 10 to 30, columns 30 to 50
    boxes = np.array([[0.0, 0, 40, 80], [12, 32, 20, 45], [0, 0, 10, 80]])
    moved = framing.boxes(boxes, 40, 80)
    assert moved.tolist() == [[0, 0, 20, 20], [2, 2, 10, 15]]


def test_stretching_squeezes_the_longer_side() -> None:
    moved = Framing(40, 40, stretch=True).boxes(np.array([[10.0, 20, 20, 40]]), 40, 80)
    assert moved.tolist() == [[10, 10, 20, 20]]


# ------------------------------------------------------------------------------------- layouts


def test_tiny_imagenet(tmp_path: Path) -> None:
    """Corners in both of its lists are inclusive: 0 63 is the whole side."""
    data = dataset(
        "tiny_imagenet",
        trees.tiny_imagenet(tmp_path),
        "dataset.num_classes=3",
        "dataset.val_size=3",
    )
    assert data.missing_boxes() == ""
    splits = data.load()
    assert [b.tolist() for b in data.boxes(splits.test)] == [[[32, 0, 63, 45]]] * 6
    assert [b.tolist() for b in data.boxes(splits.val)] == [[[0, 0, 64, 64]]] * 3


def test_boxes_follow_the_order_of_the_set(tmp_path: Path) -> None:
    """The test images of Tiny ImageNet are sorted by class, its list is not; an image that is left
    out takes its box with it."""
    root = trees.tiny_imagenet(tmp_path)
    file = root / "val/val_annotations.txt"
    rows = [line.split("\t") for line in file.read_text().splitlines()]
    marked = [[*row[:2], "0", "0", str(10 + i), "20"] for i, row in enumerate(rows)]
    file.write_text("".join("\t".join(row) + "\n" for row in marked))
    trees.truncate(root / "val/images/val_4.JPEG")
    for more in (["dataset.delivery=resident"], ["dataset.delivery=streaming"]):
        data = dataset(
            "tiny_imagenet", root, "dataset.num_classes=3", "dataset.bad_images=skip", *more
        )
        test = data.load().test
        assert isinstance(test, ImageSet if data.delivery == "resident" else FileSet)
        rights = [int(boxes[0, 3]) for boxes in data.boxes(test)]
        number = {right: right - 11 for right in rights}
        assert sorted(number.values()) == [0, 1, 2, 3, 5]
        assert [
            row for right in rights for row in [(number[right] + 1) % 3]
        ] == test.labels.tolist()


def test_resident_images_of_another_size(tmp_path: Path) -> None:
    data = dataset(
        "tiny_imagenet",
        trees.tiny_imagenet(tmp_path),
        "dataset.num_classes=3",
        "dataset.image_size=32",
    )
    assert data.boxes(data.load().test)[0].tolist() == [[16, 0, 31.5, 22.5]]


def test_cub(tmp_path: Path) -> None:
    """The published layout: split, classes and boxes by the images' numbers; images of 60x80 px are
    stretched to 256 and cropped to 224, and their boxes and masks with them."""
    data = dataset("cub", trees.cub(tmp_path), "dataset.num_classes=2", "dataset.workers=0")
    splits = data.load()
    assert splits.class_names == ("Black footed Albatross", "Laysan Albatross")
    assert (len(splits.train), len(splits.test)) == (4, 2)
    assert splits.test.labels.tolist() == [0, 1]
    assert [name.endswith("_0002.jpg") for name in trees.names_of(splits.test)] == [True, True]
    (box, _), mask = data.boxes(splits.test), data.masks(splits.test)(0)
    wanted = np.array([10 / 60, 16 / 80, 40 / 60, 36 / 80]) * 256 - 16
    assert box.tolist() == [pytest.approx(wanted.tolist())]
    (images,) = StreamedSet(splits.test, data, CPU).batches([np.arange(2)])
    for seen in (images[0, 0] >= 128, mask):
        assert seen.shape == (224, 224)
        rows, columns = (np.flatnonzero(seen.numpy().any(axis)) for axis in (1, 0))
        found = [rows[0], columns[0], rows[-1] + 1, columns[-1] + 1]
        assert np.abs(wanted - found).max() <= 2.5  # JPEG and interpolation


@pytest.mark.parametrize(
    ("file", "change", "said"),
    [
        ("bounding_boxes.txt", lambda t: t.replace("3 16.0", "3 wide"), "no box"),
        ("bounding_boxes.txt", lambda t: t.replace("3 16.0", "9 16.0"), "has no boxes of 1 of 2"),
    ],
)
def test_damaged_lists_of_boxes(tmp_path: Path, file: str, change: Any, said: str) -> None:
    data = dataset("cub", trees.cub(tmp_path), "dataset.num_classes=2")
    test = data.load().test
    (tmp_path / file).write_text(change((tmp_path / file).read_text()))
    with pytest.raises(UserError, match=said):
        data.boxes(test)


@pytest.mark.parametrize(
    ("file", "change", "said"),
    [
        ("images.txt", lambda t: t.replace("6 ", "7 "), "do not agree on image 7"),
        ("image_class_labels.txt", lambda t: t.replace("6 2", "6 1"), "do not agree on image 6"),
        ("train_test_split.txt", lambda t: t.replace("6 0", "6 2"), "train_test_split 2"),
        ("images.txt", lambda t: "\n".join(t.splitlines()[:-1]), "they differ in 002"),
        ("classes.txt", lambda t: t.splitlines()[0] + "\n", "has 1 classes"),
        ("classes.txt", lambda t: "1\n2\n", "expected two columns"),
    ],
)
def test_cub_lists_that_disagree(tmp_path: Path, file: str, change: Any, said: str) -> None:
    trees.cub(tmp_path)
    (tmp_path / file).write_text(change((tmp_path / file).read_text()))
    with pytest.raises(UserError, match=said):
        dataset("cub", tmp_path, "dataset.num_classes=2").load()


def test_missing_cub_says_where_it_is_published(tmp_path: Path) -> None:
    data = dataset("cub", tmp_path)
    for said in (str(tmp_path), "bounding_boxes.txt", "65de6-vp158", "segmentations.tgz"):
        assert said in data.missing_boxes()


STEMS = ("ILSVRC2012_val_00000001", "ILSVRC2012_val_00000002")


@pytest.fixture
def imagenet(tmp_path: Path) -> Dataset:
    for part, name in (("train", "n01440764_1"), ("val", STEMS[0]), ("val", STEMS[1])):
        for synset in ("n01440764", "n01443537") if part == "train" else ("n01440764",):
            trees.write_image(tmp_path / part / synset / f"{name}.JPEG", 1, (100, 200))
    trees.write_image(tmp_path / "val/n01443537/ILSVRC2012_val_00000003.JPEG", 1, (100, 200))
    return dataset(
        "imagenet",
        tmp_path,
        "dataset.num_classes=2",
        "dataset.eval_resize=100",
        "dataset.image_size=50",
    )  # type: ignore[no-any-return]


def test_imagenet_by_xml_and_by_csv(imagenet: Dataset) -> None:
    """Two objects, one of which lies outside of the crop (rows 25 to 75, columns 75 to 125)."""
    folder, test = Path(imagenet.root) / "boxes", imagenet.load().test
    assert str(folder) in imagenet.missing_boxes()
    assert "ILSVRC2012_bbox_val_v3.tgz" in imagenet.missing_boxes()
    boxes = [(80, 30, 99, 59), (0, 0, 70, 99)]
    for number in (1, 2, 3):
        trees.voc(folder / f"val/ILSVRC2012_val_0000000{number}.xml", boxes[: 1 + (number == 2)])
    assert imagenet.missing_boxes() == ""
    by_xml = [b.tolist() for b in imagenet.boxes(test)]
    assert by_xml == [[[5, 5, 35, 25]]] * 3
    (folder / "val/ILSVRC2012_val_00000002.xml").write_text("<annotation>")
    with pytest.raises(UserError, match=r"00000002.xml cannot be read"):
        imagenet.boxes(test)

    rows = [f"{stem},n01440764 80 30 99 59 n01440764 0 0 70 99 " for stem in (*STEMS, "x")]
    solution = folder / "LOC_val_solution.csv"
    solution.write_text("\n".join(["ImageId,PredictionString", *rows]))
    with pytest.raises(UserError, match="has no boxes of 1 of 3 images"):
        imagenet.boxes(test)
    solution.write_text(solution.read_text().replace("\nx,", "\nILSVRC2012_val_00000003,"))
    assert [b.tolist() for b in imagenet.boxes(test)] == by_xml


def test_boxes_of_training_images_of_imagenet(imagenet: Dataset) -> None:
    train = imagenet.load().train
    trees.voc(Path(imagenet.root) / "boxes/n01440764/n01440764_1.xml", [(80, 30, 99, 59)])
    trees.voc(Path(imagenet.root) / "boxes/val/x.xml", [])
    assert [b.tolist() for b in imagenet.boxes(train)] == [[[5, 5, 35, 25]]] * 2


def test_digits_have_boxes_around_the_ink() -> None:
    data = config_of("dataset=digits", "model=resnet").dataset
    test = data.load().test
    assert isinstance(test, ImageSet)
    (top, left, bottom, right), mask = data.boxes(test)[7][0].astype(int), data.masks(test)
    assert mask is not None
    ink = test.images[7, 0].numpy() > 0
    assert ink[top:bottom, left:right].sum() == ink.sum() == int(mask(7).sum())
    assert (
        ink[top].any() and ink[bottom - 1].any() and ink[:, left].any() and ink[:, right - 1].any()
    )


def test_sets_without_boxes_say_so() -> None:
    data = config_of("dataset=synthetic", "model=resnet").dataset
    assert "tiny_imagenet" in data.missing_boxes()
    with pytest.raises(UserError, match="synthetic has no boxes"):
        data.boxes(data.load().test)


# --------------------------------------------------------------------------------- window crop


def test_training_windows_are_of_the_stretched_image(tmp_path: Path) -> None:
    from torchvision.transforms.v2 import functional as vision

    from cutmix_exp.data.augment import draw_crops
    from cutmix_exp.data.decoding import decode
    from cutmix_exp.data.streaming import cropped
    from cutmix_exp.seeding import stream

    data = dataset(
        "cub",
        trees.cub(tmp_path),
        "dataset.num_classes=2",
        "dataset.image_size=40",
        "dataset.crop_resize=48",
    )
    train = data.load().train
    draws = draw_crops(data, 4000, stream(0, "crop"))
    assert draws.min() == 0 and draws.max() == 8 and set(draws[:, 0]) == set(range(9))
    image = decode(train.path(1))
    whole = vision.resize(image, [48, 48], antialias=True)
    got = cropped(image, data, np.array([3, 8]), False)
    assert torch.equal(got, whole[:, 3:43, 8:48])
    assert torch.equal(cropped(image, data, np.array([3, 8]), True), got.flip(-1))


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (
            ["dataset=digits", "++dataset.crop=window", "++dataset.crop_resize=40"],
            "images that stream",
        ),
        (["dataset=digits", "++dataset.eval_fit=stretch"], "images that stream"),
        (["dataset=cub", "dataset.crop_resize=200"], "less than dataset.image_size=224"),
        (["dataset=cub", "dataset.crop_resize=null"], "set both, or neither"),
        (["dataset=cub", "dataset.crop=random_resized"], "set both, or neither"),
    ],
)
def test_windows_that_cannot_be(words: list[str], said: str) -> None:
    with pytest.raises(UserError, match=said):
        config_of(*words, "model=resnet")


def test_framing_equals_what_makes_images_resident() -> None:
    image = torch.zeros(3, 50, 70, dtype=torch.uint8)
    image[:, 10:30, 20:50] = 255
    seen = fit(image, 40)[0] >= 128
    rows, columns = (np.flatnonzero(seen.numpy().any(axis)) for axis in (1, 0))
    moved = Framing(40, 40).boxes(np.array([[10.0, 20, 30, 50]]), 50, 70)[0]
    assert np.abs(moved - [rows[0], columns[0], rows[-1] + 1, columns[-1] + 1]).max() <= 1

"""Sets of image files in their published layouts, listed, streamed and decoded."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torchvision

from cutmix_exp.composition import compose
from cutmix_exp.config import Config, Hardware, from_dict, resolve
from cutmix_exp.data.decoding import decode, fit
from cutmix_exp.data.folders import ImageFolder, ImageNet, TinyImageNet
from cutmix_exp.data.sources import FileSet, ImageSet, Splits
from cutmix_exp.errors import UserError
from tests.data.trees import SYNSETS, class_trees, names_of, tiny_imagenet, truncate, write_image

STATISTICS: dict[str, Any] = {"mean": (0.5, 0.5, 0.5), "std": (0.25, 0.25, 0.25)}
CPU = Hardware(cpu_bf16=True)


def imagenet(root: Path, **fields: Any) -> ImageNet:
    given = {"name": "imagenet", "num_classes": 3, "image_size": 32, **STATISTICS, **fields}
    return ImageNet(root=str(root), **given)


def tiny(root: Path, **fields: Any) -> TinyImageNet:
    given = {"name": "tiny_imagenet", "num_classes": 3, "image_size": 64, **STATISTICS, **fields}
    return TinyImageNet(root=str(root), **given)


def own(root: Path, **fields: Any) -> ImageFolder:
    return ImageFolder(**{"name": "image_folder", "root": str(root), "image_size": 32, **fields})


def streamed(splits: Splits) -> tuple[FileSet, FileSet]:
    assert isinstance(splits.train, FileSet)
    assert isinstance(splits.test, FileSet)
    return splits.train, splits.test


def resident(splits: Splits) -> tuple[ImageSet, ImageSet]:
    assert isinstance(splits.train, ImageSet)
    assert isinstance(splits.test, ImageSet)
    return splits.train, splits.test


# ----------------------------------------------------------------------------------- listing


@pytest.mark.parametrize("below", ["", "imagenet"])
def test_imagenet_streams_the_files_that_torchvision_lists(tmp_path: Path, below: str) -> None:
    class_trees(tmp_path / below)
    splits = imagenet(tmp_path).load()
    for part, name in zip(streamed(splits), ("train", "val"), strict=True):
        wanted = torchvision.datasets.ImageFolder(str(tmp_path / below / name)).samples
        assert [(str(part.path(i)), int(part.labels[i])) for i in range(len(part))] == wanted
        assert part.sizes.tolist() == [Path(path).stat().st_size for path, _ in wanted]
        assert part.labels.dtype == torch.int64
    assert splits.class_names == SYNSETS
    assert splits.skipped == 0
    assert not (tmp_path / ".cache").exists()


def test_nested_folders_count_and_hidden_and_other_files_do_not(tmp_path: Path) -> None:
    class_trees(tmp_path, each=1)
    here = tmp_path / "train" / SYNSETS[0]
    write_image(here / "b/deep/x.PNG", 1)
    write_image(here / ".thumbnails/y.png", 1)
    write_image(here / ".z.png", 1)
    (here / "README.txt").write_text("no image")
    (tmp_path / "train/.ipynb_checkpoints").mkdir()
    train, _ = streamed(imagenet(tmp_path).load())
    assert names_of(train) == [
        "n01440764/b/deep/x.PNG",
        "n01440764/n01440764_0.JPEG",
        "n01443537/n01443537_0.JPEG",
        "n02084071/n02084071_0.JPEG",
    ]
    assert train.labels.tolist() == [0, 0, 1, 2]


def test_names_that_are_no_utf8_are_found_again(tmp_path: Path) -> None:
    class_trees(tmp_path, each=1)
    file = tmp_path / "train" / SYNSETS[0] / "caf\udce9.JPEG"
    write_image(file, 1)
    train, _ = streamed(imagenet(tmp_path).load())
    assert decode(train.path(0)).shape == (3, 64, 64)
    assert train.path(0) == file


def test_a_validation_split_of_files_is_stratified(tmp_path: Path) -> None:
    splits = imagenet(class_trees(tmp_path), val_size=3).load()
    assert isinstance(splits.val, FileSet)
    assert splits.val.labels.tolist() == [0, 1, 2]
    both = [*names_of(splits.train), *names_of(splits.val)]
    assert sorted(both) == names_of(streamed(imagenet(tmp_path).load())[0])


def test_tiny_imagenet_is_read_in_the_published_layout(tmp_path: Path) -> None:
    folder = tiny_imagenet(tmp_path / "tiny-imagenet-200")
    splits = tiny(tmp_path).load()
    train, test = resident(splits)
    assert splits.class_names == tuple(f"word {wnid}" for wnid in SYNSETS)
    assert train.labels.tolist() == [k for k in range(3) for _ in range(4)]
    files = [folder / f"train/{w}/images/{w}_{i}.JPEG" for w in SYNSETS for i in range(4)]
    np.testing.assert_array_equal(train.images.numpy(), [decode(file).numpy() for file in files])
    # val_0 and val_3 are of class 1, val_1 and val_4 of class 2, val_2 and val_5 of class 0
    assert test.labels.tolist() == [0, 0, 1, 1, 2, 2]
    files = [folder / f"val/images/val_{i}.JPEG" for i in (2, 5, 0, 3, 1, 4)]
    np.testing.assert_array_equal(test.images.numpy(), [decode(file).numpy() for file in files])


def test_streamed_and_resident_sets_are_the_same_images(tmp_path: Path) -> None:
    tiny_imagenet(tmp_path)
    pairs = zip(
        streamed(tiny(tmp_path, delivery="streaming").load()),
        resident(tiny(tmp_path).load()),
        strict=True,
    )
    for files, decoded in pairs:
        assert torch.equal(files.labels, decoded.labels)
        for i in range(len(files)):
            assert torch.equal(decode(files.path(i)), decoded.images[i])


@pytest.mark.parametrize("fault", ["unlabelled", "missing", "unknown class", "twice"])
def test_annotations_that_do_not_match_the_images_are_refused(tmp_path: Path, fault: str) -> None:
    tiny_imagenet(tmp_path)
    file = tmp_path / "val/val_annotations.txt"
    rows = file.read_text()
    if fault == "unlabelled":
        file.write_text(rows.split("\n", 1)[1])
    elif fault == "missing":
        (tmp_path / "val/images/val_0.JPEG").unlink()
    elif fault == "unknown class":
        file.write_text(rows.replace(SYNSETS[1], "n99999999", 1))
    else:
        file.write_text(rows + rows.split("\n")[0])
    with pytest.raises(UserError, match=re.escape(str(file))) as caught:
        tiny(tmp_path).load()
    assert fault == "twice" or "val_0.JPEG" in str(caught.value)


def test_images_of_several_sizes_are_fitted_to_be_resident(tmp_path: Path) -> None:
    class_trees(tmp_path)
    for part in resident(imagenet(tmp_path, delivery="resident").load()):
        assert part.images.shape[1:] == (3, 32, 32)
    train, _ = resident(imagenet(tmp_path, delivery="resident").load())
    file = tmp_path / "train" / SYNSETS[1] / f"{SYNSETS[1]}_2.JPEG"
    assert torch.equal(train.images[6], fit(decode(file), 32))


# ------------------------------------------------------------------------------- what is wrong


def test_a_folder_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    class_trees(tmp_path)
    (tmp_path / "val").rename(tmp_path / "other")
    (tmp_path / "val").write_text("no folder")
    with pytest.raises(UserError, match=f"{re.escape(str(tmp_path / 'val'))} cannot be read: Not"):
        imagenet(tmp_path).load()


def test_missing_data_is_told_with_where_and_how(tmp_path: Path) -> None:
    for dataset, folder, publisher in (
        (imagenet(tmp_path), "imagenet", "image-net.org"),
        (tiny(tmp_path), "tiny-imagenet-200", "stanford.edu"),
    ):
        with pytest.raises(UserError) as caught:
            dataset.prepare()
        for text in (
            f"{dataset.name} is not at hand",
            f"looked in: {tmp_path / folder} (for train, val",
            "to mend:",
            "dataset.root=FOLDER",
            "works now: python train.py dataset=digits",
        ):
            assert text in str(caught.value)
        assert dataset.published is not None
        assert publisher in dataset.published.url
    with pytest.raises(UserError, match=r"looked in: .* \(for train, pictures in it\)"):
        own(tmp_path, test="pictures").prepare()


def test_validation_images_in_one_folder_are_sent_to_the_script(tmp_path: Path) -> None:
    class_trees(tmp_path / "imagenet")
    for folder in (tmp_path / "imagenet/val").iterdir():
        for file in folder.iterdir():
            file.rename(folder.parent / file.name)
        folder.rmdir()
    with pytest.raises(UserError, match=r"scripts/prepare_data\.py dataset=imagenet devkit="):
        imagenet(tmp_path).prepare()


def test_the_number_of_classes_must_be_right(tmp_path: Path) -> None:
    class_trees(tmp_path / "imagenet")
    tiny_imagenet(tmp_path / "tiny-imagenet-200")
    for dataset in (imagenet(tmp_path, num_classes=4), tiny(tmp_path, num_classes=4)):
        with pytest.raises(UserError, match=r"has 3 class.*dataset\.num_classes=4"):
            dataset.load()


def test_an_empty_class_is_named(tmp_path: Path) -> None:
    class_trees(tmp_path)
    folder = tmp_path / "val" / SYNSETS[2]
    for file in folder.iterdir():
        file.rename(file.with_suffix(".txt"))
    with pytest.raises(UserError, match=f"no images in {re.escape(str(folder))} "):
        imagenet(tmp_path).load()


def test_classes_that_differ_are_named(tmp_path: Path) -> None:
    class_trees(tmp_path)
    (tmp_path / "val" / SYNSETS[2]).rename(tmp_path / "val/other")
    with pytest.raises(UserError, match="must have the same class folders") as caught:
        own(tmp_path).resolve()
    assert str(tmp_path / "train" / SYNSETS[2]) in str(caught.value)
    assert str(tmp_path / "val/other") in str(caught.value)


def test_a_link_that_leads_nowhere_is_named(tmp_path: Path) -> None:
    class_trees(tmp_path)
    link = tmp_path / "train" / SYNSETS[0] / "link.JPEG"
    link.symlink_to(tmp_path / "gone.JPEG")
    with pytest.raises(UserError, match=f"{re.escape(str(link))} cannot be read"):
        imagenet(tmp_path).load()


@pytest.mark.parametrize("delivery", ["resident", "streaming"])
def test_bad_images_are_skipped_and_counted(
    tmp_path: Path, delivery: str, capfd: pytest.CaptureFixture[str]
) -> None:
    class_trees(tmp_path)
    first = tmp_path / "train" / SYNSETS[0] / f"{SYNSETS[0]}_3.JPEG"
    truncate(first)
    (tmp_path / "train" / SYNSETS[1] / f"{SYNSETS[1]}_0.JPEG").write_text("no image")
    truncate(tmp_path / "val" / SYNSETS[2] / f"{SYNSETS[2]}_1.JPEG")
    for _ in range(2):  # made, then found
        splits = imagenet(tmp_path, delivery=delivery, bad_images="skip").load()
        assert splits.skipped == 3
        assert splits.train.labels.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2, 2]
        assert splits.test.labels.tolist() == [0, 0, 1, 1, 2]
        said = capfd.readouterr().err
        assert f"2 of 12 images cannot be decoded and are left out, the first is {first}" in said
    if delivery == "streaming":
        wanted = [f"{s}/{s}_{i}.JPEG" for s in SYNSETS for i in range(4)]
        assert names_of(splits.train) == wanted[:3] + wanted[5:]


def test_a_bad_image_of_a_resident_set_is_an_error(tmp_path: Path) -> None:
    class_trees(tmp_path)
    file = tmp_path / "train" / SYNSETS[1] / f"{SYNSETS[1]}_1.JPEG"
    truncate(file)
    for before in ((), ("skip",)):
        for bad_images in before:
            imagenet(tmp_path, delivery="resident", bad_images=bad_images).load()
        with pytest.raises(UserError, match=re.escape(str(file))) as caught:
            imagenet(tmp_path, delivery="resident").load()
        assert "dataset.bad_images=skip" in str(caught.value)


# -------------------------------------------------------------------------------- image_folder


@pytest.mark.parametrize("name", ["cifar10_jpeg", "imagenet", "tiny_imagenet", "image_folder"])
def test_delivery_can_be_set_on_the_command_line(name: str) -> None:
    words = ["delivery=streaming", "bad_images=skip", "cache_dir=elsewhere"]
    dataset = from_dict(compose([f"dataset={name}", *(f"dataset.{w}" for w in words)])).dataset
    assert [f"{w}={getattr(dataset, w)}" for w in ("delivery", "bad_images", "cache_dir")] == words


def config_of(root: Path, *overrides: str) -> Config:
    words = ["dataset=image_folder", f"dataset.root={root}", "precision=fp32", *overrides]
    return resolve(from_dict(compose(words)), CPU)


def test_own_folders_follow_the_data(tmp_path: Path) -> None:
    class_trees(tmp_path, test="test", classes=("cat", "dog"))
    config = config_of(tmp_path, "dataset.test=test", "dataset.image_size=32")
    assert config.dataset.num_classes == 2
    splits = config.dataset.load()
    assert splits.class_names == ("cat", "dog")
    assert isinstance(splits.train, FileSet)
    assert splits.fingerprint == config.dataset.fingerprint  # type: ignore[attr-defined]
    assert from_dict(config.to_dict()) == config
    assert resolve(config, CPU) == config


def test_other_data_is_another_run(tmp_path: Path) -> None:
    class_trees(tmp_path / "a")
    class_trees(tmp_path / "b")
    before = config_of(tmp_path / "a")
    assert config_of(tmp_path / "b").run_id == before.run_id
    ids = {before.run_id}
    file = tmp_path / "a/val" / SYNSETS[0] / f"{SYNSETS[0]}_1.JPEG"
    write_image(file, 9, (99, 99))
    ids.add(config_of(tmp_path / "a").run_id)
    file.rename(file.with_name("other.JPEG"))
    ids.add(config_of(tmp_path / "a").run_id)
    (tmp_path / "a/val" / SYNSETS[1] / f"{SYNSETS[1]}_1.JPEG").unlink()
    ids.add(config_of(tmp_path / "a").run_id)
    assert len(ids) == 4
    with pytest.raises(UserError, match=r"dataset\.fingerprint"):
        before.dataset.load()
    with pytest.raises(UserError, match=r"dataset\.fingerprint"):
        resolve(before, CPU)


def test_a_number_of_classes_that_is_given_is_checked(tmp_path: Path) -> None:
    class_trees(tmp_path)
    assert config_of(tmp_path, "dataset.num_classes=3").dataset.num_classes == 3
    with pytest.raises(UserError, match=r"3 class folders; dataset\.num_classes=5"):
        config_of(tmp_path, "dataset.num_classes=5")


def test_how_the_data_is_delivered_is_part_of_the_run_and_where_it_is_kept_is_not(
    tmp_path: Path,
) -> None:
    class_trees(tmp_path)
    base = config_of(tmp_path)
    for field, value, same in (
        ("cache_dir", "elsewhere", True),
        ("root", "elsewhere", True),
        ("bad_images", "skip", False),
        ("delivery", "resident", False),
    ):
        other = replace(base, dataset=replace(base.dataset, **{field: value}))
        assert (other.run_id == base.run_id) == same, field

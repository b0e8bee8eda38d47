"""Data sets: what they hold, how they are split, and what is said when they are not at hand."""

from __future__ import annotations

import dataclasses
import hashlib
import pickle
import re
import socket
import tarfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image
from sklearn.datasets import load_digits

from cutmix_exp.composition import compose
from cutmix_exp.config import from_dict
from cutmix_exp.data import sources
from cutmix_exp.data.sources import (
    NETWORK_TIMEOUT,
    Cifar,
    Cifar10Jpeg,
    Dataset,
    Digits,
    ImageSet,
    Splits,
    Synthetic,
    stratified_split,
    unreachable,
)
from cutmix_exp.errors import UserError

STATISTICS: dict[str, Any] = {"mean": (0.5, 0.5, 0.5), "std": (0.25, 0.25, 0.25)}


def digits(**fields: Any) -> Digits:
    return Digits(**{"name": "digits", "num_classes": 10, **STATISTICS, **fields})


def synthetic(**fields: Any) -> Synthetic:
    return Synthetic(**{"name": "synthetic", "num_classes": 7, **STATISTICS, **fields})


def check_form(part: ImageSet, size: int, side: int) -> None:
    assert part.images.shape == (size, 3, side, side)
    assert part.images.dtype == torch.uint8
    assert part.labels.shape == (size,)
    assert part.labels.dtype == torch.int64
    assert len(part) == size


# ------------------------------------------------------------------------------------- digits


@pytest.mark.parametrize("side", [32, 64])
def test_digits_have_the_documented_sizes(side: int) -> None:
    splits = digits(image_size=side).load()
    check_form(splits.train, 1437, side)
    check_form(splits.test, 360, side)
    assert splits.val is None
    assert splits.class_names == tuple("0123456789")


def test_digits_are_all_of_the_scaled_originals_once() -> None:
    splits = digits().load()
    images = torch.cat([splits.train.images, splits.test.images])
    labels = torch.cat([splits.train.labels, splits.test.labels])
    small = images[:, :, ::4, ::4]
    assert torch.equal(small.repeat_interleave(4, 2).repeat_interleave(4, 3), images)
    assert torch.equal(small[:, :1].expand_as(small), small)
    original = load_digits()
    grey = np.rint(original.images * 255 / 16).astype(np.uint8)
    assert (grey.min(), grey.max()) == (0, 255)
    held = sorted((s.numpy().tobytes(), int(y)) for s, y in zip(small[:, 0], labels, strict=True))
    wanted = sorted((g.tobytes(), int(y)) for g, y in zip(grey, original.target, strict=True))
    assert held == wanted


def test_digits_are_stratified() -> None:
    splits = digits().load()
    whole = np.bincount(load_digits().target)
    tested = np.bincount(splits.test.labels.numpy())
    assert abs(tested - whole * 360 / 1797).max() < 1


def test_digits_of_a_side_that_is_no_multiple_name_one_that_is() -> None:
    with pytest.raises(UserError, match=r"set dataset\.image_size=24$"):
        digits(image_size=30).load()


def test_digits_of_a_tiny_side_name_one_that_can_be_had() -> None:
    with pytest.raises(UserError) as caught:
        digits(image_size=4).load()
    (side,) = re.findall(r"set dataset\.image_size=(\d+)", str(caught.value))
    assert int(side) >= 8
    assert digits(image_size=int(side)).load().train.images.shape[-1] == int(side)


# ---------------------------------------------------------------------------------- synthetic


@pytest.mark.parametrize("side", [1, 3, 4, 10, 32, 33])
def test_synthetic_images_have_the_asked_size(side: int) -> None:
    splits = synthetic(image_size=side, train_size=20, test_size=9).load()
    check_form(splits.train, 20, side)
    check_form(splits.test, 9, side)
    assert splits.train.labels.tolist() == [i % 7 for i in range(20)]
    assert len(splits.class_names) == 7


def test_synthetic_images_are_always_the_same() -> None:
    one, other = (synthetic(image_size=10).load() for _ in range(2))
    assert torch.equal(one.train.images, other.train.images)
    assert torch.equal(one.test.images, other.test.images)
    assert one.fingerprint == other.fingerprint


def test_synthetic_classes_can_be_told_apart_and_images_differ() -> None:
    splits = synthetic(train_size=700, test_size=70).load()
    train, test = splits.train.images.float(), splits.test.images.float()
    means = torch.stack([train[splits.train.labels == k].mean(0) for k in range(7)])
    nearest = torch.cdist(test.flatten(1), means.flatten(1)).argmin(1)
    assert torch.equal(nearest, splits.test.labels)
    assert len(torch.unique(splits.train.images, dim=0)) == 700


# ------------------------------------------------------------------------------ what all share


def test_a_validation_split_is_taken_off_the_training_images() -> None:
    whole = digits().load()
    splits = digits(val_size=143).load()
    assert splits.val is not None
    check_form(splits.train, 1294, 32)
    check_form(splits.val, 143, 32)
    assert torch.equal(splits.test.images, whole.test.images)
    parts = torch.cat([splits.train.images, splits.val.images]).flatten(1)
    order, wanted = (np.lexsort(p.numpy().T) for p in (parts, whole.train.images.flatten(1)))
    assert torch.equal(parts[order], whole.train.images.flatten(1)[wanted])


def test_the_validation_split_follows_its_own_seed() -> None:
    names = [digits(val_size=100, val_seed=seed).load().fingerprint for seed in (0, 0, 1)]
    assert names[0] == names[1] != names[2]


def test_the_fingerprint_sees_every_pixel_and_label() -> None:
    def splits() -> Splits:
        return synthetic(train_size=8, test_size=8).load()

    known = {splits().fingerprint}
    for part, field in [("train", "images"), ("train", "labels"), ("test", "images")]:
        changed = splits()
        getattr(getattr(changed, part), field).view(-1)[-1] += 1
        known.add(changed.fingerprint)
    assert len(known) == 4
    assert all(re.fullmatch("[0-9a-f]{16}", name) for name in known)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Small(Dataset):
    """Four images of 6 px with labels up to 3."""

    def read(self) -> tuple[ImageSet, ImageSet, tuple[str, ...]]:
        part = ImageSet(torch.zeros(4, 3, 6, 6, dtype=torch.uint8), torch.arange(4))
        return part, part, tuple("abcd")


def test_another_image_size_than_the_images_have_is_refused() -> None:
    with pytest.raises(UserError, match=r"6x6 px, but dataset\.image_size=32.*image_size=6"):
        Small(name="small", num_classes=4, **STATISTICS).load()
    Small(name="small", num_classes=4, image_size=6, **STATISTICS).load()


def test_fewer_classes_than_the_labels_have_are_refused() -> None:
    with pytest.raises(UserError, match=r"labels up to 3, but dataset\.num_classes=3"):
        Small(name="small", num_classes=3, image_size=6, **STATISTICS).load()


@pytest.mark.parametrize("field", ["mean", "std"])
def test_statistics_are_of_three_channels(field: str) -> None:
    with pytest.raises(UserError, match=rf"dataset\.{field} has 1 values; expected 3"):
        synthetic(**{field: (0.5,)})


# --------------------------------------------------------------------------- stratified splits


def test_a_stratified_split_holds_out_each_class_in_proportion() -> None:
    labels = np.repeat(np.arange(4), [100, 50, 30, 20])
    np.random.default_rng(0).shuffle(labels)
    kept, held_out = stratified_split(labels, 40, seed=0)
    assert sorted([*kept, *held_out]) == list(range(200))
    assert np.bincount(labels[held_out]).tolist() == [20, 10, 6, 4]
    assert kept.tolist() == sorted(kept)
    assert held_out.tolist() == sorted(held_out)


def test_a_stratified_split_follows_its_seed() -> None:
    labels = np.arange(200) % 4
    held_out = [tuple(stratified_split(labels, 40, seed)[1]) for seed in (0, 0, 1)]
    assert held_out[0] == held_out[1] != held_out[2]


@pytest.mark.parametrize("size", [1, 3, 17, 20, 1000])
def test_a_stratified_split_that_cannot_be_is_refused(size: int) -> None:
    labels = np.arange(20) % 4
    with pytest.raises(UserError, match=rf"val_size={size}.*20 .*4 classes.*between 4 and 16"):
        stratified_split(labels, size, seed=0)


@pytest.mark.parametrize("size", [4, 16])
def test_a_stratified_split_of_the_extreme_sizes(size: int) -> None:
    labels = np.arange(20) % 4
    kept, held_out = stratified_split(labels, size, seed=0)
    assert set(labels[kept]) == set(labels[held_out]) == set(range(4))


def test_a_class_of_one_image_cannot_be_split_and_the_user_is_told() -> None:
    with pytest.raises(UserError):
        stratified_split(np.array([0, 0, 0, 0, 1]), 2, seed=0)


# -------------------------------------------------------------------------------------- CIFAR

NAMES = {10: [f"class{i}" for i in range(10)], 100: [f"fine{i}" for i in range(100)]}


def cifar(root: Path, classes: int = 10) -> Cifar:
    return Cifar(name=f"cifar{classes}", root=str(root), num_classes=classes, **STATISTICS)


def md5(file: Path) -> str:
    return hashlib.md5(file.read_bytes()).hexdigest()


def no_network(url: str) -> str:
    return "no network here"


@pytest.fixture(params=[10, 100])
def published(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> tuple[int, Path, np.ndarray, np.ndarray]:
    """Small files in the published layout, whose checksums torchvision is told to expect."""
    classes = request.param
    kind = {10: torchvision.datasets.CIFAR10, 100: torchvision.datasets.CIFAR100}[classes]
    files = [f"data_batch_{i}" for i in range(1, 6)] if classes == 10 else ["train"]
    files.append("test_batch" if classes == 10 else "test")
    label_key = "labels" if classes == 10 else "fine_labels"
    folder = tmp_path / kind.base_folder
    folder.mkdir()
    rng = np.random.default_rng(0)
    each = 20 if classes == 10 else 100
    images = rng.integers(0, 256, (len(files), each, 3072), dtype=np.uint8)
    labels = rng.integers(0, classes, (len(files), each))
    for name, data, numbers in zip(files, images, labels, strict=True):
        entry = {"data": data, label_key: numbers.tolist(), "coarse_labels": [0] * each}
        (folder / name).write_bytes(pickle.dumps(entry, protocol=2))
    meta = folder / kind.meta["filename"]
    meta.write_bytes(pickle.dumps({kind.meta["key"]: NAMES[classes]}, protocol=2))
    sums = [[name, md5(folder / name)] for name in files]
    monkeypatch.setattr(kind, "train_list", sums[:-1])
    monkeypatch.setattr(kind, "test_list", sums[-1:])
    monkeypatch.setattr(kind, "meta", {**kind.meta, "md5": md5(meta)})
    monkeypatch.setattr(sources, "unreachable", no_network)
    archive = tmp_path / "archive.tar.gz"
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(folder, kind.base_folder)
    monkeypatch.setattr(kind, "filename", "archive.tar.gz")
    monkeypatch.setattr(kind, "tgz_md5", md5(archive))
    return classes, tmp_path, images, labels


def check_cifar(splits: Splits, classes: int, images: np.ndarray, labels: np.ndarray) -> None:
    parts = [(splits.train, slice(0, -1)), (splits.test, slice(-1, None))]
    for part, which in parts:
        wanted = images[which].reshape(-1, 3, 32, 32)
        check_form(part, len(wanted), 32)
        np.testing.assert_array_equal(part.images.numpy(), wanted)
        np.testing.assert_array_equal(part.labels.numpy(), labels[which].ravel())
    assert splits.class_names == tuple(NAMES[classes])


def test_cifar_is_read_from_the_published_files(
    published: tuple[int, Path, np.ndarray, np.ndarray],
) -> None:
    classes, root, images, labels = published
    (root / "archive.tar.gz").unlink()
    check_cifar(cifar(root, classes).load(), classes, images, labels)


def test_an_archive_at_hand_is_unpacked_without_network(
    published: tuple[int, Path, np.ndarray, np.ndarray], tmp_path: Path
) -> None:
    classes, root, images, labels = published
    other = tmp_path / "elsewhere"
    other.mkdir()
    (root / "archive.tar.gz").rename(other / "archive.tar.gz")
    check_cifar(cifar(other, classes).load(), classes, images, labels)


def test_a_damaged_cifar_file_counts_as_missing(
    published: tuple[int, Path, np.ndarray, np.ndarray],
) -> None:
    classes, root, _, _ = published
    (root / "archive.tar.gz").unlink()
    file = next(p for p in root.rglob("test*") if p.is_file())
    file.write_bytes(file.read_bytes()[:-1] + b"x")
    with pytest.raises(UserError, match="is not at hand"):
        cifar(root, classes).load()


def test_a_damaged_archive_asks_no_server_that_cannot_be_reached(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An interrupted download leaves one. torchvision would download again, with no time limit."""
    asked: list[str] = []

    def urlopen(request: Any, *args: Any, **kwargs: Any) -> None:
        asked.append(getattr(request, "full_url", request))
        raise OSError("no network here")

    monkeypatch.setattr("urllib.request.urlopen", urlopen)
    monkeypatch.setattr(sources, "unreachable", no_network)
    (tmp_path / "cifar-10-python.tar.gz").write_bytes(b"half an archive")
    with pytest.raises(UserError, match="is not at hand"):
        cifar(tmp_path).load()
    assert asked == []


@pytest.mark.parametrize("classes", [10, 100])
def test_missing_cifar_names_folder_archive_and_a_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, classes: int
) -> None:
    monkeypatch.setattr(sources, "unreachable", no_network)
    started = time.monotonic()
    with pytest.raises(UserError) as caught:
        cifar(tmp_path / "not here", classes).prepare()
    assert time.monotonic() - started < 20
    message = str(caught.value)
    for text in (
        f"cifar{classes} is not at hand",
        str(tmp_path / "not here"),
        f"cifar-{classes}-python.tar.gz",
        "no network here",
        "dataset.root=",
    ):
        assert text in message
    check_command(message)


def check_command(message: str) -> None:
    """The message ends with a command that needs no data and whose overrides are all right."""
    (words,) = re.findall(r"python train\.py (dataset=digits .*)$", message)
    assert from_dict(compose(words.split())).dataset == digits_of_the_config()


def digits_of_the_config() -> Dataset:
    return from_dict(compose(["dataset=digits", "model=resnet"])).dataset


def test_cifar_has_10_or_100_classes(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"num_classes=20.*10 or 100"):
        cifar(tmp_path, 20)


# ------------------------------------------------------------------------------------ network


@pytest.fixture
def silent_server(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Accepts connections and never answers."""
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    held = []
    with socket.create_server(("127.0.0.1", 0)) as server:

        def accept() -> None:
            try:
                while True:
                    held.append(server.accept())
            except OSError:
                return

        threading.Thread(target=accept, daemon=True).start()
        yield f"http://127.0.0.1:{server.getsockname()[1]}/archive.tar.gz"
        server.shutdown(socket.SHUT_RDWR)
    for connection, _ in held:
        connection.close()


@pytest.mark.slow
def test_a_server_that_never_answers_is_unreachable_within_seconds(silent_server: str) -> None:
    started = time.monotonic()
    reason = unreachable(silent_server)
    assert time.monotonic() - started < NETWORK_TIMEOUT + 2
    assert reason
    assert NETWORK_TIMEOUT + 2 < 20


def test_a_name_that_takes_for_ever_to_look_up_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """The system's resolver knows no time limit."""
    done = threading.Event()
    monkeypatch.setattr(sources, "NETWORK_TIMEOUT", 0.3)
    monkeypatch.setattr("urllib.request.urlopen", lambda *args, **kwargs: done.wait(20))
    started = time.monotonic()
    reason = unreachable("http://server.invalid/archive.tar.gz")
    done.set()
    assert time.monotonic() - started < 5
    assert reason.startswith("no answer within")


def test_a_closed_port_is_unreachable_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    started = time.monotonic()
    reason = unreachable(f"http://127.0.0.1:{port}/archive.tar.gz")
    assert time.monotonic() - started < NETWORK_TIMEOUT
    assert "refused" in reason


@pytest.mark.parametrize(("status", "reached"), [(200, True), (404, False)])
def test_a_server_that_answers_is_reached_if_it_has_the_file(
    monkeypatch: pytest.MonkeyPatch, status: int, reached: bool
) -> None:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with socket.create_server(("127.0.0.1", 0)) as server:

        def answer() -> None:
            connection, _ = server.accept()
            with connection:
                connection.recv(4096)
                connection.sendall(b"HTTP/1.0 %d Told\r\n\r\n" % status)

        threading.Thread(target=answer, daemon=True).start()
        reason = unreachable(f"http://127.0.0.1:{server.getsockname()[1]}/")
    assert (reason == "") == reached
    assert reached or "404" in reason


# ------------------------------------------------------------------------------- cifar10_jpeg


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """Ten classes of two training images and one test image."""
    rng = np.random.default_rng(0)
    for part, number in (("train", 2), ("test", 1)):
        for name in "jihgfedcba":
            folder = tmp_path / "cifar-10-images" / part / name
            folder.mkdir(parents=True)
            for i in reversed(range(number)):
                pixels = rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / f"{i:04}.jpg", quality=75)
    return tmp_path


def jpegs(root: Path) -> Cifar10Jpeg:
    return Cifar10Jpeg(name="cifar10_jpeg", root=str(root), num_classes=10, **STATISTICS)


@pytest.mark.parametrize("below", [".", "cifar-10-images"])
def test_class_folders_are_read_in_the_order_of_their_names(tree: Path, below: str) -> None:
    (tree / "cifar-10-images/train/a/.DS_Store").write_bytes(b"")
    splits = jpegs(tree / below).load()
    assert splits.class_names == tuple("abcdefghij")
    for part, which, number in ((splits.train, "train", 2), (splits.test, "test", 1)):
        check_form(part, 10 * number, 32)
        assert part.labels.tolist() == [k for k in range(10) for _ in range(number)]
        files = [
            tree / "cifar-10-images" / which / name / f"{i:04}.jpg"
            for name in "abcdefghij"
            for i in range(number)
        ]
        wanted = [np.asarray(Image.open(file)).transpose(2, 0, 1) for file in files]
        np.testing.assert_array_equal(part.images.numpy(), wanted)


def test_grey_images_become_three_channels(tree: Path) -> None:
    file = tree / "cifar-10-images/train/a/0000.jpg"
    Image.open(file).convert("L").save(file)
    image = jpegs(tree).load().train.images[0]
    assert torch.equal(image[0], image[1])
    assert torch.equal(image[0], image[2])


@pytest.mark.parametrize("kept", [0.0, 0.1, 0.7, 0.9])
def test_a_truncated_jpeg_is_named(tree: Path, kept: float) -> None:
    """Empty, in its header, or in its pixels."""
    file = tree / "cifar-10-images/test/c/0000.jpg"
    whole = file.read_bytes()
    assert whole.index(b"\xff\xda") < 0.6 * len(whole), "the pixels begin here"
    file.write_bytes(whole[: int(kept * len(whole))])
    with pytest.raises(UserError, match=re.escape(str(file))):
        jpegs(tree).load()


def test_an_image_of_another_size_is_named(tree: Path) -> None:
    file = tree / "cifar-10-images/train/d/0001.jpg"
    Image.new("RGB", (16, 32)).save(file)
    with pytest.raises(UserError, match=rf"{re.escape(str(file))} has \(32, 16\) px"):
        jpegs(tree).load()


def test_a_class_without_images_is_named(tree: Path) -> None:
    folder = tree / "cifar-10-images/test/e"
    (folder / "0000.jpg").unlink()
    with pytest.raises(UserError, match=re.escape(str(folder))):
        jpegs(tree).load()


def test_a_missing_class_folder_is_refused(tree: Path) -> None:
    for file in (tree / "cifar-10-images/train/a").iterdir():
        file.unlink()
    (tree / "cifar-10-images/train/a").rmdir()
    with pytest.raises(UserError, match=r"9 class folders; dataset\.num_classes=10"):
        jpegs(tree).load()


def test_a_missing_folder_is_named_with_a_command(tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        jpegs(tmp_path / "not here").load()
    message = str(caught.value)
    assert "cifar10_jpeg is not at hand" in message
    assert str(tmp_path / "not here" / "cifar-10-images") in message
    assert "dataset.root=" in message
    check_command(message)

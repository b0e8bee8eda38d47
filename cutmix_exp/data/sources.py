"""Sources: what images there are. Each is a config part that loads whole sets as uint8 tensors."""

from __future__ import annotations

import fcntl
import hashlib
import importlib.util
import os
import threading
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor

from cutmix_exp.data.boxes import Boxes, Framing
from cutmix_exp.errors import UserError
from cutmix_exp.schema import Part, option

TRY_NOW = "python train.py dataset=digits model=resnet model.depth=20 budget=smoke"
NETWORK_TIMEOUT = 6.0
"""Seconds after which a server that does not answer counts as no network."""


@dataclass(frozen=True)
class ImageSet:
    """N images uint8 [N, 3, H, W] and their labels int64 [N].

    `skipped` files were left out, because they could not be decoded; `files` are those that the
    images were decoded from, by which to find what else is published of them.
    """

    images: Tensor
    labels: Tensor
    skipped: int = 0
    files: FileSet | None = None

    def __len__(self) -> int:
        return len(self.labels)

    def at(self, index: np.ndarray) -> ImageSet:
        chosen = torch.from_numpy(index)
        files = None if self.files is None else self.files.at(index)
        return ImageSet(self.images[chosen], self.labels[chosen], files=files)

    def to(self, device: torch.device) -> ImageSet:
        return replace(self, images=self.images.to(device), labels=self.labels.to(device))

    def batches(self, indices: list[np.ndarray]) -> Iterator[Tensor]:
        """The images uint8 [n, 3, H, W] of each list of indices, for an evaluation."""
        for index in indices:
            yield self.images[torch.from_numpy(index)]

    def contents(self) -> Iterator[bytes | memoryview]:
        """What the fingerprint is made of: every pixel and label."""
        yield self.images.contiguous().numpy().data
        yield self.labels.numpy().tobytes()


@dataclass(frozen=True)
class FileSet:
    """N image files that are decoded when they are needed.

    Attributes:
        root: the folder that the names start from.
        names: bytes [N], each file's path below `root` (an array, not a list of objects: worker
            processes share its memory).
        sizes: int64 [N], of the files in bytes.
        labels: int64 [N].
        skipped: number of files that were left out, because they cannot be decoded.
    """

    root: Path
    names: np.ndarray
    sizes: np.ndarray
    labels: Tensor
    skipped: int = 0

    def __len__(self) -> int:
        return len(self.labels)

    def path(self, index: int) -> Path:
        return self.root / os.fsdecode(self.names[index])

    def at(self, index: np.ndarray) -> FileSet:
        labels = self.labels[torch.from_numpy(index)]
        return FileSet(self.root, self.names[index], self.sizes[index], labels)

    def contents(self) -> Iterator[bytes | memoryview]:
        """What the fingerprint is made of: names, sizes and labels, since reading all files of an
        ImageNet would take hours."""
        yield b"\n".join(self.names.tolist())
        yield self.sizes.astype(np.int64).tobytes()
        yield self.labels.numpy().tobytes()


@dataclass(frozen=True)
class Splits:
    """A loaded data set: decoded, or as files. `val` is None unless a validation split was asked
    for; `skipped` files were left out, because they cannot be decoded (`bad_images=skip`)."""

    train: ImageSet | FileSet
    val: ImageSet | FileSet | None
    test: ImageSet | FileSet
    class_names: tuple[str, ...]
    skipped: int = 0

    @cached_property
    def fingerprint(self) -> str:
        """Of all that the splits hold."""
        parts = (self.train, self.val, self.test)
        return fingerprint(*(part for part in parts if part is not None))


def fingerprint(*parts: ImageSet | FileSet) -> str:
    """16 hexadecimal digits of the SHA-256 of the sets' contents, one after the other."""
    digest = hashlib.sha256()
    for part in parts:
        for content in part.contents():
            digest.update(content)
    return digest.hexdigest()[:16]


@dataclass(frozen=True)
class Publication:
    """Who published a data set, where, and under what terms."""

    publisher: str
    url: str
    terms: str


@dataclass(frozen=True, kw_only=True)
class Dataset(Part):
    """The config group `dataset`.

    Class attributes: `published` says where the data is from; `as_given` has what its file in
    configs/dataset sets of the fields that some settings have no use for: such a value stays when
    others are changed.

    Attributes:
        name: names the run.
        root: folder that holds the data sets' own folders (or is the data set's folder).
        image_size: side in pixels; the images are square.
        num_classes: number of labels.
        mean, std: of the training images in [0, 1], per channel, for the normalisation.
        crop: how training images are cropped: `pad` (a window of the padded image),
            `random_resized` (a box of random area and aspect, resized; Szegedy et al.), or `window`
            (of the image resized to `crop_resize` x `crop_resize`; of sets that stream).
        crop_padding, padding_mode: pixels added on each side, and what is in them.
        crop_resize: side in pixels of the images that a `window` is taken of.
        crop_scale, crop_ratio: ranges of the random box's share of the image, and of its width
            over height.
        flip: mirror half of the training images.
        color_jitter: brightness, contrast and saturation are blended by up to so much, in random
            order (data/augment.py).
        lighting: standard deviation of the PCA lighting noise (Krizhevsky et al. 2012).
        eval_resize: shorter side in pixels before the centre crop of test images that stream;
            None is `image_size` * 8/7, the usual 256 for 224.
        eval_fit: whether the `shorter` side is made `eval_resize` long, or both (`stretch`).
        eval_size: side in pixels of that centre crop; None is `image_size`.
        workers: processes that decode images that stream; None is one for each core.
        val_size: number of training images held out for validation, stratified by class; 0: none.
        val_seed: draws the validation split; not the run's seed, so that runs share the split.
    """

    published: ClassVar[Publication | None] = None
    as_given: ClassVar[dict[str, Any]] = {}

    name: str
    root: str = option("data", identity=False)
    image_size: int = option(32, ge=1)
    num_classes: int = option(ge=2)
    mean: tuple[float, ...] = option(ge=0, le=1)
    std: tuple[float, ...] = option(gt=0)
    crop: Literal["pad", "random_resized", "window"] = option("pad", neutral="pad")
    crop_padding: int = option(4, ge=0)
    padding_mode: Literal["zeros", "reflect"] = option("zeros", neutral="zeros")
    crop_scale: tuple[float, ...] = option((0.08, 1.0), gt=0, le=1, neutral=(0.08, 1.0))
    crop_ratio: tuple[float, ...] = option((3 / 4, 4 / 3), gt=0, neutral=(3 / 4, 4 / 3))
    flip: bool = True
    color_jitter: float = option(0.0, ge=0, le=1, neutral=0.0)
    lighting: float = option(0.0, ge=0, neutral=0.0)
    eval_resize: int | None = option(None, ge=1, neutral=None)
    eval_size: int | None = option(None, ge=1, neutral=None)
    crop_resize: int | None = option(None, ge=1, neutral=None)
    eval_fit: Literal["shorter", "stretch"] = option("shorter", neutral="shorter")
    workers: int | None = option(None, ge=0, identity=False)
    val_size: int = option(0, ge=0)
    val_seed: int = option(0, ge=0, lt=2**32)

    def __post_init__(self) -> None:
        for field in ("mean", "std"):
            if len(getattr(self, field)) != 3:
                raise UserError(
                    f"dataset.{field} has {len(getattr(self, field))} values; expected 3"
                )
        for field in ("crop_scale", "crop_ratio"):
            limits = getattr(self, field)
            if len(limits) != 2 or limits[0] > limits[1]:
                raise UserError(f"dataset.{field}={list(limits)}: expected [smallest,largest]")
        if self.eval_size not in (None, self.image_size) and not self.streams:
            raise UserError(
                f"dataset.eval_size={self.eval_size}: only sets that stream are scored at another "
                f"size than dataset.image_size={self.image_size}"
            )
        self._check_window()
        self._check_used()
        if self.padding_mode == "reflect" and self.crop_padding >= self.image_size:
            raise UserError(
                f"dataset.crop_padding={self.crop_padding}: reflection pads by less than the image's "
                f"{self.image_size} px"
            )

    def _check_window(self) -> None:
        if (self.crop == "window") != (self.crop_resize is not None):
            raise UserError(
                f"dataset.crop={self.crop}, dataset.crop_resize={self.crop_resize}: a window is taken "
                "of the image resized to dataset.crop_resize; set both, or neither"
            )
        if self.crop_resize is not None and self.crop_resize < self.image_size:
            raise UserError(
                f"dataset.crop_resize={self.crop_resize} is less than "
                f"dataset.image_size={self.image_size}, the side of the window"
            )

    def _check_used(self) -> None:
        """Refuse what would do nothing, and yet make another run."""
        used = {"crop_padding": "pad", "padding_mode": "pad"}
        used |= {"crop_scale": "random_resized", "crop_ratio": "random_resized"}
        usual = {field.name: field.default for field in fields(Dataset)}
        for name, crop in used.items():
            value = getattr(self, name)
            if self.crop != crop and value not in (usual[name], self.as_given.get(name)):
                shown = list(value) if isinstance(value, tuple) else value
                raise UserError(
                    f"dataset.{name}={shown} is of dataset.crop={crop}; dataset.crop={self.crop} has "
                    f"no use for it; leave it out, or set dataset.crop={crop}"
                )
        as_they_are = (None, self.image_size, self.as_given.get("eval_resize"))
        of_streams = {
            "crop": self.crop == "window",
            "eval_fit": self.eval_fit == "stretch",
            "eval_resize": self.eval_resize not in as_they_are,
        }
        for name, demanded in of_streams.items():
            if demanded and not self.streams:
                raise UserError(
                    f"dataset.{name}={getattr(self, name)} is of images that stream, which "
                    f"{self.name}'s do not; leave it out, or, where the data set has it, set "
                    "dataset.delivery=streaming"
                )

    @property
    def train_images(self) -> int | None:
        """Number of training images, those of the validation split among them; None where it is not
        known without the data."""
        return None

    @property
    def streams(self) -> bool:
        """Whether `read` gives files that are decoded when they are needed."""
        return False

    @property
    def framing(self) -> Framing:
        """How a test image of any size becomes the one that is evaluated, if it streams."""
        size = self.eval_size or self.image_size
        resized = self.eval_resize or -(-size * 256 // 224)
        return Framing(resized, size, self.eval_fit == "stretch")

    def resolve(self) -> Dataset:
        """Fill in what depends on the data itself (class-folder trees); explicit values win.

        Raises:
            UserError: the data is missing.
        """
        return self

    def missing(self) -> str:
        """What is not at hand, where it was looked for and how to mend it; empty if all is there.
        Downloads nothing."""
        return ""

    def prepare(self) -> None:
        """Make sure that the data is there, downloading it where that is possible.

        Raises:
            UserError: it is not, and cannot be had; says where it was looked for.
        """
        missing = self.missing()
        if missing:
            raise UserError(missing)

    def read(self) -> tuple[ImageSet | FileSet, ImageSet | FileSet, tuple[str, ...]]:
        """Training images, test images, class names."""
        raise NotImplementedError

    def missing_boxes(self) -> str:
        """Why there are no true boxes of objects; which layout is expected and where it is
        published; empty if they are there."""
        return (
            f"{self.name} has no boxes of objects; data sets that have: cub, imagenet, "
            "tiny_imagenet, and digits (around the ink)"
        )

    def boxes(self, part: ImageSet | FileSet) -> list[Boxes]:
        """The true boxes of each image of a part of `load`'s sets, in the part's order and in the
        pixels of the images that are evaluated; of an image whose boxes lie outside of the centre
        crop there is none (shape [0, 4]).

        Raises:
            UserError: an image has no boxes, or their files are damaged.
        """
        raise UserError(self.missing_boxes())

    def masks(self, part: ImageSet | FileSet) -> Callable[[int], Tensor] | None:
        """The true mask bool [S, S] of an image of a part, by its index; None: there are none."""
        return None

    def load(self) -> Splits:
        """The sets (decoded ones in host memory), with the validation split taken off the training
        images."""
        self.prepare()
        train, test, class_names = self.read()
        for part in (train, test):
            size = (self.image_size, self.image_size)
            height, width = part.images.shape[2:] if isinstance(part, ImageSet) else size
            if (height, width) != size:
                raise UserError(
                    f"{self.name} has images of {height}x{width} px, but "
                    f"dataset.image_size={self.image_size}; set dataset.image_size={height}"
                )
            if len(part) and int(part.labels.max()) >= self.num_classes:
                raise UserError(
                    f"{self.name} has labels up to {int(part.labels.max())}, but "
                    f"dataset.num_classes={self.num_classes}"
                )
        skipped = train.skipped + test.skipped
        if not self.val_size:
            return Splits(train, None, test, class_names, skipped)
        kept, held_out = stratified_split(train.labels.numpy(), self.val_size, self.val_seed)
        return Splits(train.at(kept), train.at(held_out), test, class_names, skipped)


def stratified_split(labels: np.ndarray, size: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Sorted indices of the images kept and held out, each class in proportion.

    The same images as scikit-learn's `train_test_split(stratify=labels, test_size=size,
    random_state=seed)` holds out, without the seconds that its import takes.

    Raises:
        UserError: there are too few images for such a split.
    """
    _, places, counts = np.unique(labels, return_inverse=True, return_counts=True)
    classes = len(counts)
    if not classes <= size <= len(labels) - classes:
        raise UserError(
            f"dataset.val_size={size}: of {len(labels)} training images in {classes} classes, "
            f"between {classes} and {len(labels) - classes} can be held out (0: none)"
        )
    if counts.min() < 2:
        raise UserError(
            f"dataset.val_size={size}: no stratified split is possible: a class has one image only"
        )
    rng = np.random.RandomState(seed)
    kept = _proportional(counts, len(labels) - size, rng)
    held = _proportional(counts - kept, size, rng)
    out = []
    for name, (keep, hold) in enumerate(zip(kept, held, strict=True)):
        members = rng.permutation(np.flatnonzero(places == name))
        out.append(members[keep : keep + hold])
    held_out = np.sort(np.concatenate(out))
    return np.setdiff1d(np.arange(len(labels)), held_out), held_out


def _proportional(counts: np.ndarray, draws: int, rng: np.random.RandomState) -> np.ndarray:
    """How many of `draws` fall to each class, int64, in proportion to `counts`: rounded down, and
    what is left goes to the largest remainders, by lot among equal ones."""
    exact = counts / counts.sum() * draws
    given = np.floor(exact)
    remainders, left = exact - given, int(draws - given.sum())
    for remainder in np.sort(np.unique(remainders))[::-1]:
        if not left:
            break
        (equal,) = np.where(remainders == remainder)
        chosen = rng.choice(equal, size=min(len(equal), left), replace=False)
        given[chosen] += 1
        left -= len(chosen)
    return given.astype(np.int64)


def digits_file() -> Path:
    """Where scikit-learn keeps the digits: 64 pixels in 0..16 and a label a line. It is found
    without importing the package, which takes seconds.

    Raises:
        UserError: scikit-learn is not installed, or keeps them elsewhere.
    """
    found = importlib.util.find_spec("sklearn")
    folder = Path(found.origin).parent if found and found.origin else Path()
    file = folder / "datasets" / "data" / "digits.csv.gz"
    if not file.exists():
        raise UserError(f"dataset=digits is part of scikit-learn, but {file} is not there")
    return file


@dataclass(frozen=True, kw_only=True)
class Digits(Dataset):
    """scikit-learn's embedded 8x8 digits (UCI optdigits, test part), each pixel repeated to 32x32
    RGB: 1,437 training and 360 test images, stratified. A smoke test: one test image is 0.28
    points of error."""

    published = Publication(
        "E. Alpaydin and C. Kaynak, UCI Machine Learning Repository; part of scikit-learn",
        "https://archive.ics.uci.edu/dataset/80",
        "CC BY 4.0",
    )

    @property
    def train_images(self) -> int:
        return 1_437

    def read(self) -> tuple[ImageSet, ImageSet, tuple[str, ...]]:
        if self.image_size % 8:
            nearest = max(8, self.image_size // 8 * 8)
            raise UserError(
                f"dataset.image_size={self.image_size} is no multiple of the digits' 8 px, each of "
                f"which is repeated; set dataset.image_size={nearest}"
            )
        digits = np.loadtxt(digits_file(), delimiter=",")
        grey = np.rint(digits[:, :-1].reshape(-1, 8, 8) * (255 / 16)).astype(np.uint8)
        scale = self.image_size // grey.shape[1]
        images = np.repeat(np.repeat(grey, scale, 1), scale, 2)[:, None].repeat(3, 1)
        labels = digits[:, -1].astype(np.int64)
        train, test = stratified_split(labels, 360, seed=0)
        whole = ImageSet(torch.from_numpy(images), torch.from_numpy(labels))
        return whole.at(train), whole.at(test), tuple("0123456789")

    def missing_boxes(self) -> str:
        return ""

    def boxes(self, part: ImageSet | FileSet) -> list[Boxes]:
        """Around the ink."""
        mask = self.masks(part)
        found = []
        for index in range(len(part)):
            rows, columns = (np.flatnonzero(mask(index).numpy().any(axis)) for axis in (1, 0))
            corners = [rows[0], columns[0], rows[-1] + 1, columns[-1] + 1]
            found.append(np.array([corners], dtype=np.float64))
        return found

    def masks(self, part: ImageSet | FileSet) -> Callable[[int], Tensor]:
        """The ink."""
        assert isinstance(part, ImageSet)
        return lambda index: part.images[index, 0].cpu() > 0


@dataclass(frozen=True, kw_only=True)
class Synthetic(Dataset):
    """Made on the fly: each class is a coarse random pattern under pixel noise. For trying models
    and speed; errors on it mean nothing.

    Attributes:
        train_size, test_size: numbers of images.
    """

    train_size: int = option(256, ge=1)
    test_size: int = option(128, ge=1)

    @property
    def train_images(self) -> int:
        return self.train_size

    def read(self) -> tuple[ImageSet, ImageSet, tuple[str, ...]]:
        rng = np.random.default_rng(0)
        side, coarse = self.image_size, 4
        patterns = rng.integers(64, 192, size=(self.num_classes, 3, coarse, coarse))
        patterns = np.repeat(np.repeat(patterns, -(-side // coarse), 2), -(-side // coarse), 3)
        sets = []
        for size in (self.train_size, self.test_size):
            labels = np.arange(size, dtype=np.int64) % self.num_classes
            images = patterns[labels, :, :side, :side]
            images = images + rng.integers(-64, 64, size=images.shape)
            sets.append(
                ImageSet(torch.from_numpy(images.astype(np.uint8)), torch.from_numpy(labels))
            )
        return sets[0], sets[1], tuple(f"class {i}" for i in range(self.num_classes))


@dataclass(frozen=True, kw_only=True)
class Samples(Dataset):
    """Square windows of scikit-learn's two embedded photographs, a temple and a flower, to look at
    regularizers on: 32 training and 8 test images of each, which overlap. Errors mean nothing."""

    published = Publication(
        "D. Buechele (china.jpg) and vultilion (flower.jpg), flickr; part of scikit-learn",
        "https://scikit-learn.org/stable/datasets/loading_other_datasets.html",
        "CC BY 2.0",
    )
    as_given: ClassVar[dict[str, Any]] = {"padding_mode": "reflect"}

    @property
    def train_images(self) -> int:
        return 64

    def read(self) -> tuple[ImageSet, ImageSet, tuple[str, ...]]:
        from sklearn.datasets import load_sample_images
        from torchvision.transforms.v2 import functional as transforms

        side = [self.image_size, self.image_size]
        photographs = [torch.tensor(p).permute(2, 0, 1) for p in load_sample_images().images]
        rng = np.random.default_rng(0)
        sets = []
        for size in (32, 8):
            images, labels = [], np.arange(2 * size, dtype=np.int64) % 2
            for label in labels:
                photograph = photographs[label]
                window = int(rng.uniform(0.6, 1.0) * photograph.shape[1])
                top, left = rng.integers(
                    photograph.shape[1] - window + 1, size=2
                )  # the left square
                cut = photograph[:, top : top + window, left : left + window]
                images.append(transforms.resize(cut, side, antialias=True))
            sets.append(ImageSet(torch.stack(images), torch.from_numpy(labels)))
        return sets[0], sets[1], ("temple", "flower")


@dataclass(frozen=True, kw_only=True)
class Cifar(Dataset):
    """CIFAR-10 or CIFAR-100 (Krizhevsky 2009), through torchvision: checksums, and a download where
    there is a network. 50,000 training and 10,000 test images of 32x32 px."""

    published = Publication(
        "A. Krizhevsky, University of Toronto",
        "https://www.cs.toronto.edu/~kriz/cifar.html",
        "no licence is stated; the publisher asks to cite Krizhevsky 2009",
    )

    @property
    def train_images(self) -> int:
        return 50_000

    def _torchvision_class(self) -> Any:
        import torchvision

        return {10: torchvision.datasets.CIFAR10, 100: torchvision.datasets.CIFAR100}[
            self.num_classes
        ]

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.num_classes not in (10, 100):
            raise UserError(f"dataset.num_classes={self.num_classes}: CIFAR has 10 or 100 classes")

    def missing(self) -> str:
        try:
            self._torchvision_class()(Path(self.root).absolute(), train=True, download=False)
        except (RuntimeError, FileNotFoundError):
            return self._not_at_hand("can be tried by scripts/prepare_data.py, or by a run")
        return ""

    def _not_at_hand(self, download: str) -> str:
        cifar, root = self._torchvision_class(), Path(self.root).absolute()
        return (
            f"{self.name} is not at hand\n"
            f"looked in: {root} (for the folder {cifar.base_folder} or the archive {cifar.filename}, "
            f"md5 {cifar.tgz_md5})\n"
            f"download:  {cifar.url} {download}\n"
            f"to mend:   put {cifar.filename} into {root}, or name another folder by "
            "dataset.root=FOLDER\n"
            f"works now: {TRY_NOW}"
        )

    def prepare(self) -> None:
        from torchvision.datasets.utils import check_integrity

        if not self.missing():
            return
        cifar, root = self._torchvision_class(), Path(self.root).absolute()
        reason = ""
        if not check_integrity(str(root / cifar.filename), cifar.tgz_md5):
            reason = unreachable(cifar.url)
        if not reason:
            try:
                with folder_lock(root):
                    cifar(root, train=True, download=True)
                return
            except (OSError, RuntimeError) as error:
                reason = str(error) or type(error).__name__
        raise UserError(self._not_at_hand(f"failed: {reason}"))

    def read(self) -> tuple[ImageSet, ImageSet, tuple[str, ...]]:
        cifar = self._torchvision_class()
        sets = []
        for train in (True, False):
            held = cifar(Path(self.root), train=train)
            images = torch.from_numpy(held.data).permute(0, 3, 1, 2).contiguous()
            sets.append(ImageSet(images, torch.tensor(held.targets, dtype=torch.int64)))
        return sets[0], sets[1], tuple(held.classes)


def unreachable(url: str) -> str:
    """Why a server cannot be reached, or an empty text; answers within seconds.

    The request runs in a thread of its own, because looking up a name has no time limit.
    """
    answer = [f"no answer within {NETWORK_TIMEOUT:.0f} s"]

    def ask() -> None:
        try:
            request = urllib.request.Request(url, method="HEAD")
            urllib.request.urlopen(request, timeout=NETWORK_TIMEOUT).close()
            answer[0] = ""
        except Exception as error:
            answer[0] = f"{error}"

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(NETWORK_TIMEOUT)
    return answer[0]


@contextmanager
def folder_lock(folder: Path) -> Iterator[None]:
    """One process at a time prepares a folder; the lock goes with the process that holds it."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / ".lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def __getattr__(name: str) -> Any:
    """`Cifar10Jpeg`, by the path that records made before it moved name it by."""
    if name == "Cifar10Jpeg":
        from cutmix_exp.data.folders import Cifar10Jpeg

        return Cifar10Jpeg
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

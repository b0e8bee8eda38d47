"""Images that belong to none of the classes: the seven sets of the paper's Tables 12 and A2, which
are ODIN's (Liang et al., 1706.02690), and others that are usual.

A set may be had from several sources; the first one that is at hand is taken, and named. What a
network is shown is resized like its own test images: the shorter side to the image size, then the
centre.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import yaml
from torch import Tensor
from torchvision.transforms.v2 import functional as vision

from cutmix_exp import schema
from cutmix_exp.composition import CONFIG_DIR
from cutmix_exp.data.cache import Cache, Listing
from cutmix_exp.data.folders import ImageFiles, list_images
from cutmix_exp.data.sources import Dataset
from cutmix_exp.errors import UserError
from cutmix_exp.evaluation.base import EvaluationSet, Subject
from cutmix_exp.seeding import stream

ODIN = "https://github.com/facebookresearch/odin (links to archives; no licence of the images is stated)"


@dataclass(frozen=True)
class Setting:
    """What sets are loaded for.

    Attributes:
        places: folders in which they are looked for; `where` says it.
        cache: where decoded files are kept; None is `.cache` in the place where they were found.
        seed: of what is drawn: noise, and places of crops.
        noise: number of noise images.
    """

    subject: Subject
    places: tuple[Path, ...]
    where: str
    cache: Path | None
    seed: int
    noise: int

    def find(self, path: str) -> Path | None:
        return next((p / path for p in self.places if (p / path).exists()), None)

    def without_places(self, message: str) -> str:
        """A message without the folders of this machine, so that it can be kept in records."""
        folders = {str(place.absolute()) for place in (*self.places, self.cache) if place}
        for folder in sorted(folders, reverse=True):  # what lies below another one first
            message = message.replace(folder, "...")
        return message

    def decoded(self, files: Listing, name: str, place: Path, side: int | None) -> Tensor:
        """All images of some files, uint8 [N, 3, H, W]."""
        return Cache(self.cache or place / ".cache", name).decoded(files, side).images

    def shown(self, files: Listing, name: str, place: Path) -> EvaluationSet:
        """Files as this network sees its own test images."""
        if self.subject.config.dataset.streams:
            return self.subject.at_hand(files)
        side = self.subject.image_size
        return Squares(self.decoded(files, name, place, side), side, self.subject.world.device)


@dataclass(frozen=True)
class Squares:
    """Decoded images of one size that are cropped and resized when they are needed, on the host.

    Attributes:
        images: uint8 [N, 3, H, W].
        side: of what is shown.
        corners: int64 [N, 2], top and left of a window of `side` px in each image; None: the whole.
    """

    images: Tensor
    side: int
    device: torch.device
    corners: np.ndarray | None = None

    @property
    def labels(self) -> Tensor:
        return torch.zeros(len(self.images), dtype=torch.int64)

    def __len__(self) -> int:
        return len(self.images)

    def batches(self, indices: list[np.ndarray]) -> Iterator[Tensor]:
        for index in indices:
            images = self.images[torch.from_numpy(index)]
            if self.corners is not None:
                windows = zip(images, self.corners[index].tolist(), strict=True)
                images = torch.stack(
                    [
                        i[:, top : top + self.side, left : left + self.side]
                        for i, (top, left) in windows
                    ]
                )
            yield square(images, self.side).to(self.device)


def square(images: Tensor, side: int) -> Tensor:
    """uint8 [n, 3, side, side]: the shorter side resized (bilinear, antialiased), then the centre."""
    if min(images.shape[2:]) != side:
        images = vision.resize(images, [side], antialias=True)
    return vision.center_crop(images, [side, side])


@dataclass(frozen=True)
class NoiseImages:
    """Noise, float32 in [0, 1] and not rounded to bytes, as in ODIN's code. Each image hangs on the
    seed and its number alone."""

    law: Literal["uniform", "gaussian"]
    seed: int
    size: int
    side: int
    device: torch.device

    @property
    def labels(self) -> Tensor:
        return torch.zeros(self.size, dtype=torch.int64)

    def __len__(self) -> int:
        return self.size

    def batches(self, indices: list[np.ndarray]) -> Iterator[Tensor]:
        for index in indices:
            drawn = [self._draw(int(number)) for number in index]
            yield torch.from_numpy(np.stack(drawn)).to(self.device)

    def _draw(self, number: int) -> np.ndarray:
        rng = stream(self.seed, f"ood/{self.law}", step=number)
        shape = (3, self.side, self.side)
        if self.law == "uniform":
            return rng.random(shape, dtype=np.float32)
        return (rng.standard_normal(shape, dtype=np.float32) + np.float32(0.5)).clip(0, 1)


@dataclass(frozen=True)
class Chosen:
    """Some images of a set, in the order of `index` int64 [n]."""

    whole: EvaluationSet
    index: np.ndarray

    @property
    def labels(self) -> Tensor:
        return self.whole.labels[torch.from_numpy(self.index).to(self.whole.labels.device)]

    def __len__(self) -> int:
        return len(self.index)

    def batches(self, indices: list[np.ndarray]) -> Iterator[Tensor]:
        return self.whole.batches([self.index[part] for part in indices])


# -------------------------------------------------------------------------------- sources


@dataclass(frozen=True)
class Source:
    """Where images can be had from.

    Attributes:
        said: what they are, for the protocol.
    """

    said: str

    def missing(self, setting: Setting) -> str:
        """What is not at hand: where it was looked for, and where it is published; or why it does
        not fit the network. Empty if it can be loaded."""
        raise NotImplementedError

    def load(self, setting: Setting) -> EvaluationSet:
        """Raises UserError: files that are no images."""
        raise NotImplementedError


def not_at_hand(setting: Setting, layout: str, published: str) -> str:
    """Names no folder of this machine: the message is kept in records."""
    return (
        f"it is not at hand: expected {layout} in {setting.where}\n"
        f"published: {published}\n"
        "to mend:   unpack it there, or name another folder by suite.root=FOLDER"
    )


@dataclass(frozen=True)
class Noise(Source):
    law: Literal["uniform", "gaussian"]

    def missing(self, setting: Setting) -> str:
        return ""

    def load(self, setting: Setting) -> EvaluationSet:
        side, device = setting.subject.image_size, setting.subject.world.device
        return NoiseImages(self.law, setting.seed, setting.noise, side, device)


@dataclass(frozen=True)
class Folder(Source):
    """Images below a folder, in the order of their paths.

    Attributes:
        crop: cut the centre out of larger images instead of resizing them, which all must have one
            size.
    """

    path: str
    layout: str
    published: str
    crop: bool = False

    def missing(self, setting: Setting) -> str:
        found = setting.find(self.path)
        return "" if found else not_at_hand(setting, self.layout, self.published)

    def load(self, setting: Setting) -> EvaluationSet:
        found = setting.find(self.path)
        assert found is not None, "missing() comes first"
        files = list_images(found.parent, (found.name,))
        place = found.parents[len(Path(self.path).parts) - 1]
        name = "ood-" + self.path.replace("/", "_")
        side, device = setting.subject.image_size, setting.subject.world.device
        if self.crop and not setting.subject.config.dataset.streams:
            images = setting.decoded(files, name, place, None)
            spare = np.array(images.shape[2:]) - side
            corners = np.tile(spare // 2, (len(images), 1)) if spare.min() >= 0 else None
            return Squares(images, side, device, corners)
        return setting.shown(files, name, place)


@dataclass(frozen=True)
class TestImages(Source):
    """The test images of another data set of the project.

    Attributes:
        dataset: its name in configs/dataset.
    """

    dataset: str

    def _found(self, setting: Setting) -> tuple[Dataset, str]:
        """The data set at the first place that has it, or at the first one, and what it lacks."""
        parts = [(part, part.missing()) for part in self._parts(setting)]
        return next((p for p in parts if not p[1]), parts[0])

    def _parts(self, setting: Setting) -> list[Dataset]:
        plain = yaml.safe_load((CONFIG_DIR / "dataset" / f"{self.dataset}.yaml").read_text())
        return [
            schema.build(Dataset, plain | {"root": str(place)}, f"dataset {self.dataset}")
            for place in setting.places
        ]

    def missing(self, setting: Setting) -> str:
        part, missing = self._found(setting)
        if not missing:
            return ""
        published = part.published
        where = f"{published.url} ({published.publisher}; {published.terms})" if published else ""
        return not_at_hand(setting, f"the data set {self.dataset}", where)

    def load(self, setting: Setting) -> EvaluationSet:
        part, _ = self._found(setting)
        if isinstance(part, ImageFiles):
            return self._of_files(setting, part, part.files()[1])
        _, test, _ = part.read()
        return Squares(test.images, setting.subject.image_size, setting.subject.world.device)  # type: ignore[union-attr]

    def _of_files(self, setting: Setting, part: ImageFiles, files: Listing) -> EvaluationSet:
        return setting.shown(files, f"ood-{self.dataset}", Path(part.root))


@dataclass(frozen=True)
class MadeOfTinyImageNet(TestImages):
    """Cropped or resized from the 10,000 validation images of Tiny ImageNet, of 64 px. ODIN's sets
    are of its test images; where they cropped and how they resized is not told.

    Attributes:
        how: `crop` (a window of the image size at a random place) or `resize`.
    """

    how: Literal["crop", "resize"]

    def missing(self, setting: Setting) -> str:
        missing = super().missing(setting)
        side = setting.subject.image_size
        if not missing and self.how == "crop" and side >= 64:
            return f"images of 64 px are not cropped to the network's {side} px"
        return missing

    def _of_files(self, setting: Setting, part: ImageFiles, files: Listing) -> EvaluationSet:
        if self.how == "resize":
            return super()._of_files(setting, part, files)
        images = setting.decoded(files, f"{self.dataset}-test", Path(part.root), part.image_size)
        side = setting.subject.image_size
        rng = stream(setting.seed, "ood/tinyimagenet_crop")
        corners = rng.integers(0, part.image_size - side + 1, size=(len(images), 2))
        return Squares(images, side, setting.subject.world.device, corners)


@dataclass(frozen=True)
class Svhn(Source):
    """The 26,032 test images of the cropped digits, 32 px, in MATLAB's format."""

    paths = ("svhn/test_32x32.mat", "SVHN/test_32x32.mat", "test_32x32.mat")

    def _file(self, setting: Setting) -> Path | None:
        return next((found for p in self.paths if (found := setting.find(p))), None)

    def missing(self, setting: Setting) -> str:
        where = (
            "http://ufldl.stanford.edu/housenumbers (Netzer et al. 2011; non-commercial use only)"
        )
        found = self._file(setting)
        return "" if found else not_at_hand(setting, "svhn/test_32x32.mat", where)

    def load(self, setting: Setting) -> EvaluationSet:
        from scipy.io import loadmat

        file = self._file(setting)
        assert file is not None, "missing() comes first"
        try:
            pixels = loadmat(str(file))["X"]  # [H, W, 3, N]
        except Exception as error:  # on damaged files scipy raises all kinds
            raise UserError(
                f"{file} cannot be read: {error}; download test_32x32.mat again"
            ) from None
        images = torch.from_numpy(np.ascontiguousarray(pixels.transpose(3, 2, 0, 1)))
        return Squares(images, setting.subject.image_size, setting.subject.world.device)


@dataclass(frozen=True)
class Listed(Source):
    """A set of OpenOOD v1.5: benchmark_imglist/<benchmark>/test_<name>.txt has a path and a label in
    each line; the paths start at images_classic or images_largescale."""

    benchmark: str
    name: str

    @property
    def path(self) -> str:
        return f"benchmark_imglist/{self.benchmark}/test_{self.name}.txt"

    def missing(self, setting: Setting) -> str:
        """Of the images only the first one is looked for: a set is unpacked or it is not."""
        where = (
            "https://github.com/Jingkang50/OpenOOD (scripts/download; each set under its own terms)"
        )
        below = "images_classic or images_largescale"
        file = setting.find(self.path)
        if file is None:
            layout = f"{self.path} and the images that it names in {below}"
            return not_at_hand(setting, layout, where)
        names = self._names(file)
        if names and self._root(file, names) is None:
            layout = f"the images that {self.path} names in {below} (the first: {names[0]})"
            return not_at_hand(setting, layout, where)
        return ""

    def _names(self, file: Path) -> list[str]:
        """The paths that a list holds."""
        lines = file.read_text("utf-8").splitlines()
        return [line.split()[0] for line in lines if line.strip()]

    def _root(self, file: Path, names: list[str]) -> Path | None:
        """The folder that a list's paths start at; None where its first image is in none."""
        roots = [file.parents[2] / f for f in ("images_classic", "images_largescale")]
        return next((root for root in roots if names and (root / names[0]).is_file()), None)

    def load(self, setting: Setting) -> EvaluationSet:
        found = setting.find(self.path)
        assert found is not None, "missing() comes first"
        place, names = found.parents[2], self._names(found)
        root = self._root(found, names)
        absent = [name for name in names if root is None or not (root / name).is_file()]
        if root is None or absent:
            raise UserError(
                f"{found} names {len(absent):,} images that are not in {place}/images_classic or "
                f"images_largescale, the first is {absent[0] if absent else '(none: it is empty)'}; "
                "unpack OpenOOD's archive of this set there"
            )
        stats = [(root / name).stat() for name in names]
        files = Listing(
            root,
            np.array([name.encode() for name in names]),
            np.array([s.st_size for s in stats], dtype=np.int64),
            torch.zeros(len(names), dtype=torch.int64),
            times=np.array([s.st_mtime_ns for s in stats], dtype=np.int64),
        )
        return setting.shown(files, f"ood-{self.benchmark}-{self.name}", place)


@dataclass(frozen=True)
class Outliers:
    """A set by its sources, the preferred one first.

    Attributes:
        familiar: data sets whose networks were trained on such images.
    """

    sources: tuple[Source, ...]
    familiar: tuple[str, ...] = ()


def odin(archive: str, layout: str, said: str, **fields: Any) -> Folder:
    return Folder(said, archive, layout, ODIN, **fields)


TINY = ("tiny_imagenet", "imagenet")
CIFAR10 = ("cifar10", "cifar10_jpeg")
SETS: dict[str, Outliers] = {
    "tinyimagenet_crop": Outliers(
        (
            odin("Imagenet", "Imagenet/test/*.png", "ODIN's archive Imagenet", crop=True),
            MadeOfTinyImageNet(
                "Tiny ImageNet, validation, random windows", "tiny_imagenet", "crop"
            ),
        ),
        TINY,
    ),
    "tinyimagenet_resize": Outliers(
        (
            odin("Imagenet_resize", "Imagenet_resize/*.png", "ODIN's archive Imagenet_resize"),
            MadeOfTinyImageNet("Tiny ImageNet, validation, resized", "tiny_imagenet", "resize"),
        ),
        TINY,
    ),
    "lsun_crop": Outliers((odin("LSUN", "LSUN/test/*.png", "ODIN's archive LSUN", crop=True),)),
    "lsun_resize": Outliers(
        (odin("LSUN_resize", "LSUN_resize/*.png", "ODIN's archive LSUN_resize"),)
    ),
    "isun": Outliers((odin("iSUN", "iSUN/iSUN_patches/*.jpeg", "ODIN's archive iSUN"),)),
    "uniform": Outliers((Noise("uniform on [0, 1], each pixel and channel", "uniform"),)),
    "gaussian": Outliers((Noise("normal(0.5, 1) clipped to [0, 1]", "gaussian"),)),
    "svhn": Outliers((Svhn("SVHN, test images"),)),
    "dtd": Outliers(
        (
            Folder(
                "Describable Textures, all images",
                "dtd/images",
                "dtd/images/<class>/*.jpg",
                "https://www.robots.ox.ac.uk/~vgg/data/dtd (Cimpoi et al. 2014; research only)",
            ),
        )
    ),
    "cifar10": Outliers((TestImages("CIFAR-10, test images", "cifar10"),), CIFAR10),
    "cifar10_jpeg": Outliers(
        (TestImages("CIFAR-10 (JPEG), test images", "cifar10_jpeg"),), CIFAR10
    ),
    "cifar100": Outliers((TestImages("CIFAR-100, test images", "cifar100"),), ("cifar100",)),
}

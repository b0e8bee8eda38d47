"""Robustness to common corruptions (Hendrycks and Dietterich, ICLR 2019): made on the fly, or read
from the published sets."""

from __future__ import annotations

import io
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from cutmix_exp.data.sources import ImageSet
from cutmix_exp.errors import UserError
from cutmix_exp.evaluation.attacks import percent
from cutmix_exp.evaluation.base import EvaluationSet, Findings, Subject, Suite
from cutmix_exp.evaluation.classification import read_off
from cutmix_exp.evaluation.corrupt import Corrupter, read_frost
from cutmix_exp.evaluation.published import images_by_class, locate, misfit, not_at_hand, places
from cutmix_exp.evaluation.sampling import limited, stratified_subset
from cutmix_exp.evaluation.severities import ALEXNET_ERROR, CORRUPTIONS, Family, family_of
from cutmix_exp.schema import option

SEVERITIES = (1, 2, 3, 4, 5)
Hits = dict[str, np.ndarray]
"""By corruption, bool [N, severities]: which images are classified rightly."""


def right(subject: Subject, images: Tensor, labels: Tensor) -> Tensor:
    """Bool [n]: which images uint8 [n, 3, H, W] get their label, as in the training's evaluation."""
    return read_off(subject.logits_of(images), labels)["in_top1"]


def scores(hits: Hits, clean: np.ndarray | None) -> dict[str, float]:
    """Errors in percent: of each corruption the mean over its severities, and the mean of these; not
    normalised by anything."""
    errors = {name: float(np.mean([percent(~h) for h in of.T])) for name, of in hits.items()}
    metrics = {"mean_corruption_error": float(np.mean(list(errors.values())))}
    if clean is not None:
        metrics["clean_top1_error"] = percent(~clean)
    return metrics | {f"{name}/top1_error": error for name, error in errors.items()}


def curve(
    hits: Hits, clean: np.ndarray | None, severities: tuple[int, ...]
) -> dict[str, list[float]]:
    """Errors by severity: the mean over the corruptions, and each; severity 0 is the clean set."""
    first = [] if clean is None else [percent(~clean)]
    by_name = {n: [*first, *(percent(~h) for h in of.T)] for n, of in hits.items()}
    return {
        "severity": [0.0] * len(first) + [float(s) for s in severities],
        "mean_top1_error": [float(np.mean(v)) for v in zip(*by_name.values(), strict=True)],
        **by_name,
    }


def mean_normalized_error(metrics: dict[str, float]) -> float:
    """The mCE in percent: each corruption's error over AlexNet's, which is 100 for AlexNet itself."""
    ratios = [metrics[f"{name}/top1_error"] / ALEXNET_ERROR[name] for name in CORRUPTIONS]
    return 100.0 * float(np.mean(ratios))


@dataclass(frozen=True, kw_only=True)
class SomeCorruptions(Suite):
    """What the suites of corruptions have in common.

    Attributes:
        corruptions: which of the fifteen.
        limit: number of images, a fixed stratified subset; None: all.
    """

    corruptions: tuple[str, ...] = CORRUPTIONS
    limit: int | None = option(None, ge=1)

    def __post_init__(self) -> None:
        unknown = [name for name in self.corruptions if name not in CORRUPTIONS]
        if unknown or not self.corruptions:
            raise UserError(
                f"corruptions={list(self.corruptions)}: expected some of {', '.join(CORRUPTIONS)}"
            )


@dataclass(frozen=True, kw_only=True)
class Corruptions(SomeCorruptions):
    """The test images, corrupted on the fly by keyed randomness.

    Numbers are comparable between networks that were examined so, not with those of the published
    sets: these were made by other programs and, ImageNet-C, stored as JPEG files, which makes them
    easier or harder (hendrycks/robustness, issues 14 and 16).

    Attributes:
        severities: from 1 to 5.
        family: whose published severities; auto: by the images' size.
        seed: of what is drawn, which all networks share.
        frost_photos: folder of the published photographs of frost; None: without frost.
        jpeg_quality: write and read corrupted images as JPEG, as ImageNet-C is stored (85).
    """

    severities: tuple[int, ...] = option(SEVERITIES, ge=1, le=5)
    family: Literal["auto", "cifar", "tiny_imagenet", "imagenet"] = "auto"
    seed: int = option(0, ge=0)
    frost_photos: str | None = option(None, place=True)
    jpeg_quality: int | None = option(None, ge=1, le=100)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.severities:
            raise UserError("severities=[]: expected some of 1, 2, 3, 4, 5")

    def family_for(self, subject: Subject) -> Family:
        return family_of(subject.image_size) if self.family == "auto" else self.family

    def run(self, subject: Subject) -> Findings:
        data, index = limited(subject, self.limit)
        family = self.family_for(subject)
        skipped = {}
        if "frost" in self.corruptions and self.frost_photos is None:
            skipped["frost"] = (
                "it needs the published photographs, which are not ours to give: "
                "suite.frost_photos=FOLDER (ImageNet-C/imagenet_c/imagenet_c/frost of "
                "https://github.com/hendrycks/robustness)"
            )
        names = [name for name in self.corruptions if name not in skipped]
        if not names:
            raise UserError(f"no corruption is left: frost: {skipped['frost']}")
        photos = read_frost(Path(self.frost_photos), family) if self.frost_photos else ()
        corrupter = Corrupter(family, self.seed, photos, self.jpeg_quality)

        def judge(images: Tensor, labels: Tensor, rows: np.ndarray) -> dict[str, Tensor]:
            columns = {"clean": right(subject, images, labels)}
            for name in names:
                hits = [
                    right(subject, corrupter(images, name, s, index[rows]), labels)
                    for s in self.severities
                ]
                columns[name] = torch.stack(hits, 1)
            return columns

        hits: Hits = subject.over(data, judge)
        clean = hits.pop("clean")
        return Findings(
            metrics=scores(hits, clean),
            curves={"corruptions": curve(hits, clean, self.severities)},
            protocol={
                "made": "on the fly",
                "corruptions": names,
                "severities": list(self.severities),
                "family": family,
                "seed": self.seed,
                "jpeg_quality": self.jpeg_quality,
                "normalised_by": None,
                "precision": subject.config.precision,
                "limit": self.limit,
            },
            per_image={"index": index, "clean_correct": clean, **hits},
            pictures={"sheet": contact_sheet(data, corrupter, names)},
            skipped=skipped,
        )


def contact_sheet(data: EvaluationSet, corrupter: Corrupter, names: list[str]) -> bytes:
    """A PNG: the set's first image, clean and at each severity, a line for each corruption."""
    from matplotlib.figure import Figure

    (image,) = data.batches([np.array([0])])
    size, gap = image.shape[-1], max(1, image.shape[-1] // 16)
    sheet = np.full(((size + gap) * len(names), (size + gap) * 6, 3), 255, np.uint8)
    for line, name in enumerate(names):
        for severity in range(6):
            shown = corrupter(image, name, severity, np.array([0]))[0].permute(1, 2, 0)
            top, left = line * (size + gap), severity * (size + gap)
            sheet[top : top + size, left : left + size] = shown.cpu().numpy()
    figure = Figure(figsize=(8.4, 1.15 * len(names) + 0.5))
    axis = figure.subplots()
    axis.imshow(sheet, interpolation="nearest")
    centres = (size + gap) * (np.arange(max(len(names), 6)) + 0.5) - gap / 2
    axis.set_yticks(centres[: len(names)], names)
    axis.set_xticks(centres[:6], ["clean", *(f"severity {s}" for s in SEVERITIES)])
    axis.tick_params(
        length=0, labelsize=9, top=True, bottom=False, labeltop=True, labelbottom=False
    )
    axis.spines[:].set_visible(False)
    out = io.BytesIO()
    figure.savefig(out, format="png", dpi=100, bbox_inches="tight")
    return out.getvalue()


CIFAR_C = {
    "cifar10": ("CIFAR-10-C", "https://zenodo.org/record/2535967"),
    "cifar10_jpeg": ("CIFAR-10-C", "https://zenodo.org/record/2535967"),
    "cifar100": ("CIFAR-100-C", "https://zenodo.org/record/3555552"),
}
"""The published sets by the data set's name."""


@dataclass(frozen=True, kw_only=True)
class CifarC(SomeCorruptions):
    """CIFAR-10-C and CIFAR-100-C in their published layout: <corruption>.npy, uint8
    [5*N, 32, 32, 3], one severity after the other, and labels.npy.

    Attributes:
        root: the folder that holds the set, or its files; None: the data set's.
    """

    root: str | None = option(None, identity=False)

    def folder(self, subject: Subject) -> Path | None:
        names = (CIFAR_C[subject.config.dataset.name][0],)
        return locate(subject, self.root, names, lambda place: (place / "labels.npy").exists())

    def lacks(self, subject: Subject) -> str:
        name = subject.config.dataset.name
        if name not in CIFAR_C:
            return f"the suite {self.name} is for {', '.join(CIFAR_C)}; the network is of {name}"
        what, url = CIFAR_C[name]
        folder = self.folder(subject)
        if folder is None or not self.present(folder):
            layout = "labels.npy and " + ", ".join(f"{c}.npy" for c in self.corruptions)
            return not_at_hand(subject, what, self.root, (what,), layout, url)
        return ""

    def present(self, folder: Path) -> list[str]:
        return [name for name in self.corruptions if (folder / f"{name}.npy").exists()]

    def run(self, subject: Subject) -> Findings:
        folder = self.folder(subject)
        assert folder is not None
        labels = read_array(folder / "labels.npy", (None,)).astype(np.int64)
        count = len(labels) // len(SEVERITIES)
        index = stratified_subset(labels[:count], self.limit)
        hits: Hits = {}
        for name in self.present(folder):
            size = subject.image_size
            pixels = read_array(folder / f"{name}.npy", (len(labels), size, size, 3))
            columns = []
            for severity in SEVERITIES:
                rows = index + (severity - 1) * count
                images = torch.from_numpy(pixels[rows]).permute(0, 3, 1, 2).contiguous()
                part = ImageSet(images, torch.from_numpy(labels[rows]))
                columns.append(hits_of(subject, subject.at_hand(part)))
            hits[name] = np.stack(columns, 1)
        return published_findings(
            self, subject, hits, index, CIFAR_C[subject.config.dataset.name][0]
        )


def read_array(file: Path, shape: tuple[int | None, ...]) -> np.ndarray:
    """A uint8 array of a file, mapped into memory. Raises UserError: it is none of this shape."""
    try:
        array = np.load(file, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError) as error:
        raise UserError(f"{file} cannot be read: {error}") from None
    fits = len(array.shape) == len(shape) and all(
        wanted in (None, length) for wanted, length in zip(shape, array.shape, strict=True)
    )
    if not fits or array.dtype.kind not in "ui":
        wanted = " x ".join("N" if length is None else str(length) for length in shape)
        raise UserError(f"{file} is {array.dtype} {array.shape}; expected uint8 {wanted}")
    return array


def hits_of(subject: Subject, data: EvaluationSet) -> np.ndarray:
    """Bool [N]: which images of a set are classified rightly."""
    columns = subject.over(
        data,
        lambda images, labels, _: {"hits": right(subject, images, labels)},
    )
    return columns["hits"]


def published_findings(
    suite: SomeCorruptions, subject: Subject, hits: Hits, index: np.ndarray, what: str
) -> Findings:
    """The findings on a published set: `mCE` where it is defined, with all fifteen corruptions of
    ImageNet-1k."""
    metrics = scores(hits, None)
    normalised: Any = None
    if set(hits) == set(CORRUPTIONS) and subject.num_classes == 1000:
        metrics = {"mCE": mean_normalized_error(metrics), **metrics}
        normalised = "mCE: AlexNet's errors; all else: nothing"
    return Findings(
        metrics=metrics,
        curves={"corruptions": curve(hits, None, SEVERITIES)},
        protocol={
            "made": f"published: {what}",
            "corruptions": list(hits),
            "severities": list(SEVERITIES),
            "normalised_by": normalised,
            "precision": subject.config.precision,
            "limit": suite.limit,
        },
        per_image={"index": index, **hits},
        skipped={name: "not in the folder" for name in suite.corruptions if name not in hits},
    )


IMAGENET_C = ("ImageNet-C", "imagenet-c", "Tiny-ImageNet-C")
IMAGENET_C_URL = (
    "https://zenodo.org/record/2235448 (ImageNet-C), https://zenodo.org/record/2536630 "
    "(Tiny ImageNet-C)"
)


@dataclass(frozen=True, kw_only=True)
class ImageNetC(SomeCorruptions):
    """ImageNet-C and Tiny ImageNet-C in their published layout: <corruption>/<severity>/<synset>/
    *.JPEG; the archives' own folders (noise, blur, ...) may lie above.

    Attributes:
        root: the folder that holds the set, or its folders; None: the data set's.
    """

    root: str | None = option(None, identity=False)

    def folders(self, subject: Subject) -> dict[str, Path]:
        """By corruption, the folder that holds its severities."""

        def below(place: Path) -> dict[str, Path]:
            found = {}
            for name in self.corruptions:
                places = [place / name, *sorted(place.glob(f"*/{name}"))]
                whole = [p for p in places if all((p / str(s)).is_dir() for s in SEVERITIES)]
                if whole:
                    found[name] = whole[0]
            return found

        found = [below(place) for place in places(subject, self.root, IMAGENET_C)]
        return max(found, key=len, default={})

    def lacks(self, subject: Subject) -> str:
        folders = self.folders(subject)
        if not folders:
            layout = "<corruption>/<severity 1 to 5>/<class>/*.JPEG"
            what = "ImageNet-C or Tiny ImageNet-C"
            return not_at_hand(subject, what, self.root, IMAGENET_C, layout, IMAGENET_C_URL)
        return misfit(subject, next(iter(folders.values())) / "1")

    def run(self, subject: Subject) -> Findings:
        hits: Hits = {}
        for name, folder in self.folders(subject).items():
            columns = []
            for severity in SEVERITIES:
                data, index = images_by_class(subject, folder / str(severity), self.limit)
                columns.append(hits_of(subject, data))
            hits[name] = np.stack(columns, 1)
        what = "ImageNet-C" if subject.num_classes == 1000 else "ImageNet-C's layout"
        return published_findings(self, subject, hits, index, what)

"""Texture or shape: what a network goes by (Geirhos et al., ICLR 2019)."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from cutmix_exp.data.folders import class_folders, list_images
from cutmix_exp.errors import UserError
from cutmix_exp.evaluation.attacks import percent
from cutmix_exp.evaluation.base import Findings, Subject, Suite
from cutmix_exp.evaluation.classification import read_off
from cutmix_exp.evaluation.published import (
    as_they_are,
    images_by_class,
    locate,
    misfit,
    not_at_hand,
)
from cutmix_exp.schema import option

STYLIZED = ("Stylized-ImageNet", "stylized-imagenet")
STYLIZED_URL = "made by the program of https://github.com/rgeirhos/Stylized-ImageNet"
CUE_CONFLICT = ("style-transfer-preprocessed-512", "cue-conflict")
CUE_CONFLICT_URL = "https://github.com/rgeirhos/texture-vs-shape (stimuli/)"


@dataclass(frozen=True, kw_only=True)
class StylizedImageNet(Suite):
    """Errors on Stylized-ImageNet, whose textures are those of paintings: val/<synset>/*.

    Attributes:
        root: the folder that holds the set, or its `val`; None: the data set's.
        limit: number of images, a fixed stratified subset; None: all.
    """

    root: str | None = option(None, identity=False)
    limit: int | None = option(None, ge=1)

    def folder(self, subject: Subject) -> Path | None:
        if self.root is None:
            # The data set's own root has a `val` too: only a folder of the set's name will do.
            base = Path(subject.config.dataset.root)
            places = [base / name for name in STYLIZED if (base / name / "val").is_dir()]
            return places[0] / "val" if places else None
        place = locate(subject, self.root, STYLIZED, lambda place: (place / "val").is_dir())
        return place / "val" if place else None

    def lacks(self, subject: Subject) -> str:
        folder = self.folder(subject)
        if folder is None:
            layout = "val/<class>/*.png"
            what = "Stylized-ImageNet"
            return not_at_hand(subject, what, self.root, STYLIZED, layout, STYLIZED_URL)
        return misfit(subject, folder)

    def run(self, subject: Subject) -> Findings:
        folder = self.folder(subject)
        assert folder is not None
        data, index = images_by_class(subject, folder, self.limit)

        def judge(images: Tensor, labels: Tensor, _: np.ndarray) -> dict[str, Tensor]:
            found = read_off(subject.logits_of(images), labels)
            return {name: found[name] for name in ("in_top1", "in_top5")}

        hits = subject.over(data, judge)
        return Findings(
            metrics={
                "top1_error": percent(~hits["in_top1"]),
                "top5_error": percent(~hits["in_top5"]),
                "top1_accuracy": percent(hits["in_top1"]),
            },
            protocol={"precision": subject.config.precision, "limit": self.limit},
            per_image={"index": index, "correct": hits["in_top1"]},
        )


def numbers(text: str) -> tuple[int, ...]:
    """Of a text such as `1-3,7`: 1, 2, 3, 7."""
    out: list[int] = []
    for part in text.split(","):
        first, _, last = part.partition("-")
        out += range(int(first), int(last or first) + 1)
    return tuple(out)


CATEGORIES = {
    "airplane": numbers("404"),
    "bear": numbers("294-297"),
    "bicycle": numbers("444,671"),
    "bird": numbers("8,10-16,18-20,22-24,80-83,87-96,98-100,127-133,135-145"),
    "boat": numbers("472,554,625,814,914"),
    "bottle": numbers("440,720,737,898-899,901,907"),
    "car": numbers("436,511,817"),
    "cat": numbers("281-286"),
    "chair": numbers("423,559,765,857"),
    "clock": numbers("409,530,892"),
    "dog": numbers(
        "152-191,193-203,205-226,228-241,243-250,252-257,259,261-263,265-268",
    ),
    "elephant": numbers("385-386"),
    "keyboard": numbers("508,878"),
    "knife": numbers("499"),
    "oven": numbers("766"),
    "truck": numbers("555,569,656,675,717,734,864,867"),
}
"""ImageNet-1k's classes by the stimuli's sixteen categories. Source: rgeirhos/texture-vs-shape,
code/helper/human_categories.py."""


def decisions(probabilities: Tensor) -> Tensor:
    """The category int64 [n], by name in order, whose classes have the highest mean probability.

    Args:
        probabilities: [n, 1000].
    """
    means = [probabilities[:, list(classes)].mean(1) for classes in CATEGORIES.values()]
    return torch.stack(means, 1).argmax(1)


@dataclass(frozen=True, kw_only=True)
class CueConflict(Suite):
    """Shape bias on images with the shape of one category and the texture of another, in their
    published layout: <shape>/<shape><number>-<texture><number>.png of sixteen categories.

    Of the images whose two categories differ and which get one of them, the share that gets the
    shape's, in percent.

    Attributes:
        root: the folder that holds the set, or its categories; None: the data set's.
    """

    root: str | None = option(None, identity=False)

    def folder(self, subject: Subject) -> Path | None:
        return locate(subject, self.root, CUE_CONFLICT, lambda p: (p / "airplane").is_dir())

    def lacks(self, subject: Subject) -> str:
        if subject.num_classes != 1000:
            return (
                f"the suite {self.name} is for networks with ImageNet-1k's 1000 classes; this one "
                f"has {subject.num_classes}"
            )
        if self.folder(subject) is None:
            layout = "airplane/airplane1-bicycle2.png and so on"
            what = "the set of conflicting cues"
            return not_at_hand(subject, what, self.root, CUE_CONFLICT, layout, CUE_CONFLICT_URL)
        return ""

    def run(self, subject: Subject) -> Findings:
        folder = self.folder(subject)
        assert folder is not None
        files = list_images(folder, class_folders(folder))
        cues = np.array([cues_of(name) for name in files.names.tolist()])

        def judge(images: Tensor, labels: Tensor, _: np.ndarray) -> dict[str, Tensor]:
            return {"decision": decisions(subject.logits_of(images).softmax(1))}

        found = subject.over(as_they_are(subject, files), judge)["decision"]
        shape, texture = (found == cues.T) & (cues[:, 0] != cues[:, 1])
        conflicts = cues[:, 0] != cues[:, 1]
        decided = int(shape.sum() + texture.sum())
        metrics = {
            "shape_accuracy": percent(shape[conflicts]),
            "texture_accuracy": percent(texture[conflicts]),
        }
        skipped = {}
        if decided:
            metrics = {"shape_bias": 100.0 * int(shape.sum()) / decided, **metrics}
        else:
            skipped["shape_bias"] = "no image got one of its two categories"
        return Findings(
            metrics=metrics,
            protocol={
                "decision": "mean probability of a category's classes",
                "images_with_conflict": int(conflicts.sum()),
                "precision": subject.config.precision,
            },
            per_image={"shape": cues[:, 0], "texture": cues[:, 1], "decision": found},
            skipped=skipped,
        )


def cues_of(name: bytes) -> tuple[int, int]:
    """The categories of shape and texture that a file's name tells. Raises UserError."""
    stem = Path(name.decode("utf-8", "replace")).stem
    told = re.fullmatch(r"([a-z]+)\d+-([a-z]+)\d+", stem)
    order = list(CATEGORIES)
    if told is None or not {told[1], told[2]} <= set(order):
        raise UserError(
            f"{name.decode('utf-8', 'replace')} does not tell its cues; expected a name such as "
            f"airplane1-bicycle2.png, of the categories {', '.join(order)}"
        )
    return order.index(told[1]), order.index(told[2])

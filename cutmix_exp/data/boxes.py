"""True boxes of objects: the layouts in which they are published, and where they lie in the images
that are evaluated.

A box is (top, left, bottom, right), half open: it covers the rows top <= y < bottom. Lists that
name the last pixel itself (Tiny ImageNet, ImageNet) are read as last + 1; so the overlap of two
boxes is the one that others compute from inclusive corners with `+ 1`.
"""

from __future__ import annotations

import csv
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import torch
from torch import Tensor

from cutmix_exp.errors import UserError

Boxes = np.ndarray
"""float64 [m, 4]: (top, left, bottom, right) of the m boxes of an image, in pixels."""


@dataclass(frozen=True)
class Framing:
    """How a whole image becomes the square one that is evaluated: resized, then its centre.

    Attributes:
        resized: of the shorter side in pixels, or of both sides if `stretch`.
        size: side of the centre crop.
    """

    resized: int
    size: int
    stretch: bool = False

    def resized_to(self, height: int, width: int) -> tuple[int, int]:
        """(height, width) after resizing, as torchvision rounds them."""
        if self.stretch:
            return self.resized, self.resized
        shorter, longer = sorted((height, width))
        other = int(self.resized * longer / shorter)
        return (self.resized, other) if height <= width else (other, self.resized)

    def boxes(self, boxes: Boxes, height: int, width: int) -> Boxes:
        """Where the boxes of an image of `height` x `width` lie in the crop; what is outside is cut
        off, and boxes of which nothing is left are dropped."""
        new = self.resized_to(height, width)
        scale = np.array([new[0] / height, new[1] / width] * 2)
        shift = np.array([_margin(side, self.size) for side in new] * 2)
        moved = np.clip(boxes * scale - shift, 0, self.size)
        return moved[(moved[:, 2] > moved[:, 0]) & (moved[:, 3] > moved[:, 1])]

    def mask(self, mask: Tensor) -> Tensor:
        """bool [size, size] from a mask bool [H, W]: the nearest pixel counts."""
        from torchvision.transforms.v2 import functional as vision

        new = self.resized_to(*mask.shape)
        grey = vision.resize(
            mask[None].to(torch.uint8), list(new), interpolation=vision.InterpolationMode.NEAREST
        )
        return vision.center_crop(grey, [self.size, self.size])[0].bool()


def _margin(side: int, size: int) -> int:
    """What torchvision's centre crop leaves out before its first pixel; negative where it pads."""
    return round((side - size) / 2) if side >= size else -((size - side) // 2)


def _inclusive(left: float, top: float, right: float, bottom: float) -> list[float]:
    return [top, left, bottom + 1, right + 1]


def _found(rows: dict[str, Boxes], names: list[str], where: str) -> list[Boxes]:
    missing = [name for name in names if name not in rows]
    if missing:
        raise UserError(
            f"{where} has no boxes of {len(missing):,} of {len(names):,} images, the first is "
            f"{missing[0]}"
        )
    return [rows[name] for name in names]


def tiny_imagenet_boxes(folder: Path, names: list[str]) -> list[Boxes]:
    """Of val/val_annotations.txt, and for names of training images (<wnid>/images/...) of
    train/<wnid>/<wnid>_boxes.txt. Raises UserError: a list is damaged or lacks an image."""
    wnids = sorted({name.partition("/")[0] for name in names if "/" in name})
    lists = [(folder / f"train/{w}/{w}_boxes.txt", f"{w}/images/") for w in wnids]
    if any("/" not in name for name in names):
        lists.append((folder / "val/val_annotations.txt", ""))
    rows: dict[str, Boxes] = {}
    for file, prefix in lists:
        for fields in _lines(file, "\t"):
            # val_annotations.txt has the class between name and box.
            left, top, right, bottom = _numbers(file, fields[-4:], 4)
            rows[prefix + fields[0]] = np.array([_inclusive(left, top, right, bottom)])
    return _found(rows, names, f"{folder}")


def cub_boxes(folder: Path, names: list[str]) -> list[Boxes]:
    """Of bounding_boxes.txt: <image number> <x> <y> <width> <height>; images.txt has the names.

    Raises:
        UserError: a list is damaged or lacks an image.
    """
    file = folder / "bounding_boxes.txt"
    number_of = {name: number for number, name in _lines(folder / "images.txt", None)}
    rows: dict[str, Boxes] = {}
    for number, *fields in _lines(file, None):
        left, top, width, height = _numbers(file, fields, 4)
        rows[number] = np.array([[top, left, top + height, left + width]])
    return _found({n: rows[i] for n, i in number_of.items() if i in rows}, names, f"{file}")


def loc_csv_boxes(file: Path, stems: list[str]) -> list[Boxes]:
    """Of Kaggle's LOC_val_solution.csv: ImageId, and "<synset> <x0> <y0> <x1> <y1> ..." for each
    box. Raises UserError: it is damaged or lacks an image."""
    rows: dict[str, Boxes] = {}
    try:
        with open(file, newline="") as opened:
            for row in csv.DictReader(opened):
                words = row["PredictionString"].split()
                parts = [words[i + 1 : i + 5] for i in range(0, len(words), 5)]
                boxes = [_inclusive(*_numbers(file, part, 4)) for part in parts]
                rows[row["ImageId"]] = np.array(boxes).reshape(-1, 4)
    except (KeyError, AttributeError):
        raise UserError(f"{file} has no columns ImageId and PredictionString") from None
    return _found(rows, stems, f"{file}")


def voc_boxes(file: Path) -> Boxes:
    """Of an XML file of Pascal VOC's form, all its objects. Raises UserError: it is damaged."""
    try:
        tree = ElementTree.parse(file)
    except (OSError, ElementTree.ParseError) as error:
        raise UserError(f"{file} cannot be read: {error}") from None
    boxes = []
    for box in tree.iter("bndbox"):
        corners = [box.findtext(name) or "" for name in ("xmin", "ymin", "xmax", "ymax")]
        boxes.append(_inclusive(*_numbers(file, corners, 4)))
    return np.array(boxes).reshape(-1, 4)


def _lines(file: Path, separator: str | None) -> list[list[str]]:
    try:
        text = file.read_text("utf-8")
    except OSError as error:
        raise UserError(f"{file} cannot be read: {error.strerror}") from None
    return [line.split(separator) for line in text.splitlines() if line.strip()]


def _numbers(file: Path, words: list[str], count: int) -> list[float]:
    try:
        numbers = [float(word) for word in words]
    except ValueError:
        numbers = []
    if len(numbers) != count:
        raise UserError(f"{file} is not as published: {' '.join(words)!r} is no box")
    return numbers

"""Small image trees of the published layouts."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
from PIL import Image

SYNSETS = ("n01440764", "n01443537", "n02084071")


def write_image(file: Path, seed: int, size: tuple[int, int] = (64, 64), mode: str = "RGB") -> None:
    """A random image of (height, width); the suffix names the format."""
    file.parent.mkdir(parents=True, exist_ok=True)
    coarse = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    Image.fromarray(coarse).resize(size[::-1]).convert(mode).save(file)


def class_trees(
    root: Path, test: str = "val", classes: tuple[str, ...] = SYNSETS, each: int = 4
) -> Path:
    """train/<class>/ with `each` images of several sizes and test/<class>/ with two."""
    for part, number in (("train", each), (test, 2)):
        for label, name in enumerate(classes):
            for i in reversed(range(number)):
                seed = 100 * label + i + (50 if part == test else 0)
                write_image(root / part / name / f"{name}_{i}.JPEG", seed, (40 + 8 * i, 72))
    return root


def tiny_imagenet(root: Path, wnids: tuple[str, ...] = SYNSETS, each: int = 4) -> Path:
    """The published layout of Tiny ImageNet; the validation images go round the classes."""
    for label, wnid in enumerate(wnids):
        for i in range(each):
            write_image(root / f"train/{wnid}/images/{wnid}_{i}.JPEG", 10 * label + i)
        boxes = "".join(f"{wnid}_{i}.JPEG\t0\t0\t63\t63\n" for i in range(each))
        (root / f"train/{wnid}/{wnid}_boxes.txt").write_text(boxes)
    rows = []
    for i in range(2 * len(wnids)):
        write_image(root / f"val/images/val_{i}.JPEG", 500 + i)
        rows.append(f"val_{i}.JPEG\t{wnids[(i + 1) % len(wnids)]}\t0\t32\t44\t62\n")
    (root / "val/val_annotations.txt").write_text("".join(rows))
    (root / "wnids.txt").write_text("\n".join(reversed(wnids)) + "\n")
    words = "".join(f"{wnid}\tword {wnid}, synonym\n" for wnid in ("n00000001", *wnids))
    (root / "words.txt").write_text(words)
    return root


def cub(root: Path, each: int = 3, size: tuple[int, int] = (60, 80)) -> Path:
    """The published layout of CUB-200-2011 with two species: the first two images of each are for
    training, and the object of image i is a white rectangle at (8 + i, 16), 30 high and 20 wide."""
    classes = ("001.Black_footed_Albatross", "002.Laysan_Albatross")
    lists: dict[str, list[str]] = {}
    for label, name in enumerate(classes, start=1):
        lists.setdefault("classes.txt", []).append(f"{label} {name}")
        for i in range(each):
            number = (label - 1) * each + i + 1
            file = f"{name}/{name[4:]}_{i:04}.jpg"
            object_image(root / "images" / file, (8 + i, 16, 38 + i, 36), size)
            mask = root / "segmentations" / Path(file).with_suffix(".png")
            object_image(mask, (8 + i, 16, 38 + i, 36), size)
            for where, text in (
                ("images.txt", file),
                ("image_class_labels.txt", f"{label}"),
                ("train_test_split.txt", f"{int(i < 2)}"),
                ("bounding_boxes.txt", f"16.0 {8 + i}.0 20.0 30.0"),
            ):
                lists.setdefault(where, []).append(f"{number} {text}")
    for where, lines in lists.items():
        (root / where).write_text("\n".join(lines) + "\n")
    return root


def object_image(file: Path, box: tuple[int, int, int, int], size: tuple[int, int]) -> None:
    """A white rectangle (top, left, bottom, right) on black, in an image of (height, width)."""
    pixels = np.zeros((*size, 3), dtype=np.uint8)
    pixels[box[0] : box[2], box[1] : box[3]] = 255
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(file, quality=95)


def voc(file: Path, boxes: list[tuple[int, int, int, int]]) -> None:
    """ImageNet's XML file of an image, with boxes (xmin, ymin, xmax, ymax)."""
    objects = "".join(
        "<object><name>n01440764</name><bndbox>"
        + "".join(f"<{n}>{v}</{n}>" for n, v in zip(CORNERS, box, strict=True))
        + "</bndbox></object>"
        for box in boxes
    )
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(f"<annotation><filename>x</filename>{objects}</annotation>")


CORNERS = ("xmin", "ymin", "xmax", "ymax")


def truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def names_of(files: object) -> list[str]:
    return [os.fsdecode(name) for name in files.names]  # type: ignore[attr-defined]

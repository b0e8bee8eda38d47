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


def truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def names_of(files: object) -> list[str]:
    return [os.fsdecode(name) for name in files.names]  # type: ignore[attr-defined]

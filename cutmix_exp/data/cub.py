"""CUB-200-2011, the birds on which the paper localises objects (Table 9)."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor

from cutmix_exp.data.boxes import Boxes, cub_boxes
from cutmix_exp.data.cache import Listing
from cutmix_exp.data.decoding import decode
from cutmix_exp.data.folders import ImageFiles, list_images
from cutmix_exp.data.sources import FileSet, ImageSet, Publication
from cutmix_exp.errors import UserError
from cutmix_exp.schema import option


@dataclass(frozen=True, kw_only=True)
class Cub(ImageFiles):
    """CUB-200-2011 (Wah et al. 2011): 200 species of birds, 5,994 training and 5,794 test images in
    the published layout: images/<class>/*.jpg, and lists images.txt, classes.txt,
    image_class_labels.txt, train_test_split.txt, bounding_boxes.txt. Masks, where
    segmentations.tgz is unpacked beside them: segmentations/<class>/*.png."""

    below = "CUB_200_2011"
    layout = (
        "images",
        "images.txt",
        "classes.txt",
        "image_class_labels.txt",
        "train_test_split.txt",
        "bounding_boxes.txt",
    )
    mend = (
        "unpack CUB_200_2011.tgz (https://data.caltech.edu/records/65de6-vp158) there, and "
        "segmentations.tgz inside CUB_200_2011 if masks are wanted"
    )
    published = Publication(
        "C. Wah, S. Branson, P. Welinder, P. Perona, S. Belongie, California Institute of Technology",
        "https://data.caltech.edu/records/65de6-vp158",
        "images are their photographers'; for non-commercial research and education only",
    )
    as_given: ClassVar[dict[str, Any]] = {"eval_resize": 256}

    delivery: Literal["resident", "streaming"] = option("streaming", neutral="resident")

    @property
    def train_images(self) -> int:
        return 5_994

    def files(self) -> tuple[Listing, Listing, tuple[str, ...]]:
        folder = self.folder()
        classes = tuple(self._column("classes.txt").values())
        if len(classes) != self.num_classes:
            raise UserError(
                f"{folder / 'classes.txt'} has {len(classes)} classes; "
                f"dataset.num_classes={self.num_classes}"
            )
        listing = list_images(folder / "images", classes)
        of_training = self._in_training(classes)
        names = [os.fsdecode(name) for name in listing.names]
        differing = sorted(set(names) ^ of_training.keys())
        if differing:
            raise UserError(
                f"{folder / 'images.txt'} must name each image below {folder / 'images'}; they differ "
                f"in {', '.join(differing[:3])}"
                f"{f' and {len(differing) - 3} more' if len(differing) > 3 else ''}"
            )
        chosen = np.array([of_training[name] for name in names])
        plain = tuple(name.partition(".")[2].replace("_", " ") or name for name in classes)
        return _part(listing, chosen), _part(listing, ~chosen), plain

    def _column(self, name: str) -> dict[str, str]:
        """The second column of a list by the first, an image's or a class's number."""
        file = self.folder() / name
        rows = [line.split() for line in file.read_text("utf-8").splitlines() if line.strip()]
        if any(len(row) != 2 for row in rows):
            raise UserError(f"{file} is not as published: expected two columns; unpack it again")
        return dict(rows)

    def _in_training(self, classes: tuple[str, ...]) -> dict[str, bool]:
        """Whether an image is for training, by its name. Raises UserError: the lists disagree."""
        names, parts = self._column("images.txt"), self._column("train_test_split.txt")
        numbers, class_of = self._column("image_class_labels.txt"), self._column("classes.txt")
        for number, name in names.items():
            label = class_of.get(numbers.get(number, ""))
            if label != name.partition("/")[0] or parts.get(number) not in ("0", "1"):
                raise UserError(
                    f"the lists in {self.folder()} do not agree on image {number} ({name}): class "
                    f"{label}, train_test_split {parts.get(number)}; unpack the archive again"
                )
        return {name: parts[number] == "1" for number, name in names.items()}

    def missing_boxes(self) -> str:
        return self.missing()

    def file_boxes(self, names: list[str]) -> list[Boxes]:
        return cub_boxes(self.folder(), names)

    def masks(self, part: ImageSet | FileSet) -> Callable[[int], Tensor] | None:
        """Pixels that at least half of the annotators marked (grey 128 and above)."""
        folder, framing = self.folder() / "segmentations", self.framing
        if not folder.is_dir():
            return None
        files = part if isinstance(part, FileSet) else part.files
        assert files is not None, "decoded images know their files"

        def mask(index: int) -> Tensor:
            name = Path(os.fsdecode(files.names[index])).with_suffix(".png")
            return framing.mask(decode(folder / name)[0] >= 128)

        return mask


def _part(listing: Listing, chosen: np.ndarray) -> Listing:
    return replace(
        listing,
        names=listing.names[chosen],
        sizes=listing.sizes[chosen],
        times=listing.times[chosen],
        labels=listing.labels[torch.from_numpy(chosen)],
    )

"""Sets that others made of a known test set, in the folders in which they publish them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np

from cutmix_exp.data.folders import ImageFiles, TinyImageNet, class_folders, list_images
from cutmix_exp.data.sources import FileSet
from cutmix_exp.data.streaming import StreamedSet
from cutmix_exp.evaluation.base import Subject
from cutmix_exp.evaluation.sampling import stratified_subset


def places(subject: Subject, root: str | None, names: tuple[str, ...]) -> list[Path]:
    """The folders in which a set may be: those of the names below `root` (None: the data set's own),
    then `root` itself."""
    base = Path(root or subject.config.dataset.root)
    return [place for place in (*(base / name for name in names), base) if place.is_dir()]


def locate(
    subject: Subject, root: str | None, names: tuple[str, ...], fits: Callable[[Path], bool]
) -> Path | None:
    """The first of `places` that fits."""
    return next((place for place in places(subject, root, names) if fits(place)), None)


def not_at_hand(
    subject: Subject, what: str, root: str | None, names: tuple[str, ...], layout: str, url: str
) -> str:
    """The message for a set that is not there."""
    base = Path(root or subject.config.dataset.root).absolute()
    return (
        f"{what} is not at hand\n"
        f"looked in: {base} and its folders {', '.join(names)}, for {layout}\n"
        f"published: {url}\n"
        "to mend:   put it there, or name its folder by suite.root=FOLDER"
    )


def as_they_are(subject: Subject, files: FileSet) -> StreamedSet:
    """Image files that were cropped when they were made: only resized, where the network expects
    another size."""
    dataset = subject.config.dataset
    cropped = replace(dataset, eval_resize=subject.image_size)
    return StreamedSet(files, cropped, subject.world.device)


def misfit(subject: Subject, folder: Path) -> str:
    """Why a folder's class folders are not the subject's classes; empty if they are.

    All sets sort their classes by the folders' names. Tiny ImageNet names them otherwise, so of it
    only their number is compared.
    """
    found, classes = class_folders(folder), subject.splits.class_names
    if len(found) != len(classes):
        return f"{folder} has {len(found)} class folders; the network knows {len(classes)} classes"
    dataset = subject.config.dataset
    named_alike = isinstance(dataset, ImageFiles) and not isinstance(dataset, TinyImageNet)
    if named_alike and found != classes:
        only = sorted(set(found) ^ set(classes))[0]
        return f"{folder} and {dataset.name} have different class folders: {only} is in one of them"
    return ""


def images_by_class(
    subject: Subject, folder: Path, limit: int | None = None
) -> tuple[StreamedSet, np.ndarray]:
    """Images in <folder>/<class>/, labelled by the sorted order of the classes, and their places [n]
    among all in this order.

    Args:
        limit: number of images, a fixed stratified subset; None: all.

    Raises:
        UserError: a class without images, a folder that cannot be read.
    """
    files = list_images(folder, class_folders(folder))
    index = stratified_subset(files.labels.numpy(), limit)
    return as_they_are(subject, files.at(index)), index

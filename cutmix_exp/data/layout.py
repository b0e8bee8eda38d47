"""ImageNet's validation images, published in one folder, into class folders."""

from __future__ import annotations

import csv
from pathlib import Path

from cutmix_exp.data.folders import KAGGLE, class_folders
from cutmix_exp.errors import UserError

TRUTH = "ILSVRC2012_validation_ground_truth.txt"


def validation_synsets(devkit: Path) -> dict[str, str]:
    """The synset of each validation image by file name.

    Args:
        devkit: the unpacked ILSVRC2012_devkit_t12 (data/ with the ground truth and meta.mat), or a
            folder with Kaggle's LOC_val_solution.csv.

    Raises:
        UserError: neither is there, or its content is not what was published.
    """
    try:
        if (devkit / KAGGLE).exists():
            with open(devkit / KAGGLE, newline="") as file:
                rows = list(csv.DictReader(file))
            return {f"{r['ImageId']}.JPEG": r["PredictionString"].split()[0] for r in rows}
        synsets = _synsets(devkit / "data/meta.mat")
        numbers = (devkit / "data" / TRUTH).read_text().split()
        return {
            f"ILSVRC2012_val_{i:08}.JPEG": synsets[int(number)]
            for i, number in enumerate(numbers, start=1)
        }
    except FileNotFoundError as error:
        raise UserError(
            f"devkit={devkit}: there is no {error.filename}; the folder must hold data/{TRUTH} and "
            f"data/meta.mat (ILSVRC2012_devkit_t12), or Kaggle's {KAGGLE}"
        ) from None
    except (ValueError, LookupError) as error:
        raise UserError(
            f"devkit={devkit}: its files are not as published ({type(error).__name__}: {error}); "
            "unpack the archive again"
        ) from None


def _synsets(file: Path) -> dict[int, str]:
    """Synset by number (ILSVRC2012_ID) of the classes that have no children."""
    from scipy.io import loadmat

    with open(file, "rb") as opened:
        try:
            table = loadmat(opened, squeeze_me=True)["synsets"]
        except Exception as error:  # on damaged files scipy raises all kinds
            raise ValueError(f"{file.name}: {error}") from None
    return {int(row["ILSVRC2012_ID"]): str(row["WNID"]) for row in table if not row["num_children"]}


def sort_into_folders(folder: Path, synset_of: dict[str, str]) -> int:
    """Move the images of one folder into folders that are named by synset; returns how many.

    Everything is looked at before anything is moved, and each move is a rename: the command can be
    interrupted and repeated.

    Args:
        folder: holds all images that `synset_of` names, some of which may have been moved before.
        synset_of: of each image, by file name.

    Raises:
        UserError: files or folders that are not known, images that are missing, twice there or in
            another class's folder; nothing is moved then.
    """
    loose = {p.name for p in folder.iterdir() if p.is_file() and not p.name.startswith(".")}
    synsets = class_folders(folder)
    moved = {p.name: p.parent.name for s in synsets for p in (folder / s).iterdir()}
    faults = {
        "unknown files": loose - synset_of.keys(),
        "unknown folders": set(synsets) - set(synset_of.values()),
        "images in a folder and outside": loose & moved.keys(),
        "images in a wrong folder": {n for n in moved if moved[n] != synset_of.get(n, moved[n])},
        "missing images": synset_of.keys() - loose - moved.keys(),
    }
    found = [
        f"{len(names):,} {fault} ({', '.join(sorted(names)[:3])}{', ...' if len(names) > 3 else ''})"
        for fault, names in faults.items()
        if names
    ]
    if found:
        raise UserError(
            f"{folder} is not as published, nothing was moved: {'; '.join(found)}; unpack the "
            "validation archive again into an empty folder"
        )
    for synset in sorted(set(synset_of.values())):
        (folder / synset).mkdir(exist_ok=True)
    for name in sorted(loose):
        (folder / name).rename(folder / synset_of[name] / name)
    return len(loose)

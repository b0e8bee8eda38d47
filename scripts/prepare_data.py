"""What data is at hand, and what is to be done: python scripts/prepare_data.py [dataset=NAME]"""

import sys
from dataclasses import dataclass
from pathlib import Path

from cutmix_exp import cli
from cutmix_exp.composition import CONFIG_DIR, compose
from cutmix_exp.config import from_dict
from cutmix_exp.data.folders import ImageFiles, ImageNet
from cutmix_exp.data.layout import sort_into_folders, validation_synsets
from cutmix_exp.data.sources import Dataset
from cutmix_exp.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Options:
    """Check the data sets: what is there or missing, where it is published and under what terms.

    dataset=NAME    only this one; it is downloaded where that is possible, and laid out
    root=FOLDER     where to look, as dataset.root=FOLDER of train.py
    devkit=FOLDER   with dataset=imagenet: sort the validation images, unpacked into val/, into
                    folders by class. FOLDER holds the unpacked ILSVRC2012_devkit_t12, or Kaggle's
                    LOC_val_solution.csv. Can be interrupted and repeated.

    Every other name=value is an override of train.py, e.g. dataset.num_classes=100. The exit status
    is 2 if a named data set is not ready.
    """

    dataset: str | None = None
    root: str | None = None
    devkit: str | None = None


def command(arguments: list[str]) -> int:
    overrides: list[str] = []
    options = cli.parse(Options, arguments, rest=overrides)
    if options.root is not None:
        overrides.append(f"dataset.root={options.root}")
    if options.devkit is not None and options.dataset != "imagenet":
        raise UserError("devkit=FOLDER goes with dataset=imagenet")
    if options.dataset is not None:
        dataset = dataset_of(options.dataset, overrides)
        print(origin(dataset))
        if options.devkit is not None:
            lay_out(dataset, Path(options.devkit))
        dataset.prepare()
        print(f"ready: {contents(dataset)}")
        return 0
    for name in sorted(file.stem for file in (CONFIG_DIR / "dataset").glob("*.yaml")):
        dataset = dataset_of(name, overrides)
        print(f"{origin(dataset)}\n{indented(state(dataset))}\n")
    return 0


def dataset_of(name: str, overrides: list[str]) -> Dataset:
    return from_dict(compose([f"dataset={name}", *overrides])).dataset


def origin(dataset: Dataset) -> str:
    if dataset.published is None:
        return f"{dataset.name}: no published data set"
    published = dataset.published
    return (
        f"{dataset.name}: {published.publisher}\n"
        f"    published: {published.url}\n    terms:     {published.terms}"
    )


def state(dataset: Dataset) -> str:
    """Whether a data set is ready, without downloading or moving anything."""
    try:
        return dataset.missing() or f"ready: {contents(dataset)}"
    except UserError as error:
        return f"not ready: {error}"


def contents(dataset: Dataset) -> str:
    if not isinstance(dataset, ImageFiles):
        return "nothing is missing"
    train, test, names = dataset.files()
    return (
        f"{len(train):,} training and {len(test):,} test images in {len(names):,} classes in "
        f"{dataset.folder().absolute()}"
    )


def lay_out(dataset: Dataset, devkit: Path) -> None:
    assert isinstance(dataset, ImageNet)
    folder = dataset.folder() / "val"
    if not folder.is_dir():
        raise UserError(dataset.missing())
    number = sort_into_folders(folder, validation_synsets(devkit))
    print(f"{number:,} validation images were moved into class folders", file=sys.stderr)


def indented(text: str) -> str:
    return "\n".join(f"    {line}" for line in text.splitlines())


if __name__ == "__main__":
    cli.main(command)

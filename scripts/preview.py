"""See what a regularizer does: python scripts/preview.py aug=cutmix dataset=digits"""

from dataclasses import dataclass, replace
from pathlib import Path

from cutmix_exp import cli
from cutmix_exp.composition import compose
from cutmix_exp.config import from_dict, resolve
from cutmix_exp.data.sources import Splits
from cutmix_exp.files import write_bytes
from cutmix_exp.reporting.preview import contact_sheet, visible_methods
from cutmix_exp.schema import option


@dataclass(frozen=True, kw_only=True)
class Options:
    """Write a contact sheet of training images: sources, mixed image, soft label, lambda.

    out=FILE      default: RUNS_DIR/preview-<dataset>-<aug>.png; the suffix .jpg gives a smaller file
    every=FOLDER  instead: FOLDER/<aug>.jpg for each regularizer that acts on images
    rows=8        images shown

    Every other name=value is an override of train.py, e.g. aug=cutmix dataset=digits seed=1.
    """

    out: str | None = None
    every: str | None = None
    rows: int = option(8, ge=1, le=64)


def write_sheet(overrides: list[str], options: Options, splits: Splits | None = None) -> Splits:
    """Returns the data set, for the next sheet."""
    config = resolve(from_dict(compose(overrides)))
    splits = splits or config.dataset.load()
    name = f"preview-{config.dataset.name}-{config.aug.name}.png"
    file = Path(options.out) if options.out else Path(config.runs_dir) / name
    sheet = contact_sheet(config, splits, options.rows, file.suffix[1:])
    write_bytes(file, sheet)
    print(file)
    return splits


def command(arguments: list[str]) -> int:
    overrides: list[str] = []
    options = cli.parse(Options, arguments, rest=overrides)
    if options.every is None:
        write_sheet(overrides, options)
        return 0
    splits = None
    for name in visible_methods():
        one = replace(options, out=f"{options.every}/{name}.jpg")
        splits = write_sheet([*overrides, f"aug={name}"], one, splits)
    return 0


if __name__ == "__main__":
    cli.main(command)

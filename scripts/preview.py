"""See what a regularizer does: python scripts/preview.py aug=cutmix dataset=digits"""

from dataclasses import dataclass
from pathlib import Path

from cutmix_exp import cli
from cutmix_exp.config import compose, from_dict, resolve
from cutmix_exp.files import write_bytes
from cutmix_exp.reporting.preview import contact_sheet
from cutmix_exp.schema import option


@dataclass(frozen=True, kw_only=True)
class Options:
    """Write a contact sheet of training images: sources, mixed image, soft label, lambda.

    out=FILE   default: RUNS_DIR/preview-<dataset>-<aug>.png
    rows=8     images shown

    Every other name=value is an override of train.py, e.g. aug=cutmix dataset=digits seed=1.
    """

    out: str | None = None
    rows: int = option(8, ge=1, le=64)


def command(arguments: list[str]) -> int:
    overrides: list[str] = []
    options = cli.parse(Options, arguments, rest=overrides)
    config = resolve(from_dict(compose(overrides)))
    sheet = contact_sheet(config, config.dataset.load(), options.rows)
    name = f"preview-{config.dataset.name}-{config.aug.name}.png"
    file = Path(options.out) if options.out else Path(config.runs_dir) / name
    write_bytes(file, sheet)
    print(file)
    return 0


if __name__ == "__main__":
    cli.main(command)

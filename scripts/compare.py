"""Two networks side by side: python scripts/compare.py 'run=[A,B]' (see README.md)."""

from dataclasses import dataclass
from pathlib import Path

from cutmix_exp import cli
from cutmix_exp.errors import UserError
from cutmix_exp.files import write_text
from cutmix_exp.reporting.compare import compare
from cutmix_exp.reporting.examined import read_examined


@dataclass(frozen=True, kw_only=True)
class Options:
    """Compare two runs, or two report cards: fields that differ, numbers, tests over the images.

    run=[A,B]            two of: a run_id, a run's directory, the name of a record
    out=FILE             write Markdown there; default: print it
    runs_dir=runs        where runs are
    results_dir=results  where committed records are
    """

    run: tuple[str, ...]
    out: str | None = None
    runs_dir: str = "runs"
    results_dir: str = "results"


def command(arguments: list[str]) -> int:
    options = cli.parse(Options, arguments)
    if len(options.run) != 2:
        raise UserError(f"run={list(options.run)}: two are compared; write 'run=[A,B]'")
    folders = Path(options.runs_dir), Path(options.results_dir)
    first, second = (read_examined(name, *folders) for name in options.run)
    text = compare(first, second)
    if options.out is None:
        print(text)
    else:
        write_text(Path(options.out), text)
        print(options.out)
    return 0


if __name__ == "__main__":
    cli.main(command)

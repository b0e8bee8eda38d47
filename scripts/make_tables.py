"""Records to tables and figures: python scripts/make_tables.py [table=NAME] [results_dir=results]"""

from dataclasses import dataclass
from pathlib import Path

from cutmix_exp import cli
from cutmix_exp.files import write_bytes, write_text
from cutmix_exp.reporting.figures import FIGURES, Figure, draw
from cutmix_exp.reporting.record import Record
from cutmix_exp.reporting.render import render
from cutmix_exp.reporting.tables import load_records, load_table, table_names


@dataclass(frozen=True, kw_only=True)
class Options:
    """Render the tables of configs/table, and the figures, from committed records.

    table=NAME           only this one, and its figures
    results_dir=results  holds records/, and gets tables/ and figures/
    """

    table: str | None = None
    results_dir: str = "results"


def write_figure(figure: Figure, records: list[Record], folder: Path) -> None:
    """Draw a figure; without records there is none, and an old one would be wrong."""
    file = folder / f"{figure.name}.png"
    image = draw(figure, load_table(figure.table), records)
    if image is None:
        file.unlink(missing_ok=True)
        print(f"{file}: not drawn, no records of {figure.table}")
    else:
        write_bytes(file, image)
        print(file)


def command(arguments: list[str]) -> int:
    options = cli.parse(Options, arguments)
    results = Path(options.results_dir)
    records = load_records(results / "records")
    names = [options.table] if options.table else table_names()
    for name in names:
        markdown, table_csv = render(load_table(name), records)
        write_text(results / "tables" / f"{name}.md", markdown)
        write_text(results / "tables" / f"{name}.csv", table_csv)
        print(f"{results / 'tables' / name}.md")
    for figure in FIGURES:
        if figure.table in names:
            write_figure(figure, records, results / "figures")
    return 0


if __name__ == "__main__":
    cli.main(command)

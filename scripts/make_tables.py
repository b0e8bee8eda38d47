"""Records to tables: python scripts/make_tables.py [table=NAME] [results_dir=results]"""

from dataclasses import dataclass
from pathlib import Path

from cutmix_exp import cli
from cutmix_exp.files import write_text
from cutmix_exp.reporting.tables import load_records, load_table, render, table_names


@dataclass(frozen=True, kw_only=True)
class Options:
    """Render the tables of configs/table from committed records.

    table=NAME           only this one
    results_dir=results  holds records/, and gets tables/
    """

    table: str | None = None
    results_dir: str = "results"


def command(arguments: list[str]) -> int:
    options = cli.parse(Options, arguments)
    results = Path(options.results_dir)
    records = load_records(results / "records")
    for name in [options.table] if options.table else table_names():
        markdown, table_csv = render(load_table(name), records)
        write_text(results / "tables" / f"{name}.md", markdown)
        write_text(results / "tables" / f"{name}.csv", table_csv)
        print(f"{results / 'tables' / name}.md")
    return 0


if __name__ == "__main__":
    cli.main(command)

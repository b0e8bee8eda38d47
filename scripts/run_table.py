"""Run what is missing of a table: python scripts/run_table.py table=NAME (see README.md)."""

from dataclasses import dataclass
from pathlib import Path

from cutmix_exp import cli
from cutmix_exp.errors import UserError
from cutmix_exp.files import write_json
from cutmix_exp.reporting.costs import CAUTIOUS
from cutmix_exp.reporting.record import portable, read_record
from cutmix_exp.reporting.render import render
from cutmix_exp.reporting.tables import load_budget, load_records, load_table
from cutmix_exp.schema import option
from cutmix_exp.sweeps.jobs import Job, Settings
from cutmix_exp.sweeps.suites import SuiteJob
from cutmix_exp.sweeps.sweep import Sweep
from cutmix_exp.sweeps.table import listing, plan_table


@dataclass(frozen=True, kw_only=True)
class Options(Settings):
    """Train every row of a table that has no record yet, and run the suites that its columns show.

    table=NAME           a file of configs/table
    budget=NAME          smoke, short, medium or paper; default: the table's
    seeds=N              seeds 0 to N-1; default: the table's
    dry_run=true         only list the rows, their commands, what is done and what the rest will cost;
                         the hardware need not be here
    tflops=20            of the cost estimate: 10^12 operations per second that a device sustains,
                         assumed where no record of the same model and image size has a speed
    results_dir=results  where records/ and tables/ are kept
    jobs=N               runs at a time; default: as many as the GPUs allow, one on a CPU
    retries=1            further tries of a run that failed
    engine=local         or slurm, ray: see docs/sweeps.md, also for slurm={...} and ray={...}

    Every other name=value is handed to train.py, e.g. devices=4 or precision=fp32; the suites get those
    of the machine and of the data's place, e.g. dataset.root=FOLDER. What has a record in another
    precision than this machine would choose counts as done, unless precision=NAME is given.
    """

    table: str
    budget: str | None = None
    seeds: int | None = option(None, ge=1)
    dry_run: bool = False
    tflops: float = option(CAUTIOUS, gt=0)
    results_dir: str = "results"


def keep(job: Job) -> None:
    """Copy the record of what is complete to where tables are made from."""
    if isinstance(job, SuiteJob):
        job.keep()
    elif job.config.force or not job.is_complete():
        write_json(job.record, portable(read_record(job.config.run_dir / "record.json")))


def command(arguments: list[str]) -> int:
    extra: list[str] = []
    options = cli.parse(Options, arguments, rest=extra)
    results = Path(options.results_dir)
    table = load_table(options.table)
    plan = plan_table(
        table,
        options,
        budget=load_budget(options.budget or table.budget).name,
        seeds=options.seeds or table.seeds,
        extra=extra,
        results=results,
        on_paper=options.dry_run,
    )
    if options.dry_run:
        for line in listing(plan, load_records(results / "records"), options.tflops):
            print(line)
        return 0
    for line in plan.skipped_lines():
        print(line, flush=True)
    if not plan.runs:
        raise UserError(plan.nothing())
    sweep = Sweep(plan.jobs, options, on_complete=keep)
    status = sweep.run()
    if kept := plan.kept():
        print(kept)
    print(f"\n{render(table, load_records(results / 'records'))[0]}")
    return status


if __name__ == "__main__":
    cli.main(command)

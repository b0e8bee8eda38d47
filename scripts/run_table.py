"""Run what is missing of a table: python scripts/run_table.py table=NAME (see README.md)."""

import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from cutmix_exp import cli
from cutmix_exp.config import Config, compose, from_dict, resolve
from cutmix_exp.errors import UserError
from cutmix_exp.files import write_json
from cutmix_exp.reporting.costs import Cost, estimate
from cutmix_exp.reporting.record import portable, read_record
from cutmix_exp.reporting.render import render
from cutmix_exp.reporting.tables import load_budget, load_records, load_table, row_config
from cutmix_exp.schema import option
from cutmix_exp.sweeps.jobs import Job, Settings
from cutmix_exp.sweeps.sweep import Sweep


@dataclass(frozen=True, kw_only=True)
class Options(Settings):
    """Train every row of a table that has no record yet.

    table=NAME           a file of configs/table
    budget=NAME          smoke, short, medium or paper; default: the table's
    seeds=N              seeds 0 to N-1; default: the table's
    dry_run=true         only list the rows, their commands, what is done and what the rest will cost
    tflops=20            of the cost estimate: 10^12 operations per second that a device sustains,
                         assumed where no record of the same data set and model has a speed
    results_dir=results  where records/ and tables/ are kept
    jobs=N               runs at a time; default: as many as the GPUs allow, one on a CPU
    retries=1            further tries of a run that failed
    engine=local         or slurm, ray: see docs/sweeps.md, also for slurm={...} and ray={...}

    Every other name=value is handed to train.py, e.g. devices=4 or precision=fp32.
    """

    table: str
    budget: str | None = None
    seeds: int | None = option(None, ge=1)
    dry_run: bool = False
    tflops: float = option(20.0, gt=0)
    results_dir: str = "results"


def jobs_of(options: Options, extra: list[str]) -> tuple[list[Job], list[str]]:
    """The runs of a table, and for each row that cannot be run a line that says why."""
    table = load_table(options.table)
    budget = load_budget(options.budget or table.budget).name
    jobs, skipped = [], []
    for row in table.rows:
        found = row_config(table, row)
        if not isinstance(found, Config):
            why = f"not available yet: {found}" if found else "quoted, not run"
            skipped.append(f"[skipped] {row.label}: {why.splitlines()[0]}")
            continue
        for seed in range(options.seeds or table.seeds):
            overrides = [*table.overrides(row), f"budget={budget}", f"seed={seed}", *extra]
            config = options.resolve(from_dict(compose(overrides)))
            if extra:
                check_extra(config, overrides[: -len(extra)], extra)
            record = Path(options.results_dir) / "records" / f"{config.run_id}.json"
            jobs.append(Job(f"{row.label}, seed {seed}", tuple(overrides), config, record))
    return jobs, skipped


def check_extra(config: Config, overrides: list[str], extra: list[str]) -> None:
    """Raises UserError if the extra overrides make another experiment of a table's row."""
    own = resolve(from_dict(compose(overrides)))
    if (config.cell(), config.seed) != (own.cell(), own.seed):
        raise UserError(
            f"{' '.join(extra)}: this would be another experiment than the table's row, whose record "
            "no table would show; use train.py, or a table of your own in configs/table"
        )


def keep(job: Job) -> None:
    """Copy the record of a complete run to where tables are made from."""
    if job.config.force or not job.is_complete():
        write_json(job.record, portable(read_record(job.config.run_dir / "record.json")))


def listing(options: Options, jobs: list[Job], skipped: list[str]) -> Iterator[str]:
    """The lines of a dry run."""
    done = load_records(Path(options.results_dir) / "records")
    costs = []
    for number, job in enumerate(jobs, start=1):
        state = "done"
        if not job.is_complete():
            costs.append(estimate(job.config, done, options.tflops))
            state = f"missing, {costs[-1]}"
        yield f"[{number}/{len(jobs)}] {job.name}: {state}"
        yield f"    python train.py {shlex.join(job.words)}"
    yield from skipped
    yield summary(jobs, costs)


def summary(jobs: list[Job], costs: list[Cost]) -> str:
    """What is done, and the cost of what is not, by the basis of the estimate."""
    text = f"{len(jobs) - len(costs)} of {len(jobs)} runs are done"
    for basis in dict.fromkeys(cost.basis for cost in costs):
        hours = [cost.hours for cost in costs if cost.basis == basis]
        known = [h for h in hours if h is not None]
        total = f"about {sum(known):.3g} device-hours" if known else "cost unknown"
        text += f"\n{len(hours)} to do: {total}, {basis}"
    return text


def command(arguments: list[str]) -> int:
    extra: list[str] = []
    options = cli.parse(Options, arguments, rest=extra)
    jobs, skipped = jobs_of(options, extra)
    if options.dry_run:
        for line in listing(options, jobs, skipped):
            print(line)
        return 0
    for line in skipped:
        print(line, flush=True)
    if not jobs:
        raise UserError(f"nothing of the table {options.table} can be run; see above")
    sweep = Sweep(jobs, options, on_complete=keep)
    status = sweep.run()
    records = load_records(Path(options.results_dir) / "records")
    print(f"\n{render(load_table(options.table), records)[0]}")
    return status


if __name__ == "__main__":
    cli.main(command)

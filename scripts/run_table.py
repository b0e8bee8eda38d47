"""Run what is missing of a table: python scripts/run_table.py table=NAME (see README.md)."""

import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from cutmix_exp import cli
from cutmix_exp.config import Config, compose, from_dict, resolve
from cutmix_exp.errors import UserError
from cutmix_exp.files import write_json
from cutmix_exp.reporting.costs import Cost, estimate
from cutmix_exp.reporting.record import REPOSITORY, portable, read_record
from cutmix_exp.reporting.render import render
from cutmix_exp.reporting.tables import load_budget, load_records, load_table, row_config
from cutmix_exp.schema import option


@dataclass(frozen=True, kw_only=True)
class Options:
    """Train every row of a table that has no record yet, one after the other.

    table=NAME           a file of configs/table
    budget=NAME          smoke, short, medium or paper; default: the table's
    seeds=N              seeds 0 to N-1; default: the table's
    dry_run=true         only list the rows, their commands, what is done and what the rest will cost
    tflops=20            of the cost estimate: 10^12 operations per second that a device sustains,
                         assumed where no record of the same data set and model has a speed
    results_dir=results  where records/ and tables/ are kept

    Every other name=value is handed to train.py, e.g. devices=4 or precision=fp32.
    """

    table: str
    budget: str | None = None
    seeds: int | None = option(None, ge=1)
    dry_run: bool = False
    tflops: float = option(20.0, gt=0)
    results_dir: str = "results"


@dataclass(frozen=True)
class Job:
    """One run of a table."""

    label: str
    overrides: list[str]
    config: Config
    record: Path

    @property
    def is_done(self) -> bool:
        return self.record.exists() and read_record(self.record)["status"] == "complete"

    @property
    def name(self) -> str:
        return f"{self.label}, seed {self.config.seed}"


def jobs_of(options: Options, extra: list[str]) -> tuple[list[Job], list[str]]:
    """The runs of a table, and for each row that cannot be run a line that says why."""
    table = load_table(options.table)
    budget = load_budget(options.budget or table.budget).name
    jobs, skipped = [], []
    for row in table.rows:
        found = row_config(table, row)
        if not isinstance(found, Config):
            why = f"not available yet: {found}" if found else "quoted, not run"
            skipped.append(f"{row.label}: {why.splitlines()[0]}")
            continue
        for seed in range(options.seeds or table.seeds):
            overrides = [*table.overrides(row), f"budget={budget}", f"seed={seed}", *extra]
            config = resolve(from_dict(compose(overrides)))
            if extra:
                check_extra(config, overrides[: -len(extra)], extra)
            record = Path(options.results_dir) / "records" / f"{config.run_id}.json"
            jobs.append(Job(row.label, overrides, config, record))
    return jobs, skipped


def check_extra(config: Config, overrides: list[str], extra: list[str]) -> None:
    """Raises UserError if the extra overrides make another experiment of a table's row."""
    own = resolve(from_dict(compose(overrides)))
    if (config.cell(), config.seed) != (own.cell(), own.seed):
        raise UserError(
            f"{' '.join(extra)}: this would be another experiment than the table's row, whose record "
            "no table would show; use train.py, or a table of your own in configs/table"
        )


def train(job: Job) -> str:
    """Carry out one run and keep its record; returns what went wrong, if anything."""
    done = subprocess.run([sys.executable, str(REPOSITORY / "train.py"), *job.overrides])
    if done.returncode:
        return f"train.py ended with {done.returncode}"
    write_json(job.record, portable(read_record(job.config.run_dir / "record.json")))
    return ""


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
    results = Path(options.results_dir)
    jobs, skipped = jobs_of(options, extra)
    done = load_records(results / "records") if options.dry_run else []
    failures, costs = [], []
    for number, job in enumerate(jobs, start=1):
        state = "done" if job.is_done else "missing"
        if options.dry_run and not job.is_done:
            costs.append(estimate(job.config, done, options.tflops))
            state += f", {costs[-1]}"
        print(f"[{number}/{len(jobs)}] {job.name}: {state}", flush=True)
        print(f"    python train.py {shlex.join(job.overrides)}", flush=True)
        if options.dry_run or job.is_done:
            continue
        cause = train(job)
        if cause:
            failures.append(f"{job.name}: {cause}")
    for line in skipped:
        print(f"[skipped] {line}", flush=True)
    if options.dry_run:
        print(summary(jobs, costs))
        return 0
    if not jobs:
        raise UserError(f"nothing of the table {options.table} can be run; see above")
    markdown, _ = render(load_table(options.table), load_records(results / "records"))
    print(f"\n{markdown}")
    if failures:
        print("failed:\n  " + "\n  ".join(failures), file=sys.stderr)
    return 1 if failures else 0


if __name__ == "__main__":
    cli.main(command)

"""What a table takes: its rows' runs, the suites that its columns name, and what of them is missing."""

from __future__ import annotations

import shlex
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from cutmix_exp.composition import compose
from cutmix_exp.config import DTYPES, Config, Hardware, from_dict, resolve
from cutmix_exp.errors import UserError
from cutmix_exp.reporting.costs import Cost, duration, estimate
from cutmix_exp.reporting.record import Record
from cutmix_exp.reporting.tables import Table, row_config
from cutmix_exp.sweeps.jobs import Job, Settings
from cutmix_exp.sweeps.suites import SuiteJob, suite_job


@dataclass(frozen=True)
class RowPlan:
    """What a row takes.

    Attributes:
        runs: one for each seed.
        suites: of each of them.
        precision: in which this machine would train it.
    """

    label: str
    runs: list[Job]
    suites: list[SuiteJob]
    precision: str

    @property
    def in_another(self) -> list[Job]:
        """The runs that are done in another precision."""
        return [run for run in self.runs if run.config.precision != self.precision]


@dataclass(frozen=True)
class Plan:
    """What a table takes.

    Attributes:
        skipped: why, of each row that cannot be run.
    """

    table: Table
    rows: list[RowPlan] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)

    @property
    def runs(self) -> list[Job]:
        return [run for row in self.rows for run in row.runs]

    @property
    def suites(self) -> list[SuiteJob]:
        return [suite for row in self.rows for suite in row.suites]

    @property
    def jobs(self) -> list[Job]:
        return [*self.runs, *self.suites]

    def skipped_lines(self) -> list[str]:
        return [f"[skipped] {label}: {why}" for label, why in self.skipped.items()]

    def nothing(self) -> str:
        """Why there is nothing to run."""
        counts = Counter(why.partition(":")[0] for why in self.skipped.values())
        causes = ", ".join(f"{count} {why}" for why, count in counts.items())
        return f"no row of the table {self.table.name} can be run: {causes}"

    def kept(self) -> str:
        """What is not trained again because it is done in another precision; empty if nothing."""
        found = [
            (row.precision, run.config.precision) for row in self.rows for run in row.in_another
        ]
        return "\n".join(
            f"{count} are done in {theirs} and not trained again in {ours}, as this machine would; "
            f"precision={ours} asks for that"
            for (ours, theirs), count in Counter(found).items()
        )


def plan_table(
    table: Table,
    settings: Settings,
    *,
    budget: str,
    seeds: int,
    extra: Sequence[str],
    results: Path,
    on_paper: bool = False,
) -> Plan:
    """The runs and suites of a table.

    Args:
        extra: further overrides of each run.
        results: the folder whose `records` say what is done.
        on_paper: whether this machine need not have what the runs ask for.

    Raises:
        UserError: the extra overrides make other experiments than the rows, or do not fit.
    """
    plan = Plan(table)
    wanted: dict[str, list[str]] = {}
    for column in table.columns:
        wanted.setdefault(column.suite, []).append(column.metric)
    for row in table.rows:
        found = row_config(table, row)
        if not isinstance(found, Config):
            why = f"not available yet: {found}" if found else "quoted, not run"
            plan.skipped[row.label] = why.splitlines()[0]
            continue
        own = [*table.overrides(row), f"budget={budget}"]
        asked = from_dict(compose([*own, *extra]))
        config = settings.resolve(asked, hardware_for(asked) if on_paper else None)
        if extra:
            check_extra(config, own, extra)
        chosen = asked.precision != "auto" or config.force
        runs, suites = [], []
        for seed in range(seeds):
            words = (*own, f"seed={seed}", *extra)
            run = run_job(f"{row.label}, seed {seed}", words, replace(config, seed=seed), results)
            if not chosen and not run.is_complete():
                run = in_another_precision(run, results) or run
            runs.append(run)
            of_suites = (
                [*extra, f"precision={config.precision}"]
                if run.config.precision != config.precision
                else extra
            )
            suites += [suite_job(run, name, m, of_suites) for name, m in wanted.items()]
        plan.rows.append(RowPlan(row.label, runs, suites, config.precision))
    return plan


def run_job(name: str, words: Sequence[str], config: Config, results: Path) -> Job:
    return Job(name, tuple(words), config, results / "records" / f"{config.run_id}.json")


def in_another_precision(run: Job, results: Path) -> Job | None:
    """The same run in a precision in which it is complete, if there is one."""
    for precision in DTYPES:
        config = replace(run.config, precision=precision)  # type: ignore[arg-type]
        other = run_job(run.name, (*run.words, f"precision={precision}"), config, results)
        if other.is_complete():
            return other
    return None


def hardware_for(config: Config) -> Hardware:
    """This machine, and what a config asks for beyond it: on paper nothing is computed."""
    here = Hardware.here()
    needs_gpu = config.device == "cuda" or (config.device == "auto" and config.precision == "fp16")
    gpus = max(here.gpus, config.devices or 1) if needs_gpu or here.gpus else 0
    bf16 = config.precision == "bf16"
    return replace(
        here,
        gpus=gpus,
        gpu_bf16=here.gpu_bf16 or bf16 or not here.gpus,
        cpu_bf16=here.cpu_bf16 or bf16,
    )


def check_extra(config: Config, overrides: Sequence[str], extra: Sequence[str]) -> None:
    """Raises UserError if the extra overrides make another experiment of a table's row."""
    if any(word.startswith("seed=") for word in extra):
        raise UserError("seed: a table is trained with the seeds 0 to N-1; say seeds=N")
    own = resolve(from_dict(compose(list(overrides))))
    if config.cell() != own.cell():
        raise UserError(
            f"{' '.join(extra)}: this would be another experiment than the table's row, whose record "
            "no table would show; use train.py, or a table of your own in configs/table"
        )


def listing(plan: Plan, records: list[Record], tflops: float) -> Iterator[str]:
    """The lines of a dry run: what is done and what the rest costs, then each row with its command."""
    if not plan.runs:
        yield from plan.skipped_lines()
        yield plan.nothing()
        return
    costs = {
        job: estimate(job.config, records, tflops) for job in plan.runs if not job.is_complete()
    }
    yield summary(plan, list(costs.values()))
    for number, row in enumerate(plan.rows, start=1):
        yield f"[{number}/{len(plan.rows)}] {row.label}: {_state(row, costs)}"
        yield from _suite_states(row)
        yield f"    {_command([job for job in row.runs if job in costs] or row.runs)}"
    yield from plan.skipped_lines()


def summary(plan: Plan, costs: Sequence[Cost]) -> str:
    """What is done, and the cost of what is not, by the basis of the estimate."""
    runs, suites = plan.runs, plan.suites
    text = f"{len(runs) - len(costs)} of {len(runs)} runs are done"
    if suites:
        done = sum(job.is_complete() for job in suites)
        text += f", {done} of {len(suites)} suites on them (their cost is not estimated)"
    for basis in dict.fromkeys(cost.basis for cost in costs):
        hours = [cost.hours for cost in costs if cost.basis == basis]
        known = [h for h in hours if h is not None]
        total = f"about {duration(sum(known))} of one device" if known else "cost unknown"
        text += f"\n{len(hours)} to do: {total}, {basis}"
    return "\n".join(filter(None, [text, plan.kept()]))


def _state(row: RowPlan, costs: dict[Job, Cost]) -> str:
    """What is done of a row's runs."""
    parts = []
    done = [job for job in row.runs if job not in costs and job not in row.in_another]
    if done:
        parts.append(f"done ({_seeds(done)})")
    for precision in dict.fromkeys(job.config.precision for job in row.in_another):
        of_it = [job for job in row.in_another if job.config.precision == precision]
        parts.append(f"done in {precision}, missing in {row.precision} ({_seeds(of_it)})")
    missing = [job for job in row.runs if job in costs]
    if missing:
        each = " each" if len(missing) > 1 else ""
        parts.append(f"missing ({_seeds(missing)}), {costs[missing[0]].amount}{each}")
    return "; ".join(parts)


def _suite_states(row: RowPlan) -> Iterator[str]:
    """A line for each suite that is missing of a row's runs, and one for the others."""
    missing: dict[str, list[SuiteJob]] = {job.suite: [] for job in row.suites}
    for job in row.suites:
        if not job.is_complete():
            missing[job.suite].append(job)
    for suite, jobs in missing.items():
        if jobs:
            yield f"    suite {suite}: missing ({_seeds(jobs)})"
    if done := [suite for suite, jobs in missing.items() if not jobs]:
        yield f"    suites done: {', '.join(done)}"


def _seeds(jobs: Sequence[Job]) -> str:
    seeds = " ".join(str(job.config.seed) for job in jobs)
    return f"seeds {seeds}" if len(jobs) > 1 else f"seed {seeds}"


def _command(jobs: Sequence[Job]) -> str:
    """What trains these runs of one row."""
    words = list(jobs[0].words)
    if len(jobs) > 1:
        seeds = ",".join(str(job.config.seed) for job in jobs)
        words = ["-m", *(f"seed={seeds}" if w.startswith("seed=") else w for w in words)]
    return f"python train.py {shlex.join(words)}"

"""A suite on a finished run, as a job of a sweep."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, ClassVar

from cutmix_exp.errors import UserError
from cutmix_exp.evaluation.base import Suite, load_suite
from cutmix_exp.files import write_json
from cutmix_exp.reporting.record import Record, portable, read_record
from cutmix_exp.subject import OF_A_RUN
from cutmix_exp.sweeps import process
from cutmix_exp.sweeps.jobs import Job


@dataclass(frozen=True, eq=False, kw_only=True)
class SuiteJob(Job):
    """`scripts/evaluate.py run=RUN suite=NAME`: complete when the committed record has each number.

    Attributes:
        suite: its name.
        metrics: the numbers that are wanted of it.
    """

    kind: ClassVar[str] = "suites"
    program: ClassVar[tuple[str, ...] | None] = process.EVALUATE

    suite: str
    metrics: tuple[str, ...]

    @property
    def key(self) -> str:
        return f"{self.config.run_id}.{self.suite}"

    @cached_property
    def _suite(self) -> Suite:
        return load_suite(self.suite)

    def is_complete(self) -> bool:
        record = self._committed()
        return bool(record) and not self._missing(record)

    def lacks(self) -> str:
        run = self.config.run_dir
        if not (run / "checkpoints" / "last.pt").exists():
            return (
                f"its network is not in {run}, only its record is in {self.record.parent}; name the "
                "folder that has it (runs_dir=FOLDER), or train it again (force=true)"
            )
        committed = self._committed()
        if committed and not same_training(committed, self.own_record()):
            return f"{self.record} is of another training than {run}; force=true trains it again"
        return ""

    def outcome(self) -> str | None:
        return None if self._missing(self.own_record()) else "the record has what it found"

    def told(self) -> str:
        record = self.own_record()
        entry = self.entry(record)
        if entry is None:
            return ""
        causes = "".join(
            f"\n{name}: {why.splitlines()[0]}" for name, why in entry["skipped"].items()
        )
        return f"it has not found {', '.join(self._missing(record))}, which the table shows{causes}"

    def keep(self) -> None:
        """Copy what the run's record has found to the committed one, where that is older."""
        own, committed = self.own_record(), self._committed()
        newer = not self._missing(own) and bool(self._missing(committed))
        if newer and same_training(own, committed):
            write_json(self.record, portable(own))

    def _committed(self) -> Record:
        try:
            return read_record(self.record) if self.record.exists() else {}
        except UserError:
            return {}

    def entry(self, record: Record) -> dict[str, Any] | None:
        """What a record has of this suite, as it is now."""
        entry = record.get("evaluations", {}).get(self.suite)
        return entry if entry and self._suite.gave(entry) else None

    def _missing(self, record: Record) -> list[str]:
        """The numbers that a record does not have."""
        entry = self.entry(record)
        return [name for name in self.metrics if entry is None or name not in entry["metrics"]]


def same_training(a: Record, b: Record) -> bool:
    return bool(a) and bool(b) and a["metrics"] == b["metrics"]


def suite_job(run: Job, suite: str, metrics: Sequence[str], words: Sequence[str]) -> SuiteJob:
    """The job that looks at a run when that is complete.

    Args:
        words: of the run, of which it gets what concerns an evaluation.
    """
    folders = (f"runs_dir={run.config.runs_dir}", f"results_dir={run.record.parent.parent}")
    kept = [word for word in words if word.partition("=")[0] in OF_A_RUN]
    job = SuiteJob(
        name=f"{run.name}, suite {suite}",
        words=(f"run={run.config.run_id}", f"suite={suite}", *folders, *kept),
        config=run.config,
        record=run.record,
        after=run,
        suite=suite,
        metrics=tuple(metrics),
    )
    in_part = not job.is_complete() and job.outcome() is None and job.entry(job.own_record())
    return replace(job, words=(*job.words, "force=true")) if in_part else job

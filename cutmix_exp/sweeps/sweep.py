"""The sweep itself: what is missing, tries, and one summary."""

from __future__ import annotations

import signal
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

from cutmix_exp.errors import Interrupted, UserError
from cutmix_exp.stopping import SIGNALS
from cutmix_exp.sweeps.jobs import IN_USE, Ended, Job, Settings, cause_of, distinct
from cutmix_exp.sweeps.local import Local


class Engine(Protocol):
    """What carries out runs: this machine, Slurm, Ray."""

    running: dict[Job, Any]
    interval: float  # seconds between two looks at what has ended

    def start(self, waiting: deque[Job]) -> dict[Job, str]: ...
    def poll(self) -> list[Ended]: ...
    def stop(self, *, now: bool = False) -> str: ...


def engine_of(settings: Settings) -> Engine:
    """Raises UserError if the library that it needs is not installed."""
    if settings.engine == "local":
        return Local(settings.jobs)
    from cutmix_exp.sweeps.cluster import RayEngine, SlurmEngine

    return SlurmEngine(settings) if settings.engine == "slurm" else RayEngine(settings)


class Sweep:
    """Carries out jobs: those that are not complete, each up to 1 + `retries` times, and none before
    the one that it comes after is complete.

    Args:
        jobs: a run that is named twice is carried out once.
        settings: see there.
        refused: causes by name, of what cannot be carried out at all; they count as failures.
        on_complete: called with each job that is complete, also before this sweep.
        engine: by default what the settings name.
        brief: print no counts, and a summary only if something is amiss.
    """

    def __init__(
        self,
        jobs: Sequence[Job],
        settings: Settings,
        *,
        refused: dict[str, str] | None = None,
        on_complete: Callable[[Job], None] = lambda job: None,
        engine: Engine | None = None,
        brief: bool = False,
    ) -> None:
        self.jobs, self.doubles = distinct(jobs)
        self.settings = settings
        self.on_complete = on_complete
        self.engine = engine
        self.brief = brief
        self.failed: dict[str, str] = dict(refused or {})
        self.refused = len(self.failed)
        self.held: dict[str, str] = {}
        self.before: list[Job] = []
        self.trained: list[Job] = []
        self.waiting: deque[Job] = deque()
        self.later: list[Job] = []
        self.tries: dict[Job, int] = {}
        self.log_from: dict[Job, int] = {}
        self.began: dict[Job, float] = {}
        self.put_off: set[Job] = set()
        self.signals: list[int] = []

    def run(self) -> int:
        """Carry out what is missing and print the summary.

        Returns:
            the exit status: 0 if every run is complete, 1 if not, that of `Interrupted` if a signal
            has stopped the sweep.
        """
        for job in self.jobs:
            if job.is_complete() and not job.config.force:
                self.before.append(job)
                self.on_complete(job)
            elif job.after is None or job.after.key in {other.key for other in self.before}:
                self.waiting.append(job)
            else:
                self.later.append(job)
        self._prepare()
        state = f"{len(self.before)} complete, {len(self.waiting) + len(self.later)} to do"
        if not self.brief:
            print(f"{_counted(self.jobs)}: {state}", flush=True)
        for line in self.doubles:
            print(line)
        if self.waiting:
            self.engine = self.engine or engine_of(self.settings)
            with self._signals():
                self._loop(self.engine)
        status = 1 if self.failed or self.held else 0
        if self.signals:
            status = Interrupted(self.signals[0]).status
        if status or not self.brief:
            print(self.summary(), flush=True)
        return status

    def _prepare(self) -> None:
        """Bring what is downloaded once, before several runs ask for it; without it a run fails."""
        causes: dict[str, str] = {}
        for job in list(self.waiting):
            key = str((job.config.dataset, job.config.model))
            if key not in causes:
                causes[key] = ""
                try:
                    job.config.dataset.prepare()
                    job.config.model.prepare()
                except UserError as error:
                    causes[key] = str(error)
            if cause := job.lacks() or causes[key]:
                self.waiting.remove(job)
                self.failed[job.name] = cause

    def _loop(self, engine: Engine) -> None:
        told = 0
        while engine.running or (self.waiting and not self.signals):
            if not self.signals:
                self._start(engine)
            elif told < min(2, len(self.signals)):
                name = signal.Signals(self.signals[told]).name
                print(f"{name}: {engine.stop(now=told > 0)}", flush=True)
                told += 1
            ended = engine.poll()
            for end in ended:
                self._settle(end)
            if not ended:
                time.sleep(engine.interval)

    def _start(self, engine: Engine) -> None:
        sizes = {job: _size(job) for job in self.waiting}
        for job, where in engine.start(self.waiting).items():
            self.tries[job] = self.tries.get(job, 0) + 1
            self.log_from[job], self.began[job] = sizes[job], time.monotonic()
            nth = f", try {self.tries[job]}" if self.tries[job] > 1 else ""
            self._say(job, f"started {where}".strip() + f"{nth} (log: {job.log})")

    def _settle(self, end: Ended) -> None:
        job = end.job
        found = job.outcome() if end.status == 0 else None
        if found is not None:
            self.trained.append(job)
            self.on_complete(job)
            seconds = time.monotonic() - self.began[job]
            self._say(job, f"complete in {seconds:.0f} s, {found}")
            self._release(job)
            return
        log = _read(job, self.log_from[job])
        cause = end.cause or cause_of(end.status, log, job.told(), job.script)
        if self.signals:
            self._say(job, "stopped; the same command continues it")
        elif IN_USE in cause:
            if job not in self.put_off and (self.waiting or self._engine_is_busy()):
                self.put_off.add(job)
                self.tries[job] -= 1
                self.waiting.append(job)
                self._say(job, f"put off: {cause}")
            else:
                self.held[job.name] = cause
                self._say(job, f"held by another process: {cause}")
        elif self.tries[job] <= self.settings.retries and end.status != 0:
            self.waiting.append(job)
            self._say(job, f"failed, will be tried again: {cause}")
        else:
            tries = f"{self.tries[job]} tries" if self.tries[job] > 1 else "1 try"
            self.failed[job.name] = f"{cause}\n({tries}; log: {job.log})"
            self._say(job, f"failed: {cause}")

    def _release(self, job: Job) -> None:
        """Let those begin that come after it."""
        ready = [other for other in self.later if other.after and other.after.key == job.key]
        for other in ready:
            self.later.remove(other)
            if cause := other.lacks():
                self.failed[other.name] = cause
            else:
                self.waiting.append(other)

    def _engine_is_busy(self) -> bool:
        return self.engine is not None and bool(self.engine.running)

    def _say(self, job: Job, text: str) -> None:
        print(f"[{self.jobs.index(job) + 1}/{len(self.jobs)}] {job.name}: {text}", flush=True)

    @contextmanager
    def _signals(self) -> Iterator[None]:
        """SIGINT, SIGTERM and SIGUSR1 stop the runs cleanly; a second Ctrl-C kills them."""

        def handle(number: int, frame: object) -> None:
            # A batch system may send several, and kills by itself.
            if not self.signals or number == signal.SIGINT:
                self.signals.append(number)

        before = {number: signal.signal(number, handle) for number in SIGNALS}
        try:
            yield
        finally:
            for number, old in before.items():
                signal.signal(number, old)

    def summary(self) -> str:
        """What is complete, what failed and why, and what is left."""
        settled = len(self.before) + len(self.trained) + len(self.held) + len(self.failed)
        total = len(self.jobs) + self.refused
        left = total - settled
        parts = [f"{len(self.before)} complete before", f"{len(self.trained)} completed now"]
        parts += [f"{len(self.failed)} failed"] if self.failed else []
        parts += [f"{len(self.held)} held by other processes"] if self.held else []
        parts += [f"{left} not done"] if left else []
        lines = [f"sweep of {_counted(self.jobs, self.refused)}: {', '.join(parts)}"]
        for title, causes in (("failed", self.failed), ("held by another process", self.held)):
            lines += [f"{title}:"] if causes else []
            for name, cause in causes.items():
                lines.append(f"  {name}: " + cause.replace("\n", "\n    "))
        if left or self.failed or self.held:
            lines.append("the same command goes on with what is missing")
        return "\n".join(lines)


def _size(job: Job) -> int:
    return job.log.stat().st_size if job.log.exists() else 0


def _read(job: Job, start: int) -> str:
    """What the log holds from a place on, or the end of it."""
    if not job.log.exists():
        return ""
    with open(job.log, "rb") as file:
        file.seek(max(start, _size(job) - 100_000))
        return file.read().decode(errors="replace")


def _counted(jobs: Sequence[Job], refused: int = 0) -> str:
    """How many there are of each kind."""
    counts = {"runs": refused}
    for job in jobs:
        counts[job.kind] = counts.get(job.kind, 0) + 1
    return " and ".join(f"{count} {kind}" for kind, count in counts.items())

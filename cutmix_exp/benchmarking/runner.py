"""Runs the variants of a case, one process each, taking turns."""

from __future__ import annotations

import json
import os
import select
import statistics
import subprocess
import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

from cutmix_exp.benchmarking import worker
from cutmix_exp.benchmarking.cases import OURS, Case, Variant
from cutmix_exp.errors import UserError
from cutmix_exp.startup import KERNELS

PATIENCE = 300.0
"""Seconds after which a process that does not answer counts as failed."""


@dataclass(frozen=True)
class Result:
    """The figures of a case.

    Attributes:
        figures: of each variant, one for each round: images per second, bytes, or seconds.
        ratios: of each round: ours against the best other (see `Case.quantity`).
    """

    case: Case
    figures: dict[str, list[float]]

    @property
    def other(self) -> str:
        """The best alternative."""
        others = [name for name in self.figures if name != OURS]
        best = max if self.case.quantity == "rate" else min
        return str(best(others, key=lambda name: statistics.median(self.figures[name])))

    @property
    def ratios(self) -> list[float]:
        ours = self.figures[OURS]
        if self.case.quantity == "latency":
            return [float(self.case.limit or 0.0) / figure for figure in ours]
        pairs = zip(ours, self.figures[self.other], strict=True)
        return [mine / theirs for mine, theirs in pairs]

    @property
    def ratio(self) -> float:
        return statistics.median(self.ratios)

    @property
    def met(self) -> bool | None:
        """Whether the goal is reached; None where there is none."""
        if self.case.goal is None:
            return None
        if self.case.quantity == "memory":
            return self.ratio <= self.case.goal
        return self.ratio >= self.case.goal

    def to_dict(self) -> dict[str, Any]:
        return {
            "group": self.case.group,
            "title": self.case.title,
            "unit": self.case.unit,
            "quantity": self.case.quantity,
            "figures": self.figures,
            "other": self.other,
            "ratio": self.ratio,
            "ratios": self.ratios,
            "goal": self.case.goal,
            "met": self.met,
        }


class Process:
    """A variant that waits to be asked.

    Raises:
        UserError: it ended or does not answer; its last words are told.
    """

    def __init__(self, title: str, variant: Variant) -> None:
        self.title = title
        self.errors = tempfile.TemporaryFile("w+")  # noqa: SIM115 (closed with the process)
        environment = dict(os.environ)
        if variant.module == "reference":
            environment.pop(KERNELS, None)  # ours, not of a default environment
        cores = None if variant.cores is None else list(variant.cores)
        self.process = subprocess.Popen(
            worker.command(variant.module, variant.name, cores, **variant.arguments),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.errors,
            text=True,
            env=environment,
            start_new_session=True,
        )
        self._answer()

    def ask(self, seconds: float) -> dict[str, float]:
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(f"{seconds}\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            pass  # `_answer` tells why
        return dict(json.loads(self._answer()))

    def _answer(self) -> str:
        assert self.process.stdout is not None
        ready, _, _ = select.select([self.process.stdout], [], [], PATIENCE)
        line = self.process.stdout.readline() if ready else ""
        if not line:
            self.close()
            self.errors.seek(0)
            words = "\n".join(self.errors.read().splitlines()[-5:])
            reason = "ended" if ready else f"does not answer within {PATIENCE:.0f} s"
            raise UserError(f"benchmark of '{self.title}': the process {reason}\n{words}")
        return line

    def close(self) -> None:
        """End it and whatever it has started, which shares its process group."""
        import signal

        try:
            os.killpg(self.process.pid, signal.SIGTERM)
            self.process.wait(10)
        except (ProcessLookupError, PermissionError):
            pass
        except subprocess.TimeoutExpired:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()


def run(case: Case, effort: float, say: Callable[[str], None]) -> Result:
    """Measure a case; `effort` multiplies the length of the turns and, above 1, their number."""
    say(f"{case.title}: preparing {len(case.variants)} processes")
    figures: dict[str, list[float]] = {name: [] for name in case.variants}
    with ExitStack() as running:
        processes: dict[str, Process] = {}
        for name, variant in case.variants.items():
            processes[name] = Process(f"{case.title}: {name}", variant)
            running.callback(processes[name].close)
        rounds = max(1, round(case.rounds * max(effort, 1.0))) if effort >= 1 else case.rounds
        for number in range(rounds):
            order = list(processes)[:: 1 if number % 2 == 0 else -1]
            for name in order:
                figures[name].append(_figure(case, processes[name].ask(case.seconds * effort)))
            say(
                f"  round {number + 1}/{rounds}: "
                + ", ".join(f"{n} {shown(case, f[-1])}" for n, f in figures.items())
            )
    return Result(case, figures)


def _figure(case: Case, answer: dict[str, float]) -> float:
    if case.quantity == "memory":
        return answer["memory"]
    return 1.0 / answer["rate"] if case.quantity == "latency" else answer["rate"]


def shown(case: Case, figure: float) -> str:
    if case.quantity == "memory":
        return f"{figure / 2**30:.2f} GiB"
    return f"{figure:.2f} s" if case.quantity == "latency" else f"{figure:,.4g} {case.unit}"

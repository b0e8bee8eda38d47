"""Runs packed on the GPUs, or the cores, of this machine."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from cutmix_exp.config import Hardware
from cutmix_exp.distributed import share
from cutmix_exp.sweeps import process
from cutmix_exp.sweeps.jobs import Ended, Job


@dataclass(frozen=True)
class Place:
    """Where a run is put.

    Attributes:
        slot: its number among the runs at a time.
        gpus: as CUDA_VISIBLE_DEVICES names them.
    """

    slot: int
    gpus: tuple[str, ...] = ()


class Local:
    """Starts a run when there is room for it, in the order given.

    A run on GPUs takes `devices` of them, those with the fewest runs; two runs share a GPU only
    where `jobs` asks for more at a time than there are GPUs for. Runs on CPUs get equal parts of
    the cores.

    Args:
        jobs: runs at a time; None: as many as the GPUs allow, one on a CPU.
        gpus: those to use, as CUDA_VISIBLE_DEVICES names them.
        cores: the CPU cores to use.
        program: what is started in place of train.py, by tests.
    """

    interval = 0.1

    def __init__(
        self,
        jobs: int | None,
        gpus: Sequence[str] | None = None,
        cores: Sequence[int] | None = None,
        program: Sequence[str] = process.TRAIN,
    ) -> None:
        self.jobs = jobs
        self.gpus = visible_gpus() if gpus is None else list(gpus)
        self.cores = sorted(os.sched_getaffinity(0)) if cores is None else list(cores)
        self.program = program
        self.running: dict[Job, Any] = {}  # its process and its place

    def start(self, waiting: deque[Job]) -> dict[Job, str]:
        """Start what there is room for and take it from `waiting`; says where each was put."""
        started = {}
        while waiting and (place := self.place(waiting[0])) is not None:
            job = waiting.popleft()
            alone = self.limit(job) == 1
            child = process.start(
                job.words,
                job.log,
                env=self.environment(job, place),
                cores=() if alone or job.gpus else self.cores_of(job, place),
                show=alone,
                program=job.program or self.program,
            )
            self.running[job] = (child, place)
            started[job] = f"on GPU {','.join(place.gpus)}" if place.gpus else ""
        return started

    def limit(self, job: Job) -> int:
        """How many runs like this one may be at work at a time."""
        if self.jobs is not None:
            return self.jobs
        return max(1, len(self.gpus) // job.gpus) if job.gpus else 1

    def place(self, job: Job) -> Place | None:
        """Where there is room for it; None where there is none now."""
        taken = {place.slot for _, place in self.running.values()}
        slots = [n for n in range(self.limit(job)) if n not in taken]
        if not slots or len(taken) >= self.limit(job):
            return None
        if not job.gpus:
            return Place(slots[0])
        used = [gpu for _, place in self.running.values() for gpu in place.gpus]
        runs_each = -(-self.limit(job) * job.gpus // len(self.gpus)) if self.jobs else 1
        free = sorted((g for g in self.gpus if used.count(g) < runs_each), key=used.count)
        return Place(slots[0], tuple(free[: job.gpus])) if len(free) >= job.gpus else None

    def cores_of(self, job: Job, place: Place) -> list[int]:
        """The slot's part of the cores; where there are more slots than cores, one, in turn."""
        count = len(self.cores)
        if self.limit(job) > count:
            return [self.cores[place.slot % count]]
        return [self.cores[n] for n in share(count, place.slot, self.limit(job))]

    def environment(self, job: Job, place: Place) -> dict[str, str]:
        env = {"CUDA_VISIBLE_DEVICES": ",".join(place.gpus)} if place.gpus else {}
        if self.limit(job) > 1:
            threads = len(self.cores_of(job, place))
            chosen = os.environ.get("OMP_NUM_THREADS", "")
            env["OMP_NUM_THREADS"] = str(min(threads, int(chosen)) if chosen.isdigit() else threads)
        return env

    def poll(self) -> list[Ended]:
        """The tries that have ended since the last call; does not wait."""
        ended = []
        for job, (child, _) in list(self.running.items()):
            status = child.poll()
            if status is not None:
                del self.running[job]
                ended.append(Ended(job, status))
        return ended

    def stop(self, *, now: bool = False) -> str:
        """Tell what is at work to stop: after a checkpoint, or `now`; says what was done."""
        for child, _ in self.running.values():
            child.kill() if now else child.terminate()
        return f"{len(self.running)} at work told to stop"


def visible_gpus() -> list[str]:
    """The GPUs of this machine, or those of them that CUDA_VISIBLE_DEVICES names."""
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
    if chosen is not None:
        return [name.strip() for name in chosen.split(",") if name.strip()]
    return [str(n) for n in range(Hardware.here().gpus)]

"""Runs on a cluster: Slurm through submitit, several machines through Ray. Both do the scheduling."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import tempfile
from collections import deque
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from cutmix_exp.errors import Interrupted, UserError, installing
from cutmix_exp.files import write_json
from cutmix_exp.sweeps import process
from cutmix_exp.sweeps.jobs import Ended, Job, Settings

GONE_ON = ("PENDING", "RUNNING", "REQUEUED", "REQUEUE_HOLD", "SUSPENDED", "CONFIGURING", "RESIZING")
"""States of Slurm in which a job has not ended."""


class SlurmRun:
    """What Slurm carries out for one run; submitit pickles it, and calls `checkpoint` before a time
    limit or a pre-emption takes the machine away, then requeues what that returns."""

    def __init__(self, words: Sequence[str], log: str, program: Sequence[str]) -> None:
        self.words, self.log, self.program = words, log, program
        self.child: subprocess.Popen[bytes] | None = None

    def __call__(self) -> int:
        self.child = process.start(self.words, Path(self.log), program=self.program)
        status = process.wait(self.child)
        if status in (Interrupted(signal.SIGTERM).status, -signal.SIGTERM):
            # Slurm has told all processes of the job to stop, the run among them: on to requeueing.
            name = os.environ.get("SUBMITIT_PREEMPT_SIGNAL", "USR2")
            signal.raise_signal(getattr(signal, f"SIG{name}"))
        return status

    def checkpoint(self) -> Any:
        from submitit.helpers import DelayedSubmission

        if self.child is not None:
            process.stop(self.child)
        return DelayedSubmission(SlurmRun(self.words, self.log, self.program))


class SlurmEngine:
    """One array of Slurm jobs for the runs that ask for the same number of GPUs.

    A run that an earlier sweep has submitted, and that has not ended, is waited for.

    Raises:
        UserError: submitit is not installed, or there is no sbatch here.
    """

    interval = 2.0

    def __init__(self, settings: Settings, program: Sequence[str] = process.TRAIN) -> None:
        try:
            import submitit
        except ImportError:
            raise UserError(
                f"engine=slurm needs submitit, which is not installed: {installing('cluster')}"
            ) from None
        self.submitit = submitit
        self.settings, self.program = settings, program
        self.running: dict[Job, Any] = {}
        try:
            self._executor(Path(tempfile.gettempdir()), 0)  # checks what it is asked for
        except (RuntimeError, ValueError) as error:
            raise UserError(
                f"engine=slurm: {error}; sbatch must be here (slurm.cluster=local rehearses without)"
            ) from None

    def _executor(self, folder: Path, gpus: int) -> Any:
        slurm = self.settings.slurm
        executor = self.submitit.AutoExecutor(
            folder, cluster=slurm.cluster, slurm_max_num_timeout=slurm.timeouts
        )
        asked = {
            "slurm_partition": slurm.partition,
            "slurm_account": slurm.account,
            "slurm_qos": slurm.qos,
            "slurm_constraint": slurm.constraint,
            "slurm_array_parallelism": self.settings.jobs,
            "mem_gb": slurm.memory_gb,
        }
        executor.update_parameters(
            name="cutmix_exp",
            timeout_min=slurm.minutes,
            cpus_per_task=slurm.cpus,
            gpus_per_node=gpus,
            slurm_signal_delay_s=slurm.grace_seconds,
            **{name: value for name, value in asked.items() if value is not None},
        )
        return executor

    def start(self, waiting: deque[Job]) -> dict[Job, str]:
        started = {}
        for job in list(waiting):
            if (found := self._submitted_before(job)) is not None:
                self.running[job] = found
                started[job] = f"before, Slurm job {found.job_id}"
                waiting.remove(job)
        room = len(waiting)
        if self.settings.slurm.cluster == "local":  # it would start all of them at once
            room = min(room, (self.settings.jobs or 1) - len(self.running))
        new = [waiting.popleft() for _ in range(room)]
        for gpus, group in groupby(sorted(new, key=lambda job: job.gpus), lambda job: job.gpus):
            jobs = list(group)
            folder = (jobs[0].log.parent / "submitit").absolute()
            executor = self._executor(folder, gpus)
            with executor.batch():
                submitted = [
                    executor.submit(
                        SlurmRun(job.words, str(job.log.absolute()), job.program or self.program)
                    )
                    for job in jobs
                ]
            for job, held in zip(jobs, submitted, strict=True):
                place = {"job_id": held.job_id, "folder": str(folder)}
                write_json(job.log.with_suffix(".slurm"), place)
                self.running[job] = held
                started[job] = f"as Slurm job {held.job_id}"
        return started

    def _submitted_before(self, job: Job) -> Any:
        file = job.log.with_suffix(".slurm")
        if self.settings.slurm.cluster != "slurm" or not file.exists():
            return None
        place = json.loads(file.read_text())
        found = self.submitit.SlurmJob(folder=place["folder"], job_id=place["job_id"])
        return found if found.state in GONE_ON else None

    def poll(self) -> list[Ended]:
        ended = []
        for job, held in list(self.running.items()):
            if not held.done():
                continue
            del self.running[job]
            job.log.with_suffix(".slurm").unlink(missing_ok=True)
            try:
                ended.append(Ended(job, held.result()))
            except Exception as error:  # the node failed, the job was cancelled, ...
                last = str(error).strip().splitlines()[-1:]
                ended.append(Ended(job, None, f"Slurm job {held.job_id}: {' '.join(last)}"))
        return ended

    def stop(self, *, now: bool = False) -> str:
        """Leave them to Slurm; the same command finds them."""
        count = len(self.running)
        self.running.clear()
        return f"{count} runs stay with Slurm; the same command waits for them (scancel ends them)"


class RayEngine:
    """A task of Ray for each run, on whichever machine of the cluster has room for it. All machines
    must see this repository, the data and `runs_dir` at the same paths.

    Raises:
        UserError: Ray is not installed, or no cluster answers.
    """

    interval = 0.5

    def __init__(self, settings: Settings, program: Sequence[str] = process.TRAIN) -> None:
        try:
            import ray
        except ImportError:
            raise UserError(
                f"engine=ray needs Ray, which is not installed: {installing('ray')}"
            ) from None
        self.ray, self.settings, self.program = ray, settings, program
        address = settings.ray.address
        try:
            ray.init(
                address=address,
                log_to_driver=False,
                include_dashboard=None,
                configure_logging=False,
            )
        except (ConnectionError, ValueError) as error:
            raise UserError(
                f"no Ray cluster answers at ray.address={address}: {error}; start one "
                "(ray start --head), or use ray.address=local"
            ) from None
        self.task = ray.remote(process.carry_out)
        self.running: dict[Job, Any] = {}

    def start(self, waiting: deque[Job]) -> dict[Job, str]:
        started = {}
        most = self.settings.jobs or len(waiting) + len(self.running)
        while waiting and len(self.running) < most:
            job = waiting.popleft()
            asked = {"num_gpus": job.gpus, "num_cpus": self.settings.ray.cpus, "max_retries": 0}
            words, log = list(job.words), str(job.log.absolute())
            self.running[job] = self.task.options(**asked).remote(
                words, log, program=job.program or self.program, folder=os.getcwd()
            )
            started[job] = "as a task of Ray"
        return started

    def poll(self) -> list[Ended]:
        ended = []
        for job, reference in list(self.running.items()):
            if not self.ray.wait([reference], timeout=0)[0]:
                continue
            del self.running[job]
            try:
                ended.append(Ended(job, self.ray.get(reference)))
            except self.ray.exceptions.RayError as error:  # its machine died, it was cancelled, ...
                ended.append(Ended(job, None, f"Ray: {str(error).strip().splitlines()[-1]}"))
        return ended

    def stop(self, *, now: bool = False) -> str:
        for reference in self.running.values():
            self.ray.cancel(reference, force=now)
        return f"{len(self.running)} tasks told to stop"

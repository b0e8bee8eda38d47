"""What a sweep consists of, how it may be carried out, and why one of its runs failed."""

from __future__ import annotations

import signal
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, Literal

from cutmix_exp.composition import compose
from cutmix_exp.config import Config, Hardware, from_dict, resolve
from cutmix_exp.errors import UserError
from cutmix_exp.reporting.record import Record, read_record
from cutmix_exp.schema import option

IN_USE = " is in use by "
"""What a run says when another process works in its directory (rundir.in_use)."""


@dataclass(frozen=True, kw_only=True)
class Slurm:
    """What each run asks of Slurm. GPUs follow from `devices`.

    Attributes:
        cluster: `slurm`; `local` rehearses the same on this machine, without a cluster.
        partition, account, qos, constraint: as of sbatch; None is the cluster's default.
        minutes: time limit of one start; a run that needs more is requeued and continues.
        timeouts: how often it may be.
        cpus: cores for each run.
        memory_gb: main memory for each run; None is the cluster's default.
        grace_seconds: how long before the limit a run is told to stop.
    """

    cluster: Literal["slurm", "local"] = "slurm"
    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    constraint: str | None = None
    minutes: int = option(240, ge=1)
    timeouts: int = option(20, ge=0)
    cpus: int = option(8, ge=1)
    memory_gb: int | None = option(None, ge=1)
    grace_seconds: int = option(120, ge=10)


@dataclass(frozen=True, kw_only=True)
class Ray:
    """Where Ray runs, and what each run asks of it. GPUs follow from `devices`.

    Attributes:
        address: of a running Ray cluster; `local` starts Ray on this machine for this sweep.
        cpus: cores for each run.
    """

    address: str = "auto"
    cpus: int = option(4, ge=1)


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How a sweep is carried out; nothing here can move a number.

    Attributes:
        jobs: runs at a time. None: as many as the GPUs allow, one on a CPU, all on a cluster.
        retries: further tries of a run that failed; each continues from its last checkpoint.
        engine: `local` (this machine), `slurm` (through submitit), `ray` (several machines).
    """

    jobs: int | None = option(None, ge=1)
    retries: int = option(1, ge=0)
    engine: Literal["local", "slurm", "ray"] = "local"
    slurm: Slurm = field(default_factory=Slurm)
    ray: Ray = field(default_factory=Ray)

    def resolve(self, config: Config, hardware: Hardware | None = None) -> Config:
        """The config as the machine that trains it will resolve it, which names the run.

        Args:
            hardware: of this machine, where it is not to be asked what it has.

        Raises:
            UserError: as `config.resolve`; or the name would depend on a machine of a cluster.
        """
        if self.engine == "local":
            return resolve(config, hardware)
        if "auto" in (config.device, config.precision):
            raise UserError(
                f"engine={self.engine} with device={config.device} precision={config.precision}: "
                "`auto` depends on the machine that trains, and a run's name on it; say for example "
                "device=cuda precision=bf16"
            )
        there = Hardware(gpus=config.devices or 1, gpu_bf16=True, cpu_bf16=True)
        return resolve(config, there)


@dataclass(frozen=True, eq=False)
class Job:
    """One run of a sweep.

    Attributes:
        name: what tells it from the others, for people.
        words: the overrides of train.py.
        config: resolved.
        record: the file that says whether it is complete.
        after: what must be complete before it can begin.
    """

    kind: ClassVar[str] = "runs"
    program: ClassVar[tuple[str, ...] | None] = None
    """What is started in place of the sweep's program."""

    name: str
    words: tuple[str, ...]
    config: Config
    record: Path
    after: Job | None = None

    @property
    def key(self) -> str:
        """What two jobs share that would do the same."""
        return self.config.run_id

    @property
    def log(self) -> Path:
        return Path(self.config.runs_dir) / ".sweeps" / f"{self.key}.log"

    @property
    def script(self) -> str:
        return Path(self.program[-1]).name if self.program else "train.py"

    @property
    def gpus(self) -> int:
        return self.config.world_size if self.config.device == "cuda" else 0

    def is_complete(self) -> bool:
        """Whether its record says so; one that cannot be read does not, and the run will tell."""
        try:
            return self.record.exists() and read_record(self.record)["status"] == "complete"
        except UserError:
            return False

    def lacks(self) -> str:
        """Why it cannot begin; empty if it can."""
        return ""

    def own_record(self) -> Record:
        """The record of the run's last start; empty where there is none."""
        try:
            return read_record(self.config.run_dir / "record.json")
        except UserError:
            return {}

    def outcome(self) -> str | None:
        """What a try that ended well has found, in some words; None if it is not complete."""
        record = self.own_record()
        if record.get("status") != "complete":
            return None
        return f"test error {record['metrics']['test/top1_error_last']:.2f} %"

    def told(self) -> str:
        """Why it is not complete, as far as it has written that down."""
        return str(self.own_record().get("error", ""))


@dataclass(frozen=True)
class Ended:
    """A try that has ended.

    Attributes:
        status: exit status of train.py, negative for a signal; None where it is not known.
        cause: why there is no status.
    """

    job: Job
    status: int | None
    cause: str = ""


def distinct(jobs: Iterable[Job]) -> tuple[list[Job], list[str]]:
    """The jobs without those that are a run named before, and a line for each of these."""
    first: dict[str, Job] = {}
    doubles = []
    for job in jobs:
        known = first.setdefault(job.key, job)
        if known is not job:
            doubles.append(f"{job.name}: the same run as {known.name}")
    return list(first.values()), doubles


def plan(
    overrides: Sequence[Sequence[str]], settings: Settings
) -> tuple[list[Job], dict[str, str]]:
    """The runs that these lists of overrides describe, and what is wrong with those that are none.

    Raises:
        UserError: none is a run; the first one's cause.
    """
    jobs, refused = jobs_of(zip(names_of(overrides), overrides, strict=True), settings)
    if refused and not jobs:
        raise UserError(next(iter(refused.values())))
    return jobs, refused


def jobs_of(
    named: Iterable[tuple[str, Sequence[str]]], settings: Settings
) -> tuple[list[Job], dict[str, str]]:
    """The runs among these names and overrides, and by name what is wrong with the others."""
    jobs, refused = [], {}
    for name, words in named:
        try:
            jobs.append(job_of(name, words, settings))
        except UserError as error:
            refused[name] = str(error)
    return jobs, refused


def job_of(name: str, words: Sequence[str], settings: Settings) -> Job:
    """The run that these overrides describe. Raises UserError: they describe none."""
    config = settings.resolve(from_dict(compose(list(words))))
    return Job(name, tuple(words), config, config.run_dir / "record.json")


def names_of(overrides: Sequence[Sequence[str]]) -> list[str]:
    """What tells each list of overrides from the others: the words that not all have."""
    common = set.intersection(*(set(words) for words in overrides)) if len(overrides) > 1 else set()
    return [" ".join(w for w in words if w not in common) or " ".join(words) for words in overrides]


def cause_of(status: int | None, log: str, recorded: str, script: str = "train.py") -> str:
    """Why a try failed, in a line or some: what it told the user, else how it ended.

    Args:
        status: exit status, negative for a signal; None where it is not known.
        log: what this try wrote.
        recorded: the cause that it has written down, if there is one.
        script: what was started.
    """
    told = log.rpartition("\nerror: ")[2] if "\nerror: " in log else ""
    if told:
        return "\n".join(told.strip().splitlines()[:6])
    if status is not None and status < 0:
        name = signal.Signals(-status).name
        return f"killed by {name}" + (" (out of memory?)" if name == "SIGKILL" else "")
    if recorded:
        return recorded
    lines = [line for line in log.splitlines() if line.strip()]
    tail = f": {lines[-1].strip()}" if "Traceback" in log else ""
    return f"{script} ended with {status}{tail}"

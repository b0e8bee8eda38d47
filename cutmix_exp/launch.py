"""From a config to its processes: this one, or `devices` of them by torch.distributed's launcher."""

from __future__ import annotations

import logging
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import fields
from functools import partial
from typing import Any, NoReturn

from cutmix_exp.config import Config
from cutmix_exp.distributed import is_main_process, launched_world
from cutmix_exp.errors import AGAIN, Interrupted, RankLost, UserError

TOLD = (UserError.status, RankLost.status)
"""Exit statuses of a process that has told the user what is wrong."""

LAUNCHER_LOGS = (
    "torch.distributed.elastic",
    "torch.distributed.elastic.agent.server.api",  # has a level of its own
    "torch.multiprocessing.spawn",
)
"""Where torch's launcher would tell in its own words, and tracebacks, what a process has told."""


class WorkerFailed(Exception):
    """A process of a run ended with an error.

    Attributes:
        status: exit status of the command.
        told: whether the process has said what was wrong.
    """

    def __init__(self, message: str, status: int, told: bool) -> None:
        super().__init__(message)
        self.status, self.told = status, told


def launch(config: Config) -> None:
    """Carry out a resolved config.

    Raises:
        UserError, Interrupted: what `experiment.run` raises, if it runs in this process.
        Interrupted: the processes were asked to stop.
        WorkerFailed: a process of several failed.
    """
    from cutmix_exp import experiment
    from cutmix_exp.rundir import finished_record

    alone = config.world_size == 1 or launched_world() is not None
    if not alone and finished_record(config) is None:
        config.dataset.prepare()  # once, and its errors here, before any process is started
        config.model.prepare()
    in_processes(config, partial(experiment.run, config))


def in_processes(config: Config, work: Callable[[], Any]) -> None:
    """Call `work`, which can be pickled, in this process or in `devices` of them.

    Raises:
        as `launch`.
    """
    if config.world_size == 1 or launched_world() is not None:
        work()
        return
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import elastic_launch

    for name in LAUNCHER_LOGS:
        logging.getLogger(name).setLevel(logging.CRITICAL)
    try:
        elastic_launch(launch_settings(config), worker)(work)
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        raise worker_failed(config, rank, failure.exitcode) from None
    except SignalException as error:
        raise Interrupted(error.sigval) from None


def launch_settings(config: Config) -> Any:
    """Of torch's launcher, for processes on this machine. It passes a signal on to them and waits
    until they have ended."""
    from torch.distributed.launcher.api import LaunchConfig

    patient: dict[str, Any] = {
        "signals_to_handle": "SIGTERM,SIGINT,SIGUSR1",
        "shutdown_timeout": round(60 * config.trainer.timeout_minutes),
    }
    known = {field.name for field in fields(LaunchConfig)}  # older releases wait for 30 seconds
    return LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=config.world_size,
        run_id=config.run_id,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=0,
        monitor_interval=0.1,
        **{name: value for name, value in patient.items() if name in known},
    )


def worker_failed(config: Config, rank: int, status: int) -> Exception:
    """What the exit status of the first process that failed means for the command."""
    stopped = {Interrupted(number).status: number for number in (signal.SIGTERM, signal.SIGINT)}
    if status in stopped:
        return Interrupted(stopped[status])
    if status < 0:
        name = signal.Signals(-status).name
        message = (
            f"rank {rank} of {config.run_id} was ended by {name}"
            f"{' (out of memory?)' if name == 'SIGKILL' else ''}; {AGAIN}"
        )
        return WorkerFailed(message, RankLost.status, told=False)
    message = f"rank {rank} of {config.run_id} ended with {status}"
    return WorkerFailed(message, status, told=status in TOLD)


def worker(work: Callable[[], Any]) -> None:
    """One of several processes. What concerns all is told by the first."""
    try:
        work()
    except UserError as error:
        tell(error, error.status)
    except Interrupted as stopped:
        sys.exit(stopped.status)


def tell(error: object, status: int) -> NoReturn:
    """Say what is wrong, once for all processes that it concerns, and end."""
    if is_main_process() or getattr(error, "local", False):
        text = f"{error}; {AGAIN}" if isinstance(error, Interrupted) else f"error: {error}"
        print(text, file=sys.stderr, flush=True)
    sys.exit(status)


@contextmanager
def errors_told() -> Iterator[None]:
    """End the program with one message and the error's status, where the user can mend it."""
    try:
        yield
    except UserError as error:
        tell(error, error.status)
    except WorkerFailed as error:
        if error.told:
            sys.exit(error.status)
        tell(error, error.status)
    except Interrupted as stopped:
        tell(stopped, stopped.status)

"""From a config to its processes: this one, or `devices` of them by torch.distributed's launcher."""

from __future__ import annotations

import logging
import signal
import sys
from typing import NoReturn

from cutmix_exp.config import Config
from cutmix_exp.distributed import is_main_process, launched_world
from cutmix_exp.errors import LocalError, UserError

USER_ERROR = 2
"""Exit status of a process that has told the user what is wrong."""


class WorkerFailed(Exception):
    """A process of a run ended with an error.

    Attributes:
        told: whether the process has said what was wrong.
    """

    def __init__(self, message: str, told: bool) -> None:
        super().__init__(message)
        self.told = told


def launch(config: Config) -> None:
    """Carry out a resolved config.

    Raises:
        UserError: what `experiment.run` raises, if it runs in this process.
        WorkerFailed: a process of several failed.
    """
    from cutmix_exp import experiment

    if config.world_size == 1 or launched_world() is not None:
        experiment.run(config)
        return
    if experiment.finished_record(config) is None:
        config.dataset.prepare()  # once, and its errors here, before any process is started
        config.model.prepare()
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    settings = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=config.world_size,
        run_id=config.run_id,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=0,
        monitor_interval=0.1,
    )
    # The launcher would log a traceback of its own for what a process has already told.
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    try:
        elastic_launch(settings, worker)(config)
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        status = failure.exitcode
        message = f"process {rank} of {config.run_id} ended with {status}"
        raise WorkerFailed(message, told=status == USER_ERROR) from None
    except SignalException as error:
        if error.sigval == signal.SIGINT:
            raise KeyboardInterrupt from None
        raise


def worker(config: Config) -> None:
    """One of several processes. What concerns all is told by the first."""
    from cutmix_exp import experiment

    try:
        experiment.run(config)
    except UserError as error:
        tell(error, USER_ERROR)
    except KeyboardInterrupt:
        sys.exit(130)


def tell(error: object, status: int) -> NoReturn:
    """Say what is wrong, once for all processes that it concerns, and end."""
    if is_main_process() or isinstance(error, LocalError):
        print(f"error: {error}", file=sys.stderr, flush=True)
    sys.exit(status)

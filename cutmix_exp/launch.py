"""From a config to its processes: this one, or `devices` of them by torch.distributed's launcher."""

from __future__ import annotations

import logging
import os

from cutmix_exp.config import Config
from cutmix_exp.errors import UserError


class WorkerFailed(Exception):
    """A process of a run ended with an error that it has already told."""


def under_torchrun() -> bool:
    return "TORCHELASTIC_RUN_ID" in os.environ


def launch(config: Config) -> None:
    """Carry out a resolved config.

    Raises:
        UserError: what `experiment.run` raises, if it runs in this process.
        WorkerFailed: a process of several failed.
    """
    from cutmix_exp import experiment

    if config.world_size == 1 or under_torchrun():
        experiment.run(config)
        return
    if experiment.finished_record(config) is None:
        config.dataset.prepare()  # once, and its errors here, before any process is started
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
        raise WorkerFailed(
            f"process {rank} of {config.run_id} ended with {failure.exitcode}"
        ) from None


def worker(config: Config) -> None:
    """One of several processes. A user's error is told once, by rank 0 or by the rank it met."""
    import sys

    from cutmix_exp import experiment

    try:
        experiment.run(config)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        sys.exit(2)

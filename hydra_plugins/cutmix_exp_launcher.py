"""Hydra's launcher for `train.py -m`: hands the runs of a multirun to cutmix_exp.sweeps.

Hydra looks for plugins in the folder hydra_plugins beside train.py, and for this one's options in
configs/hydra/launcher/sweep.yaml.
"""

from collections.abc import Sequence
from typing import Any

from hydra.core.utils import JobReturn, JobStatus
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig


class SweepLauncher(Launcher):
    """Each run in a process of its own; the options are cutmix_exp.sweeps.jobs.Settings."""

    def __init__(self, **options: Any) -> None:
        self.options = options

    def setup(
        self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig
    ) -> None:
        """Nothing of it is needed: train.py composes each run itself."""

    def launch(
        self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int
    ) -> Sequence[JobReturn]:
        """Carry out the runs. Raises SystemExit if not all of them are complete then."""
        from cutmix_exp import schema  # here: Hydra imports this file at every start
        from cutmix_exp.sweeps.jobs import Settings, plan
        from cutmix_exp.sweeps.sweep import Sweep

        settings = schema.build(Settings, self.options, "hydra.launcher")
        jobs, refused = plan(job_overrides, settings)
        status = Sweep(jobs, settings, refused=refused).run()
        if status:
            raise SystemExit(status)
        return [JobReturn(overrides=words, status=JobStatus.COMPLETED) for words in job_overrides]

"""What the tests share: real commands in real processes, and small configs."""

from __future__ import annotations

import functools
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

from cutmix_exp.composition import compose
from cutmix_exp.config import Config, from_dict, resolve
from cutmix_exp.reporting.tables import Table, row_config
from tests.starter import Starter

ROOT = Path(__file__).resolve().parent.parent
TINY = ["dataset=digits", "model=resnet", "model.depth=8", "budget=smoke", "device=cpu"]
"""Two epochs of an 8-layer network on the digits: some seconds."""


def config_of(*overrides: str) -> Config:
    """A resolved config as train.py would make it."""
    return resolve(from_dict(compose(list(overrides))))


def row_configs(table: Table) -> list[Config]:
    """The unresolved configs of the rows that are available."""
    configs = [row_config(table, row) for row in table.rows]
    return [config for config in configs if isinstance(config, Config)]


def environment(**extra: str) -> dict[str, str]:
    """The environment of a fresh shell in the repository: no launcher's variables, and one thread
    for each process, which is faster for small networks."""
    launcher = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "TORCHELASTIC_RUN_ID")
    kept = {k: v for k, v in os.environ.items() if k not in launcher}
    kept["OMP_NUM_THREADS"] = "1"
    return {**kept, "PYTHONPATH": f"{ROOT}{os.pathsep}{kept.get('PYTHONPATH', '')}", **extra}


@functools.cache
def starter() -> Starter:
    return Starter(ROOT, environment())


def command(
    *words: str, cwd: Path = ROOT, timeout: float = 240, fresh: bool = False, **extra: str
) -> subprocess.CompletedProcess[str]:
    """Run a command of the project's Python; fails the test if it takes longer than `timeout`.

    Args:
        fresh: start a new Python, which imports everything itself (see starter.py).
    """
    if not fresh:
        return starter().run(list(words), cwd, environment(**extra), timeout)
    return subprocess.run(
        [sys.executable, *words],
        cwd=cwd,
        env=environment(**extra),
        capture_output=True,
        text=True,
        timeout=timeout,
    )


def train(*overrides: str, **extra: Any) -> subprocess.CompletedProcess[str]:
    """python train.py OVERRIDES, which must succeed."""
    done = command(str(ROOT / "train.py"), *overrides, **extra)
    assert done.returncode == 0, done.stdout + done.stderr
    return done


def refused(*overrides: str, script: str = "train.py", **extra: Any) -> str:
    """The one message of a command that must fail without a traceback."""
    done = command(str(ROOT / script), *overrides, **extra)
    assert done.returncode not in (0, -signal.SIGKILL), done.stdout
    assert starter().cpu_seconds < 20  # not of the clock, which other programs make run faster
    assert "Traceback" not in done.stdout + done.stderr
    assert done.stderr.count("error: ") == 1, done.stderr
    return done.stderr


def only_run(runs_dir: Path) -> Path:
    """The directory of the one run below `runs_dir`."""
    (found,) = [p for p in runs_dir.iterdir() if (p / "record.json").exists()]
    return found


def record_of(run: Path) -> dict[str, Any]:
    return dict(json.loads((run / "record.json").read_text()))


def metrics_of(run: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl without what depends on the clock."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    clocked = ("time", "images_per_second", "data_wait", "input_ceiling")
    return [{k: v for k, v in line.items() if k not in clocked} for line in lines]

"""Sweeps on Slurm (submitit) and Ray, with both engines' own means of running on one machine."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cutmix_exp.errors import UserError
from cutmix_exp.sweeps.cluster import RayEngine, SlurmEngine
from cutmix_exp.sweeps.jobs import Job, Ray, Settings, Slurm
from cutmix_exp.sweeps.sweep import Sweep, engine_of
from tests.test_sweeps import STUB, config, jobs_that, starts, until  # noqa: F401 (fixtures)

NO_SUBMITIT = "submitit is not installed (the optional extra `cluster`)"
NO_RAY = "Ray is not installed (the optional extra `ray`)"
LOCAL = Settings(engine="slurm", jobs=2, slurm=Slurm(cluster="local", minutes=5))

FAKE_SBATCH = """#!{python}
import json, os, re, sys
at = os.path.dirname(os.path.abspath(__file__))
text = open(sys.argv[1]).read()
with open(at + "/asked", "a") as file:
    file.write(json.dumps(text) + "\\n")
number = len(open(at + "/asked").readlines())
print("Submitted batch job", 100 + number)
"""
FAKE_SACCT = """#!{python}
import os, sys
at = os.path.dirname(os.path.abspath(__file__))
print("JobID|State|NodeList")
for line in open(at + "/states"):
    print(line.strip())
"""


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with an sbatch that notes what it is asked for and a sacct that says what the file
    `states` says."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name, text in (("sbatch", FAKE_SBATCH), ("sacct", FAKE_SACCT), ("srun", FAKE_SACCT)):
        (folder / name).write_text(text.format(python=sys.executable))
        (folder / name).chmod(0o755)
    (folder / "states").touch()
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
    return folder


def test_a_library_that_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    for engine, module, extra in (("slurm", "submitit", "cluster"), ("ray", "ray", "ray")):
        monkeypatch.setitem(sys.modules, module, None)
        with pytest.raises(UserError, match=rf"-e '\.\[{extra}\]'"):
            engine_of(Settings(engine=engine))  # type: ignore[arg-type]


@pytest.mark.skipif(importlib.util.find_spec("submitit") is None, reason=NO_SUBMITIT)
def test_no_slurm_here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(UserError, match="sbatch"):
        SlurmEngine(Settings(engine="slurm"))


@pytest.mark.slow
def test_submitit_carries_out_a_sweep(
    jobs_that: Callable[..., list[Job]],  # noqa: F811
    capfd: pytest.CaptureFixture[str],
) -> None:
    pytest.importorskip("submitit", reason=NO_SUBMITIT)
    jobs = jobs_that("succeeds", "fails", "fails once")
    status = Sweep(jobs, LOCAL, engine=SlurmEngine(LOCAL, program=STUB)).run()
    said = capfd.readouterr().out
    assert status == 1 and [sum("{" in line for line in starts(job)) for job in jobs] == [1, 2, 2]
    assert "sweep of 3 runs: 0 complete before, 2 completed now, 1 failed" in said
    assert "seed=1: the disk is full" in said.partition("failed:\n")[2]


@pytest.mark.slow
@pytest.mark.parametrize("told_directly", [False, True])
def test_a_preempted_run_stops_cleanly_and_is_requeued(
    told_directly: bool,
    jobs_that: Callable[..., list[Job]],  # noqa: F811
) -> None:
    """Slurm's signal comes to submitit's process, or to all processes of the job, the run too."""
    pytest.importorskip("submitit", reason=NO_SUBMITIT)
    (job,) = jobs_that("waits once")
    engine = SlurmEngine(LOCAL, program=STUB)
    sweep = Sweep([job], LOCAL, engine=engine)
    preempted = []

    def poll() -> Any:
        if starts(job) and not preempted:
            noted = json.loads(starts(job)[0])
            if told_directly:
                os.kill(noted["pid"], signal.SIGTERM)
            else:
                os.kill(noted["parent"], signal.SIGUSR2)
            preempted.append(True)
        return SlurmEngine.poll(engine)

    engine.poll = poll  # type: ignore[method-assign]
    engine.interval = 0.1
    assert sweep.run() == 0
    noted = [line if "{" not in line else "start" for line in starts(job)]
    assert noted == ["start", "stopped by SIGTERM", "start"]
    assert sweep.tries[job] == 1  # a pre-emption is no failure


def test_slurm_is_asked_for_an_array_and_found_again(
    slurm: Path,
    jobs_that: Callable[..., list[Job]],  # noqa: F811
) -> None:
    pytest.importorskip("submitit", reason=NO_SUBMITIT)
    from collections import deque

    settings = Settings(
        engine="slurm", jobs=2, slurm=Slurm(partition="gpu", minutes=90, memory_gb=20)
    )
    jobs = jobs_that("succeeds", "succeeds", "succeeds", gpus=2)
    engine = SlurmEngine(settings, program=STUB)
    assert list(engine.start(deque(jobs)).values()) == [f"as Slurm job 101_{n}" for n in range(3)]
    asked = json.loads((slurm / "asked").read_text())
    for option in ("array=0-2%2", "gpus-per-node=2", "partition=gpu", "time=90", "signal=USR2@120"):
        assert f"#SBATCH --{option}" in asked, asked
    assert "with Slurm" in engine.stop() and not engine.running

    (slurm / "states").write_text("101_0|RUNNING|a\n101_1|PENDING|\n101_2|FAILED|b\n")
    again = SlurmEngine(settings, program=STUB)
    where = again.start(deque(jobs))
    assert where == {
        jobs[0]: "before, Slurm job 101_0",
        jobs[1]: "before, Slurm job 101_1",
        jobs[2]: "as Slurm job 102",
    }
    assert len((slurm / "asked").read_text().splitlines()) == 2


@pytest.mark.slow
def test_ray_carries_out_a_sweep(
    jobs_that: Callable[..., list[Job]],  # noqa: F811
    capfd: pytest.CaptureFixture[str],
) -> None:
    ray = pytest.importorskip("ray", reason=NO_RAY)
    settings = Settings(engine="ray", retries=1, ray=Ray(address="local", cpus=1))
    jobs = jobs_that("succeeds", "fails", "fails once", "is killed")
    try:
        status = Sweep(jobs, settings, engine=RayEngine(settings, program=STUB)).run()
    finally:
        ray.shutdown()
    said = capfd.readouterr().out
    assert status == 1
    assert [sum("{" in line for line in starts(job)) for job in jobs] == [1, 2, 2, 2]
    assert "sweep of 4 runs: 0 complete before, 2 completed now, 2 failed" in said
    told = said.partition("failed:\n")[2]
    assert "seed=1: the disk is full" in told and "seed=3: killed by SIGKILL" in told

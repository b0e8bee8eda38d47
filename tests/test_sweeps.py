"""Many runs: packed, retried, stopped, continued; and a multirun that is killed twice."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from cutmix_exp.composition import compose
from cutmix_exp.config import Config, Hardware, from_dict, resolve
from cutmix_exp.errors import UserError
from cutmix_exp.rundir import in_use
from cutmix_exp.sweeps import process
from cutmix_exp.sweeps.jobs import IN_USE, Job, Settings, cause_of, names_of, plan
from cutmix_exp.sweeps.local import Local, visible_gpus
from cutmix_exp.sweeps.sweep import Sweep
from tests.helpers import ROOT, TINY, command, environment, metrics_of, record_of

STUB = (sys.executable, "-S", str(ROOT / "tests" / "stub_run.py"))


@pytest.fixture(scope="module")
def config() -> Config:
    return resolve(from_dict(compose(TINY)), Hardware())


@pytest.fixture
def jobs_that(config: Config, tmp_path: Path) -> Callable[..., list[Job]]:
    """Jobs of the stub, one for each behaviour."""

    def make(*behaviours: str, gpus: int = 0) -> list[Job]:
        jobs = []
        for seed, behaviour in enumerate(behaviours):
            where = {"device": "cuda", "devices": gpus} if gpus else {}
            mine = replace(config, seed=seed, runs_dir=str(tmp_path), **where)  # type: ignore[arg-type]
            words = (str(mine.run_dir), behaviour)
            jobs.append(Job(f"seed={seed}", words, mine, mine.run_dir / "record.json"))
        return jobs

    return make


def starts(job: Job) -> list[str]:
    """What each start of the stub has noted."""
    file = job.config.run_dir / "starts"
    return file.read_text().splitlines() if file.exists() else []


def until(condition: Callable[[], Any], seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.05)


def swept(todo: list[Job], **settings: Any) -> tuple[int, Sweep]:
    chosen = Settings(**settings)
    sweep = Sweep(todo, chosen, engine=Local(chosen.jobs, gpus=[], program=STUB))
    return sweep.run(), sweep


def test_a_sweep_goes_on_after_failures_and_sums_them_up(
    jobs_that: Callable[..., list[Job]], capfd: pytest.CaptureFixture[str]
) -> None:
    jobs = jobs_that("fails", "succeeds", "fails once", "is killed", "crashes", "succeeds")
    status, _ = swept(jobs, retries=1, jobs=2)
    said = capfd.readouterr().out
    assert status == 1
    assert [sum("{" in line for line in starts(job)) for job in jobs] == [2, 1, 2, 2, 2, 1]
    assert "sweep of 6 runs: 0 complete before, 3 completed now, 3 failed" in said
    told = said.partition("failed:\n")[2]
    assert f"  seed=0: the disk is full\n    make room\n    (2 tries; log: {jobs[0].log})" in told
    assert "  seed=3: killed by SIGKILL (out of memory?)" in told
    assert "  seed=4: train.py ended with 1: ValueError: a defect" in told
    assert "seed=1" not in told and "seed=2" not in told
    assert "training" not in said  # of jobs at a time, each has a log of its own
    assert "training" in jobs[1].log.read_text()
    again, _ = swept(jobs, retries=0)
    said = capfd.readouterr().out
    assert "6 runs: 3 complete, 3 to do" in said and again == 1
    assert [sum("{" in line for line in starts(job)) for job in jobs] == [3, 1, 2, 3, 3, 1]


def test_the_cause_is_that_of_the_last_try(jobs_that: Callable[..., list[Job]]) -> None:
    status, sweep = swept(jobs_that("fails, is killed"), retries=1)
    assert status == 1 and sweep.failed["seed=0"].startswith("killed by SIGKILL")


def test_nothing_to_do(jobs_that: Callable[..., list[Job]]) -> None:
    jobs = jobs_that("succeeds", "succeeds")
    kept: list[Job] = []
    assert swept(jobs)[0] == 0
    sweep = Sweep([*jobs, jobs[0]], Settings(), on_complete=kept.append)
    assert sweep.run() == 0 and kept == jobs  # told of what was complete, and of each run once
    assert [len(starts(job)) for job in jobs] == [1, 1]


def test_force_trains_again(jobs_that: Callable[..., list[Job]]) -> None:
    jobs = jobs_that("succeeds")
    assert swept(jobs)[0] == 0
    forced = [replace(job, config=replace(job.config, force=True)) for job in jobs]
    assert swept(forced)[0] == 0
    assert len(starts(jobs[0])) == 2


def test_a_run_that_another_process_holds_is_reported_not_retried(
    jobs_that: Callable[..., list[Job]], capfd: pytest.CaptureFixture[str]
) -> None:
    assert IN_USE in str(in_use(Path("a"), None))  # what a real run says
    jobs = jobs_that("is held", "succeeds")
    status, sweep = swept(jobs, retries=5)
    assert status == 1 and sweep.trained == jobs[1:]
    assert len(starts(jobs[0])) == 2  # looked at again after the rest, then left
    assert (
        "held by another process:\n  seed=0: this is in use by process 7" in capfd.readouterr().out
    )


def test_runs_are_packed_on_free_gpus(jobs_that: Callable[..., list[Job]]) -> None:
    engine = Local(None, gpus=["4", "5", "6", "7", "9"], cores=range(8), program=STUB)
    jobs = jobs_that(*["waits"] * 4, gpus=2)
    waiting = deque(jobs)
    assert list(engine.start(waiting).values()) == ["on GPU 4,5", "on GPU 6,7"]
    assert list(waiting) == jobs[2:] and engine.start(waiting) == {}
    (jobs[1].config.run_dir).mkdir(exist_ok=True)
    (jobs[1].config.run_dir / "go").touch()
    until(lambda: engine.poll())
    assert engine.start(waiting) == {jobs[2]: "on GPU 6,7"} and list(waiting) == jobs[3:]
    used = [gpu for _, place in engine.running.values() for gpu in place.gpus]
    assert max(Counter(used).values()) == 1 and len(used) == 4
    until(lambda: starts(jobs[2]))
    seen = json.loads(starts(jobs[2])[0])
    assert seen["CUDA_VISIBLE_DEVICES"] == ",".join(engine.running[jobs[2]][1].gpus)
    assert seen["OMP_NUM_THREADS"] == "1" if "OMP_NUM_THREADS" in os.environ else "4"
    engine.stop()
    until(lambda: not engine.running or engine.poll())


def test_runs_of_different_sizes_never_share_a_gpu(jobs_that: Any) -> None:
    engine = Local(None, gpus=["0", "1", "2", "3"], program=STUB)
    waiting = deque([*jobs_that("waits", gpus=3), *jobs_that("waits", "waits", gpus=2)[1:]])
    assert list(engine.start(waiting).values()) == ["on GPU 0,1,2"] and len(waiting) == 1
    engine.stop(now=True)


@pytest.mark.parametrize(
    ("jobs", "devices", "at_a_time", "most_on_one"), [(None, 1, 3, 1), (6, 1, 6, 2), (2, 3, 2, 2)]
)
def test_gpus_are_shared_only_where_it_is_asked_for(
    jobs: int | None, devices: int, at_a_time: int, most_on_one: int, jobs_that: Any
) -> None:
    engine = Local(jobs, gpus=["0", "1", "2"], program=STUB)
    engine.start(deque(jobs_that(*["waits"] * 7, gpus=devices)))
    used = Counter(gpu for _, place in engine.running.values() for gpu in place.gpus)
    assert len(engine.running) == at_a_time and max(used.values()) == most_on_one
    engine.stop(now=True)


def test_runs_at_a_time_share_the_cores(jobs_that: Callable[..., list[Job]]) -> None:
    engine = Local(2, gpus=[], cores=[10, 11, 12, 13, 14], program=STUB)
    first, second = jobs_that("waits", "waits")
    places = [engine.place(first)]
    engine.running[first] = (None, places[0])
    places.append(engine.place(second))
    assert [engine.cores_of(first, p) for p in places if p] == [[10, 11], [12, 13, 14]]
    crowded = Local(3, gpus=[], cores=[4], program=STUB)
    assert crowded.cores_of(first, places[1]) == [4]  # type: ignore[arg-type]


def test_a_process_is_bound_to_its_cores(jobs_that: Callable[..., list[Job]]) -> None:
    jobs = jobs_that("succeeds", "succeeds")
    core = sorted(os.sched_getaffinity(0))[:1]
    sweep = Sweep(jobs, Settings(), engine=Local(2, gpus=[], cores=core * 2, program=STUB))
    assert sweep.run() == 0
    assert [json.loads(starts(job)[0])["cores"] for job in jobs] == [1, 1]
    assert json.loads(starts(jobs[0])[0])["OMP_NUM_THREADS"] == "1"


def test_visible_gpus_are_those_of_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3, GPU-5a")
    assert visible_gpus() == ["3", "GPU-5a"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert visible_gpus() == []


def test_a_signal_stops_the_runs_and_starts_no_other(
    jobs_that: Callable[..., list[Job]], capfd: pytest.CaptureFixture[str]
) -> None:
    jobs = jobs_that("waits", "waits", "succeeds")

    def ask() -> None:
        until(lambda: starts(jobs[0]) and starts(jobs[1]))
        os.kill(os.getpid(), signal.SIGTERM)

    before = signal.getsignal(signal.SIGTERM)
    asking = threading.Thread(target=ask, daemon=True)
    asking.start()
    status, _ = swept(jobs, jobs=2, retries=3)
    asking.join()
    assert status == 75 and signal.getsignal(signal.SIGTERM) is before
    assert [job.config.run_dir.exists() for job in jobs] == [True, True, False]
    assert all(starts(job)[1:] == ["stopped by SIGTERM"] for job in jobs[:2])
    assert "0 completed now, 3 not done" in capfd.readouterr().out


def test_a_run_does_not_outlive_the_process_that_started_it(tmp_path: Path) -> None:
    """Killed with SIGKILL, the parent can tell nobody; the kernel tells the run."""
    run = tmp_path / "run"
    child = os.fork()
    if child == 0:  # stands for a sweep
        process.start([str(run), "waits"], tmp_path / "log", program=STUB)
        time.sleep(600)
        os._exit(0)
    until(lambda: (run / "starts").exists())
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    until(lambda: "stopped by SIGTERM" in (run / "starts").read_text())


def test_a_combination_that_is_no_run_is_refused_and_the_others_are_planned() -> None:
    words = [[*TINY, f"devices={n}", "schedule.batch_size=3"] for n in (1, 2, 4)]
    jobs, refused = plan(words, Settings())
    assert [job.name for job in jobs] == ["devices=1", "devices=2"]
    assert list(refused) == ["devices=4"] and "use at least 4" in refused["devices=4"]
    with pytest.raises(UserError, match="use at least 4"):
        plan(words[2:], Settings())
    sweep = Sweep([], Settings(), refused=refused)
    assert sweep.run() == 1 and "sweep of 1 runs" in sweep.summary()


def test_a_clusters_machines_must_not_choose_the_name() -> None:
    words = ["dataset=digits", "model=resnet"]
    with pytest.raises(UserError, match="device=cuda precision=bf16"):
        plan([words], Settings(engine="slurm"))
    (job,), _ = plan(
        [[*words, "device=cuda", "precision=bf16", "devices=2"]], Settings(engine="ray")
    )
    assert job.gpus == 2 and job.config.precision == "bf16"


def test_what_tells_runs_from_each_other() -> None:
    assert names_of([["a=1", "b=2", "c=3"], ["a=1", "b=3", "c=3"]]) == ["b=2", "b=3"]
    assert names_of([["a=1", "b=2"]]) == ["a=1 b=2"]
    assert cause_of(1, "--- x\nnothing", "ValueError: recorded") == "ValueError: recorded"
    assert cause_of(-15, "--- x\n", "old") == "killed by SIGTERM"


TWELVE = ["-m", *TINY, "trainer.max_steps=2", "aug=baseline,cutout,mixup,cutmix", "seed=0,1,2"]


def complete(runs: Path) -> dict[Path, int]:
    """The complete records, and when each was written."""
    found = [p for p in runs.glob("*/record.json") if record_of(p.parent)["status"] == "complete"]
    return {p: p.stat().st_mtime_ns for p in found}


def descendants(pid: int) -> list[int]:
    """The process and all below it, by /proc."""
    found = [pid]
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            parent = int(stat.read_text().rpartition(")")[2].split()[1])
        except OSError:
            continue
        if parent == pid:
            found += descendants(int(stat.parent.name))
    return found


@pytest.mark.slow
def test_a_multirun_killed_twice_and_repeated_trains_each_run_once(tmp_path: Path) -> None:
    words = [str(ROOT / "train.py"), *TWELVE, "hydra.launcher.jobs=2"]
    runs = tmp_path / "runs"
    seen: dict[Path, int] = {}
    for count, everything in ((2, False), (6, True)):  # the sweep alone; then the runs with it
        started = subprocess.Popen(
            [sys.executable, *words], cwd=tmp_path, env=environment(), stdout=subprocess.DEVNULL
        )
        until(lambda count=count: len(complete(runs)) >= count, 400)
        for pid in descendants(started.pid) if everything else [started.pid]:
            os.kill(pid, signal.SIGKILL)
        assert started.wait() == -signal.SIGKILL
        now = complete(runs)
        assert seen.items() <= now.items()
        seen = now
    done = command(*words, cwd=tmp_path, timeout=500)
    assert done.returncode == 0, done.stdout + done.stderr
    left = 12 - len(seen)
    assert f"12 runs: {len(seen)} complete, {left} to do" in done.stdout
    assert f"sweep of 12 runs: {len(seen)} complete before, {left} completed now" in done.stdout
    ended = complete(runs)
    assert len(ended) == 12 and seen.items() <= ended.items()
    assert [p.name for p in tmp_path.iterdir()] == ["runs"]
    for file in ended:
        log = (runs / ".sweeps" / f"{file.parent.name}.log").read_text()
        assert log.count("test error last") == 1 and "nothing is trained" not in log
        steps = [(n["step"], n["split"]) for n in metrics_of(file.parent)]
        assert steps == [(2, "train"), (2, "test")]


@pytest.mark.slow
def test_a_sweep_of_runs_on_two_devices_each(tmp_path: Path) -> None:
    words = [*TINY, "devices=2", "aug=baseline,cutmix", "trainer.max_steps=2"]
    done = command(str(ROOT / "train.py"), "-m", *words, cwd=tmp_path, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "sweep of 2 runs: 0 complete before, 2 completed now" in done.stdout
    records = [record_of(file.parent) for file in complete(tmp_path / "runs")]
    assert sorted(r["aug"] for r in records) == ["baseline", "cutmix"]
    assert [r["cost"]["world_size"] for r in records] == [2, 2]

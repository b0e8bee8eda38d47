"""A run that is killed goes on with the same command and ends with the bits of the unbroken run."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.helpers import (
    ROOT,
    TINY,
    command,
    environment,
    metrics_of,
    only_run,
    record_of,
    refused,
    train,
)

SMALL = [
    "dataset=synthetic",
    "dataset.num_classes=10",
    "dataset.train_size=380",  # six steps an epoch, the last one of 60 images
    "dataset.test_size=100",
    "schedule.lr=0.05",
    *TINY[1:],
]
RUN = [*SMALL, "aug=cutmix", "aug.mix.prob=1.0", "schedule.epochs=3"]


def ending(runs: Path) -> tuple[Any, Any, Any]:
    """What must not differ: weights and momenta, metrics lines, and the record without its costs."""
    run = only_run(runs)
    state = torch.load(run / "checkpoints" / "last.pt", weights_only=True)
    record = record_of(run)
    tensors = {
        **state["model"],
        **{f"m{k}": v["momentum_buffer"] for k, v in state["optimizer"]["state"].items()},
    }
    told = {k: v for k, v in record.items() if k not in ("cost", "provenance", "config")}
    return tensors, metrics_of(run), told


def assert_same(one: tuple[Any, Any, Any], other: tuple[Any, Any, Any]) -> None:
    assert one[0].keys() == other[0].keys()
    for name, tensor in one[0].items():
        assert torch.equal(tensor, other[0][name]), name
    assert one[1:] == other[1:]


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any, Any]:
    runs = tmp_path_factory.mktemp("unbroken")
    train(*RUN, f"runs_dir={runs}")
    return ending(runs)


@pytest.mark.parametrize(
    ("moment", "count"),
    [
        ("step", 8),  # in the second epoch
        ("evaluation", 4),  # of the second epoch, on the test set
        ("save", 2),  # the second checkpoint is half written
    ],
)
def test_killed_and_repeated(moment: str, count: int, tmp_path: Path, unbroken: Any) -> None:
    words = [*RUN, f"runs_dir={tmp_path}"]
    killed = command(str(ROOT / "tests" / "crash.py"), moment, str(count), *words)
    assert killed.returncode == -signal.SIGKILL
    run = only_run(tmp_path)
    assert record_of(run)["status"] == "running"
    kept = torch.load(run / "checkpoints" / "last.pt", weights_only=True)
    assert kept["step"] == 6  # the end of the first epoch, whole
    done = train(*words)
    assert "continuing from step 6" in done.stdout
    assert_same(ending(tmp_path), unbroken)
    steps = [(n["step"], n["split"]) for n in metrics_of(run)]
    assert len(steps) == len(set(steps)) == 6


def test_killed_before_the_first_checkpoint(tmp_path: Path, unbroken: Any) -> None:
    words = [*RUN, f"runs_dir={tmp_path}"]
    assert (
        command(str(ROOT / "tests" / "crash.py"), "step", "3", *words).returncode == -signal.SIGKILL
    )
    train(*words)
    assert_same(ending(tmp_path), unbroken)


@pytest.mark.slow
def test_resumed_in_mid_epoch(tmp_path: Path, unbroken: Any) -> None:
    words = [*RUN, f"runs_dir={tmp_path}", "checkpoint.every_minutes=0.000001"]
    for count in ("8", "3"):  # the second start takes two steps, to the ninth
        killed = command(str(ROOT / "tests" / "crash.py"), "step", count, *words)
        assert killed.returncode == -signal.SIGKILL
    done = train(*words)
    assert "continuing from step 9" in done.stdout
    assert_same(ending(tmp_path), unbroken)
    starts = record_of(only_run(tmp_path))["provenance"]["starts"]
    assert len(starts) == 3


@pytest.mark.slow
def test_two_processes_killed_in_mid_epoch_and_repeated(tmp_path: Path) -> None:
    # The ranks agree on a checkpoint every 20 steps: the first one is in the fourth epoch.
    late = ["schedule.epochs=7", "checkpoint.every_epochs=100", "checkpoint.every_minutes=0.000001"]
    words = [*RUN[:-1], *late, "devices=2"]
    train(*words, f"runs_dir={tmp_path / 'unbroken'}")
    broken = tmp_path / "broken"
    started = subprocess.Popen(
        [sys.executable, str(ROOT / "train.py"), *words, f"runs_dir={broken}"],
        env=environment(),
        cwd=ROOT,
        start_new_session=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + 120
    while not list(broken.glob("*/checkpoints/last.pt")) and time.monotonic() < deadline:
        time.sleep(0.05)
    subprocess.run(["pkill", "-KILL", "-s", str(started.pid)], check=True)
    assert started.wait() == -signal.SIGKILL
    assert record_of(only_run(broken))["status"] == "running"
    done = train(*words, f"runs_dir={broken}")
    assert "continuing from step" in done.stdout
    assert_same(ending(broken), ending(tmp_path / "unbroken"))


def test_tensorboard_is_written_anew_on_resume(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    words = [*RUN, f"runs_dir={tmp_path}"]
    command(str(ROOT / "tests" / "crash.py"), "evaluation", "4", *words)
    train(*words)
    files = list((only_run(tmp_path) / "tb").iterdir())
    assert len(files) == 1
    board = EventAccumulator(str(files[0]), purge_orphaned_data=False)
    board.Reload()
    assert [e.step for e in board.Scalars("train/loss")] == [6, 12, 18]


def test_a_run_in_use_is_refused(tmp_path: Path) -> None:
    import fcntl

    words = [*SMALL, "trainer.max_steps=1", f"runs_dir={tmp_path}"]
    assert (
        command(str(ROOT / "tests" / "crash.py"), "step", "1", *words).returncode == -signal.SIGKILL
    )
    with open(only_run(tmp_path) / ".lock") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        assert "in use by process" in refused(*words)
    train(*words)  # the lock went with its holder


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path: Path) -> None:
    said = refused(*SMALL, "schedule.lr=1e30", f"runs_dir={tmp_path}")
    assert "not finite" in said and "step 2" in said and "schedule.lr" in said
    assert "there is no checkpoint yet" in said
    record = record_of(only_run(tmp_path))
    assert record["status"] == "failed" and "not finite" in record["error"]


def test_a_network_that_is_ruined_by_the_last_step_is_not_kept(tmp_path: Path) -> None:
    words = [*SMALL, "schedule.lr=1e30", "trainer.max_steps=1", f"runs_dir={tmp_path}"]
    assert "loss in evaluation mode is not finite" in refused(*words)
    run = only_run(tmp_path)
    assert record_of(run)["status"] == "failed"
    assert not (run / "checkpoints").exists()
    assert (run / "metrics.jsonl").read_text() == ""


@pytest.mark.slow
def test_resumed_on_another_number_of_processes(tmp_path: Path) -> None:
    """To rounding: the weights that one process ends with differ from the unbroken run's by less
    than a hundredth of what they moved since the kill."""
    words = [*RUN, "precision=fp32", "trainer.bn_group_size=32"]
    train(*words, f"runs_dir={tmp_path / 'unbroken'}")
    broken = f"runs_dir={tmp_path / 'broken'}"
    killed = command(str(ROOT / "tests" / "crash.py"), "step", "8", *words, broken)
    assert killed.returncode == -signal.SIGKILL
    middle = torch.load(
        only_run(tmp_path / "broken") / "checkpoints" / "last.pt", weights_only=True
    )["model"]
    assert "continuing from step 6" in train(*words, "devices=2", broken).stdout
    one, two = ending(tmp_path / "unbroken")[0], ending(tmp_path / "broken")[0]
    for name in middle:
        if middle[name].is_floating_point():
            moved = (one[name] - middle[name]).norm()
            assert (one[name] - two[name]).norm() <= 0.01 * moved, name


def test_a_damaged_checkpoint_and_one_that_would_execute_are_refused(tmp_path: Path) -> None:
    words = [*SMALL, "trainer.max_steps=1", f"runs_dir={tmp_path}"]
    train(*words)
    run = only_run(tmp_path)
    record = record_of(run)
    (run / "record.json").write_text(json.dumps({**record, "status": "interrupted"}))
    last, marker = run / "checkpoints" / "last.pt", tmp_path / "executed"

    class Evil:
        def __reduce__(self) -> Any:
            return (Path.touch, (marker,))

    torch.save({"schema": 1, "evil": Evil()}, last)
    assert "cannot be read" in refused(*words)
    assert not marker.exists()
    last.write_bytes(last.read_bytes()[:100])
    assert "cannot be read" in refused(*words)
    torch.save({"schema": 99}, last)
    assert "schema 99" in refused(*words)


def test_an_unfinished_run_of_another_batchnorm_group_is_mentioned(tmp_path: Path) -> None:
    words = [*SMALL, f"runs_dir={tmp_path}"]
    killed = command(
        str(ROOT / "tests" / "crash.py"), "step", "3", *words, "trainer.bn_group_size=32"
    )
    assert killed.returncode == -signal.SIGKILL
    done = train(*words)
    assert "differs from this one only in its BatchNorm group size (32, here 64)" in done.stdout

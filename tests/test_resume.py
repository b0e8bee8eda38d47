"""A run that is killed goes on with the same command and ends with the bits of the unbroken run."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.forks import at_step, ends, fork_train, train_ranks
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
from tests.test_sweeps import descendants

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


def kill_me() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize(
    ("number", "status"), [(signal.SIGTERM, 75), (signal.SIGUSR1, 75), (signal.SIGINT, 130)]
)
def test_a_signal_ends_the_step_and_writes_a_checkpoint(
    number: signal.Signals, status: int, tmp_path: Path, unbroken: Any
) -> None:
    words = [*RUN, f"runs_dir={tmp_path}"]

    def ask() -> None:
        at_step(8, lambda: os.kill(os.getpid(), number))

    said = ends(fork_train(*words, log=tmp_path / "log", before=ask), status)
    assert f"stopped by {number.name}; the same command continues" in said
    run = only_run(tmp_path)
    assert record_of(run)["status"] == "interrupted"
    kept = torch.load(run / "checkpoints" / "last.pt", weights_only=True)
    assert kept["step"] == 8  # the step was finished, no other was begun
    if number == signal.SIGUSR1:  # the others are in the same state
        said = ends(fork_train(*words, log=tmp_path / "log"), 0)
        assert "continuing from step 8" in said
        assert_same(ending(tmp_path), unbroken)


def test_a_torn_line_and_a_damaged_checkpoint_leave_no_trace_but_a_warning(
    tmp_path: Path, unbroken: Any
) -> None:
    words = [*RUN, f"runs_dir={tmp_path}"]
    said = ends(fork_train(*words, log=tmp_path / "log", before=lambda: at_step(17, kill_me)), -9)
    run = only_run(tmp_path)
    with open(run / "metrics.jsonl", "a") as file:
        file.write('{"step": 17, "epoch": 3, "spl')
    last = run / "checkpoints" / "last.pt"
    last.write_bytes(last.read_bytes()[:5000])
    (run / "checkpoints" / ".last.pt.1234.tmp").write_bytes(b"half")  # of a killed process
    said = ends(fork_train(*words, log=tmp_path / "log"), 0)
    assert "warning: the checkpoint" in said and "continuing from step 6" in said
    assert_same(ending(tmp_path), unbroken)
    (warning,) = record_of(run)["provenance"]["warnings"]
    assert "continuing from the one before it" in warning
    left = [p.name for p in (run / "checkpoints").iterdir()]
    assert sorted(left) == ["last.pt", "previous.pt"]


@pytest.mark.slow
def test_three_ranks_stop_together_and_resume_bit_for_bit(tmp_path: Path) -> None:
    """The signal reaches one rank alone. Then all are killed, one after the other."""
    words = [*RUN, "aug=[cutmix,shakedrop]", "schedule.ema_decay=0.9"]
    for rank in train_ranks(3, *words, f"runs_dir={tmp_path / 'unbroken'}", folder=tmp_path):
        ends(rank, 0)
    broken = [*words, f"runs_dir={tmp_path / 'broken'}"]

    def ask(rank: int) -> None:
        if rank == 1:
            at_step(8, lambda: os.kill(os.getpid(), signal.SIGTERM))

    for rank in train_ranks(3, *broken, folder=tmp_path, before=ask):
        ends(rank, 75)
    run = only_run(tmp_path / "broken")
    assert record_of(run)["status"] == "interrupted"
    kept = torch.load(run / "checkpoints" / "last.pt", weights_only=True)
    assert kept["step"] == 9  # what one rank wishes is known to all a step later
    # A resumed run takes its first step once more, to learn DDP's order: here the second call is
    # step 10.
    for rank in train_ranks(3, *broken, folder=tmp_path, before=lambda _: at_step(3, kill_me)):
        assert rank.wait() == -signal.SIGKILL
    for rank in train_ranks(3, *broken, folder=tmp_path):
        ends(rank, 0)
    assert "continuing from step 9" in (tmp_path / "rank0.log").read_text()
    assert_same(ending(tmp_path / "broken"), ending(tmp_path / "unbroken"))


def started(*words: str, **extra: Any) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, *words],
        env=environment(**extra),
        cwd=ROOT,
        start_new_session=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def wait_for(condition: Any, timeout: float = 180) -> None:
    until = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.02)


@pytest.mark.slow
def test_devices_are_stopped_killed_and_repeated(tmp_path: Path) -> None:
    """A batch system signals the command alone, which passes it on; then all are killed."""
    words = [str(ROOT / "train.py"), *RUN[:-1], "schedule.epochs=7", "devices=2"]
    one = command(*words, f"runs_dir={tmp_path / 'unbroken'}")
    assert one.returncode == 0, one.stderr
    broken = tmp_path / "broken"
    lines = broken / only_run(tmp_path / "unbroken").name / "metrics.jsonl"

    def reached(epochs: int) -> bool:
        return lines.exists() and len(lines.read_text().splitlines()) >= 2 * epochs

    stopped = started(*words, f"runs_dir={broken}")
    wait_for(lambda: reached(1))
    stopped.send_signal(signal.SIGUSR1)
    said = stopped.communicate(timeout=180)[1]
    assert stopped.returncode == 75, said
    assert said == "stopped by SIGUSR1; the same command continues from the last checkpoint\n"
    assert record_of(only_run(broken))["status"] == "interrupted"
    killed = started(*words, f"runs_dir={broken}")
    wait_for(lambda: reached(4))
    os.killpg(killed.pid, signal.SIGKILL)
    killed.communicate(timeout=60)
    assert record_of(only_run(broken))["status"] == "running"
    done = train(*words[1:], f"runs_dir={broken}")
    assert "continuing from step" in done.stdout
    assert_same(ending(broken), ending(tmp_path / "unbroken"))


@pytest.mark.slow
def test_a_rank_of_a_command_dies_and_one_message_tells(tmp_path: Path) -> None:
    """Not the launcher in its words, nor the rank that is left, which is ended while it calls."""
    words = [*RUN[:-1], "schedule.epochs=50", "devices=2", f"runs_dir={tmp_path}"]
    run = started(str(ROOT / "train.py"), *words)
    wait_for(lambda: list(tmp_path.glob("*/checkpoints/last.pt")))
    commands = {pid: Path(f"/proc/{pid}/cmdline").read_bytes() for pid in descendants(run.pid)}
    os.kill(max(pid for pid, words in commands.items() if b"spawn_main" in words), signal.SIGKILL)
    said = run.communicate(timeout=180)[1]
    assert run.returncode == 69, said
    dead = f"error: rank 1 of {only_run(tmp_path).name} was ended by SIGKILL (out of memory?)"
    assert said == f"{dead}; the same command continues from the last checkpoint\n"
    assert record_of(only_run(tmp_path))["status"] == "failed"


@pytest.mark.slow
def test_torchrun_restarts_after_the_death_of_a_rank_and_the_run_resumes(
    tmp_path: Path, unbroken: Any
) -> None:
    run = started(
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node=2",
        "--max-restarts=1",
        str(ROOT / "tests" / "crash.py"),
        "step",
        "8",
        *RUN,
        "trainer.bn_group_size=32",
        f"runs_dir={tmp_path}",
        CRASH_ONCE="1",  # rank 1, in the launcher's first attempt
    )
    said, errors = run.communicate(timeout=240)
    assert run.returncode == 0, errors
    assert said.count("continuing from step 6") == 1
    record = record_of(only_run(tmp_path))
    assert record["status"] == "complete" and len(record["provenance"]["starts"]) == 2
    assert [n["step"] for n in metrics_of(only_run(tmp_path))] == [6, 6, 12, 12, 18, 18]


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
    """To rounding: the network that one process ends with differs from the unbroken run's by less
    than a hundredth of what it moved since the kill."""
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

    def distance(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
        weights = [n for n in middle if n.endswith((".weight", ".bias"))]
        apart = [(a[n] - b[n]).flatten() for n in weights]
        return float(torch.cat(apart).norm())

    assert distance(one, two) <= 0.01 * distance(one, middle)


def test_an_unfinished_run_of_another_batchnorm_group_is_mentioned(tmp_path: Path) -> None:
    words = [*SMALL, f"runs_dir={tmp_path}"]
    killed = command(
        str(ROOT / "tests" / "crash.py"), "step", "3", *words, "trainer.bn_group_size=32"
    )
    assert killed.returncode == -signal.SIGKILL
    done = train(*words)
    assert "differs from this one only in its BatchNorm group size (32, here 64)" in done.stdout

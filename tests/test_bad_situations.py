"""What goes wrong on real machines: each situation is made for real, and told in one message."""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from cutmix_exp import rundir
from cutmix_exp.distributed import World
from cutmix_exp.errors import UserError
from cutmix_exp.failures import explain, lost_rank
from cutmix_exp.files import write_json
from cutmix_exp.rundir import finished_record, run_directory
from cutmix_exp.training.checkpoint import load_checkpoint
from tests.data.trees import class_trees
from tests.forks import Fork, at_step, ends, fork_train, train_ranks
from tests.helpers import TINY, config_of, only_run, record_of

SMALL = [
    "dataset=synthetic",
    "dataset.num_classes=10",
    "dataset.train_size=130",  # three steps an epoch
    "dataset.test_size=20",
    *TINY[1:],
]
MAIN = World(0, 1, torch.device("cpu"))


def told(fork: Fork, status: int = 2) -> str:
    """The one message of a run that must fail."""
    said = ends(fork, status)
    assert said.count("error: ") == 1, said
    return said


@contextmanager
def disk(folder: Path, size: str) -> Iterator[Path]:
    """A file system of its own in memory, of that size."""
    folder.mkdir(exist_ok=True)
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "none", str(folder)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("needs the right to mount (run as root, or in a container that allows it)")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def remount(folder: Path, option: str) -> None:
    subprocess.run(["mount", "-o", f"remount,{option}", str(folder)], check=True)


def test_a_full_disk_under_a_checkpoint(tmp_path: Path) -> None:
    with disk(tmp_path / "disk", "1m") as runs:  # room for one checkpoint and a half
        words = [*SMALL, "schedule.epochs=2", f"runs_dir={runs}"]
        said = told(fork_train(*words, log=tmp_path / "log"))
        assert "No space left on device" in said and "make room" in said
        run = only_run(runs)
        assert load_checkpoint(run / "checkpoints" / "last.pt")["step"] == 3
        assert {p.name for p in (run / "checkpoints").iterdir()} == {"last.pt", "previous.pt"}
        record = record_of(run)
        assert record["status"] == "failed" and "No space left" in record["error"]
        remount(runs, "size=16m")
        assert "continuing from step 3" in ends(fork_train(*words, log=tmp_path / "log"), 0)


def test_a_file_of_a_limited_size(tmp_path: Path) -> None:
    """The same without the right to mount: the kernel's limit on the size of a file."""

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))

    said = told(fork_train(*SMALL, f"runs_dir={tmp_path}", log=tmp_path / "log", before=limit))
    assert "cannot write" in said and "File too large" in said
    assert "ulimit -f" in said and "make room" not in said
    assert not list(only_run(tmp_path).rglob("*.pt*"))


def test_a_full_disk_under_an_event_file(tmp_path: Path) -> None:
    tb = tmp_path / config_of(*SMALL).run_id / "tb"
    tb.mkdir(parents=True)
    with disk(tb, "8k"):  # not enough for the picture of the augmented images
        said = told(fork_train(*SMALL, f"runs_dir={tmp_path}", log=tmp_path / "log"))
        assert "No space left on device" in said and "make room" in said
    assert record_of(only_run(tmp_path))["status"] == "failed"


def test_a_disk_that_cannot_be_written(tmp_path: Path) -> None:
    with disk(tmp_path / "disk", "1m") as runs:
        remount(runs, "ro")
        said = told(fork_train(*SMALL, f"runs_dir={runs}", log=tmp_path / "log"))
        assert "Read-only file system" in said and "runs_dir=FOLDER" in said


def test_a_directory_of_another_run(tmp_path: Path) -> None:
    config = config_of(*SMALL, f"runs_dir={tmp_path}")
    config.run_dir.mkdir()
    record = {"schema_version": 1, "status": "complete", "cell": config.cell()}
    write_json(config.run_dir / "record.json", {**record, "run_id": config.run_id})
    assert finished_record(config) is not None
    for wrong in (
        {"run_id": "another", "cell": config.cell()},
        {"run_id": config.run_id, "cell": "x"},
    ):
        write_json(config.run_dir / "record.json", {**record, **wrong})
        with pytest.raises(UserError, match="holds another run"):
            finished_record(config)


def test_two_starts_at_once(tmp_path: Path) -> None:
    words, go = [*SMALL, f"runs_dir={tmp_path}"], tmp_path / "go"

    def wait() -> None:
        at_step(1, lambda: [time.sleep(0.01) for _ in iter(go.exists, True)])

    both = [fork_train(*words, log=tmp_path / f"log{i}", before=wait) for i in range(2)]
    until = time.monotonic() + 120
    while not any("in use" in fork.said() for fork in both):
        assert time.monotonic() < until, [fork.said() for fork in both]
        time.sleep(0.01)
    go.touch()
    loser, winner = sorted(both, key=lambda fork: "in use" not in fork.said())
    assert f"in use by process {winner.pid} on" in told(loser) and "minutes)" in loser.said()
    ends(winner, 0)


def test_a_lock_that_was_left_is_taken_over(tmp_path: Path) -> None:
    config = config_of(*SMALL, f"runs_dir={tmp_path}")
    config.run_dir.mkdir()
    lock = config.run_dir / ".lock"
    with run_directory(config, MAIN) as warnings:
        assert not warnings
        left = lock.read_text()
        assert json.loads(left)["pid"] == os.getpid()
    assert lock.read_text() == ""
    lock.write_text(left)  # as after SIGKILL: the kernel has given the lock back
    with run_directory(config, MAIN) as warnings:
        assert f"taking over from process {os.getpid()}" in warnings[0]


@pytest.mark.parametrize("alive", [True, False])
def test_a_lock_of_another_machine_is_watched(
    alive: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where a file system gives the lock to two machines, only signs of life tell."""
    monkeypatch.setattr(rundir, "BEAT", 0.2)
    config = config_of(*SMALL, f"runs_dir={tmp_path}")
    config.run_dir.mkdir()
    lock, ended = config.run_dir / ".lock", threading.Event()
    lock.write_text(json.dumps({"pid": 7, "host": "elsewhere", "since": time.time() - 600}))
    beat = threading.Thread(target=rundir._beat, args=(str(lock), ended), daemon=True)
    if alive:
        beat.start()
        with pytest.raises(UserError, match=r"process 7 on elsewhere \(for 10 minutes\)"):
            run_directory(config, MAIN).__enter__()
        ended.set()
    else:
        with run_directory(config, MAIN) as warnings:
            assert "taking over from process 7 on elsewhere" in warnings[0]


FOLDERS = [
    "dataset=image_folder",
    "dataset.workers=1",
    "dataset.image_size=16",
    "schedule=digits",
    "schedule.epochs=2",
    "schedule.batch_size=4",
    "schedule.lr=0.01",
    *TINY[1:],
]


def test_a_folder_that_vanishes_and_comes_back(tmp_path: Path) -> None:
    root = class_trees(tmp_path / "data", each=8)
    words = [*FOLDERS, f"dataset.root={root}", f"runs_dir={tmp_path / 'runs'}"]
    words += ["checkpoint.every_minutes=1e-9"]

    def vanish() -> None:
        at_step(2, lambda: root.rename(tmp_path / "gone"))

    said = told(fork_train(*words, log=tmp_path / "log", before=vanish))
    assert f"the data set's folder {root}" in said and "is gone; bring it back" in said
    (tmp_path / "gone").rename(root)
    assert "continuing from step" in ends(fork_train(*words, log=tmp_path / "log"), 0)


def test_a_signal_to_the_whole_group_spares_the_workers_that_decode(tmp_path: Path) -> None:
    """Slurm and Ctrl-C signal all processes: a worker that died of it would break the step."""
    root = class_trees(tmp_path / "data", each=8)
    words = [*FOLDERS, f"dataset.root={root}", f"runs_dir={tmp_path / 'runs'}"]
    for number, status in ((signal.SIGTERM, 75), (signal.SIGINT, 130)):

        def signal_all(number: int = number) -> None:
            at_step(2, lambda: (os.killpg(0, number), time.sleep(0.3)))

        ends(fork_train(*words, log=tmp_path / "log", before=signal_all), status)
    assert record_of(only_run(tmp_path / "runs"))["status"] == "interrupted"
    assert load_checkpoint(only_run(tmp_path / "runs") / "checkpoints" / "last.pt")["step"] == 4


def test_files_that_have_changed_since_the_run_began(tmp_path: Path) -> None:
    root = class_trees(tmp_path / "data" / "cifar-10-images", test="test", each=8)
    words = [*FOLDERS[2:], "dataset=cifar10_jpeg", "dataset.num_classes=3", f"dataset.root={root}"]
    words += ["dataset.delivery=streaming", f"runs_dir={tmp_path / 'runs'}"]

    def stop() -> None:
        at_step(2, lambda: os.kill(os.getpid(), signal.SIGTERM))

    ends(fork_train(*words, log=tmp_path / "log", before=stop), 75)
    with open(next((root / "train").rglob("*_1.JPEG")), "ab") as file:
        file.write(b"more")
    said = told(fork_train(*words, log=tmp_path / "log"))
    assert "has changed since" in said and "force=true" in said


def test_too_little_memory(tmp_path: Path) -> None:
    """Torch's own refusal, of more than an address space holds: under a limit of the process the
    libraries below it may end it where they stand."""

    def too_much() -> None:
        torch.empty(2**50, dtype=torch.uint8)

    said = told(
        fork_train(
            *SMALL,
            "schedule.batch_size=52",
            f"runs_dir={tmp_path}",
            log=tmp_path / "log",
            before=lambda: at_step(1, too_much),
        )
    )
    assert "out of memory: 52 images at once are too many" in said
    assert "trainer.accumulate=2" in said and "schedule.batch_size=26" in said
    assert "out of memory" in record_of(only_run(tmp_path))["error"]


def test_too_little_memory_of_a_gpu() -> None:
    config = config_of(*SMALL, "schedule.batch_size=64", "trainer.accumulate=4")
    error = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
    assert "trainer.accumulate=8" in str(explain(error, config, MAIN))
    other = RuntimeError("shape mismatch")
    assert explain(other, config, MAIN) is other


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_a_rank_that_dies_or_hangs_is_named(number: signal.Signals, tmp_path: Path) -> None:
    def fall(rank: int) -> None:
        if rank == 1:
            at_step(2, lambda: os.kill(os.getpid(), number))

    words = [*SMALL, f"runs_dir={tmp_path}", "trainer.timeout_minutes=0.05"]
    ranks = train_ranks(2, *words, folder=tmp_path, before=fall)
    said = told(ranks[0], 69)
    fate = {
        signal.SIGKILL: "is gone",
        signal.SIGSTOP: "does not answer within trainer.timeout_minutes=0.05",
    }[number]
    assert f"rank 1 ({os.uname().nodename}) of 2 {fate}" in said
    assert "the same command continues" in said
    if number == signal.SIGSTOP:
        os.kill(ranks[1].pid, signal.SIGKILL)
    assert ranks[1].wait() == -signal.SIGKILL
    assert record_of(only_run(tmp_path))["status"] == "failed"


class Store:
    """A launcher's store in which some ranks have answered."""

    def __init__(self, present: list[int]) -> None:
        self.keys = {f"here/{rank}" for rank in present}

    def set(self, key: str, value: str) -> None:
        self.keys.add(key)

    def check(self, keys: list[str]) -> bool:
        return self.keys.issuperset(keys)

    def get(self, key: str) -> bytes:
        return b"node" + key[-1].encode()


def test_of_several_ranks_the_first_that_is_left_tells() -> None:
    config = config_of(*SMALL)
    error = RuntimeError("[gloo/pair.cc:1] Connection closed by peer [10.0.0.1]:1. This is typical")
    tells = []
    for rank in (1, 3):
        world = World(rank, 4, torch.device("cpu"), None, Store([1, 3]))
        lost = lost_rank(error, config, world, hurry=lambda: False)
        assert "ranks 0 (node0), 2 (node2) is gone" not in str(lost)
        assert "ranks 0 (node0), 2 (node2) are gone: Connection closed by peer" in str(lost)
        tells.append(lost.local)
    assert tells == [True, False]


@pytest.mark.parametrize(
    "words",
    [
        ["dataset=../../elsewhere/mine"],
        ["+experiment=../../elsewhere/mine"],
        ["aug=[cutmix,../../elsewhere/mine]"],
        ["dataset=digits", "dataset.name=../elsewhere"],
        ["dataset=digits", "dataset.name=.."],
        ["dataset=digits", "model.name=a/b"],
    ],
)
def test_no_name_leads_out_of_its_folder(words: list[str], tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"leads out|would name a folder"):
        config_of(*words)


def test_what_a_kill_has_left_is_cleared(tmp_path: Path) -> None:
    config = config_of(*SMALL, f"runs_dir={tmp_path}")
    left = config.run_dir / "checkpoints" / ".last.pt.77.tmp"
    kept = config.run_dir / "checkpoints" / "last.pt"
    left.parent.mkdir(parents=True)
    for file in (left, kept):
        file.write_bytes(b"")
    with run_directory(config, MAIN):
        assert kept.exists() and not left.exists()
    shutil.rmtree(config.run_dir)

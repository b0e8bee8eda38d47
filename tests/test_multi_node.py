"""Two machines, made of network namespaces of this one: torchrun --nnodes=2 over their own link."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.helpers import ROOT, TINY, environment, metrics_of, only_run, record_of
from tests.test_sweeps import descendants

pytestmark = pytest.mark.slow
ADDRESSES = ("10.231.47.1", "10.231.47.2")
EPOCHS = 12
LIMIT = 240.0
RUN = [*TINY[1:], "dataset=synthetic", "dataset.num_classes=10", "dataset.train_size=128"]
RUN += ["dataset.test_size=64", "precision=fp32", "schedule.lr=0.05"]
RUN += [f"schedule.epochs={EPOCHS}", "trainer.timeout_minutes=0.3"]


def ip(*words: str, check: bool = True) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["ip", *words], capture_output=True, text=True, check=check)


@pytest.fixture(scope="module")
def hosts() -> Iterator[tuple[str, str]]:
    """The names of two network namespaces with a cable between them, and nothing else."""
    names = f"cutmix-{os.getpid()}-a", f"cutmix-{os.getpid()}-b"
    try:
        for name in names:
            ip("netns", "add", name)
        pair = [word for end in names for word in ("netns", end)]
        ip("link", "add", "cable", *pair[:2], "type", "veth", "peer", "name", "cable", *pair[2:])
        for name, address in zip(names, ADDRESSES, strict=True):
            ip("-n", name, "address", "add", f"{address}/24", "dev", "cable")
            ip("-n", name, "link", "set", "cable", "up")
            ip("-n", name, "link", "set", "lo", "up")
    except (OSError, subprocess.CalledProcessError) as error:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], capture_output=True, check=False)
        why = getattr(error, "stderr", None) or str(error)
        pytest.skip(f"network namespaces cannot be made here (needs root and iproute2): {why}")
    yield names
    for name in names:
        ip("netns", "del", name)


def start(host: str, rank: int, runs: Path) -> subprocess.Popen[str]:
    """torchrun on one host, as its user types it there."""
    there = ["ip", "netns", "exec", host, sys.executable]
    torchrun = ["-m", "torch.distributed.run", "--nnodes=2", "--nproc-per-node=1"]
    torchrun += [f"--node-rank={rank}", f"--master-addr={ADDRESSES[0]}", "--master-port=29512"]
    return subprocess.Popen(
        [*there, *torchrun, str(ROOT / "train.py"), *RUN, f"runs_dir={runs}"],
        env=environment(GLOO_SOCKET_IFNAME="cable"),
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def test_a_host_is_cut_off_and_the_same_command_resumes(
    hosts: tuple[str, str], tmp_path: Path
) -> None:
    first, second = (start(host, rank, tmp_path) for rank, host in enumerate(hosts))
    deadline = time.monotonic() + LIMIT
    while not list(tmp_path.glob("*/checkpoints/last*.pt")):
        assert time.monotonic() < deadline and first.poll() is None, first.communicate()[0]
        time.sleep(0.05)
    ip("-n", hosts[1], "link", "set", "cable", "down")
    said = first.communicate(timeout=LIMIT)[0]
    for pid in descendants(second.pid):  # its machine is switched off and on again
        os.kill(pid, signal.SIGKILL)
    second.communicate()
    assert first.returncode != 0
    told = [line for line in said.splitlines() if line.startswith("error: ")]
    assert len(told) == 1 and "rank 1" in told[0] and "does not answer" in told[0], said
    assert "the same command continues from the last checkpoint" in said
    run = only_run(tmp_path)
    assert record_of(run)["status"] == "failed"

    ip("-n", hosts[1], "link", "set", "cable", "up")
    both = [start(host, rank, tmp_path) for rank, host in enumerate(hosts)]
    outputs = [process.communicate(timeout=LIMIT)[0] for process in both]
    assert [process.returncode for process in both] == [0, 0], outputs
    assert "continuing from step" in outputs[0]
    record = record_of(run)
    assert record["status"] == "complete" and record["cost"]["world_size"] == 2
    epochs = [line["epoch"] for line in metrics_of(run) if line["split"] == "train"]
    assert epochs == list(range(1, EPOCHS + 1))

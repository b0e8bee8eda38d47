"""One variant in one process: prepares a subject, then measures it whenever it is told to.

    python -m cutmix_exp.benchmarking.worker '{"module": "ours", "name": "training", ...}'

Says `ready`, then answers each line on its input, a number of seconds, with one line of JSON.
Processes that are not asked sleep, so that variants take turns without being prepared anew.
"""

from __future__ import annotations

import importlib
import json
import os
import socket
import sys
import time
from pathlib import Path
from typing import Any


def command(module: str, name: str, cores: list[int] | None = None, **arguments: Any) -> list[str]:
    spec = {"module": module, "name": name, "cores": cores, "arguments": arguments}
    return [sys.executable, "-m", "cutmix_exp.benchmarking.worker", json.dumps(spec)]


def main(text: str) -> None:
    spec = json.loads(text)
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # whatever else is printed does not disturb the answers
    if spec["cores"] is not None:
        os.sched_setaffinity(0, spec["cores"])
    if spec["module"] == "ours":
        importlib.import_module("cutmix_exp.startup")  # as train.py does
    subject = importlib.import_module(f"cutmix_exp.benchmarking.{spec['module']}")
    if spec["cores"] is not None:
        import torch

        torch.set_num_threads(len(spec["cores"]))
    work = getattr(subject, spec["name"])(**spec["arguments"])
    work()
    answers.write("ready\n")
    for line in sys.stdin:
        answers.write(json.dumps(measure(work, float(line))) + "\n")


def measure(work: Any, seconds: float) -> dict[str, float]:
    """Images per second over at least so many seconds, and this process's peak memory."""
    images, started = 0, time.perf_counter()
    while (elapsed := time.perf_counter() - started) < seconds or not images:
        images += work()
    elapsed = time.perf_counter() - started
    return {"rate": images / elapsed, "memory": peak_memory()}


def peak_memory() -> float:
    """Bytes that this process has held in memory at most, since it began."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return 1024.0 * int(line.split()[1])
    raise RuntimeError("/proc/self/status has no VmHWM")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


if __name__ == "__main__":
    main(sys.argv[1])

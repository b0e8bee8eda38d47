"""Kill one small run again and again with SIGKILL, at random moments, and compare it with the run
that was never killed: python -m tests.soak [KILLS [SEED [RANKS]]] (`make soak`).

Each attempt is the training command in a process (with RANKS > 1: in so many) of its own, forked
from this one, which has imported torch. The moments are drawn from SEED, as a share of the time
that the unbroken run took; so they fall into the start, the steps, the evaluations and the writing of
checkpoints alike.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tests.forks import Fork, fork_train, train_ranks
from tests.helpers import metrics_of, only_run, record_of

RUN = [
    "dataset=digits",
    "dataset.val_size=200",  # leaves 20 steps an epoch
    "model=resnet",
    "model.depth=8",
    "aug=[cutmix,shakedrop]",
    "aug.mix.prob=1.0",
    "device=cpu",
    "budget=smoke",
    "schedule.epochs=4",
    "schedule.lr=0.05",
    "schedule.ema_decay=0.9",
    "trainer.bn_group_size=16",
    "checkpoint.every_minutes=0.001",
]
CLOCKED = ("wall_seconds", "phase_seconds", "images_per_second", "achieved_flops")
CLOCKED += ("peak_memory_bytes",)


def start(runs: Path, ranks: int) -> list[Fork]:
    words = [*RUN, f"runs_dir={runs}"]
    if ranks == 1:
        return [fork_train(*words, log=runs.parent / "log")]
    return train_ranks(ranks, *words, folder=runs.parent)


def where_it_stood(folder: Path) -> str:
    """What a kill has hit, by what it has left in a folder of run directories."""
    if any(folder.rglob(".*.tmp")):
        return "while a file was written"
    said = "".join(log.read_text() for log in folder.parent.glob("*log"))
    if "parameters" not in said:
        return "in the start, before there was a network"
    if not any(folder.rglob("last.pt")):
        return "in training, before the first checkpoint"
    return "in training or evaluation, after a checkpoint"


def results(run: Path) -> dict[str, Any]:
    """Everything that must be equal: digests of states, metrics, record, predictions."""
    out: dict[str, Any] = {"metrics.jsonl": metrics_of(run)}
    for name in ("last.pt", "best.pt"):
        state = torch.load(run / "checkpoints" / name, weights_only=True)
        for key in ("seconds", "lines", "digest"):
            state.pop(key, None)
        out[name] = state
    record = record_of(run)
    record.pop("provenance")
    record["config"].pop("runs_dir")
    record["cost"] = {k: v for k, v in record["cost"].items() if k not in CLOCKED}
    out["record.json"] = record
    with np.load(run / "evaluations" / "test.npz") as held:
        out["test.npz"] = {name: torch.from_numpy(held[name]) for name in held.files}
    return out


def differing(one: Any, other: Any, path: str = "") -> list[str]:
    """The places at which two nested containers differ; tensors by their bits."""
    if isinstance(one, torch.Tensor):
        return [] if torch.equal(one, other) and one.dtype == other.dtype else [path]
    if isinstance(one, dict) and isinstance(other, dict):
        if one.keys() != other.keys():
            return [f"{path} (keys)"]
        return [d for key in one for d in differing(one[key], other[key], f"{path}/{key}")]
    if isinstance(one, (list, tuple)) and len(one) == len(other):
        pairs = zip(one, other, strict=True)
        return [d for i, (a, b) in enumerate(pairs) for d in differing(a, b, f"{path}[{i}]")]
    return [] if one == other else [path]


def steps_in_tensorboard(run: Path) -> list[int]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board = EventAccumulator(str(run / "tb"), purge_orphaned_data=False)
    board.Reload()
    return [event.step for event in board.Scalars("train/loss")]


def compare(unbroken: Path, broken: Path) -> list[str]:
    """What differs between the ends of two runs."""
    different = differing(results(unbroken), results(broken))
    return different + ["tb"] * (steps_in_tensorboard(unbroken) != steps_in_tensorboard(broken))


def soak(folder: Path, kills: int, seed: int, ranks: int) -> list[str]:
    """Kill so often; returns what differs in the end. A run that was completed between two kills is
    compared too, and started over."""
    began = time.monotonic()
    assert all(process.wait(3600) == 0 for process in start(folder / "unbroken", ranks))
    whole = time.monotonic() - began
    print(f"the unbroken run took {whole:.1f} s", flush=True)
    unbroken, rng, hit = only_run(folder / "unbroken"), random.Random(seed), Counter[str]()
    broken = folder / "broken" / unbroken.name
    different, completed = list[str](), 0
    while True:
        processes = start(folder / "broken", ranks)
        if sum(hit.values()) < kills:
            time.sleep(whole * rng.random())
            for process in rng.sample(processes, len(processes)):
                os.kill(process.pid, signal.SIGKILL)
        statuses = {process.wait(3600) for process in processes}
        if -signal.SIGKILL in statuses:
            hit[where_it_stood(folder / "broken")] += 1
        elif statuses == {0}:
            different += compare(unbroken, broken)
            completed += 1
            if sum(hit.values()) == kills:
                break
            shutil.rmtree(broken)
        else:
            return [f"an attempt ended with {statuses}:\n{processes[0].said()}"]
    for moment, count in sorted(hit.items()):
        print(f"{count:3} kills {moment}")
    print(f"{completed} runs were completed and compared, in {time.monotonic() - began:.0f} s")
    print(f"kills survived: {sum(hit.values())} of {kills} (seed {seed}, ranks: {ranks})")
    return different


def main() -> int:
    given = [int(word) for word in sys.argv[1:]]
    kills, seed, ranks = given + [50, 0, 1][len(given) :]
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        different = soak(Path(name), kills, seed, ranks)
    print("verdict: " + ("different: " + "; ".join(different[:10]) if different else "identical"))
    return 1 if different else 0


if __name__ == "__main__":
    sys.exit(main())

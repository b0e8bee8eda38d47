"""Kill one small run again and again with SIGKILL, at random moments, and compare it with the run
that was never killed: python tests/soak.py [KILLS [SEED [RANKS]]] (`make soak`).

Each attempt is the training command in a process (with RANKS > 1: in so many) of its own, forked
from this one, which has imported torch. The moments are drawn from SEED, as a share of the time
that an attempt took that was not killed; so they fall into the start, the steps, the evaluations and
the writing of checkpoints alike. An attempt that ends before its kill starts the run over.
"""

from __future__ import annotations

import json
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
    "dataset=synthetic",
    "dataset.num_classes=10",
    "dataset.image_size=16",
    "dataset.train_size=400",
    "dataset.val_size=50",  # leaves six steps an epoch
    "dataset.test_size=100",
    "model=resnet",
    "model.depth=8",
    "aug=[cutmix,shakedrop]",
    "aug.mix.prob=1.0",
    "device=cpu",
    "budget=smoke",
    "schedule.epochs=3",
    "schedule.lr=0.05",
    "schedule.ema_decay=0.9",
    "trainer.bn_group_size=16",
    "checkpoint.every_minutes=0.002",
]
CLOCKED = ("wall_seconds", "images_per_second", "peak_memory_bytes")


def start(runs: Path, ranks: int) -> list[Fork]:
    words = [*RUN, f"runs_dir={runs}"]
    if ranks == 1:
        return [fork_train(*words, log=runs.parent / "log")]
    return train_ranks(ranks, *words, folder=runs.parent)


def where_it_stood(run: Path) -> str:
    """What a kill has hit, by what it has left."""
    if not (run / "record.json").exists():
        return "before the record was begun"
    if any(run.rglob(".*.tmp")):
        return "while a file was written"
    if not (run / "checkpoints" / "last.pt").exists():
        return "before the first checkpoint"
    return "in training, evaluation or between"


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


def soak(folder: Path, kills: int, seed: int, ranks: int) -> tuple[int, Counter[str], list[str]]:
    """Kills survived, what they hit, and what differs in the end."""
    began = time.monotonic()
    assert all(process.wait(3600) == 0 for process in start(folder / "unbroken", ranks))
    whole = time.monotonic() - began
    unbroken = only_run(folder / "unbroken")
    broken = folder / "broken" / unbroken.name
    rng, hit, starts_over = random.Random(seed), Counter[str](), 0
    done = 0
    while done < kills:
        processes = start(folder / "broken", ranks)
        time.sleep(whole * rng.random() * 0.6)
        for process in rng.sample(processes, len(processes)):
            os.kill(process.pid, signal.SIGKILL)
        statuses = {process.wait(60) for process in processes}
        if -signal.SIGKILL in statuses:
            done += 1
            hit[where_it_stood(broken)] += 1
            print(f"kill {done}: {where_it_stood(broken)}", flush=True)
        elif statuses != {0}:
            return done, hit, [f"an attempt ended with {statuses}:\n{processes[0].said()}"]
        if (
            json.loads(
                (broken / "record.json").read_text() if (broken / "record.json").exists() else "{}"
            ).get("status")
            == "complete"
        ):
            starts_over += 1
            if done < kills:
                shutil.rmtree(broken)
    for process in start(folder / "broken", ranks):
        if (status := process.wait(3600)) != 0:
            return done, hit, [f"the last attempt ended with {status}:\n{process.said()}"]
    different = differing(results(unbroken), results(broken))
    if steps_in_tensorboard(unbroken) != steps_in_tensorboard(broken):
        different.append("tb")
    starts = len(record_of(broken)["provenance"].get("starts", [1]))
    print(f"the run was complete {starts_over + 1} times; the last one took {starts} starts")
    return done, hit, different


def main() -> int:
    kills, seed, ranks = ([int(word) for word in sys.argv[1:]] + [50, 0, 1][len(sys.argv) - 1 :])[
        :3
    ]
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        done, hit, different = soak(Path(name), kills, seed, ranks)
    for moment, count in sorted(hit.items()):
        print(f"{count:3} kills {moment}")
    verdict = "identical" if not different else "different: " + "; ".join(different[:10])
    print(f"kills survived: {done} of {kills} (seed {seed}, {ranks} ranks); verdict: {verdict}")
    return 1 if different or done < kills else 0


if __name__ == "__main__":
    sys.exit(main())

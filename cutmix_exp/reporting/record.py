"""record.json: what a run was, on what, and what came out. Tables are made from records alone."""

from __future__ import annotations

import json
import platform
import resource
import shlex
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import nn

from cutmix_exp.config import Config
from cutmix_exp.errors import UserError
from cutmix_exp.reporting.flops import BACKWARD, forward_flops
from cutmix_exp.training.logging import Line
from cutmix_exp.training.trainer import best_epoch

SCHEMA_VERSION = 1
PACKAGES = ("torch", "torchvision", "timm", "numpy", "scikit-learn", "hydra-core", "omegaconf")
REPOSITORY = Path(__file__).resolve().parent.parent.parent

Record = dict[str, Any]


def new_record(config: Config) -> Record:
    """A record of a run that has just begun."""
    return {
        "schema_version": SCHEMA_VERSION,
        "run_id": config.run_id,
        "cell": config.cell(),
        "status": "running",
        "seed": config.seed,
        "dataset": config.dataset.name,
        "model": config.model.name,
        "aug": config.aug.name,
        "budget": config.budget_name,
        "protocol": {
            **config.aug.protocol(),
            "precision": config.precision,
            "bn_group_size": config.bn_group_size,
            "bn_synchronised": config.trainer.sync_bn,
            "deterministic": config.trainer.deterministic,
            "partner_scope": "global batch" if config.pairing_shares == 1 else "rank",
            "selection": "last epoch; best is the best epoch on the test set (the paper's rule); "
            "val_selected is the best epoch on held-out training images, where there are any",
        },
        "metrics": {},
        "history": {},
        "evaluations": {},
        "cost": {},
        "provenance": provenance(),
        "config": config.to_dict(),
    }


def read_record(path: Path) -> Record:
    """Raises UserError if the file is no record of this schema."""
    try:
        record = json.loads(path.read_text())
        version = record["schema_version"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is not a record: {error}") from None
    if version != SCHEMA_VERSION:
        raise UserError(f"{path} has schema_version {version}; this version reads {SCHEMA_VERSION}")
    return dict(record)


def metrics_of(lines: list[Line]) -> dict[str, float]:
    """The final metrics from the lines of metrics.jsonl.

    `last` is of the last epoch, `best` of the epoch that is best on the test set (top-5 of that
    same epoch), `val_selected` of the epoch that is best on the validation split. All are of the
    moving average where the recipe has one; `raw` is then of the trained network.
    """
    by_split = {s: [n for n in lines if n["split"] == s] for s in ("train", "val", "test")}
    tests = {line["epoch"]: line for line in by_split["test"]}
    chosen = {"last": max(tests), "best": best_epoch(lines, "test")}
    if by_split["val"]:
        chosen["val_selected"] = best_epoch(lines, "val")
    out: dict[str, float] = {}
    for name in ("top1_error", "top5_error"):
        for rule, epoch in chosen.items():
            out[f"test/{name}_{rule}"] = tests[epoch][name]
    for name in ("loss", "raw_top1_error", "raw_top5_error"):
        if name in tests[chosen["last"]]:
            out[f"test/{name}_last"] = tests[chosen["last"]][name]
    out["test/best_epoch"] = chosen["best"]
    last_train = by_split["train"][-1]
    for name in ("loss", "top1_error", "clean_loss", "clean_top1_error"):
        if name in last_train:
            out[f"train/{name}_last"] = last_train[name]
    return out


def history_of(lines: list[Line]) -> dict[str, list[float]]:
    """Curves by epoch, for figures: a committed record has no metrics.jsonl beside it."""
    out: dict[str, list[float]] = {}
    for line in lines:
        for name in ("loss", "top1_error", "top5_error", "clean_top1_error", "raw_top1_error"):
            if name in line:
                out.setdefault(f"{line['split']}/{name}", []).append(round(line[name], 6))
    return out


def cost_of(
    config: Config,
    network: nn.Module,
    lines: list[Line],
    seconds: float,
    phases: dict[str, float],
) -> dict[str, Any]:
    """What the run cost: time (`phase_seconds` of the last start), speed, memory (on a CPU the
    process's peak), arithmetic; `flops_per_image` is that of the forward pass in training,
    `achieved_flops` that of the training steps in a second, on all devices together."""
    trains = [line for line in lines if line["split"] == "train"]
    speeds = sorted(line["images_per_second"] for line in trains if line["images_per_second"])
    if config.device == "cuda":
        peak = torch.cuda.max_memory_allocated()
    else:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    speed = round(speeds[len(speeds) // 2], 2) if speeds else 0.0
    flops = forward_flops(network, config.dataset.image_size, config.dataset.num_classes)
    return {
        "wall_seconds": round(seconds, 3),
        "phase_seconds": {name: round(spent, 3) for name, spent in phases.items()},
        "images_per_second": speed,
        "peak_memory_bytes": int(peak),
        "device": device_name(config.device),
        "threads": torch.get_num_threads(),
        "world_size": config.world_size,
        "flops_per_image": flops,
        "achieved_flops": round(speed * flops * (1 + BACKWARD)),
        "parameters": sum(p.numel() for p in network.parameters()),
    }


def external_record(name: str, config: Config) -> Record:
    """The record of a network from elsewhere: how it was trained is not known here."""
    return {
        "schema_version": SCHEMA_VERSION,
        "run_id": name,
        "status": "external",
        "dataset": config.dataset.name,
        "model": config.model.name,
        "cost": {},
        "evaluations": {},
        "provenance": provenance(),
        "config": portable_config(config.to_dict()),
    }


def device_name(device: str) -> str:
    return torch.cuda.get_device_name() if device == "cuda" else cpu_name()


def cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def continue_record(record: Record, before: Record) -> None:
    """Note in a run's record that it was begun by an earlier start, of which `before` was left."""
    earlier = before["provenance"].get("starts") or [before["provenance"]]
    record["provenance"]["starts"] = [*earlier, {**record["provenance"]}]
    record["provenance"]["dirty"] = any(start["dirty"] for start in record["provenance"]["starts"])
    if "warnings" in before["provenance"]:
        record["provenance"]["warnings"] = list(before["provenance"]["warnings"])


def provenance() -> dict[str, Any]:
    """Where a number comes from: code, packages, command (of the last start; see `starts`)."""
    commit, changes = (
        _git("rev-parse", "HEAD"),
        _git("status", "--porcelain", "--", ".", ":!results"),
    )
    return {
        "git_commit": commit,
        "dirty": None if changes is None else bool(changes),
        "packages": {name: _version(name) for name in PACKAGES},
        "python": platform.python_version(),
        "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
    }


def _git(*arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", "-C", str(REPOSITORY), *arguments], capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def portable(record: Record) -> Record:
    """A copy of a record to be committed: without the places of one machine."""
    provenance = _placeless(record["provenance"])
    if "starts" in provenance:
        provenance["starts"] = [_placeless(start) for start in provenance["starts"]]
    return {**record, "config": portable_config(record["config"]), "provenance": provenance}


def portable_config(config: dict[str, Any]) -> dict[str, Any]:
    """A resolved config without the places of one machine."""
    dataset = {**config["dataset"], "root": "data"}
    if "cache_dir" in dataset:
        dataset["cache_dir"] = None
    model = (
        {**config["model"], "weights": None} if "weights" in config["model"] else config["model"]
    )
    return {**config, "runs_dir": "runs", "dataset": dataset, "model": model}


def _placeless(provenance: dict[str, Any]) -> dict[str, Any]:
    words = shlex.split(provenance["command"])
    places = ("runs_dir=", "dataset.root=", "dataset.cache_dir=")
    kept = [w for w in words if not w.startswith(places)]
    return {**provenance, "command": shlex.join(kept)}

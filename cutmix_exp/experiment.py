"""One run: find or make its directory, build its parts, train, and leave a record."""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
import yaml

from cutmix_exp.config import Config
from cutmix_exp.distributed import World, world_of
from cutmix_exp.errors import UserError
from cutmix_exp.files import write_atomically, write_json, write_text
from cutmix_exp.models.base import count_parameters
from cutmix_exp.reporting.record import (
    Record,
    continue_record,
    cost_of,
    history_of,
    metrics_of,
    new_record,
    read_record,
)
from cutmix_exp.training.logging import NoLog, Reporter, RunLog
from cutmix_exp.training.trainer import Trainer


def run(config: Config) -> Record:
    """Carry out a resolved config in this process (one of `devices`); returns the record.

    A finished run is left as it is, an unfinished one continues from its last checkpoint.

    Raises:
        UserError: missing data, a run directory that another process works in, a loss that is
            not finite, ...
    """
    with world_of(config.device) as world:
        report = Reporter(active=world.is_main)
        done = world.broadcast(finished_record(config) if world.is_main else None)
        if done is not None:
            report.say(f"{config.run_id} is complete, nothing is trained; force=true starts over")
            report.say(summary(done))
            return done
        world.together(config.dataset.prepare)  # before anything is written
        world.together(config.model.prepare)
        with ExitStack() as held:
            world.together(lambda: held.enter_context(run_directory(config, world)))
            return train(config, world, report)


def train(config: Config, world: World, report: Reporter) -> Record:
    """Train to the end, or leave a record that says why not."""
    record = new_record(config)
    before = left_behind(config)
    if before is not None:
        continue_record(record, before)
    for line in notes(config):
        report.say(line)
    if world.is_main:
        write_json(config.run_dir / "record.json", record)
        write_text(
            config.run_dir / "config.yaml", yaml.safe_dump(config.to_dict(), sort_keys=False)
        )
        (config.run_dir / "evaluations").mkdir(exist_ok=True)
    status, cause = "failed", ""
    try:
        splits = world.together(config.dataset.load)
        record["provenance"]["dataset_fingerprint"] = splits.fingerprint
        record["provenance"]["images_skipped"] = splits.skipped
        if config.device == "cuda":
            torch.cuda.reset_peak_memory_stats()  # of an earlier run in this process
        trainer = Trainer(config, splits, world, report)
        sizes = {"training": splits.train, "validation": splits.val, "test": splits.test}
        report.say(
            f"{config.dataset.name}: "
            + ", ".join(f"{len(part):,} {name} images" for name, part in sizes.items() if part)
        )
        report.say(f"{config.model.name}: {count_parameters(trainer.model):,} parameters")
        if trainer.resume():
            report.say(f"continuing from step {trainer.step}")
        log = RunLog(config.run_dir, config, trainer.lines) if world.is_main else NoLog()
        predictions = trainer.fit(log)
        record["metrics"] = metrics_of(trainer.lines)
        record["history"] = history_of(trainer.lines)
        record["cost"] = cost_of(config, trainer.model, trainer.lines, trainer.seconds)
        if world.is_main:
            file = config.run_dir / "evaluations" / "test.npz"
            write_atomically(file, lambda f: np.savez_compressed(f, **asdict(predictions)))
        log.close(record["metrics"])
        status = "complete"
    except KeyboardInterrupt:
        status = "interrupted"
        raise
    except Exception as error:
        cause = f"{type(error).__name__}: {error}"
        raise
    finally:
        record["status"] = status
        if cause:
            record["error"] = cause
        if world.is_main:
            write_json(config.run_dir / "record.json", record)
    report.say(summary(record))
    return record


def summary(record: Record) -> str:
    """The end of a run in a line."""
    metrics = record["metrics"]
    return (
        f"{record['run_id']}: test error last {metrics['test/top1_error_last']:.2f} %, "
        f"best {metrics['test/top1_error_best']:.2f} % (epoch {metrics['test/best_epoch']:.0f}, "
        "chosen on the test set)"
    )


def left_behind(config: Config) -> Record | None:
    """The record of an earlier start of this run that left a checkpoint, if it can be read."""
    if not (config.run_dir / "checkpoints" / "last.pt").exists():
        return None
    try:
        return read_record(config.run_dir / "record.json")
    except UserError:
        return None


def finished_record(config: Config) -> Record | None:
    """The record of this run if it is complete and not to be started over."""
    file = config.run_dir / "record.json"
    if config.force or not file.exists():
        return None
    record = read_record(file)
    return record if record["status"] == "complete" else None


@contextmanager
def run_directory(config: Config, world: World) -> Iterator[None]:
    """Make the run directory and hold it against other processes; empties it under `force`.

    Raises:
        UserError: it cannot be written, or another process works in it.
    """
    if not world.is_main:
        yield
        return
    directory = config.run_dir
    try:
        directory.mkdir(parents=True, exist_ok=True)
        lock = open(directory / ".lock", "a+")  # noqa: SIM115 (held until the run ends)
    except OSError as error:
        raise UserError(
            f"cannot write into {directory}: {error.strerror}; set runs_dir=FOLDER"
        ) from None
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            lock.seek(0)
            owner = lock.read().strip() or "another process"
            raise UserError(
                f"{directory} is in use by {owner}; wait for it, or use another runs_dir"
            ) from None
        lock.truncate(0)
        lock.write(f"process {os.getpid()}")
        lock.flush()
        if config.force:
            for path in directory.iterdir():
                if path.name != ".lock":
                    shutil.rmtree(path) if path.is_dir() else path.unlink()
        yield


def notes(config: Config) -> Iterator[str]:
    """What the user should know of unfinished runs like this one."""
    pattern = f"{config.dataset.name}-{config.model.name}-{config.aug.name}-*-s{config.seed}"
    for other in sorted(Path(config.runs_dir).glob(f"{pattern}/record.json")):
        try:
            record = read_record(other)
        except UserError as error:
            yield f"note: {error}"
            continue
        if record["status"] == "complete" or record["run_id"] == config.run_id:
            continue
        theirs = record["protocol"]
        same = record["cell"] == config.cell() and theirs["precision"] == config.precision
        if same and theirs["bn_group_size"] != config.bn_group_size:
            yield (
                f"note: the unfinished run {record['run_id']} differs from this one only in its "
                f"BatchNorm group size ({theirs['bn_group_size']}, here {config.bn_group_size}); "
                f"trainer.bn_group_size={theirs['bn_group_size']} would continue it"
            )

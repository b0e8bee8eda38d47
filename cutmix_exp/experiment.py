"""One run: find or make its directory, build its parts, train, and leave a record."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
import yaml

from cutmix_exp.config import Config
from cutmix_exp.distributed import World, world_of
from cutmix_exp.errors import Interrupted, UserError
from cutmix_exp.failures import explain
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
from cutmix_exp.rundir import finished_record, run_directory
from cutmix_exp.stopping import Stop
from cutmix_exp.training.checkpoint import has_checkpoint
from cutmix_exp.training.logging import NoLog, Reporter, RunLog
from cutmix_exp.training.trainer import Trainer


def run(config: Config) -> Record:
    """Carry out a resolved config in this process (one of `devices`); returns the record.

    A finished run is left as it is, an unfinished one continues from its last checkpoint.

    Raises:
        UserError: missing data, a run directory that another process works in, a loss that is
            not finite, a full disk, another rank that is gone, ...
        Interrupted: a signal has asked the run to stop.
    """
    stop = Stop()
    with world_of(config.device, config.trainer.timeout_minutes) as world, stop.listening():
        report = Reporter(active=world.is_main)
        try:
            done = world.broadcast(
                world.together(lambda: finished_record(config) if world.is_main else None)
            )
            if done is not None:
                report.say(
                    f"{config.run_id} is complete, nothing is trained; force=true starts over"
                )
                report.say(summary(done))
                return done
            world.together(config.dataset.prepare)  # before anything is written
            world.together(config.model.prepare)
            with ExitStack() as held:
                found = world.together(lambda: held.enter_context(run_directory(config, world)))
                return train(config, world, report, stop, found)
        except Exception as error:
            known = explain(error, config, world, stop.asked)
            if known is error:
                raise
            raise known from error


def train(
    config: Config, world: World, report: Reporter, stop: Stop, warnings: list[str]
) -> Record:
    """Train to the end, or leave a record that says why not. `warnings` are of what was found."""
    record = new_record(config)
    before = left_behind(config)
    if before is not None:
        continue_record(record, before)
    for line in [*notes(config), *warnings]:
        report.say(line)
    if world.is_main:
        write_json(config.run_dir / "record.json", record)
        write_text(
            config.run_dir / "config.yaml", yaml.safe_dump(config.to_dict(), sort_keys=False)
        )
        (config.run_dir / "evaluations").mkdir(exist_ok=True)
    status, cause = "failed", ""
    try:
        trainer = prepared(config, world, report, record)
        if world.is_main:  # with what was found, should this start be killed
            write_json(config.run_dir / "record.json", record)
        with stop.deferred():
            trainer.asked_to_stop = stop.asked
            carry_out(trainer, record)
        status = "complete"
    except (KeyboardInterrupt, Interrupted):
        status = "interrupted"
        raise
    except Exception as error:
        known = explain(error, config, world, stop.asked)
        cause = f"{type(known).__name__}: {known}"
        if known is error:
            raise
        raise known from error
    finally:
        record["status"] = status
        if cause:
            record["error"] = cause
        if world.is_main:
            leave(record, config, report)
    report.say(summary(record))
    return record


def prepared(config: Config, world: World, report: Reporter, record: Record) -> Trainer:
    """The trainer with its data, at the place where the run stands; notes in the record what it
    has found."""
    splits = world.together(config.dataset.load)
    record["provenance"]["dataset_fingerprint"] = splits.fingerprint
    record["provenance"]["images_skipped"] = splits.skipped
    check_same_data(world.gather(splits.fingerprint))
    if config.device == "cuda":
        torch.cuda.reset_peak_memory_stats()  # of an earlier run in this process
    trainer = Trainer(config, splits, world, report)
    sizes = {"training": splits.train, "validation": splits.val, "test": splits.test}
    report.say(
        f"{config.dataset.name}: "
        + ", ".join(f"{len(part):,} {name} images" for name, part in sizes.items() if part)
    )
    report.say(f"{config.model.name}: {count_parameters(trainer.model):,} parameters")
    resumed = trainer.resume()
    if trainer.warning:
        report.say(f"warning: {trainer.warning}")
        record["provenance"].setdefault("warnings", []).append(trainer.warning)
    if resumed:
        report.say(f"continuing from step {trainer.step}")
    return trainer


def check_same_data(fingerprints: list[str]) -> None:
    """Raises UserError if the ranks (of several machines) have loaded different files."""
    differing = [rank for rank, mine in enumerate(fingerprints) if mine != fingerprints[0]]
    if differing:
        raise UserError(
            f"rank {differing[0]} has another data set than rank 0 (fingerprints "
            f"{fingerprints[differing[0]]} and {fingerprints[0]}); give all machines the same files"
        )


def carry_out(trainer: Trainer, record: Record) -> None:
    """Train to the end and put what came out into the record and beside it."""
    config, world = trainer.config, trainer.world
    log = RunLog(config.run_dir, config, trainer.lines) if world.is_main else NoLog()
    predictions = trainer.fit(log)
    record["metrics"] = metrics_of(trainer.lines)
    record["history"] = history_of(trainer.lines)
    record["cost"] = cost_of(config, trainer.model, trainer.lines, trainer.seconds, trainer.phases)
    if world.is_main:
        file = config.run_dir / "evaluations" / "test.npz"
        write_atomically(file, lambda f: np.savez_compressed(f, **asdict(predictions)))
    log.close(record["metrics"])


def leave(record: Record, config: Config, report: Reporter) -> None:
    """Write the record. Where even that fails, the error that is on its way matters more."""
    try:
        write_json(config.run_dir / "record.json", record)
    except OSError as error:
        if record["status"] == "complete":
            raise
        report.say(f"warning: the record cannot be written either: {error.strerror}")


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
    if not has_checkpoint(config.run_dir / "checkpoints"):
        return None
    try:
        return read_record(config.run_dir / "record.json")
    except UserError:
        return None


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

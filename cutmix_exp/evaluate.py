"""Examine a trained network by suites, and keep what they find in its record."""

from __future__ import annotations

import fcntl
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from cutmix_exp import schema
from cutmix_exp.distributed import world_of
from cutmix_exp.errors import LocalError, UserError
from cutmix_exp.evaluation.base import Findings, Subject, Suite
from cutmix_exp.files import write_atomically, write_bytes, write_json
from cutmix_exp.reporting.card import write_card
from cutmix_exp.reporting.examined import examined
from cutmix_exp.reporting.record import (
    Record,
    device_name,
    external_record,
    portable,
    provenance,
    read_record,
)
from cutmix_exp.subject import Origin, open_subject
from cutmix_exp.training.logging import Reporter

Entry = dict[str, Any]


@dataclass(frozen=True)
class Place:
    """Where the findings of a subject are kept.

    Attributes:
        weights: which network of the run they are of; those of another than the last have names of
            their own, so that tables and cards do not take them for the last one's.
        record: the file that gets them.
        copies: records of the same run elsewhere (committed ones), which get them too.
        evaluations: the folder of per-image columns and pictures.
    """

    weights: str
    record: Path
    copies: tuple[Path, ...]
    evaluations: Path

    def key(self, suite: Suite) -> str:
        """The name of a suite's findings: `fgsm`, `fgsm@best`."""
        return suite.name if self.weights == "last" else f"{suite.name}@{self.weights}"


def evaluate(
    origin: Origin,
    suites: list[Suite],
    results: Path,
    *,
    force: bool,
    demanded: bool,
    card: bool = False,
) -> Record:
    """Run suites on one network; returns its record. On each of the processes that share the work.

    What the record has already, of the same checkpoint, suite, precision and version, is not run
    again unless `force`.

    Args:
        results: the folder whose `records` hold committed records.
        demanded: whether a suite that cannot be run is an error; else it is told and left out.
        card: whether to write a report card below `results`.

    Raises:
        UserError: the network or its data cannot be had, a demanded suite cannot be run.
    """
    with world_of(origin.config.device) as world:
        report = Reporter(active=world.is_main)
        subject = open_subject(origin, world, report.say, report.batches)
        report.say(f"{subject.name}: checkpoint {subject.checkpoint}, {origin.config.precision}")
        place = place_of(origin, subject, results)
        if world.is_main and not place.record.exists():
            write_json(place.record, external_record(subject.name, subject.config))
        world.barrier()
        left_out = {}
        for suite in [part for listed in suites for part in listed.parts()]:
            name = place.key(suite)
            known = world.broadcast(read_record(place.record)["evaluations"].get(name))
            if known and not force and is_of(known, subject, suite):
                report.say(f"{name}: in the record already; force=true runs it again")
                report.say(summary(known))
                continue
            reason = suite.lacks(subject)
            if reason and demanded:
                raise UserError(reason)
            if not reason:
                report.say(f"{name}: running")
                try:
                    report.say(summary(examine(subject, suite, place)))
                except UserError as error:
                    # What one rank alone has met leaves the others in the middle of the suite.
                    if demanded or (isinstance(error, LocalError) and world.size > 1):
                        raise
                    reason = str(error)
            if reason:
                left_out[name] = reason
                report.say(f"{name}: left out: {reason}")
        if world.is_main:
            keep_left_out(place, left_out)
        record = read_record(place.record)
        if card and world.is_main:
            page = write_card(examined(record, place.evaluations), results / "cards")
            report.say(str(page))
        return record


def place_of(origin: Origin, subject: Subject, results: Path) -> Place:
    """A run's findings go to its own record (and its committed copy, where there is one), those of a
    checkpoint from elsewhere to a record of its own among the committed ones."""
    committed = results / "records" / f"{subject.name}.json"
    if origin.run_dir is None:
        folder = Path(origin.config.runs_dir) / subject.name / "evaluations"
        return Place(origin.weights, committed, (), folder)
    own = read_record(origin.run_dir / "record.json")["metrics"]
    same = committed.exists() and read_record(committed)["metrics"] == own
    if committed.exists() and not same:
        subject.say(f"{committed} is of another training of this run and stays as it is")
    copies = (committed,) if same else ()
    return Place(
        origin.weights, origin.run_dir / "record.json", copies, origin.run_dir / "evaluations"
    )


def is_of(entry: Entry, subject: Subject, suite: Suite) -> bool:
    """Whether an entry is what the suite would find again."""
    return (
        entry["checkpoint"] == subject.checkpoint
        and suite.gave(entry)
        and entry["precision"] == subject.config.precision
    )


def examine(subject: Subject, suite: Suite, place: Place) -> Entry:
    """Run one suite and keep what it finds."""
    started = time.monotonic()
    found = suite.run(subject)
    entry = entry_of(subject, suite, found, time.monotonic() - started)
    if subject.world.is_main:
        keep(place, place.key(suite), found, entry)
    subject.world.barrier()
    return entry


def entry_of(subject: Subject, suite: Suite, found: Findings, seconds: float) -> Entry:
    """What stands in a record below `evaluations`."""
    config, code = subject.config, provenance()
    return {
        "checkpoint": subject.checkpoint,
        "suite": schema.identity_of(suite),
        "version": suite.version,
        "precision": config.precision,
        "metrics": found.metrics,
        "curves": found.curves,
        "protocol": found.protocol,
        "skipped": found.skipped,
        "cost": {
            "wall_seconds": round(seconds, 3),
            "device": device_name(config.device),
            "world_size": subject.world.size,
        },
        "git_commit": code["git_commit"],
        "dirty": code["dirty"],
    }


def keep(place: Place, name: str, found: Findings, entry: Entry) -> None:
    """Write columns and pictures, then the record: what it names is there."""
    if found.per_image:
        columns: dict[str, Any] = found.per_image
        file = place.evaluations / f"{name}.npz"
        write_atomically(file, lambda out: np.savez_compressed(out, **columns))
    for picture, content in found.pictures.items():
        write_bytes(place.evaluations / f"{name}-{picture}.png", content)
    with held(place):
        record = read_record(place.record)
        record["evaluations"][name] = entry
        write_json(place.record, record)
        for copy in place.copies:
            write_json(copy, portable(record))


def keep_left_out(place: Place, left_out: dict[str, str]) -> None:
    """Note the suites that could not be run, by the first line of the reason."""
    if not left_out:
        return
    with held(place):
        record = read_record(place.record)
        record["evaluations_left_out"] = {n: r.splitlines()[0] for n, r in left_out.items()}
        write_json(place.record, record)


@contextmanager
def held(place: Place) -> Iterator[None]:
    """Hold a record against other evaluations while it is read and written again."""
    place.evaluations.mkdir(parents=True, exist_ok=True)
    with open(place.evaluations / ".lock", "a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
    # The lock stays where it is: who removed it could remove another's.


def summary(entry: Entry) -> str:
    """The metrics of an entry, a line each."""
    lines = [f"    {name}: {value:.4g}" for name, value in entry["metrics"].items()]
    lines += [
        f"    {name}: skipped: {why.splitlines()[0]}" for name, why in entry["skipped"].items()
    ]
    return "\n".join(lines)

"""Which network is to be examined: a run of ours, a checkpoint from anywhere, published weights."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from cutmix_exp import schema
from cutmix_exp.composition import compose
from cutmix_exp.config import Config, from_dict, resolve
from cutmix_exp.distributed import World
from cutmix_exp.errors import UserError
from cutmix_exp.evaluation.base import Count, Subject
from cutmix_exp.evaluation.foreign import digest, load_into, read_state
from cutmix_exp.reporting.record import Record, read_record
from cutmix_exp.training.trainer import make_model, set_determinism

LIBRARIES = ("timm", "torchvision")
OF_A_RUN = (
    "device",
    "devices",
    "precision",
    "dataset.root",
    "dataset.boxes_dir",
    "dataset.cache_dir",
    "dataset.workers",
)
"""What can be set when a run is examined; all else is the run's."""


@dataclass(frozen=True)
class Origin:
    """Where a network is from.

    Attributes:
        config: resolved.
        file: its tensors; None: the model's own published weights.
        run_dir: of a run of ours.
    """

    config: Config
    file: Path | None
    run_dir: Path | None

    @property
    def record(self) -> Record | None:
        return read_record(self.run_dir / "record.json") if self.run_dir else None

    @property
    def weights(self) -> str:
        """Which network of a run: `last`, `best` or the name of another checkpoint; `last` elsewhere."""
        return self.file.stem if self.run_dir and self.file else "last"


def find(where: str, runs_dir: Path, weights: str, overrides: list[str]) -> Origin:
    """The origin that `run=WHERE` names.

    Args:
        where: a run_id below `runs_dir`, a run's directory, a checkpoint file, or
            `timm:ARCHITECTURE`, `torchvision:ARCHITECTURE`.
        weights: of a run: `last` or `best` (by its validation split).
        overrides: as on train.py's command line.

    Raises:
        UserError: there is no such thing, the run is not finished, an override does not fit.
    """
    elsewhere = [*overrides, f"runs_dir={runs_dir}"]
    library, _, architecture = where.partition(":")
    if library in LIBRARIES and architecture:
        words = [f"model={library}", f"model.architecture={architecture}", "model.pretrained=true"]
        return Origin(resolve(from_dict(compose([*words, *elsewhere]))), None, None)
    path = Path(where)
    for folder in (runs_dir / where, path):
        if (folder / "record.json").is_file():
            return _of_run(folder, weights, overrides)
    if path.is_file():
        folder = path.resolve().parent.parent
        if path.parent.name == "checkpoints" and (folder / "record.json").is_file():
            return replace(_of_run(folder, weights, overrides), file=path)
        return Origin(resolve(from_dict(compose(elsewhere))), path, None)
    near = sorted(p.parent.name for p in runs_dir.glob("*/record.json"))
    listed = "\n".join(f"  {name}" for name in near[:20]) or "  (none)"
    raise UserError(
        f"run={where}: there is no run of this name in {runs_dir}, and no such file\n"
        "allowed: a run_id, a run's directory, a checkpoint file, timm:NAME, torchvision:NAME\n"
        f"runs in {runs_dir} (runs_dir=FOLDER names another):\n{listed}"
    )


def _of_run(folder: Path, weights: str, overrides: list[str]) -> Origin:
    record = read_record(folder / "record.json")
    if record["status"] != "complete":
        raise UserError(
            f"the run {record['run_id']} is not complete (its record says {record['status']}); "
            "continue it by its own command first"
        )
    if weights not in ("last", "best"):
        raise UserError(f"weights={weights} is not allowed; choose one of last, best")
    file = folder / "checkpoints" / f"{weights}.pt"
    if not file.exists():
        hint = "; best.pt needs dataset.val_size above 0" if weights == "best" else ""
        raise UserError(f"there is no checkpoint {file}{hint}")
    plain = record["config"]
    # The machine is this one, not that of the training.
    plain |= {"device": "auto", "devices": None, "runs_dir": str(folder.parent)}
    for name, value in _fields(overrides).items():
        group, _, field = name.rpartition(".")
        (plain[group] if group else plain)[field] = value
    if "weights" in plain["model"]:  # the checkpoint has them, the file need not be here any more
        plain["model"]["weights"] = None
    plain["trainer"] |= {"bn_group_size": None, "sync_bn": False, "accumulate": 1}
    return Origin(resolve(from_dict(plain)), file, folder)


def _fields(overrides: list[str]) -> dict[str, Any]:
    out = {}
    for word in overrides:
        name, _, value = word.partition("=")
        if name not in OF_A_RUN:
            raise UserError(
                f"{word}: a run is examined as it was trained; what can be set is "
                f"{', '.join(OF_A_RUN)}, and the suite's fields as suite.FIELD=VALUE"
            )
        out[name] = yaml.safe_load(value)
    return out


def open_subject(
    origin: Origin,
    world: World,
    say: Callable[[str], None] = print,
    count: Count = range,
) -> Subject:
    """Load network and data.

    Raises:
        UserError: missing data, data that is not what the run was trained on, tensors that do not
            fit.
    """
    config = origin.config
    set_determinism(config.trainer.deterministic)
    world.together(config.dataset.prepare)
    network = make_model(config, blank=origin.file is not None)
    if origin.file is not None:
        load_into(network, read_state(origin.file), str(origin.file))
    network = network.to(memory_format=config.model.memory_format)
    network.to(world.device).eval().requires_grad_(False)
    splits = world.together(config.dataset.load)
    record, found = origin.record, splits.fingerprint
    if record is not None and record["provenance"].get("dataset_fingerprint") not in (None, found):
        raise UserError(
            f"the data in {config.dataset.root} is not what {record['run_id']} was trained on: its "
            f"fingerprint is {found}, the record has {record['provenance']['dataset_fingerprint']}; "
            "name the right folder by dataset.root=FOLDER"
        )
    checkpoint = digest(network)
    name = record["run_id"] if record else outside_name(config, checkpoint)
    return Subject(name, checkpoint, network, config, splits, world, say, count)


def outside_name(config: Config, checkpoint: str) -> str:
    """`external-<data set>-<model>-<sha8>` of a network from elsewhere. The digest is of its tensors
    and of what else its numbers depend on: normalisation, size of the images, ..."""
    plain = re.sub(r"[^A-Za-z0-9_.-]", "_", f"{config.dataset.name}-{config.model.name}")
    known = [checkpoint, schema.identity_of(config.dataset), schema.identity_of(config.model)]
    digest_of_all = hashlib.sha256(json.dumps(known, sort_keys=True).encode()).hexdigest()
    return f"external-{plain}-{digest_of_all[:8]}"

"""The configuration: one typed, frozen tree. Behind this file there is no OmegaConf.

`composition.compose` (Hydra's groups to a dictionary) -> `build` (names, types, ranges) ->
`resolve` (what depends on image size, budget and hardware). A resolved config says everything about
a run, and its `run_id` follows from it alone: no clock, so every rank and every repetition agrees on
it.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch

from cutmix_exp import schema
from cutmix_exp.aug.base import NoMix, Regularizer
from cutmix_exp.data.sources import Dataset
from cutmix_exp.distributed import launched_world
from cutmix_exp.errors import UserError
from cutmix_exp.models.base import Model
from cutmix_exp.schema import option

Precision = Literal["fp32", "bf16", "fp16"]
DTYPES: dict[str, torch.dtype] = {
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
}


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """The recipe: optimizer, learning rate, loss and what goes with them. The fields below `gamma`
    stand at the paper's recipe unless a YAML says otherwise.

    Attributes:
        full_epochs: the length of the published recipe.
        epochs: what is trained; None is the budget's share of `full_epochs`.
        batch_size: global: of all devices together.
        lr: the highest rate.
        head_lr: that of the head instead, in proportion to `lr` throughout; None is `lr`. The head is
            what the network names in `new_layers` (VGG-16-GAP), else its last linear layer.
        momentum: of SGD; the first beta of LAMB and AdamW (the second is 0.999).
        nesterov: of SGD.
        weight_decay: added to the gradient by SGD, to the update by LAMB, decoupled in AdamW.
        milestones: of the policy `step`: shares of the training after which the rate is multiplied
            by `gamma`.
        optimizer: LAMB is timm's, but clips nothing by itself: set `clip_norm`, 1.0 as elsewhere.
        policy: `step`, or `cosine` from `lr` down to `min_lr`.
        updates: whether the rate changes once an epoch or at every optimizer step.
        warmup_epochs, warmup_lr: length of a linear rise from `warmup_lr` to `lr`.
        cosine_from: whether the cosine begins at the end of the warm-up (torch, torchvision), or at
            the start of the training, its first part replaced by the warm-up (timm's default).
        no_decay: parameters without weight decay: `norm` is those of normalisation layers
            (torchvision), `norm_and_bias` all with fewer than two dimensions (timm).
        clip_norm: gradients are scaled down to this total norm; None leaves them alone.
        ema_decay: share that the exponential moving average of weights and BatchNorm statistics
            keeps at each of its updates; the average is what is evaluated. None: no average.
        ema_every: optimizer steps from one update of the average to the next; the first step is one.
        loss: `bce` is the mean of K binary cross-entropies, with the mixed labels as targets.
        bce_target_threshold: targets above it become 1, the others 0; None leaves them.
        repeated_augmentation: how often an image comes in its batch, each time augmented anew; an
            epoch has as many steps as ever, and so that much fewer images.
    """

    name: str = option(identity=False)
    full_epochs: int = option(ge=1, identity=False)
    epochs: int | None = option(None, ge=1)
    batch_size: int = option(64, ge=1)
    lr: float = option(gt=0)
    head_lr: float | None = option(None, gt=0, neutral=None)
    momentum: float = option(0.9, ge=0, lt=1)
    nesterov: bool = True
    weight_decay: float = option(1e-4, ge=0)
    milestones: tuple[float, ...] = option((0.5, 0.75), ge=0, le=1)
    gamma: float = option(0.1, gt=0, le=1)
    optimizer: Literal["sgd", "lamb", "adamw"] = option("sgd", neutral="sgd")
    policy: Literal["step", "cosine"] = option("step", neutral="step")
    updates: Literal["epoch", "step"] = option("epoch", neutral="epoch")
    warmup_epochs: float = option(0.0, ge=0, neutral=0.0)
    warmup_lr: float = option(0.0, ge=0, neutral=0.0)
    min_lr: float = option(0.0, ge=0, neutral=0.0)
    cosine_from: Literal["warmup_end", "start"] = option("warmup_end", neutral="warmup_end")
    no_decay: Literal["none", "norm", "norm_and_bias"] = option("none", neutral="none")
    clip_norm: float | None = option(None, gt=0, neutral=None)
    ema_decay: float | None = option(None, ge=0, lt=1, neutral=None)
    ema_every: int = option(1, ge=1, neutral=1)
    loss: Literal["cross_entropy", "bce"] = option("cross_entropy", neutral="cross_entropy")
    bce_target_threshold: float | None = option(None, ge=0, lt=1, neutral=None)
    repeated_augmentation: int = option(1, ge=1, neutral=1)

    def __post_init__(self) -> None:
        if self.optimizer == "sgd" and self.nesterov and not self.momentum:
            raise UserError("schedule.nesterov=true needs schedule.momentum above 0")
        self._check_rates()
        if self.ema_decay is None and self.ema_every != 1:
            raise UserError(
                f"schedule.ema_every={self.ema_every} is of an average that is not kept; "
                "set schedule.ema_decay as well"
            )
        if self.loss != "bce" and self.bce_target_threshold is not None:
            raise UserError(
                f"schedule.bce_target_threshold={self.bce_target_threshold:g} needs schedule.loss=bce "
                f"(it is {self.loss})"
            )
        if self.repeated_augmentation > self.batch_size:
            raise UserError(
                f"schedule.repeated_augmentation={self.repeated_augmentation} does not fit into "
                f"schedule.batch_size={self.batch_size}"
            )

    def _check_rates(self) -> None:
        if self.policy != "cosine" and (self.min_lr or self.cosine_from != "warmup_end"):
            raise UserError(
                "schedule.min_lr and schedule.cosine_from are of the cosine; set "
                "schedule.policy=cosine, or leave them out"
            )
        for name, rate in (("min_lr", self.min_lr), ("warmup_lr", self.warmup_lr)):
            if rate > self.lr:
                raise UserError(f"schedule.{name}={rate:g} is above schedule.lr={self.lr:g}")
        if self.warmup_lr and not self.warmup_epochs:
            raise UserError(
                f"schedule.warmup_lr={self.warmup_lr:g} needs schedule.warmup_epochs above 0"
            )
        if self.warmup_epochs and not self.warmup_lr and self.updates == "epoch":
            raise UserError(
                "a warm-up from rate 0 would train the first epoch for nothing; set "
                "schedule.warmup_lr above 0, or schedule.updates=step"
            )
        if self.epochs is not None and self.warmup_epochs >= self.epochs:
            raise UserError(
                f"schedule.warmup_epochs={self.warmup_epochs:g} leaves nothing of the training, which "
                f"has {self.epochs} epochs; use fewer (0 and schedule.warmup_lr=0 for none), or train "
                "longer (budget, schedule.epochs)"
            )

    def resolve(self, epochs: int) -> Schedule:
        """With the number of epochs, and without what is of another optimizer or policy: the same
        training has one identity, and a record names nothing that was not used."""
        used = replace(self, epochs=epochs)
        if self.optimizer != "sgd":
            used = replace(used, nesterov=False)
        if self.policy != "step":
            used = replace(used, milestones=(), gamma=1.0)
        return used


@dataclass(frozen=True, kw_only=True)
class Budget:
    """How much of a recipe is trained: a number of epochs, never a time, equal for all methods.

    Attributes:
        fraction: of the schedule's `full_epochs`, where `epochs` does not name the data set.
        epochs: number of epochs by `dataset` or `dataset/model`.
    """

    name: str
    fraction: float = option(1.0, gt=0, le=1)
    epochs: dict[str, int] = option(factory=dict, ge=1)

    def epochs_for(self, dataset: str, model: str, full_epochs: int) -> int:
        for key in (f"{dataset}/{model}", dataset):
            if key in self.epochs:
                return self.epochs[key]
        return max(1, round(self.fraction * full_epochs))


@dataclass(frozen=True, kw_only=True)
class Trainer:
    """How the training is carried out.

    Attributes:
        max_steps: stop after so many optimizer steps; None trains all epochs.
        accumulate: number of micro-batches whose gradients make one update.
        bn_group_size: images that share BatchNorm statistics; None is what one device sees at
            once. The authors' CIFAR runs had 32 (batch 64 on two GPUs under DataParallel).
        sync_bn: BatchNorm statistics over all devices (GPUs only).
        deterministic: the same bits from the same command on the same hardware.
        compile: torch.compile the network; None is on GPUs, for trainings of ten epochs or more,
            which earn its time back. On CPUs it has gained little or lost (docs/performance.md).
        compile_mode: torch.compile's; `reduce-overhead` replays CUDA graphs, for networks whose
            many small kernels a GPU finishes faster than they are launched.
        timeout_minutes: how long the processes of a run wait for one of them before they end.
    """

    max_steps: int | None = option(None, ge=1)
    accumulate: int = option(1, ge=1, identity=False)
    bn_group_size: int | None = option(None, ge=1)
    sync_bn: bool = False
    deterministic: bool = True
    compile: bool | None = option(None, identity=False)
    compile_mode: Literal["default", "reduce-overhead"] = option("default", identity=False)
    timeout_minutes: float = option(30.0, gt=0, identity=False)


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """When checkpoints are written; always at the end of the training.

    Attributes:
        every_epochs: after so many epochs.
        every_minutes: and within an epoch, after so many minutes.
    """

    every_epochs: int = option(1, ge=1)
    every_minutes: float = option(10.0, gt=0)


@dataclass(frozen=True, kw_only=True)
class Logging:
    """What is logged.

    Attributes:
        grid: number of augmented training images in TensorBoard's picture.
    """

    grid: int = option(16, ge=0)


@dataclass(frozen=True, kw_only=True)
class Config:
    """A whole run. Top-level fields are the contract of docs/design.md.

    Attributes:
        seed: of everything random.
        devices: processes on this machine, one device each; None is 1, or torchrun's number.
        device: `auto` is cuda where there is a GPU.
        precision: `auto` is bf16 where the hardware has it, else fp32.
        runs_dir: where run directories are made.
        force: start over, even if the run is there already.
        profile: leave a torch.profiler trace of some steps in the run directory.
    """

    seed: int = option(0, ge=0)
    devices: int | None = option(None, ge=1, identity=False)
    device: Literal["auto", "cpu", "cuda"] = option("auto", identity=False)
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    runs_dir: str = option("runs", identity=False)
    force: bool = option(False, identity=False)
    profile: bool = option(False, identity=False)
    dataset: Dataset
    model: Model
    aug: Regularizer = field(default_factory=Regularizer)
    schedule: Schedule
    budget: Budget = option(identity=False)
    trainer: Trainer = field(default_factory=Trainer)
    checkpoint: Checkpoint = option(factory=Checkpoint, identity=False)
    logging: Logging = option(factory=Logging, identity=False)

    def __post_init__(self) -> None:
        for name in (self.dataset.name, self.model.name, *self.aug.atoms):
            if not re.fullmatch(r"[A-Za-z0-9_.]*[A-Za-z0-9_]", name):
                raise UserError(
                    f"the name {name!r} would name a folder; letters, digits, '_' and '.' are allowed"
                )

    # What follows holds for resolved configs.

    @property
    def world_size(self) -> int:
        assert self.devices is not None, "resolve() comes first"
        return self.devices

    @property
    def epochs(self) -> int:
        assert self.schedule.epochs is not None, "resolve() comes first"
        return self.schedule.epochs

    @property
    def dtype(self) -> torch.dtype:
        return DTYPES[self.precision]

    @property
    def bn_groups(self) -> int:
        """Number of groups that a full global batch falls into for BatchNorm."""
        if self.trainer.bn_group_size is not None:
            return self.schedule.batch_size // self.trainer.bn_group_size
        return self.trainer.accumulate * (1 if self.trainer.sync_bn else self.world_size)

    @property
    def bn_group_size(self) -> int:
        """Images that share BatchNorm statistics (rounded up where shares differ by one)."""
        return self.trainer.bn_group_size or -(-self.schedule.batch_size // self.bn_groups)

    @property
    def pairing_shares(self) -> int:
        """In how many parts a batch falls for the pairing: images that stream are paired by the
        rank that has decoded them, features within one forward pass."""
        if self.aug.mix.mixes_features:
            return self.world_size * self.trainer.accumulate
        mixes = not isinstance(self.aug.mix, NoMix)
        return self.world_size if self.dataset.streams and mixes else 1

    def identity(self) -> dict[str, Any]:
        """Everything that can move a number, the seed apart."""
        known: dict[str, Any] = schema.identity_of(self)
        known.pop("seed")
        known["trainer"].pop("sync_bn")
        known["trainer"]["bn_group_size"] = self.bn_group_size
        if self.schedule.batch_size % self.bn_groups:
            known["trainer"]["bn_groups"] = self.bn_groups  # the size is rounded: it is not enough
        if self.pairing_shares > 1:
            known["pairing_shares"] = self.pairing_shares
        if not self.dataset.val_size:
            known["dataset"].pop("val_seed")
        return known

    def cell(self) -> str:
        """Hash of the identity without precision and BatchNorm group size: a table's row finds
        its records by it and prints those two as caveats."""
        known = self.identity()
        known.pop("precision")
        known["trainer"].pop("bn_group_size")
        known["trainer"].pop("bn_groups", None)
        known.pop("pairing_shares", None)
        return _hash(known)

    @property
    def budget_name(self) -> str:
        """The budget that gives this number of epochs, or `custom` where the user chose it."""
        full, budget = self.schedule.full_epochs, self.budget
        expected = budget.epochs_for(self.dataset.name, self.model.name, full)
        return budget.name if self.epochs == expected else "custom"

    @property
    def run_id(self) -> str:
        parts = (self.dataset.name, self.model.name, self.aug.name, _hash(self.identity()))
        return f"{'-'.join(parts)}-s{self.seed}"

    @property
    def run_dir(self) -> Path:
        return Path(self.runs_dir) / self.run_id

    def to_dict(self) -> dict[str, Any]:
        plain: dict[str, Any] = schema.to_dict(self)
        return plain


def _hash(value: Any) -> str:
    text = json.dumps(value, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def from_dict(data: Any) -> Config:
    """A config from plain containers, checked but not resolved. Raises UserError."""
    return schema.build(Config, data)


@dataclass(frozen=True)
class Hardware:
    """What a config is resolved against; tests and dry runs make their own.

    Attributes:
        gpus: CUDA devices of this machine.
        gpu_bf16, cpu_bf16: whether they multiply bf16 in hardware.
        launched, launched_here: processes that a launcher has started, in all and on this machine.
    """

    gpus: int = 0
    gpu_bf16: bool = False
    cpu_bf16: bool = False
    launched: int | None = None
    launched_here: int = 1

    @classmethod
    def here(cls) -> Hardware:
        gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
        launched = launched_world()
        return cls(
            gpus=gpus,
            gpu_bf16=bool(gpus) and torch.cuda.is_bf16_supported(including_emulation=False),
            cpu_bf16=cpu_has_bf16(),
            launched=launched,
            launched_here=int(os.environ.get("LOCAL_WORLD_SIZE", launched or 1)),
        )

    def has_bf16(self, device: str) -> bool:
        return self.gpu_bf16 if device == "cuda" else self.cpu_bf16


def cpu_has_bf16() -> bool:
    """Whether this CPU multiplies bf16 matrices in hardware."""
    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


def resolve(config: Config, hardware: Hardware | None = None) -> Config:
    """Fill in every field that follows from others, and check what only shows then.

    Raises:
        UserError: the machine lacks the device or precision, the batch cannot be dealt to the
            devices, the model does not fit the images, ...
    """
    hardware = hardware or Hardware.here()
    dataset, schedule = config.dataset.resolve(), config.schedule
    model = config.model.resolve(dataset.image_size)
    if (expected := model.normalization()) is not None:  # of pretrained weights
        dataset = replace(dataset, mean=expected[0], std=expected[1])
    epochs = schedule.epochs or config.budget.epochs_for(
        dataset.name, model.name, schedule.full_epochs
    )
    device = _device(config, hardware)
    resolved = replace(
        config,
        device=device,
        devices=_devices(config, device, hardware),
        precision=_precision(config, device, hardware),
        dataset=dataset,
        model=model,
        aug=config.aug.resolve(dataset.image_size),
        schedule=schedule.resolve(epochs),
        trainer=_compiled(config.trainer, device, epochs),
    )
    _check_batch(resolved)
    return resolved


def _device(config: Config, hardware: Hardware) -> Literal["cpu", "cuda"]:
    if config.device == "cuda" and not hardware.gpus:
        raise UserError(
            "device=cuda, but this machine has no CUDA GPU; use device=cpu or device=auto"
        )
    if config.device == "auto":
        return "cuda" if hardware.gpus else "cpu"
    return config.device


COMPILE_FROM = 10
"""Epochs from which a training on a GPU is compiled by itself."""


def _compiled(trainer: Trainer, device: str, epochs: int) -> Trainer:
    if trainer.compile is not None:
        return trainer
    long = epochs >= COMPILE_FROM and trainer.max_steps is None
    return replace(trainer, compile=device == "cuda" and long)


def _devices(config: Config, device: str, hardware: Hardware) -> int:
    devices = config.devices or hardware.launched or 1
    if hardware.launched is not None and devices != hardware.launched:
        raise UserError(
            f"devices={devices}, but torchrun started {hardware.launched} processes; "
            "leave devices out under torchrun"
        )
    here = devices if hardware.launched is None else hardware.launched_here
    if device == "cuda" and here > hardware.gpus:
        raise UserError(
            f"{here} processes were asked for on this machine, which has {hardware.gpus} GPUs; "
            "use fewer, or device=cpu"
        )
    return devices


def _precision(config: Config, device: str, hardware: Hardware) -> Precision:
    if config.precision == "auto":
        return "bf16" if hardware.has_bf16(device) else "fp32"
    if config.precision == "bf16" and not hardware.has_bf16(device):
        raise UserError(
            f"precision=bf16, but this {device} has no bf16 arithmetic; use precision=fp32"
        )
    if config.precision == "fp16" and device == "cpu":
        raise UserError("precision=fp16 needs a GPU; use precision=bf16 or precision=fp32")
    return config.precision


def _check_batch(config: Config) -> None:
    batch, trainer = config.schedule.batch_size, config.trainer
    parts = config.world_size * trainer.accumulate
    if batch < parts:
        raise UserError(
            f"schedule.batch_size={batch} is smaller than the {config.world_size} devices x "
            f"{trainer.accumulate} accumulated micro-batches; use at least {parts}, or fewer devices"
        )
    if trainer.sync_bn and config.device == "cpu" and config.world_size > 1:
        raise UserError(
            "trainer.sync_bn=true needs GPUs; on CPUs use fixed groups: trainer.bn_group_size=N"
        )
    if trainer.sync_bn and trainer.accumulate > 1:
        raise UserError(
            "trainer.sync_bn=true and trainer.accumulate exclude each other: a small last batch gives "
            "the devices different numbers of micro-batches; use trainer.bn_group_size=N"
        )
    if trainer.bn_group_size is not None:
        if trainer.sync_bn:
            raise UserError("trainer.bn_group_size and trainer.sync_bn=true exclude each other")
        size = trainer.bn_group_size
        if batch % size or (batch // size) % parts:
            allowed = [batch // n for n in range(parts, batch + 1, parts) if batch % n == 0]
            raise UserError(
                f"trainer.bn_group_size={size}: a batch of {batch} on {config.world_size} devices x "
                f"{trainer.accumulate} micro-batches must fall into whole groups on each; "
                f"allowed: {', '.join(map(str, allowed)) or 'none, change the batch size'}"
            )

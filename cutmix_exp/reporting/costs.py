"""What a run will cost: from the speed of runs that are done, else from arithmetic."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from cutmix_exp import schema
from cutmix_exp.config import Config, from_dict
from cutmix_exp.models.base import Model
from cutmix_exp.reporting.flops import BACKWARD, forward_flops
from cutmix_exp.reporting.record import Record


@dataclass(frozen=True)
class Cost:
    """Device-hours of a run's training (without scoring the test set), and where they are from."""

    hours: float | None
    basis: str

    @property
    def amount(self) -> str:
        return "cost unknown" if self.hours is None else f"about {duration(self.hours)}"

    def __str__(self) -> str:
        return self.amount if self.hours is None else f"{self.amount}, {self.basis}"


def duration(hours: float) -> str:
    """For people: `25 s`, `12 min`, `5.7 h`, `2,750 h`."""
    if hours < 90 / 3600:
        return f"{3600 * hours:.0f} s"
    if hours < 1.5:
        return f"{60 * hours:.0f} min"
    if hours < 100:
        return f"{hours:.1f} h" if hours < 10 else f"{hours:.0f} h"
    return f"{float(f'{hours:.3g}'):,.0f} h"


def estimate(config: Config, records: list[Record], tflops: float) -> Cost:
    """The cost of a resolved config.

    Args:
        records: the speeds of those of the same image size and model are used, if there are any
            of the same data set: the highest per device, which is named.
        tflops: where there are none, 10^12 operations per second that a device is assumed to
            sustain.
    """
    images = config.dataset.train_images
    if images is None:
        return Cost(None, "the number of training images is unknown")
    seen = (images - config.dataset.val_size) * config.epochs
    measured = [r for r in records if r["cost"].get("images_per_second") and _alike(r, config)]
    measured = [r for r in measured if r["dataset"] == config.dataset.name] or measured
    if measured:
        best = max(measured, key=_speed)
        basis = f"as measured on {best['cost']['device']} in {best['protocol']['precision']}"
        if best["dataset"] != config.dataset.name:
            basis += f" with {best['dataset']}"
        return Cost(seen / _speed(best) / 3600, basis)
    flops = _flops(config.model, config.dataset.num_classes, config.dataset.image_size)
    hours = seen * (1 + BACKWARD) * flops / (tflops * 1e12) / 3600
    return Cost(hours, f"assuming {tflops:g} TFLOP/s sustained{_meaning(tflops)}")


CAUTIOUS = 20.0
"""TFLOP/s that the arithmetic of a training step is assumed to reach where nothing was measured."""


def _meaning(tflops: float) -> str:
    """What the assumption stands for, in words."""
    if tflops != CAUTIOUS:
        return ""
    return " (cautious for one A100 or H100 in eager bf16; tflops=N for another device)"


def _speed(record: Record) -> float:
    """Training images per second and device."""
    return float(record["cost"]["images_per_second"] / record["cost"]["world_size"])


def _alike(record: Record, config: Config) -> bool:
    if record["model"] != config.model.name:
        return False
    other = from_dict(record["config"])
    same_size = other.dataset.image_size == config.dataset.image_size
    return same_size and schema.identity_of(other.model) == schema.identity_of(config.model)


_COUNTED: dict[str, int] = {}


def _flops(model: Model, num_classes: int, image_size: int) -> int:
    """Counted once for each network: a table has many rows with one. Published weights, which need a
    download, change no shape."""
    if getattr(model, "pretrained", False):
        model = replace(model, pretrained=False)  # type: ignore[call-arg]
    key = repr((model, num_classes, image_size))
    if key not in _COUNTED:
        with torch.device("meta"):
            _COUNTED[key] = forward_flops(model.build(num_classes), image_size, num_classes)
    return _COUNTED[key]

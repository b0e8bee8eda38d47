"""Cost estimates against a calculation by hand."""

from __future__ import annotations

import pytest

from cutmix_exp.reporting.costs import estimate
from tests.helpers import config_of
from tests.reporting.test_tables import record

RESNET20 = ["dataset=cifar10", "model=resnet", "model.depth=20"]


def with_speed(overrides: list[str], speed: float, world_size: int = 1) -> dict:  # type: ignore[type-arg]
    made = record(overrides, 0, 10.0)
    made["cost"] = {"images_per_second": speed, "device": f"D{speed:g}", "world_size": world_size}
    return made


def test_measured_speeds_come_first() -> None:
    config = config_of(*RESNET20, "aug=cutmix", "schedule.epochs=36")
    records = [
        with_speed([*RESNET20, "aug=mixup"], 500.0),
        with_speed([*RESNET20, "aug=cutout"], 900.0, world_size=2),  # 450 on each device
        with_speed(["dataset=cifar10", "model=resnet", "model.depth=56"], 5000.0),
        with_speed(["dataset=cifar100", "model=resnet", "model.depth=20"], 5000.0),
    ]
    found = estimate(config, records, tflops=1.0)
    assert found.hours == pytest.approx(50_000 * 36 / 500 / 3600)  # 1 hour
    assert "D500 in bf16" in found.basis


def test_else_arithmetic_with_a_stated_assumption() -> None:
    config = config_of(*RESNET20, "schedule.epochs=36", "dataset.val_size=5000")
    found = estimate(config, [], tflops=2.0)
    # A convolution of ResNet-20 is 2 * 9 * C_in * C_out * H * W operations: 0.0816 GFLOP in all.
    flops = 81_626_368
    assert found.hours == pytest.approx(45_000 * 36 * 3 * flops / 2e12 / 3600, rel=0.01)
    assert "assuming 2 sustained TFLOP/s" in found.basis


def test_unknown_is_said() -> None:
    found = estimate(config_of("dataset=synthetic", "model=resnet"), [], tflops=1.0)
    assert found.hours is None and str(found) == "cost unknown"

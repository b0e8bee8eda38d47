"""Cost estimates against a calculation by hand."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from cutmix_exp.composition import CONFIG_DIR
from cutmix_exp.data.sources import Dataset, Synthetic
from cutmix_exp.reporting.costs import duration, estimate
from cutmix_exp.schema import build
from tests.data.trees import class_trees
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
    assert found.basis.endswith("D500 in bf16")
    found = estimate(config, records[3:], tflops=1.0)  # of the same network on images of this size
    assert found.hours == pytest.approx(50_000 * 36 / 5000 / 3600)
    assert found.basis.endswith("D5000 in bf16 with cifar100")
    assert "assuming" in estimate(config, records[2:3], tflops=1.0).basis  # another network


def test_else_arithmetic_with_a_stated_assumption() -> None:
    config = config_of(*RESNET20, "schedule.epochs=36", "dataset.val_size=5000")
    found = estimate(config, [], tflops=2.0)
    # A convolution of ResNet-20 is 2 * 9 * C_in * C_out * H * W operations: 0.0816 GFLOP in all.
    flops = 81_626_368
    assert found.hours == pytest.approx(45_000 * 36 * 3 * flops / 2e12 / 3600, rel=0.01)
    assert found.basis == "assuming 2 TFLOP/s sustained"
    basis = estimate(config, [], tflops=20.0).basis
    assert "assuming 20 TFLOP/s sustained (cautious for one A100 or H100 in eager bf16" in basis


def test_published_weights_are_not_needed_for_an_estimate(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    for name in ("http_proxy", "https_proxy", "HTTPS_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")  # refuses every connection
    found = estimate(config_of("experiment=wsol_cub_vgg16"), [], tflops=20.0)
    assert found.hours is not None and found.hours > 0


def test_unknown_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Synthetic, "train_images", None)
    found = estimate(config_of("dataset=synthetic", "model=resnet"), [], tflops=1.0)
    assert found.hours is None and str(found) == "cost unknown"


@pytest.mark.parametrize("name", sorted(p.stem for p in (CONFIG_DIR / "dataset").glob("*.yaml")))
def test_every_data_set_knows_its_number_of_training_images(name: str, tmp_path: Path) -> None:
    plain = yaml.safe_load((CONFIG_DIR / "dataset" / f"{name}.yaml").read_text())
    dataset = build(Dataset, {**plain, "root": str(tmp_path)})
    if name == "image_folder":  # anybody's
        assert dataset.train_images is None
        class_trees(tmp_path, each=2)  # of three classes
        assert dataset.train_images == 6
        return
    assert dataset.train_images
    if not dataset.published or not dataset.missing():  # it is here: made, or part of a package
        assert len(dataset.read()[0]) == dataset.train_images


@pytest.mark.parametrize(
    ("hours", "said"),
    [(0.007, "25 s"), (0.2, "12 min"), (5.65, "5.7 h"), (39.2, "39 h"), (2754.0, "2,750 h")],
)
def test_durations_are_for_people(hours: float, said: str) -> None:
    assert duration(hours) == said

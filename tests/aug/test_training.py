"""Every atom of configs/aug trains: two families of networks, 50 steps on the digits; and the
methods of the paper's Table 5 as whole runs."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.stats import linregress

from cutmix_exp import experiment
from cutmix_exp.aug.base import NoMix
from cutmix_exp.composition import CONFIG_DIR
from cutmix_exp.data.sources import Splits
from cutmix_exp.distributed import World
from cutmix_exp.reporting.tables import load_table
from cutmix_exp.training.logging import Reporter
from cutmix_exp.training.trainer import Trainer
from tests.helpers import config_of

ATOMS = sorted(
    p.stem for p in CONFIG_DIR.glob("aug/*.yaml") if len(config_of(f"aug={p.stem}").aug.atoms) < 2
)
MODELS = {
    "resnet": ["model=resnet", "model.depth=8"],
    "pyramidnet": ["model=pyramidnet", "model.depth=11", "model.alpha=12"],
}
DIGITS = ["dataset=digits", "dataset.image_size=8", "dataset.crop_padding=1", "device=cpu"]
SMALL = [*DIGITS, "budget=smoke", "precision=fp32", "schedule.batch_size=32"]
STEPS = 50


@pytest.fixture(scope="module")
def splits() -> Splits:
    return config_of(*DIGITS, "model=resnet").dataset.load()


@pytest.mark.slow
@pytest.mark.parametrize("method", ATOMS)
@pytest.mark.parametrize("model", MODELS)
def test_training_with_it_lowers_the_loss(model: str, method: str, splits: Splits) -> None:
    """The loss against the mixed labels, with whatever the method does to images and network."""
    config = config_of(*SMALL, *MODELS[model], f"aug={method}")
    t = Trainer(config, splits, World(0, 1, torch.device("cpu")), Reporter(active=False))
    t.network.train()
    start = [p.detach().clone() for p in t.model.parameters()]
    for group in t.optimizer.param_groups:
        group["lr"] = 0.1
    sums = [0.0]
    for step in range(STEPS):
        t.key_noise(step, step / STEPS)
        epoch, within = divmod(step, t.pipeline.steps_per_epoch)
        t.train_step(t.pipeline.plan(epoch, within, step / STEPS))
        sums.append(float(t.sums.values[0]))
        if step == 1:
            assert all(
                not torch.equal(a, b) for a, b in zip(start, t.model.parameters(), strict=True)
            )
    losses = np.diff(sums) / 32
    assert np.isfinite(losses).all()
    trend = linregress(np.arange(STEPS), losses)
    assert trend.slope < 0 and trend.pvalue < 0.01
    # Mixed labels leave a loss that no network can go below.
    share = 0.9 if isinstance(config.aug.mix, NoMix) else 0.95
    assert np.median(losses[-10:]) < share * losses[:5].mean()


TABLE = load_table("cifar100_pyramidnet200")
ROWS = {row.label: row.overrides for row in TABLE.rows}


@pytest.mark.slow
@pytest.mark.parametrize("label", ROWS)
def test_a_run_of_each_method_of_table_5(label: str, tmp_path: Path) -> None:
    """budget=smoke on digits, with a small network of the table's family: the run leaves a whole
    record under the row's method and switches."""
    words = [*DIGITS, "budget=smoke", "precision=fp32", *MODELS["pyramidnet"], *ROWS[label]]
    config = replace(config_of(*words), runs_dir=str(tmp_path))
    record = experiment.run(config)
    assert (record["status"], record["aug"]) == ("complete", config.aug.name)
    assert record["run_id"] == config.run_id and (tmp_path / config.run_id / "record.json").exists()
    assert record["protocol"].items() >= config.aug.protocol().items()
    assert len(record["history"]["test/top1_error"]) == config.epochs == 2
    assert (
        0 <= record["metrics"]["test/top1_error_best"] <= record["metrics"]["test/top1_error_last"]
    )


def test_the_rows_of_table_5_are_different_methods() -> None:
    assert len(ROWS) == 15
    assert (
        len({config_of(*SMALL, *MODELS["pyramidnet"], *words).run_id for words in ROWS.values()})
        == 15
    )

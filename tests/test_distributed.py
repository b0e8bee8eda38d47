"""Two real gloo processes against one, and torchrun against devices=N."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from cutmix_exp.distributed import World, world_of
from cutmix_exp.training.ema import make_average
from cutmix_exp.training.logging import Reporter
from cutmix_exp.training.optim import make_optimizer
from cutmix_exp.training.trainer import Trainer, make_model
from tests.forks import ends, fork_ranks
from tests.helpers import ROOT, TINY, config_of, environment, metrics_of, only_run, record_of, train

pytestmark = pytest.mark.slow


def torchrun(
    *words: str, processes: int = 2, timeout: float = 240
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={processes}", *words],
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=timeout,
    )


def test_devices_and_torchrun_are_the_same_run(tmp_path: Path) -> None:
    words = [*TINY, "aug=cutmix"]
    train(*words, "devices=2", f"runs_dir={tmp_path / 'launched'}")
    done = torchrun("train.py", *words, f"runs_dir={tmp_path / 'torchrun'}")
    assert done.returncode == 0, done.stderr
    one, two = only_run(tmp_path / "launched"), only_run(tmp_path / "torchrun")
    assert one.name == two.name
    assert metrics_of(one) == metrics_of(two)
    assert record_of(one)["metrics"] == record_of(two)["metrics"]
    for run in (one, two):
        assert record_of(run)["cost"]["world_size"] == 2
        assert record_of(run)["protocol"]["bn_group_size"] == 32
        held = np.load(run / "evaluations" / "test.npz")
        assert np.bincount(held["label"]).tolist() == [36, 36, 35, 37, 36, 37, 36, 36, 35, 36]
    assert done.stdout.count("epoch 1/2") == 1  # one process speaks


def in_double(trainer: Trainer, world: World) -> None:
    """Float64, so that a comparison is not about how ReLUs amplify the rounding of fp32."""
    trainer.model.double()
    batch = trainer.pipeline.batch

    def doubled(plan: Any, positions: np.ndarray) -> Any:
        made = batch(plan, positions)
        return replace(made, images=made.images.double())

    trainer.pipeline.batch = doubled  # type: ignore[method-assign]
    trainer.average = make_average(trainer.config.schedule, trainer.model)
    trainer.network = world.wrap(trainer.model, sync_bn=False)
    trainer.optimizer = make_optimizer(trainer.config.schedule, trainer.model)


def take_steps(steps: int, file: Path, words: list[str]) -> None:
    """What a rank does: predictions of the initial network, then `steps` steps of training."""
    with world_of("cpu", 5) as world:
        torch.set_num_threads(1)
        config = config_of(*words)
        trainer = Trainer(config, config.dataset.load(), world, Reporter(False))
        predictions = asdict(trainer.predict(trainer.test))
        trainer.network.train()
        in_double(trainer, world)
        losses, total = [], trainer.pipeline.steps_per_epoch
        for step in range(steps):
            trainer.train_step(trainer.pipeline.plan(step // total, step % total))
            ranks = world.gather(trainer.sums.values.tolist())
            losses.append([sum(column) for column in zip(*ranks, strict=True)])
        world.average_([b for b in trainer.buffers().values() if b.is_floating_point()])
        averages = world.gather(trainer.average.network.state_dict())
        if world.is_main:
            state = {"losses": losses, "model": trainer.model.state_dict(), "averages": averages}
            state["predictions"] = {k: torch.from_numpy(v) for k, v in predictions.items()}
            torch.save(state, file)


def test_one_two_and_three_ranks_take_the_same_steps(tmp_path: Path) -> None:
    """Weights, running statistics, their moving average (the same bits on each rank) and losses
    over 100 steps of CutMix in float64, last batches of an epoch included (17 images:
    two ranks have 8 and 9, and six groups 2 or 3 each). And of one network, before them, the same
    bits of every prediction."""
    words = [
        "dataset=synthetic",
        "dataset.num_classes=10",
        "dataset.image_size=8",
        "dataset.train_size=149",
        "dataset.test_size=520",  # three batches: 250, 250, 20
        *TINY[1:],
        "schedule.lr=0.02",
        "precision=fp32",
        "aug=cutmix",
        "aug.mix.prob=1.0",
        "schedule.batch_size=66",
        "trainer.bn_group_size=11",
        "schedule.ema_decay=0.8",
    ]
    states = {}
    for size in (1, 2, 3):
        file = tmp_path / f"{size}.pt"
        for rank in fork_ranks(size, lambda _, f=file: take_steps(100, f, words), tmp_path):
            ends(rank, 0)
        states[size] = torch.load(file, weights_only=True)
    one = states.pop(1)
    moved = (one["model"]["head.fc.weight"] - initial_head(words)).norm()
    assert moved > 0.1
    for many in states.values():
        for name, values in one["predictions"].items():
            assert torch.equal(many["predictions"][name], values), name
        torch.testing.assert_close(
            torch.tensor(many["losses"]), torch.tensor(one["losses"]), rtol=1e-6, atol=1e-6
        )
        for name, tensor in one["model"].items():
            torch.testing.assert_close(many["model"][name], tensor, rtol=1e-5, atol=1e-7, msg=name)
        for name, tensor in one["averages"][0].items():
            mine = [average[name] for average in many["averages"]]
            torch.testing.assert_close(mine[0], tensor, rtol=1e-5, atol=1e-7, msg=name)
            assert all(torch.equal(other, mine[0]) for other in mine), name


def initial_head(words: list[str]) -> torch.Tensor:
    return make_model(config_of(*words)).state_dict()["head.fc.weight"].double()


def test_a_failing_rank_is_told_without_a_traceback(tmp_path: Path) -> None:
    done = subprocess.run(
        [
            sys.executable,
            "train.py",
            *TINY,
            "devices=2",
            "schedule.lr=1e30",
            f"runs_dir={tmp_path}",
        ],
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 2
    assert done.stderr.count("error: ") == 1
    assert "error: the training loss is not finite" in done.stderr
    assert "Traceback" not in done.stderr
    assert record_of(only_run(tmp_path))["status"] == "failed"

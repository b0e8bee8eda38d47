"""Networks with losses of their own in the trainer: what they add, on any number of ranks and
micro-batches, under autocast, compiled, and resumed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import linregress

from cutmix_exp import evaluate as evaluation
from cutmix_exp import experiment
from cutmix_exp.config import Config
from cutmix_exp.data.sources import Splits
from cutmix_exp.distributed import World
from cutmix_exp.evaluation.base import load_suite
from cutmix_exp.reporting.costs import estimate
from cutmix_exp.reporting.flops import FlopCount, forward_flops
from cutmix_exp.subject import find
from cutmix_exp.training.checkpoint import load_checkpoint
from cutmix_exp.training.logging import NoLog, Reporter
from cutmix_exp.training.loss import LogitsAlone, soft_losses
from cutmix_exp.training.trainer import Trainer
from tests.forks import ends, fork_ranks
from tests.helpers import config_of, record_of
from tests.test_distributed import take_steps
from tests.training.test_trainer import Stopped, in_double

VGG = ["model.architecture=vgg11", "model.head.channels=8"]
RESNET = ["model.architecture=resnet18", "model.head.channels=8"]
HEADS = {
    "vgg_acol": ["model=vgg_acol", *VGG],
    "vgg_spg": ["model=vgg_spg", *VGG],
    "resnet_acol": ["model=resnet_acol", *RESNET],
    "resnet_spg": ["model=resnet_spg", *RESNET],
}
SMALL = [
    "dataset=synthetic",
    "dataset.num_classes=10",
    "dataset.train_size=28",  # three steps an epoch, the last one of 4 images
    "dataset.test_size=8",
    "schedule.batch_size=12",
    "budget=smoke",
    "device=cpu",
    "precision=fp32",
    "aug=cutmix",
    "aug.mix.prob=1.0",
]


def trainer_of(config: Config, splits: Splits | None = None) -> Trainer:
    data = splits or config.dataset.load()
    made = Trainer(config, data, World(0, 1, torch.device("cpu")), Reporter(active=False))
    made.network.train()
    return made


def step(t: Trainer, *numbers: int) -> Trainer:
    for number in numbers:
        t.train_step(t.pipeline.plan(0, number))
    return t


@pytest.mark.parametrize("name", HEADS)
def test_the_arithmetic_of_training_has_the_parts_that_only_training_asks(name: str) -> None:
    config = config_of(*SMALL, *HEADS[name])
    network = config.model.build(10).eval()
    size = config.dataset.image_size
    images, targets = torch.zeros(1, 3, size, size), torch.zeros(1, 10)
    with torch.no_grad(), FlopCount() as evaluated:
        network(images)
    with torch.no_grad(), FlopCount() as trained:
        network(images, targets)
    assert trained.total > evaluated.total
    assert forward_flops(network, size, 10) == trained.total
    seen = 28 * config.epochs  # the estimate counts without a device
    hours = 3 * trained.total * seen / 1e12 / 3600
    assert estimate(config, [], tflops=1.0).hours == pytest.approx(hours)


@pytest.mark.parametrize("name", ["vgg_acol", "vgg_spg"])
def test_a_step_counts_and_follows_the_sum_of_all_losses(name: str) -> None:
    """With label smoothing, which the recipe's loss brings to the second classifier too."""
    config = config_of(*SMALL[:-2], "aug=[cutmix,label_smoothing]", *HEADS[name])
    t = trainer_of(config)
    batch = t.pipeline.batch(t.pipeline.plan(0, 0), np.arange(12))
    network: Any = t.model
    logits, *others = network(batch.images, batch.targets)

    def recipe(given: torch.Tensor, told: torch.Tensor) -> torch.Tensor:
        return soft_losses(config.schedule, given, told, 0.1)

    added = network.auxiliary_losses(tuple(others), batch.targets, recipe)
    loss = (recipe(logits, batch.targets) + added).sum()
    wanted = torch.autograd.grad(loss / 12, list(network.parameters()))
    got: list[torch.Tensor] = []
    t.optimizer.step = lambda *a, **k: got.extend(p.grad.clone() for p in network.parameters())  # type: ignore
    step(t, 0)
    assert float(added.min()) > 0.1
    assert float(t.sums.values[0]) == pytest.approx(float(loss), rel=1e-6)
    for mine, theirs in zip(got, wanted, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-7)


def test_a_plain_network_is_asked_for_logits_alone() -> None:
    t = trainer_of(config_of(*SMALL, "model=resnet", "model.depth=8"))
    assert type(t.lesson) is LogitsAlone


@pytest.mark.parametrize("name", ["vgg_acol", "vgg_spg"])
def test_accumulation_gives_the_update_of_one_large_batch(name: str) -> None:
    words = [*SMALL, *HEADS[name]]
    one = step(in_double(trainer_of(config_of(*words))), 0, 2)
    many = step(in_double(trainer_of(config_of(*words, "trainer.accumulate=3"))), 0, 2)
    for (key, mine), theirs in zip(
        many.model.state_dict().items(), one.model.state_dict().values(), strict=True
    ):
        torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-11, msg=key)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["vgg_acol", "vgg_spg"])
def test_two_ranks_take_the_steps_of_one(name: str, tmp_path: Path) -> None:
    """Under DDP, in float64; the last batch of an epoch has 4 images."""
    words = [*SMALL, *HEADS[name], "schedule.lr=0.02"]
    states = []
    for size in (1, 2):
        file = tmp_path / f"{size}.pt"
        for rank in fork_ranks(size, lambda _, f=file: take_steps(6, f, words), tmp_path):
            ends(rank, 0)
        states.append(torch.load(file, weights_only=True))
    one, two = states
    torch.testing.assert_close(torch.tensor(two["losses"]), torch.tensor(one["losses"]))
    for key, tensor in one["model"].items():
        torch.testing.assert_close(two["model"][key], tensor, rtol=1e-7, atol=1e-10, msg=key)
    start = trainer_of(config_of(*words)).model.state_dict()
    moved = [k for k, v in one["model"].items() if not torch.equal(v, start[k].double())]
    assert moved == list(one["model"])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["resnet_acol", "vgg_spg"])
def test_resumed_in_mid_epoch_bit_for_bit(name: str, tmp_path: Path) -> None:
    reached = []
    for folder, stops in (("unbroken", False), ("broken", True)):
        config = config_of(
            *SMALL, *HEADS[name], "schedule.epochs=2", f"runs_dir={tmp_path / folder}"
        )
        t = trainer_of(config)
        if stops:

            def die(t: Trainer = t) -> None:
                if t.step == 2:
                    t.save()
                    raise Stopped

            t.after_step = die
            with pytest.raises(Stopped):
                t.fit(NoLog())
            t = trainer_of(config)
        assert t.resume() == stops
        t.fit(NoLog())
        reached.append(load_checkpoint(t.checkpoints / "last.pt"))
    one, two = reached
    assert one["step"] == 6
    for key, tensor in one["model"].items():
        assert torch.equal(tensor, two["model"][key]), key
    for index, state in one["optimizer"]["state"].items():
        other = two["optimizer"]["state"][index]["momentum_buffer"]
        assert torch.equal(state["momentum_buffer"], other)


@pytest.mark.parametrize("name", ["vgg_acol", "resnet_spg"])
def test_a_step_under_bf16_and_one_compiled(name: str) -> None:
    """backend=eager: what is tested is that the step is traced and the state is shared."""
    plain, traced, rough = (trainer_of(config_of(*SMALL, *HEADS[name])) for _ in range(3))
    torch._dynamo.reset()
    traced.network = torch.compile(traced.model, backend="eager", fullgraph=True)  # type: ignore[assignment]
    rough.autocast = lambda: torch.autocast("cpu", torch.bfloat16)  # type: ignore[method-assign]
    for t in (plain, traced, rough):
        step(t, 0)
    for mine, theirs in zip(traced.model.parameters(), plain.model.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-6)
    answer = rough.answer(rough.pipeline.batch(rough.pipeline.plan(0, 1), np.arange(12)))
    assert {a.dtype for a in answer} == {torch.float32}
    assert float(rough.sums.values[0]) == pytest.approx(float(plain.sums.values[0]), rel=0.05)


@pytest.mark.slow
@pytest.mark.parametrize("name", HEADS)
def test_training_lowers_the_loss(name: str) -> None:
    """VGG with BatchNorm, without which it is slow to begin from random weights."""
    words = ["dataset=digits", "budget=smoke", "device=cpu", "precision=fp32", *HEADS[name]]
    quick = ["schedule.batch_size=16", "model.head.channels=32"]
    if name.startswith("vgg"):
        quick.append("model.architecture=vgg11_bn")
    t = trainer_of(config_of(*words, *quick))
    for group in t.optimizer.param_groups:
        group["lr"] = 0.01
    sums = [0.0]
    for number in range(40):
        sums.append(float(step(t, number).sums.values[0]))
    losses = np.diff(sums) / 16
    trend = linregress(np.arange(40), losses)
    assert trend.slope < 0 and trend.pvalue < 0.01
    assert np.median(losses[-10:]) < 0.95 * losses[:5].mean()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["resnet_acol", "vgg_spg"])
def test_a_run_from_training_to_its_localisation(name: str, tmp_path: Path) -> None:
    words = ["dataset=digits", "budget=smoke", "device=cpu", "precision=fp32", *HEADS[name]]
    config = config_of(*words, "trainer.max_steps=2", f"runs_dir={tmp_path / 'runs'}")
    record = experiment.run(config)
    assert (record["status"], record["model"]) == ("complete", name)
    origin = find(config.run_id, tmp_path / "runs", "last", ["device=cpu"])
    suites = [
        load_suite("classification"),
        load_suite("localization", {"selection_images": 0, "num_pictures": 2, "step": 0.5}),
    ]
    evaluation.evaluate(
        origin, results=tmp_path / "results", force=False, demanded=True, suites=suites
    )
    found = record_of(config.run_dir)["evaluations"]
    metrics = found["classification"]["metrics"]
    assert metrics["loss"] == record["metrics"]["test/loss_last"]  # of the classifier alone
    assert 0 < found["localization"]["metrics"]["max_box_acc"] <= 100

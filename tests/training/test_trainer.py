"""The trainer against a plain loop, and what it promises about shares, accumulation and seeds."""

from __future__ import annotations

import ast
import inspect
import math
import textwrap
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from cutmix_exp.config import CONFIG_DIR, Config, Schedule
from cutmix_exp.data.sources import Splits
from cutmix_exp.distributed import World
from cutmix_exp.training import trainer as module
from cutmix_exp.training.checkpoint import load_checkpoint, save_checkpoint
from cutmix_exp.training.logging import NoLog, Reporter
from cutmix_exp.training.optim import learning_rate, make_optimizer
from cutmix_exp.training.trainer import Trainer, best_epoch, make_model
from tests.helpers import TINY, config_of
from tests.oracles import mixing, networks

FP32 = [*TINY, "precision=fp32"]


@pytest.fixture(scope="module")
def splits() -> Splits:
    return config_of(*FP32).dataset.load()


def trainer_of(config: Config, splits: Splits, rank: int = 0, size: int = 1) -> Trainer:
    made = Trainer(config, splits, World(rank, size, torch.device("cpu")), Reporter(active=False))
    made.network.train()
    return made


def in_double(t: Trainer) -> Trainer:
    """The same trainer in float64, so that a comparison over several steps is
    not about how ReLUs amplify the rounding of fp32."""
    t.model.double()
    t.optimizer = make_optimizer(t.config.schedule, t.model)
    batch = t.pipeline.batch

    def doubled(plan: Any, positions: np.ndarray) -> Any:
        made = batch(plan, positions)
        return replace(made, images=made.images.double())

    t.pipeline.batch = doubled  # type: ignore[method-assign]
    return t


def plain_loop(
    config: Config, splits: Splits, plans: list[Any], start: torch.nn.Module
) -> list[torch.Tensor]:
    """The recipe as one would write it down: one image at a time into the batch, the mixed loss as
    lambda * CE(own label) + (1 - lambda) * CE(partner's label), SGD by hand."""
    net = networks.ReferenceResNet(8, 10, bottleneck=False).double().train()
    with torch.no_grad():
        for mine, theirs in zip(net.parameters(), start.parameters(), strict=True):
            mine.copy_(theirs)
    velocity = [torch.zeros_like(p) for p in net.parameters()]
    s = config.schedule
    for plan in plans:
        made = [
            mixing.pad_crop_flip_normalise(
                splits.train.images[i].permute(1, 2, 0).numpy(),
                4,
                int(dy),
                int(dx),
                False,
                config.dataset.mean,
                config.dataset.std,
            )
            for i, (dy, dx) in zip(plan.index, plan.corner, strict=True)
        ]
        labels = splits.train.labels[torch.from_numpy(plan.index)]
        onehot = np.eye(10)[labels.numpy()]
        (partner,) = plan.mix.partners
        boxes = [tuple(int(v) for v in box) for box in plan.mix.boxes]
        images, targets = mixing.cutmix(np.stack(made), onehot, partner, boxes, 0.0, True)
        own = 1 - (boxes[0][2] - boxes[0][0]) * (boxes[0][3] - boxes[0][1]) / 32**2
        logits = net(torch.tensor(images))
        loss = own * F.cross_entropy(logits, labels) + (1 - own) * F.cross_entropy(
            logits, labels[torch.from_numpy(partner)]
        )
        assert np.allclose(targets.sum(1), 1)
        grads = torch.autograd.grad(loss, list(net.parameters()))
        with torch.no_grad():
            for p, v, g in zip(net.parameters(), velocity, grads, strict=True):
                g = g + s.weight_decay * p
                v.mul_(s.momentum).add_(g)
                p.sub_(s.lr * (g + s.momentum * v))  # Nesterov
    return [p.detach() for p in net.parameters()]


def test_steps_equal_a_plain_loop(splits: Splits) -> None:
    config = config_of(*FP32, "aug=cutmix", "aug.mix.prob=1.0", "schedule.lr=0.1")
    t = in_double(trainer_of(config, splits))
    start = make_model(config)
    plans = [t.pipeline.plan(0, step) for step in range(3)]
    for group in t.optimizer.param_groups:
        group["lr"] = config.schedule.lr
    for plan in plans:
        t.train_step(plan)
    expected = plain_loop(config, splits, plans, start)
    moved = 0.0
    for mine, theirs, first in zip(t.model.parameters(), expected, start.parameters(), strict=True):
        torch.testing.assert_close(mine.detach(), theirs, rtol=1e-5, atol=1e-6)  # images: fp32
        moved = max(moved, float((theirs - first).abs().max().detach()))
    assert moved > 0.02


def test_the_epochs_sums_are_the_mixed_loss_and_error(splits: Splits) -> None:
    config = config_of(*FP32, "aug=mixup", "schedule.lr=1e-9")
    t = trainer_of(config, splits)
    plan = t.pipeline.plan(0, 0)
    batch = t.pipeline.batch(plan, np.arange(64))
    logits = t.model(batch.images).detach().double()
    t.train_step(plan)
    loss, top1, top5, count = t.sums.values.tolist()
    logp = logits.log_softmax(1)
    assert count == 64
    assert loss == pytest.approx(float(-(batch.targets * logp).sum()), rel=1e-5)
    wrong = sum(1 - float(batch.targets[i, logits[i].argmax()]) for i in range(64))
    assert top1 == pytest.approx(wrong, abs=1e-4)
    missed = sum(1 - float(batch.targets[i, logits[i].topk(5).indices].sum()) for i in range(64))
    assert top5 == pytest.approx(missed, abs=1e-4)


def gradients(t: Trainer, plan: Any) -> list[torch.Tensor]:
    """What one step's backward passes leave, without the update."""
    kept: list[torch.Tensor] = []
    t.optimizer.step = lambda *a, **k: kept.extend(p.grad.clone() for p in t.model.parameters())  # type: ignore
    t.train_step(plan)
    return kept


@pytest.mark.parametrize("size", [2, 3])
def test_the_ranks_mean_gradient_is_that_of_the_whole_batch(size: int, splits: Splits) -> None:
    """Shares of 21 and 22 images weigh by their images, not by their ranks."""
    words = [*FP32, "aug=cutmix", "aug.mix.prob=1.0", "schedule.batch_size=64"]
    whole = trainer_of(config_of(*words), splits)
    plan = whole.pipeline.plan(0, 0)
    whole.model.eval()  # BatchNorm apart: its groups are the ranks'
    expected = gradients(whole, plan)
    parts = []
    for rank in range(size):
        # World.wrap would ask for a process group; the gradients before DDP's mean are wanted here
        t = trainer_of(config_of(*words), splits)
        t.world = World(rank, size, torch.device("cpu"))
        t.model.eval()
        parts.append(gradients(t, plan))
    for mine, theirs in zip(zip(*parts, strict=True), expected, strict=True):
        torch.testing.assert_close(torch.stack(mine).mean(0), theirs, rtol=1e-4, atol=1e-6)


def test_a_rank_without_images_contributes_nothing(splits: Splits) -> None:
    t = trainer_of(config_of(*FP32), splits)
    t.world = World(0, 3, torch.device("cpu"))
    assert t.parts(2)[0][1] == 0.0
    plan = t.pipeline.plan(0, 0)
    one = type(plan)(plan.index[:2], plan.corner[:2], plan.mirrored[:2], {}, module_unmixed(2))
    assert all(float(g.abs().max()) == 0.0 for g in gradients(t, one))
    assert t.sums.values.tolist() == [0.0, 0.0, 0.0, 0.0]


def module_unmixed(batch: int) -> Any:
    from cutmix_exp.aug.base import unmixed

    return unmixed(batch)


@pytest.mark.parametrize("accumulate", [2, 4])
def test_accumulation_gives_the_update_of_one_large_batch(accumulate: int, splits: Splits) -> None:
    words = [*FP32, "aug=mixup", "trainer.bn_group_size=16"]
    one = in_double(trainer_of(config_of(*words), splits))
    many = in_double(trainer_of(config_of(*words, f"trainer.accumulate={accumulate}"), splits))
    for t in (one, many):
        for step in (0, 1, 22):  # 22 is the last, partial one: 29 images
            t.train_step(t.pipeline.plan(0, step))
    for mine, theirs in zip(
        many.model.state_dict().items(), one.model.state_dict().items(), strict=True
    ):
        torch.testing.assert_close(mine[1], theirs[1], rtol=1e-9, atol=1e-10, msg=mine[0])


def test_methods_of_one_seed_share_weights_order_and_crops(splits: Splits) -> None:
    base = trainer_of(config_of(*FP32, "seed=3"), splits)
    other = trainer_of(config_of(*FP32, "seed=3", "aug=[cutout,mixup,shakedrop]"), splits)
    third = trainer_of(config_of(*FP32, "seed=4"), splits)
    for name, tensor in base.model.state_dict().items():
        assert torch.equal(tensor, other.model.state_dict()[name])
    assert not torch.equal(next(base.model.parameters()), next(third.model.parameters()))
    for epoch, step in ((0, 0), (0, 22), (1, 3)):
        one, two = base.pipeline.plan(epoch, step), other.pipeline.plan(epoch, step)
        assert np.array_equal(one.index, two.index)
        assert np.array_equal(one.corner, two.corner)
        assert np.array_equal(one.mirrored, two.mirrored)
        assert two.mix.num_sources == 2 and set(two.image) == {"cutout"}


def test_the_step_names_no_method() -> None:
    source = inspect.getsource(module).lower()
    atoms = {p.stem for p in (CONFIG_DIR / "aug").glob("*.yaml")} - {
        "baseline",
        "label_smoothing",
    }  # the slot of that name is the loss's
    words = atoms | {"cutmix(", "lambda_", "box"}
    body = source.replace("cutmix_exp", "")
    assert not [w for w in words if w in body]
    step = ast.parse(textwrap.dedent(inspect.getsource(Trainer.train_step))).body[0]
    assert isinstance(step, ast.FunctionDef)
    assert (step.end_lineno or 0) - step.lineno < 40


def test_learning_rate_drops_at_a_half_and_three_quarters() -> None:
    s = Schedule(name="x", full_epochs=300, epochs=300, lr=0.25)
    rates = [learning_rate(s, e) for e in range(300)]
    assert rates[:150] == [0.25] * 150
    assert rates[150:225] == pytest.approx([0.025] * 75)
    assert rates[225:] == pytest.approx([0.0025] * 75)
    odd = Schedule(name="x", full_epochs=5, epochs=5, lr=1.0)
    assert [learning_rate(odd, e) for e in range(5)] == pytest.approx([1, 1, 1, 0.1, 0.01])


def test_best_epoch_is_the_last_of_equal_ones() -> None:
    lines = [
        {"split": "test", "epoch": e + 1, "top1_error": v}
        for e, v in enumerate([3.0, 2.0, 2.0, 4.0])
    ]
    assert best_epoch([*lines, {"split": "val", "epoch": 9, "top1_error": 0.0}], "test") == 3


def test_weight_decay_acts_on_all_parameters(splits: Splits) -> None:
    t = trainer_of(config_of(*FP32), splits)
    (group,) = t.optimizer.param_groups
    assert len(group["params"]) == len(list(t.model.parameters()))
    assert (group["weight_decay"], group["momentum"], group["nesterov"]) == (1e-4, 0.9, True)


def test_a_checkpoint_that_cannot_be_written_leaves_the_old_one(
    tmp_path: Path, monkeypatch: Any
) -> None:
    file = tmp_path / "last.pt"
    save_checkpoint(file, {"step": 1})

    def full(state: Any, out: Any) -> None:
        out.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError, match="No space"):
        save_checkpoint(file, {"step": 2})
    assert load_checkpoint(file)["step"] == 1
    assert [p.name for p in tmp_path.iterdir()] == ["last.pt"]


def test_compiled_training_follows_the_plain_one(splits: Splits) -> None:
    """backend=eager: what is tested is that the step is traced and the state is shared."""
    words = [*FP32, "aug=cutmix", "aug.mix.prob=1.0", "trainer.bn_group_size=32"]
    plain, traced = (trainer_of(config_of(*words), splits) for _ in range(2))
    traced.network = torch.compile(traced.model, backend="eager")  # type: ignore[assignment]
    for t in (plain, traced):
        for step in (0, 22):
            t.train_step(t.pipeline.plan(0, step))
    for mine, theirs in zip(traced.model.parameters(), plain.model.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-6)


def test_bf16_keeps_targets_and_losses_in_fp32(splits: Splits) -> None:
    t = trainer_of(config_of(*TINY, "aug=mixup"), splits)
    if t.config.precision != "bf16":
        pytest.skip("this machine has no bf16 arithmetic")
    batch = t.pipeline.batch(t.pipeline.plan(0, 0), np.arange(5))
    assert batch.targets.dtype == torch.float32
    assert torch.equal(batch.targets.sum(1), torch.ones(5))
    with t.autocast():
        logits = t.network(batch.images)
    assert logits.dtype == torch.bfloat16
    assert t.losses(logits.float(), batch.targets).dtype == torch.float32


def test_label_smoothing_is_that_of_the_loss(splits: Splits) -> None:
    t = trainer_of(config_of(*FP32, "aug=label_smoothing"), splits)
    logits = torch.tensor([[2.0, 0.0, -1.0, *[0.0] * 7]])
    target = torch.tensor([[0.7, 0.3, *[0.0] * 8]])
    logp = logits.log_softmax(1)[0].tolist()
    smooth = [0.9 * p + 0.01 for p in target[0].tolist()]
    by_hand = -sum(p * q for p, q in zip(smooth, logp, strict=True))
    assert float(t.losses(logits, target)) == pytest.approx(by_hand, rel=1e-6)
    assert math.isfinite(by_hand)


def test_fit_without_log_returns_predictions_of_the_whole_test_set(
    splits: Splits, tmp_path: Path
) -> None:
    config = config_of(*FP32, "trainer.max_steps=1", f"runs_dir={tmp_path}")
    predictions = trainer_of(config, splits).fit(NoLog())
    assert np.array_equal(predictions.label, splits.test.labels.numpy())

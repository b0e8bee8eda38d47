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

from cutmix_exp.composition import CONFIG_DIR, compose
from cutmix_exp.config import (
    Config,
    Hardware,
    Schedule,
    from_dict,
    resolve,
)
from cutmix_exp.data.sources import Splits
from cutmix_exp.distributed import World
from cutmix_exp.training import trainer as module
from cutmix_exp.training.checkpoint import load_checkpoint, save_checkpoint
from cutmix_exp.training.ema import make_average
from cutmix_exp.training.logging import NoLog, Reporter
from cutmix_exp.training.optim import learning_rate, make_optimizer
from cutmix_exp.training.trainer import Trainer, best_epoch, make_model
from tests.helpers import TINY, config_of
from tests.oracles import mixing, networks

FP32 = [*TINY, "precision=fp32"]
SMALL = [
    "dataset=synthetic",
    "dataset.num_classes=10",
    "dataset.train_size=190",  # three steps an epoch
    "dataset.test_size=50",
    *FP32[1:],
]


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
    t.average = make_average(t.config.schedule, t.model)
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
            for i, (dy, dx) in zip(plan.index, plan.crop, strict=True)
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
    one = replace(
        plan,
        index=plan.index[:2],
        crop=plan.crop[:2],
        mirrored=plan.mirrored[:2],
        color=plan.color[:2],
        mix=module_unmixed(2),
    )
    assert all(float(g.abs().max()) == 0.0 for g in gradients(t, one))
    assert t.sums.values.tolist() == [0.0, 0.0, 0.0, 0.0]


def module_unmixed(batch: int) -> Any:
    from cutmix_exp.aug.base import unmixed

    return unmixed(batch)


@pytest.mark.parametrize("accumulate", [2, 4])
def test_accumulation_gives_the_update_of_one_large_batch(accumulate: int, splits: Splits) -> None:
    words = [*FP32, "aug=mixup", "trainer.bn_group_size=16", "schedule.ema_decay=0.5"]
    one = in_double(trainer_of(config_of(*words), splits))
    many = in_double(trainer_of(config_of(*words, f"trainer.accumulate={accumulate}"), splits))
    for t in (one, many):
        for step in (0, 1, 22):  # 22 is the last, partial one: 29 images
            t.train_step(t.pipeline.plan(0, step))
    for those, these in ((many.model, one.model), (many.average.network, one.average.network)):
        for mine, theirs in zip(
            those.state_dict().items(), these.state_dict().items(), strict=True
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
        assert np.array_equal(one.crop, two.crop)
        assert np.array_equal(one.mirrored, two.mirrored)
        assert two.mix.num_sources == 2 and set(two.image) == {"cutout"}


def test_the_step_names_no_method() -> None:
    source = inspect.getsource(module).lower()
    atoms = {p.stem for p in (CONFIG_DIR / "aug").glob("*.yaml")} - {
        "baseline",
        "label_smoothing",
    }  # the slot of that name is the loss's
    heads = {p.stem.split("_")[1] for p in (CONFIG_DIR / "model").glob("vgg_*.yaml")}
    assert {"acol", "spg"} <= heads
    words = atoms | heads | {"cutmix(", "lambda_", "box"}
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


def states(t: Trainer, epochs: list[int]) -> list[dict[str, torch.Tensor]]:
    """The trained network after each of some steps, which are in these epochs."""
    out = []
    for number, t.epoch in enumerate(epochs):
        t.train_step(t.pipeline.plan(0, number))
        t.step += 1
        out.append({n: v.clone() for n, v in t.model.state_dict().items()})
    return out


def test_the_moving_average_by_hand(splits: Splits) -> None:
    """Of weights and running statistics, after steps 1, 3 and 5 of five; the first one copies."""
    words = [*FP32, "schedule.ema_decay=0.75", "schedule.ema_every=2"]
    t = trainer_of(config_of(*words), splits)
    first, _, third, _, fifth = states(t, [0] * 5)
    for name, value in t.average.network.state_dict().items():
        if value.is_floating_point():
            by_hand = 0.75 * (0.75 * first[name] + 0.25 * third[name]) + 0.25 * fifth[name]
            torch.testing.assert_close(value, by_hand, rtol=1e-5, atol=1e-7, msg=name)
            assert not torch.equal(value, fifth[name]) or "shortcut" in name, name
    assert not any(p.requires_grad for p in t.average.network.parameters())


def test_the_moving_average_is_a_copy_until_the_warm_up_ends(splits: Splits) -> None:
    """As in torchvision's training: the first update after the warm-up copies once more."""
    warm = ["schedule.warmup_epochs=1", "schedule.warmup_lr=0.01"]
    t = trainer_of(config_of(*FP32, *warm, "schedule.ema_decay=0.75"), splits)
    _, _, third, fourth = states(t, [0, 0, 1, 1])
    for name, value in t.average.network.named_parameters():
        torch.testing.assert_close(value, 0.75 * third[name] + 0.25 * fourth[name])
    t = trainer_of(config_of(*FP32, *warm, "schedule.ema_decay=0.75"), splits)
    last = states(t, [0, 0])[-1]
    for name, value in t.average.network.state_dict().items():
        assert torch.equal(value, last[name]), name


def test_the_average_is_what_is_evaluated_and_the_raw_network_is_told_beside(
    tmp_path: Path,
) -> None:
    words = [*SMALL, "schedule.ema_decay=0.9", "dataset.val_size=40", f"runs_dir={tmp_path}"]
    config = config_of(*words, "trainer.max_steps=2")  # ends within the epoch
    t = trainer_of(config, config.dataset.load())
    predictions = t.fit(NoLog())
    average, raw = t.predict(t.test, t.average.network), t.predict(t.test, t.model)
    assert not np.array_equal(average.loss, raw.loss)
    assert np.array_equal(predictions.loss, average.loss)
    _, val, test = t.lines
    for name in ("loss", "top1_error", "top5_error"):
        assert test[name] == average.metrics()[name]
        assert test[f"raw_{name}"] == raw.metrics()[name]
        assert val[f"raw_{name}"] == t.predict(t.val, t.model).metrics()[name]
    best = load_checkpoint(t.checkpoints / "best.pt")["model"]
    for name, value in t.average.network.state_dict().items():
        assert torch.equal(best[name], value)


def test_without_average_the_network_itself_is_evaluated(splits: Splits, tmp_path: Path) -> None:
    t = trainer_of(config_of(*FP32, "trainer.max_steps=1", f"runs_dir={tmp_path}"), splits)
    assert t.average.network is t.model
    t.fit(NoLog())
    assert not [name for line in t.lines for name in line if "raw" in name]
    assert load_checkpoint(t.checkpoints / "last.pt")["average"] == {}


class Stopped(Exception):
    pass


RICH = [
    *SMALL,
    "schedule.epochs=2",
    "schedule.lr=0.01",
    "schedule.optimizer=lamb",
    "schedule.no_decay=norm_and_bias",
    "schedule.clip_norm=1.0",
    "schedule.policy=cosine",
    "schedule.updates=step",
    "schedule.warmup_epochs=0.5",
    "schedule.ema_decay=0.8",
    "schedule.ema_every=2",
    "schedule.loss=bce",
    "schedule.repeated_augmentation=2",
    "aug=[mixup,shakedrop,dropblock]",  # the network draws noise of its own
]


@pytest.mark.parametrize("stop", [1, 5])  # within the warm-up and after it, both in mid-epoch
def test_a_rich_recipe_is_resumed_bit_for_bit_in_mid_epoch(stop: int, tmp_path: Path) -> None:
    """With the scaler of fp16, which is off on a CPU otherwise; it grows every second step."""

    def scaled(config: Config, data: Splits) -> Trainer:
        made = trainer_of(config, data)
        made.scaler = torch.amp.GradScaler("cpu", init_scale=8.0, growth_interval=2)
        return made

    ends = []
    for name, moment in (("unbroken", None), ("broken", stop)):
        config = config_of(*RICH, f"runs_dir={tmp_path / name}")
        data = config.dataset.load()
        if moment:
            t = scaled(config, data)

            def die(t: Trainer = t) -> None:
                if t.step == stop:
                    t.save()
                    raise Stopped

            t.after_step = die
            with pytest.raises(Stopped):
                t.fit(NoLog())
        t = scaled(config, data)
        assert t.resume() == bool(moment)
        t.fit(NoLog())
        ends.append(load_checkpoint(t.checkpoints / "last.pt"))
    one, two = ends
    assert one["scaler"] == two["scaler"] and one["scaler"]["scale"] == 8.0 * 2 ** (
        one["step"] // 2
    )
    for part in ("model", "average"):
        assert one[part].keys() == two[part].keys()
        for key, tensor in one[part].items():
            assert torch.equal(tensor, two[part][key]), key
    for index, state in one["optimizer"]["state"].items():
        assert torch.equal(state["exp_avg_sq"], two["optimizer"]["state"][index]["exp_avg_sq"])
    clock = ("time", "images_per_second", "data_wait", "input_ceiling")
    told = [[{k: v for k, v in n.items() if k not in clock} for n in e["lines"]] for e in ends]
    assert told[0] == told[1]


def total_norm(grads: list[torch.Tensor]) -> float:
    return math.sqrt(sum(float((g.double() ** 2).sum()) for g in grads))


@pytest.mark.parametrize("scaled", [False, True])
def test_gradients_are_clipped_by_their_total_norm(scaled: bool, splits: Splits) -> None:
    """Under a gradient scaler (fp16) too: it is the true gradient that is clipped."""
    free = trainer_of(config_of(*FP32), splits)
    plan = free.pipeline.plan(0, 0)
    whole = gradients(free, plan)
    for limit in (0.25, 1e6):
        t = trainer_of(config_of(*FP32, f"schedule.clip_norm={limit}"), splits)
        if scaled:
            t.scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
        clipped = gradients(t, plan)
        factor = min(1.0, limit / total_norm(whole))
        for mine, theirs in zip(clipped, whole, strict=True):
            torch.testing.assert_close(mine, factor * theirs, rtol=1e-4, atol=1e-7)
    assert total_norm(whole) > 0.5


def test_the_train_error_means_the_same_under_bce(splits: Splits) -> None:
    sums = []
    for loss in ("cross_entropy", "bce"):
        t = trainer_of(config_of(*FP32, "aug=mixup", f"schedule.loss={loss}"), splits)
        t.train_step(t.pipeline.plan(0, 0))
        sums.append(t.sums.values.tolist())
    assert sums[0][1:] == sums[1][1:]
    assert sums[0][0] != sums[1][0]


def test_repeats_of_an_image_are_augmented_anew() -> None:
    words = [*SMALL, "schedule.repeated_augmentation=4"]
    config = config_of(*words)
    t = trainer_of(config, config.dataset.load())
    plan = t.pipeline.plan(0, 0)
    images = t.pipeline.batch(plan, np.arange(64)).images
    kinds = [len({images[i].numpy().tobytes() for i in np.flatnonzero(plan.index == index)})
             for index in np.unique(plan.index)]  # fmt: skip
    assert len(kinds) == 16 and np.mean(kinds) > 3.5  # of 81 crops and two flips
    assert (
        t.pipeline.steps_per_epoch
        == trainer_of(config_of(*words[:-1]), config.dataset.load()).pipeline.steps_per_epoch
    )


def test_the_networks_own_time_is_not_counted_as_input(
    splits: Splits, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a clock that stands still, except while the batch is made and the network runs."""
    t = trainer_of(config_of(*SMALL), splits)
    batch, network, clock = t.pipeline.batch, t.network, [0.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: clock[0])

    def slow_batch(*args: Any) -> Any:
        clock[0] += 2
        return batch(*args)

    def slow_network(images: torch.Tensor) -> torch.Tensor:
        clock[0] += 5
        return network(images)

    t.pipeline.batch = slow_batch  # type: ignore[method-assign]
    t.network = slow_network  # type: ignore[assignment]
    for step in range(2):
        t.train_step(t.pipeline.plan(0, step))
    assert t.phases == {"input": 4.0, "step": 10.0, "evaluation": 0.0, "checkpoint": 0.0}


@pytest.mark.parametrize(
    ("overrides", "gpus", "compiles"),
    [
        (["schedule.epochs=300"], 1, True),
        (["schedule.epochs=3"], 1, False),  # too short to earn the compiler's time back
        (["schedule.epochs=300", "trainer.max_steps=50"], 1, False),
        (["schedule.epochs=300"], 0, False),
        (["schedule.epochs=3", "trainer.compile=true"], 0, True),
        (["schedule.epochs=300", "trainer.compile=false"], 1, False),
    ],
)
def test_what_is_compiled_by_itself(overrides: list[str], gpus: int, compiles: bool) -> None:
    found = resolve(from_dict(compose(["model.depth=20", *overrides])), Hardware(gpus=gpus))
    assert found.trainer.compile is compiles
    plain = resolve(from_dict(compose(["model.depth=20", *overrides])), Hardware())
    assert plain.run_id == resolve(replace(plain, trainer=found.trainer), Hardware()).run_id


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("aug", ["baseline", "cutmix", "mixup"])
def test_a_gpu_is_not_waited_for_within_an_epoch(aug: str, splits: Splits) -> None:
    config = config_of(*SMALL, f"aug={aug}", "precision=auto", "device=cuda")
    t = Trainer(config, splits, World(0, 1, torch.device("cuda", 0)), Reporter(active=False))
    t.train_step(t.pipeline.plan(0, 0))  # what is prepared once may wait
    torch.cuda.set_sync_debug_mode("error")
    try:
        for step in (1, 2, 3):
            t.train_step(t.pipeline.plan(0, step))
    finally:
        torch.cuda.set_sync_debug_mode("default")

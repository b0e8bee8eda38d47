"""Optimizers, rates, losses and the recipes' fields, against torch, torchvision's and timm's own."""

from __future__ import annotations

import math
from dataclasses import fields, replace
from typing import Any

import pytest
import torch
from timm.loss import BinaryCrossEntropy
from timm.optim import create_optimizer_v2
from timm.scheduler import CosineLRScheduler
from torch import nn
from torch.optim import lr_scheduler

from cutmix_exp.config import Config, Schedule
from cutmix_exp.errors import UserError
from cutmix_exp.training.loss import soft_losses
from cutmix_exp.training.optim import learning_rate, make_optimizer, set_rate
from tests.helpers import TINY, config_of


def schedule(**values: Any) -> Schedule:
    return Schedule(**{"name": "x", "full_epochs": 20, "epochs": 20, "lr": 0.5, **values})


def chain(times: int, make: Any, lr: float = 0.5) -> list[float]:
    """The rates of one of torch's schedulers, stepped so many times."""
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=lr)
    scheduler, rates = make(optimizer), []
    for _ in range(times):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return rates


def test_steps_equal_torchs_multistep() -> None:
    s = schedule(milestones=(0.25, 0.5, 0.8), gamma=0.2)
    expected = chain(20, lambda o: lr_scheduler.MultiStepLR(o, [5, 10, 16], 0.2))
    assert [learning_rate(s, e) for e in range(20)] == pytest.approx(expected, rel=1e-12)


def test_cosine_equals_torchs_once_an_epoch_and_at_every_step() -> None:
    s = schedule(policy="cosine", min_lr=0.01)
    by_epoch = chain(20, lambda o: lr_scheduler.CosineAnnealingLR(o, 20, 0.01))
    assert [learning_rate(s, e) for e in range(20)] == pytest.approx(by_epoch, rel=1e-9)
    by_step = chain(140, lambda o: lr_scheduler.CosineAnnealingLR(o, 140, 0.01))
    assert [learning_rate(s, i / 7) for i in range(140)] == pytest.approx(by_step, rel=1e-9)


def test_warm_up_and_cosine_equal_torchvisions_chain() -> None:
    s = schedule(policy="cosine", warmup_epochs=5, warmup_lr=0.005)

    def make(optimizer: Any) -> Any:
        parts: list[Any] = [
            lr_scheduler.LinearLR(optimizer, start_factor=0.01, total_iters=5),
            lr_scheduler.CosineAnnealingLR(optimizer, 15),
        ]
        return lr_scheduler.SequentialLR(optimizer, parts, milestones=[5])

    expected = chain(20, make)
    assert [learning_rate(s, e) for e in range(20)] == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("cosine_from", ["warmup_end", "start"])
def test_warm_up_and_cosine_equal_timms(cosine_from: Any) -> None:
    s = schedule(
        policy="cosine", warmup_epochs=5, warmup_lr=1e-4, min_lr=1e-6, cosine_from=cosine_from
    )
    prefix = cosine_from == "warmup_end"
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.5)
    theirs = CosineLRScheduler(
        optimizer,
        t_initial=15 if prefix else 20,
        lr_min=1e-6,
        warmup_t=5,
        warmup_lr_init=1e-4,
        warmup_prefix=prefix,
    )
    for epoch in range(20):
        theirs.step(epoch)
        rate = optimizer.param_groups[0]["lr"]
        assert learning_rate(s, epoch) == pytest.approx(rate, rel=1e-12)


def test_warm_up_by_hand_and_before_steps() -> None:
    s = schedule(warmup_epochs=4, warmup_lr=0.1, epochs=10, milestones=(0.5,))
    rates = [learning_rate(s, e) for e in (0, 1, 2.5, 4, 4.9, 5)]
    assert rates == pytest.approx([0.1, 0.2, 0.35, 0.5, 0.5, 0.05])


def test_the_rate_is_set_once_an_epoch_or_at_every_step() -> None:
    optimizer = torch.optim.SGD(
        [{"params": [nn.Parameter(torch.zeros(1))]}, {"params": [nn.Parameter(torch.zeros(1))]}],
        lr=9.0,
    )
    for updates, middle in (("epoch", 0.5), ("step", 0.25)):
        s = schedule(policy="cosine", epochs=2, updates=updates)
        set_rate(optimizer, s, 0, 0, 4)
        assert [g["lr"] for g in optimizer.param_groups] == [0.5, 0.5]
        set_rate(optimizer, s, 0, 4, 4)  # half of the training, at the end of its first epoch
        assert [g["lr"] for g in optimizer.param_groups] == pytest.approx([middle, middle])
        set_rate(optimizer, s, 1, 0, 4)
        assert [g["lr"] for g in optimizer.param_groups] == pytest.approx([0.25, 0.25])


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4)
        self.scale, self.fc = nn.LayerNorm(4), nn.Linear(4, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(self.scale(self.norm(self.conv(x)).relu().mean((2, 3))))


def decayed(s: Schedule) -> set[str]:
    """Names of the parameters that decay; all must be in some group, once."""
    network = Net()
    names = {id(p): n for n, p in network.named_parameters()}
    groups = make_optimizer(s, network).param_groups
    held = [names[id(p)] for g in groups for p in g["params"]]
    assert sorted(held) == sorted(names.values())
    return {names[id(p)] for g in groups if g["weight_decay"] for p in g["params"]}


def test_what_decays() -> None:
    norms = {"norm.weight", "norm.bias", "scale.weight", "scale.bias"}
    everything = {n for n, _ in Net().named_parameters()}
    assert decayed(schedule()) == everything
    assert decayed(schedule(no_decay="norm")) == everything - norms
    assert decayed(schedule(no_decay="norm_and_bias")) == {"conv.weight", "fc.weight"}


def steps(network: nn.Module, optimizer: Any, clip: float | None) -> list[torch.Tensor]:
    draws = torch.Generator().manual_seed(1)
    for _ in range(4):
        x, y = torch.randn(8, 3, 5, 5, generator=draws), torch.arange(8) % 2
        (20 * nn.functional.cross_entropy(network(x), y)).backward()  # gradients of norm above 1
        if clip is not None:
            nn.utils.clip_grad_norm_(network.parameters(), clip)
        optimizer.step()
        optimizer.zero_grad()
    return [p.detach() for p in network.parameters()]


@pytest.mark.parametrize(("name", "clip"), [("lamb", 1.0), ("adamw", None)])
def test_lamb_and_adamw_follow_timms_defaults(name: Any, clip: float | None) -> None:
    """timm's LAMB clips to norm 1 by itself; here that is `clip_norm`."""
    mine, theirs = Net(), Net()
    theirs.load_state_dict(mine.state_dict())
    start = [p.detach().clone() for p in mine.parameters()]
    s = schedule(optimizer=name, lr=0.01, weight_decay=0.1, no_decay="norm_and_bias").resolve(20)
    moved = steps(mine, make_optimizer(s, mine), clip)
    expected = steps(theirs, create_optimizer_v2(theirs, opt=name, lr=0.01, weight_decay=0.1), None)
    for one, two, first in zip(moved, expected, start, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-6)
        assert float((one - first).abs().max()) > 1e-3


LOGITS = torch.tensor([[1.0, -2.0, 0.5], [0.0, 3.0, -1.0]])
TARGETS = torch.tensor([[0.7, 0.3, 0.0], [0.0, 0.9, 0.1]])


def test_bce_by_hand_and_as_torchs() -> None:
    losses = soft_losses(schedule(loss="bce"), LOGITS, TARGETS)
    for row in range(2):
        terms = []
        for x, t in zip(LOGITS[row].tolist(), TARGETS[row].tolist(), strict=True):
            p = 1 / (1 + math.exp(-x))
            terms.append(-t * math.log(p) - (1 - t) * math.log(1 - p))
        assert float(losses[row]) == pytest.approx(sum(terms) / 3, rel=1e-6)
    assert float(losses.mean()) == pytest.approx(float(nn.BCEWithLogitsLoss()(LOGITS, TARGETS)))


def test_bce_with_threshold_takes_both_labels_of_a_mixed_image() -> None:
    losses = soft_losses(schedule(loss="bce", bce_target_threshold=0.2), LOGITS, TARGETS)
    hard = torch.tensor([[1.0, 1.0, 0.0], [0.0, 1.0, 0.0]])
    expected = nn.BCEWithLogitsLoss(reduction="none")(LOGITS, hard).mean(1)
    torch.testing.assert_close(losses, expected)
    assert float(losses.mean()) == pytest.approx(
        float(BinaryCrossEntropy(target_threshold=0.2)(LOGITS, TARGETS))
    )


@pytest.mark.parametrize("threshold", [None, 0.05])
def test_bce_smooths_before_the_threshold_as_timm_does(threshold: float | None) -> None:
    """0.3 / 3 = 0.1 is above a threshold of 0.05: every class becomes a target."""
    labels = torch.tensor([2, 0])
    onehot = nn.functional.one_hot(labels, 3).float()
    s = schedule(loss="bce", bce_target_threshold=threshold)
    mine = soft_losses(s, LOGITS, onehot, smoothing=0.3).mean()
    theirs = BinaryCrossEntropy(smoothing=0.3, target_threshold=threshold)(LOGITS, labels)
    assert float(mine) == pytest.approx(float(theirs), rel=1e-6)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"momentum": 0.0}, ["nesterov", "momentum"]),
        ({"min_lr": 0.1}, ["min_lr", "policy=cosine"]),
        ({"cosine_from": "start"}, ["cosine_from", "policy=cosine"]),
        ({"policy": "cosine", "min_lr": 0.6}, ["min_lr=0.6", "lr=0.5"]),
        ({"warmup_epochs": 2.0, "warmup_lr": 0.6}, ["warmup_lr=0.6", "lr=0.5"]),
        ({"warmup_lr": 0.1}, ["warmup_lr=0.1", "warmup_epochs above 0"]),
        ({"warmup_epochs": 2.0}, ["rate 0", "updates=step"]),
        ({"warmup_epochs": 20.0, "warmup_lr": 0.1}, ["warmup_epochs=20", "20 epochs"]),
        ({"ema_every": 2}, ["ema_every=2", "ema_decay"]),
        ({"bce_target_threshold": 0.2}, ["bce_target_threshold=0.2", "loss=bce"]),
        ({"repeated_augmentation": 65}, ["repeated_augmentation=65", "batch_size=64"]),
    ],
)
def test_contradictory_recipes_are_refused(values: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(UserError) as error:
        schedule(**values)
    assert all(word in str(error.value) for word in words)


def test_a_warm_up_that_a_budget_makes_too_long_is_refused() -> None:
    with pytest.raises(UserError, match=r"warmup_epochs=5 leaves nothing .* 2 epochs"):
        config_of("dataset=digits", "schedule=torchvision_resnet50", "budget=smoke")


def test_what_another_optimizer_or_policy_would_use_does_not_count() -> None:
    base = config_of(*TINY)

    def run_id(**values: Any) -> str:
        return replace(base, schedule=replace(base.schedule, **values).resolve(2)).run_id

    assert run_id(optimizer="adamw") == run_id(optimizer="adamw", nesterov=False)
    assert run_id(policy="cosine") == run_id(policy="cosine", milestones=(0.1,), gamma=0.5)
    assert not replace(base.schedule, optimizer="lamb").resolve(2).nesterov


OTHER = {
    "optimizer": "lamb",
    "policy": "cosine",
    "updates": "step",
    "warmup_epochs": 1.0,
    "warmup_lr": 0.01,
    "min_lr": 0.01,
    "cosine_from": "start",
    "no_decay": "norm",
    "clip_norm": 1.0,
    "ema_decay": 0.9,
    "ema_every": 2,
    "loss": "bce",
    "bce_target_threshold": 0.2,
    "repeated_augmentation": 2,
}


def test_every_new_field_is_part_of_the_identity_unless_neutral() -> None:
    base = config_of(*TINY)
    rich = replace(base.schedule, **OTHER)
    added = {f.name: f.metadata["neutral"] for f in fields(Schedule) if "neutral" in f.metadata}
    assert set(OTHER) <= set(added)
    needed = {
        "policy": {"min_lr": 0.0, "cosine_from": "warmup_end"},
        "warmup_epochs": {"warmup_lr": 0.0},
        "ema_decay": {"ema_every": 1},
        "loss": {"bce_target_threshold": None},
    }
    ids = [identity(base, rich)]
    for name in OTHER:
        ids.append(identity(base, replace(rich, **{name: added[name]}, **needed.get(name, {}))))
    assert len(set(ids)) == len(ids)


def identity(base: Config, s: Schedule) -> str:
    return replace(base, schedule=s).run_id


def test_published_recipes() -> None:
    def recipe(name: str) -> Schedule:
        return config_of("dataset=digits", "model=resnet", f"schedule={name}").schedule

    tv = recipe("torchvision_resnet50")
    assert tv.ema_decay == pytest.approx(1 - (1 - 0.99998) * 1024 * 32 / 600, abs=1e-9)
    assert (tv.batch_size, tv.lr, tv.warmup_lr, tv.epochs) == (1024, 0.5, 0.01 * 0.5, 600)
    rsb = [recipe(f"timm_rsb_a{n}") for n in (1, 2, 3)]
    assert [(s.epochs, s.lr, s.weight_decay, s.repeated_augmentation) for s in rsb] == [
        (600, 5e-3, 0.01, 3),
        (300, 5e-3, 0.02, 3),
        (100, 8e-3, 0.02, 1),
    ]
    assert {(s.optimizer, s.loss, s.batch_size) for s in rsb} == {("lamb", "bce", 2048)}
    small = config_of("experiment=openmixup_resnet18_cutmix")
    assert (small.schedule.batch_size, small.schedule.lr, small.epochs) == (100, 0.1, 400)
    assert (small.aug.protocol()["alpha"], small.aug.protocol()["prob"]) == (0.2, 1.0)
    assert recipe("openmixup_tiny_imagenet").lr == 0.2


def two_rates(**values: Any) -> tuple[torch.optim.Optimizer, Schedule, nn.Module]:
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Linear(4, 2))
    s = schedule(lr=0.001, head_lr=0.01, milestones=(0.5,), gamma=0.1, **values)
    return make_optimizer(s, network), s, network


@pytest.mark.parametrize("no_decay", ["none", "norm_and_bias"])
def test_the_head_has_a_rate_of_its_own_in_proportion(no_decay: Any) -> None:
    optimizer, s, network = two_rates(no_decay=no_decay)
    names = {id(p): name for name, p in network.named_parameters()}
    for epoch, lr in ((0, 0.001), (9, 0.001), (10, 0.0001), (19, 0.0001)):
        set_rate(optimizer, s, epoch, 0, 1)
        found = {names[id(p)]: g["lr"] for g in optimizer.param_groups for p in g["params"]}
        assert found.keys() == set(names.values())
        for name, rate in found.items():
            assert rate == pytest.approx(10 * lr if name.startswith("2.") else lr), (epoch, name)
    decays = {g["weight_decay"] for g in optimizer.param_groups}
    assert decays == ({1e-4} if no_decay == "none" else {0.0, 1e-4})
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.0001)  # what the log shows


def test_one_step_with_two_rates_by_hand() -> None:
    """Plain SGD: each weight moves by its own rate times its gradient."""
    optimizer, s, network = two_rates(momentum=0.0, nesterov=False, weight_decay=0.0)
    set_rate(optimizer, s, 0, 0, 1)
    before = {name: p.detach().clone() for name, p in network.named_parameters()}
    for p in network.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    for name, p in network.named_parameters():
        wanted = torch.full_like(p, 0.01 if name.startswith("2.") else 0.001)
        assert torch.allclose(before[name] - p.detach(), wanted, rtol=1e-3)


def test_a_network_without_a_head_is_refused_a_rate_for_it() -> None:
    with pytest.raises(UserError, match="leave it out, or use another model"):
        make_optimizer(schedule(head_lr=1.0), nn.Sequential(nn.Conv2d(3, 3, 1)))


@pytest.mark.parametrize(
    ("name", "epochs", "batch", "lr", "head_lr", "drops"),
    [
        ("wsol_cub_resnet50", 600, 32, 0.001, 0.01, [150, 300, 450]),
        ("wsol_cub_vgg16", 600, 32, 0.0001, 0.001, [150, 300, 450]),
        ("wsol_imagenet_resnet50", 20, 256, 0.01, 0.1, [6, 12, 18]),
        ("wsol_imagenet_vgg16", 20, 256, 0.01, 0.1, [6, 12, 18]),
    ],
)
def test_the_papers_fine_tuning(
    name: str, epochs: int, batch: int, lr: float, head_lr: float, drops: list[int]
) -> None:
    """Appendix B."""
    config = config_of(f"experiment={name}")
    s, data = config.schedule, config.dataset
    assert (config.epochs, s.batch_size, s.lr, s.head_lr) == (epochs, batch, lr, head_lr)
    assert [e for e in range(1, epochs) if learning_rate(s, e) < learning_rate(s, e - 1)] == drops
    assert (s.momentum, s.weight_decay, s.gamma) == (0.9, 1e-4, 0.1)
    assert (data.crop, data.crop_resize, data.image_size) == ("window", 256, 224)
    assert (data.eval_fit, data.eval_resize, data.color_jitter) == ("stretch", 256, 0.0)
    assert config.model.pretrained  # type: ignore[attr-defined]

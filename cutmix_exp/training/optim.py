"""Optimizer and learning rate."""

from __future__ import annotations

import inspect
import math
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase

from cutmix_exp.config import Schedule
from cutmix_exp.errors import UserError

NORMS = (_NormBase, nn.LayerNorm, nn.GroupNorm)


class SGD(torch.optim.SGD):
    """torch's SGD without the decorators of its methods: they import torch.compile, in order to
    keep it out, which takes two seconds at the start of each process."""

    step = torch.no_grad()(inspect.unwrap(torch.optim.SGD.step))
    zero_grad = inspect.unwrap(torch.optim.SGD.zero_grad)
    add_param_group = inspect.unwrap(torch.optim.SGD.add_param_group)
    state_dict = inspect.unwrap(torch.optim.SGD.state_dict)
    load_state_dict = inspect.unwrap(torch.optim.SGD.load_state_dict)


def make_optimizer(schedule: Schedule, network: nn.Module) -> torch.optim.Optimizer:
    """The recipe's optimizer; SGD with weight decay on all parameters, BatchNorm and biases
    included, is the authors' (train.py)."""
    groups, lr, decay = parameter_groups(schedule, network), schedule.lr, schedule.weight_decay
    betas = (schedule.momentum, 0.999)
    if schedule.optimizer == "lamb":
        from timm.optim import Lamb  # here: timm takes seconds to import

        return Lamb(groups, lr=lr, betas=betas, weight_decay=decay, max_grad_norm=None)
    if schedule.optimizer == "adamw":
        return torch.optim.AdamW(groups, lr=lr, betas=betas, weight_decay=decay)
    return SGD(
        groups,
        lr=lr,
        momentum=schedule.momentum,
        nesterov=schedule.nesterov,
        weight_decay=decay,
    )


def parameter_groups(schedule: Schedule, network: nn.Module) -> list[dict[str, Any]]:
    """All parameters; or those with and without weight decay (see `Schedule.no_decay`), those of the
    head with a rate of their own (see `Schedule.head_lr`). `rate` is what multiplies `lr`."""
    parameters = list(network.parameters())
    parts = [(parameters, 1.0)]
    if schedule.head_lr is not None:
        head = {id(p) for layer in head_layers(network) for p in layer.parameters()}
        rest = [p for p in parameters if id(p) not in head]
        own = [p for p in parameters if id(p) in head]
        parts = [(rest, 1.0), (own, schedule.head_lr / schedule.lr)]
    spared = spared_parameters(schedule, network)
    groups: list[dict[str, Any]] = []
    for members, rate in parts:
        groups.append({"params": [p for p in members if id(p) not in spared], "rate": rate})
        if schedule.no_decay != "none":
            without = [p for p in members if id(p) in spared]
            groups.append({"params": without, "rate": rate, "weight_decay": 0.0})
    return groups


def spared_parameters(schedule: Schedule, network: nn.Module) -> set[int]:
    """The ids of parameters without weight decay."""
    if schedule.no_decay == "none":
        return set()
    if schedule.no_decay == "norm":
        norms = [m for m in network.modules() if isinstance(m, NORMS)]
        return {id(p) for norm in norms for p in norm.parameters(recurse=False)}
    return {id(p) for p in network.parameters() if p.ndim < 2}


def head_layers(network: nn.Module) -> list[nn.Module]:
    """The layers that are new in a network that is fine-tuned.

    Raises:
        UserError: the network names none and has no linear layer.
    """
    if names := getattr(network, "new_layers", ()):
        return [network.get_submodule(name) for name in names]
    linear: list[nn.Module] = [m for m in network.modules() if isinstance(m, nn.Linear)]
    if not linear:
        raise UserError(
            f"schedule.head_lr is the rate of the last linear layer, and {type(network).__name__} has "
            "none; leave it out, or use another model"
        )
    return linear[-1:]


def learning_rate(schedule: Schedule, epoch: float) -> float:
    """The rate at a time in epochs (1.5 is the middle of the second one).

    It is a function of the time alone, so that there is no scheduler state to lose.
    """
    assert schedule.epochs is not None, "resolve() comes first"
    lr, warmup = schedule.lr, schedule.warmup_epochs
    if epoch < warmup:
        return schedule.warmup_lr + (lr - schedule.warmup_lr) * epoch / warmup
    if schedule.policy == "cosine":
        first = warmup if schedule.cosine_from == "warmup_end" else 0.0
        done = (epoch - first) / (schedule.epochs - first)
        return schedule.min_lr + (lr - schedule.min_lr) * (1 + math.cos(math.pi * done)) / 2
    reached = sum(epoch >= share * schedule.epochs for share in schedule.milestones)
    return lr * schedule.gamma**reached


def set_rate(
    optimizer: torch.optim.Optimizer, schedule: Schedule, epoch: int, step: int, total: int
) -> None:
    """Set the rate of a step (counted from 0, of `total` in the epoch)."""
    within = step / total if schedule.updates == "step" else 0.0
    for group in optimizer.param_groups:
        # Optimizers of earlier checkpoints have no rate.
        group["lr"] = group.get("rate", 1.0) * learning_rate(schedule, epoch + within)

"""Optimizer and learning rate."""

from __future__ import annotations

import torch
from torch import nn

from cutmix_exp.config import Schedule


def make_optimizer(schedule: Schedule, network: nn.Module) -> torch.optim.Optimizer:
    """SGD with weight decay on all parameters, BatchNorm and biases included (authors' train.py)."""
    return torch.optim.SGD(
        network.parameters(),
        lr=schedule.lr,
        momentum=schedule.momentum,
        nesterov=schedule.nesterov,
        weight_decay=schedule.weight_decay,
    )


def learning_rate(schedule: Schedule, epoch: int) -> float:
    """The rate of one epoch (counted from 0): `lr` times `gamma` for each milestone reached.

    It is a function of the epoch alone, so that there is no scheduler state to lose.
    """
    assert schedule.epochs is not None, "resolve() comes first"
    reached = sum(epoch >= share * schedule.epochs for share in schedule.milestones)
    return schedule.lr * schedule.gamma**reached

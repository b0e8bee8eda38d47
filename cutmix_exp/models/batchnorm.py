"""BatchNorm in fixed groups: statistics over so many images, whatever the device sees at once.

One GPU can thus reproduce the authors' runs, where DataParallel gave each of two GPUs half of the
batch. Groups are contiguous positions of the global batch, and a partial batch falls into as many
groups as a full one, as under DataParallel.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from cutmix_exp.errors import UserError


class BatchGroups:
    """How the images of the current forward pass fall into groups; one object for a network.

    Attributes:
        sizes: images in each group of this device; set before each training step.
    """

    def __init__(self) -> None:
        self.sizes: list[int] = []

    def set(self, batch: int, num_groups: int, positions: np.ndarray) -> None:
        """Cut `positions` (contiguous, of a global batch of `batch` images in `num_groups` groups)
        where the groups end. Of fewer images than groups, each is a group."""
        edges = np.unique(np.arange(num_groups + 1) * batch // num_groups)
        first, last = int(positions[0]), int(positions[-1]) + 1
        inside = [int(e) for e in edges if first < e < last]
        self.sizes = np.diff([first, *inside, last]).tolist()


class GroupedBatchNorm2d(nn.BatchNorm2d):
    """BatchNorm2d with statistics per group in training; running statistics take the groups' mean.

    In evaluation it is plain BatchNorm2d, and it has the same state.
    """

    groups: BatchGroups

    @classmethod
    def convert(cls, norm: nn.BatchNorm2d, groups: BatchGroups) -> GroupedBatchNorm2d:
        """A grouped layer that shares the tensors of `norm`."""
        grouped = cls(norm.num_features, norm.eps, norm.momentum, norm.affine)
        grouped.weight, grouped.bias = norm.weight, norm.bias
        grouped.running_mean, grouped.running_var = norm.running_mean, norm.running_var
        grouped.num_batches_tracked = norm.num_batches_tracked
        grouped.groups = groups
        return grouped

    def forward(self, x: Tensor) -> Tensor:
        sizes = self.groups.sizes
        if not self.training or len(sizes) <= 1:
            return super().forward(x)
        assert self.running_mean is not None and self.running_var is not None
        assert self.num_batches_tracked is not None and self.momentum is not None
        outputs, means, variances = [], [], []
        for part in x.split(sizes):
            mean, variance = self.running_mean.clone(), self.running_var.clone()
            outputs.append(
                F.batch_norm(
                    part, mean, variance, self.weight, self.bias, True, self.momentum, self.eps
                )
            )
            means.append(mean)
            variances.append(variance)
        with torch.no_grad():
            # The update is linear in the statistics, so the mean of the groups' updates is the
            # update by their mean, on one device as on several.
            self.running_mean.copy_(torch.stack(means).mean(0))
            self.running_var.copy_(torch.stack(variances).mean(0))
            self.num_batches_tracked.add_(1)
        return torch.cat(outputs)


def group_batchnorm(network: nn.Module, groups: BatchGroups) -> None:
    """Replace every BatchNorm2d of a network by a grouped one.

    Raises:
        UserError: the network has BatchNorm layers of another kind (some of timm's have).
    """
    for module in network.modules():
        for name, child in module.named_children():
            if type(child) is nn.BatchNorm2d:
                setattr(module, name, GroupedBatchNorm2d.convert(child, groups))
            elif isinstance(child, _BatchNorm) and not isinstance(child, GroupedBatchNorm2d):
                raise UserError(
                    f"trainer.bn_group_size: the network has {type(child).__name__} layers, which "
                    "know no groups; leave trainer.bn_group_size out, or choose another model"
                )


@contextmanager
def micro_batches(network: nn.Module, count: int) -> Iterator[Callable[[], None]]:
    """Around one update of `count` micro-batches; call what it yields after each of them.

    Each micro-batch starts from the running statistics before the update, and the update ends with
    the mean of what they came to: as if their groups had been in one forward pass.
    """
    if count == 1:
        yield lambda: None
        return
    buffers = list(network.buffers())
    before = [b.clone() for b in buffers]
    sums = [torch.zeros_like(b) for b in buffers]

    def after_each() -> None:
        for buffer, old, total in zip(buffers, before, sums, strict=True):
            total.add_(buffer)
            buffer.copy_(old)

    yield after_each
    for buffer, total in zip(buffers, sums, strict=True):
        buffer.copy_(total / count)

"""The arithmetic of a network."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from cutmix_exp.models.base import AuxiliaryNetwork

BACKWARD = 2.0
"""The backward pass takes about twice the forward pass's arithmetic."""


class FlopCount(TorchDispatchMode):
    """Counts operations by the formulas of torch's FlopCounterMode, which would import
    torch.compile, two seconds, to keep itself out of it.

    Attributes:
        total: floating-point operations so far; a multiply-add counts as two.
    """

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        formula = flop_registry.get(func.overloadpacket)
        if formula is not None:
            self.total += int(formula(*args, **kwargs, out_val=result))
        return result


def forward_flops(network: nn.Module, image_size: int, num_classes: int) -> int:
    """Floating-point operations of one image's forward pass in training; a multiply-add counts as
    two. A network with losses of its own has parts that are asked in training alone."""
    was_training = network.training
    network.eval()  # one image has no statistics
    device = next(network.parameters()).device
    inputs = [torch.zeros(1, 3, image_size, image_size, device=device)]
    if isinstance(network, AuxiliaryNetwork):
        inputs.append(torch.zeros(1, num_classes, device=device))
    with torch.no_grad(), FlopCount() as counter:
        network(*inputs)
    network.train(was_training)
    return counter.total

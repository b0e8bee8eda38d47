"""The network that is evaluated: the trained one, or the moving average of what it was."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from cutmix_exp.config import Schedule


class NoAverage:
    """Off is an object: the trained network itself is evaluated.

    Attributes:
        network: what is evaluated.
    """

    def __init__(self, network: nn.Module) -> None:
        self.network = network

    def update(self, epoch: int, step: int) -> None:
        """After an optimizer step, both counted from 0."""

    def buffers(self) -> dict[str, Tensor]:
        """Buffers that the trained network does not have."""
        return {}

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        pass


class MovingAverage(NoAverage):
    """Exponential moving average of weights and buffers, as torchvision's reference training keeps
    it: a copy until the end of the warm-up, an average from there on.

    It is a linear function of weights and BatchNorm statistics. Hence the mean over ranks of their
    averaged statistics is the average of their mean, and one mean at the epoch's end is enough.
    """

    def __init__(self, network: nn.Module, schedule: Schedule) -> None:
        assert schedule.ema_decay is not None
        self.trained, self.schedule = network, schedule
        update = get_ema_multi_avg_fn(schedule.ema_decay)
        self.averaged = AveragedModel(network, multi_avg_fn=update, use_buffers=True)
        self.averaged.requires_grad_(False)
        super().__init__(self.averaged.module)

    def update(self, epoch: int, step: int) -> None:
        if step % self.schedule.ema_every:
            return
        self.averaged.update_parameters(self.trained)
        if epoch < self.schedule.warmup_epochs:
            self.averaged.n_averaged.zero_()  # the next update copies again

    def buffers(self) -> dict[str, Tensor]:
        return {f"average.{name}": b for name, b in self.network.named_buffers()}

    def state_dict(self) -> dict[str, Any]:
        return self.averaged.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.averaged.load_state_dict(state)


def make_average(schedule: Schedule, network: nn.Module) -> NoAverage:
    """What the recipe evaluates; to be made before the network is wrapped for several ranks."""
    return NoAverage(network) if schedule.ema_decay is None else MovingAverage(network, schedule)

"""What a checkpoint holds of a trainer: everything that the continued run needs to go on bit for
bit."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from cutmix_exp.errors import UserError
from cutmix_exp.training.checkpoint import State

if TYPE_CHECKING:
    from cutmix_exp.training.trainer import Trainer

COUNTERS = ("epoch", "epoch_step", "step", "lines", "seconds")


def state_of_rank(trainer: Trainer) -> State:
    """BatchNorm's running statistics and the epoch's sums are each rank's own until the epoch's
    end, so they are kept for each."""
    buffers = {name: b.cpu() for name, b in trainer.buffers().items()}
    return {"buffers": buffers, "sums": trainer.sums.values.tolist()}


def state_of(trainer: Trainer, ranks: list[State]) -> State:
    """Of the whole run. `ranks` are the states of all ranks, in their order."""
    return {
        "run_id": trainer.config.run_id,
        "fingerprint": trainer.fingerprint,
        "model": trainer.model.state_dict(),
        "average": trainer.average.state_dict(),
        "optimizer": trainer.optimizer.state_dict(),
        "scaler": trainer.scaler.state_dict(),
        "ranks": ranks,
        **{name: getattr(trainer, name) for name in COUNTERS},
    }


def restore(trainer: Trainer, state: State) -> None:
    """Put a trainer into the state of a checkpoint.

    Raises:
        UserError: it is of another run, or the data has changed.
    """
    check_belongs(trainer, state)
    trainer.model.load_state_dict(state["model"])
    trainer.average.load_state_dict(state.get("average", {}))
    trainer.optimizer.load_state_dict(state["optimizer"])
    trainer.scaler.load_state_dict(state["scaler"])
    buffers, sums = own_share(trainer, state["ranks"])
    for name, buffer in trainer.buffers().items():
        buffer.copy_(buffers[name])
    trainer.sums.load(sums)
    for name in COUNTERS:
        setattr(trainer, name, state[name])


def check_belongs(trainer: Trainer, state: State) -> None:
    mine = trainer.config.run_id
    if state["run_id"] != mine:
        raise UserError(
            f"{trainer.checkpoints} holds the run {state['run_id']}, not {mine}; it was moved there: "
            "move it back, or use another runs_dir (force=true would remove it)"
        )
    if state["fingerprint"] not in (None, trainer.fingerprint):
        raise UserError(
            f"the data set {trainer.config.dataset.name} has changed since {mine} began: its "
            f"fingerprint was {state['fingerprint']} and is {trainer.fingerprint}\n"
            "put the files back as they were, or train on the new ones from the start (force=true, "
            "or another runs_dir)"
        )


def own_share(trainer: Trainer, ranks: list[State]) -> tuple[dict[str, Tensor], list[Any]]:
    """This rank's buffers and sums."""
    if len(ranks) == trainer.world.size:
        own = ranks[trainer.world.rank]
        return own["buffers"], own["sums"]
    # Another number of ranks: the mean is what the epoch's end would have made of them.
    buffers = {
        name: torch.stack([r["buffers"][name].double() for r in ranks]).mean(0)
        for name in ranks[0]["buffers"]
    }
    total = [sum(column) for column in zip(*(r["sums"] for r in ranks), strict=True)]
    return buffers, total if trainer.world.is_main else [0.0] * len(total)

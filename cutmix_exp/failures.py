"""What can go wrong with a run, in a user's words."""

from __future__ import annotations

import errno
import re
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist

from cutmix_exp.config import Config
from cutmix_exp.distributed import World
from cutmix_exp.errors import AGAIN, LocalError, RankLost, UserError

ROLL_CALL = 3.0
"""Seconds in which the ranks that are alive answer after an exchange between them has failed."""

NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
NOT_WRITABLE = (errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO, errno.ESTALE)


def explain(
    error: Exception, config: Config, world: World, hurry: Callable[[], Any] = lambda: False
) -> Exception:
    """The error as one that tells the user what to do, where its cause is known; else itself."""
    if isinstance(error, UserError):
        return error
    if is_out_of_memory(error):
        return OutOfMemory(out_of_memory(config, str(error).splitlines()[0]))
    for cause in causes(error):
        if isinstance(cause, OSError) and cause.errno in (*NO_ROOM, *NOT_WRITABLE):
            return UserError(cannot_write(cause, config))
    if world.size > 1 and is_lost_connection(error):
        return lost_rank(error, config, world, hurry)
    return error


class OutOfMemory(LocalError):
    """This process has no memory left, where others may have some."""


def causes(error: BaseException | None) -> Iterator[BaseException]:
    """The error, and those in whose handling it was raised."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def is_out_of_memory(error: Exception) -> bool:
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    # The second is all that oneDNN says when it gets no memory for a kernel.
    signs = ("can't allocate memory", "could not create a primitive")
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in signs)


def out_of_memory(config: Config, cause: str) -> str:
    """What to change: the number of images that are in memory at once."""
    batch, parts = config.schedule.batch_size, config.world_size * config.trainer.accumulate
    more = config.trainer.accumulate * 2
    advice = [f"schedule.batch_size={max(parts, batch // 2)}, which is another recipe"]
    if batch >= parts * 2:
        advice.insert(
            0,
            f"trainer.accumulate={more}, the same updates from smaller micro-batches (without "
            "trainer.bn_group_size their BatchNorm groups are smaller too, so it is another run)",
        )
    where = "GPU" if config.device == "cuda" else "machine"
    return (
        f"out of memory: {batch // parts} images at once are too many for this {where} "
        f"(schedule.batch_size={batch}, {config.world_size} devices, "
        f"trainer.accumulate={config.trainer.accumulate}): {cause[:200]}\n"
        f"try {'; or '.join(advice)}"
    )


def cannot_write(error: OSError, config: Config) -> str:
    place = error.filename or f"into {config.run_dir}"
    mend = "make room" if error.errno in NO_ROOM else "make it writable"
    if error.errno == errno.EFBIG:
        mend = "allow larger files (ulimit -f)"
    return (
        f"cannot write {place}: {error.strerror}\n"
        f"{mend}, or move the runs to another disk (runs_dir=FOLDER); files that were there are "
        f"whole, and {AGAIN}"
    )


def is_lost_connection(error: Exception) -> bool:
    """Whether an exchange between ranks has failed: gloo has no class of its own for that."""
    if isinstance(error, dist.DistError):
        return True
    return isinstance(error, RuntimeError) and "gloo" in str(error).lower()


def in_short(error: Exception) -> str:
    """gloo's first sentence, without the place in its sources."""
    return re.sub(r"^\[.*?\] *", "", str(error).splitlines()[0]).split(". ")[0]


def lost_rank(error: Exception, config: Config, world: World, hurry: Callable[[], Any]) -> RankLost:
    """Which ranks are missing. The first of the others tells it."""
    missing = world.missing_ranks(ROLL_CALL, hurry)
    present = [rank for rank in range(world.size) if rank not in missing]
    if missing:
        who = ", ".join(f"{rank} ({world.host_of(rank)})" for rank in missing)
        subject = f"rank {who} of {world.size}" if len(missing) == 1 else f"ranks {who}"
    else:
        subject = "the connection between the ranks"
    waited = "timed out" in str(error).lower() or "timeout" in str(error).lower()
    fate = (
        f"does not answer within trainer.timeout_minutes={config.trainer.timeout_minutes:g}"
        if waited
        else "is gone"
    )
    if len(missing) > 1:
        fate = fate.replace("does not", "do not").replace("is gone", "are gone")
    lost = RankLost(f"{subject} {fate}: {in_short(error)}\n{AGAIN}")
    lost.local = present[0] == world.rank
    return lost

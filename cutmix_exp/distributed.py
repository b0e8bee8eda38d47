"""One process or many: the same calls, which do nothing where there is nothing to do."""

from __future__ import annotations

import os
import socket
import threading
import time
import uuid
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar, cast

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from cutmix_exp.errors import AGAIN, RankLost, UserError

T = TypeVar("T")


@dataclass(frozen=True)
class World:
    """This process among the others.

    Attributes:
        rank, size: its number and how many there are.
        device: where it computes.
        control: the process group by which the ranks' hosts agree; None is the default one.
        store: the launcher's small key-value store, which outlives a rank.
    """

    rank: int
    size: int
    device: torch.device
    control: Any = None
    store: Any = None

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def gather(self, value: T) -> list[T]:
        """Every rank's object (tensors on the CPU, plain containers), in the order of ranks."""
        if self.size == 1:
            return [value]
        out: list[Any] = [None] * self.size
        dist.all_gather_object(out, value, group=self.control)
        return out

    def broadcast(self, value: T) -> T:
        """Rank 0's object on every rank."""
        if self.size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0, group=self.control)
        return box[0]

    def together(self, action: Callable[[], T]) -> T:
        """What `action` returns here, if it succeeds on every rank.

        Raises:
            UserError: the first rank's error, on all ranks, so that none waits for another.
        """
        result, message = None, None
        try:
            result = action()
        except UserError as error:
            message = str(error)
        failed = [m for m in self.gather(message) if m is not None]
        if failed:
            raise UserError(failed[0])
        return cast(T, result)

    def average_(self, tensors: list[Tensor]) -> None:
        """Replace each tensor by its mean over the ranks."""
        if self.size > 1 and tensors:
            flat = torch.cat([t.flatten() for t in tensors])
            dist.all_reduce(flat)
            flat /= self.size
            for tensor, mean in zip(tensors, flat.split([t.numel() for t in tensors]), strict=True):
                tensor.copy_(mean.view_as(tensor))

    def barrier(self) -> None:
        if self.size > 1:
            dist.barrier(group=self.control)

    def ask(self, wishes: list[int]) -> Callable[[], list[int]]:
        """Start to find the largest over the ranks of each number; what is returned waits for them.

        The exchange goes on beside whatever is done before they are asked for.
        """
        if self.size == 1:
            return lambda: wishes
        largest = torch.tensor(wishes, dtype=torch.int32)
        work = dist.all_reduce(largest, dist.ReduceOp.MAX, group=self.control, async_op=True)

        def answer() -> list[int]:
            work.wait()
            return [int(value) for value in largest.tolist()]

        return answer

    def missing_ranks(self, wait: float, hurry: Callable[[], Any]) -> list[int]:
        """The ranks that do not answer a roll call within `wait` seconds, after an exchange has
        failed: it has failed on all that are alive, and they answer too. All other ranks, if the
        store is out of reach. Ends early when `hurry` is true."""
        missing, ended = [r for r in range(self.size) if r != self.rank], threading.Event()

        def call() -> None:
            self.store.set(f"here/{self.rank}", "")
            while missing and not ended.wait(0.1):
                missing[:] = [r for r in missing if not self.store.check([f"here/{r}"])]

        thread = threading.Thread(target=call, daemon=True)  # the store may never answer
        thread.start()
        until = time.monotonic() + wait
        while thread.is_alive() and time.monotonic() < until and not hurry():
            thread.join(0.1)
        # A program that ends while a thread is within the store is aborted, with a dump.
        ended.set()
        thread.join(1.0)
        return list(missing)

    def host_of(self, rank: int) -> str:
        """Where a rank runs, or ran."""
        return bytes(self.store.get(f"host/{rank}")).decode()

    def wrap(self, network: nn.Module, *, sync_bn: bool) -> nn.Module:
        """DistributedDataParallel, where there are other ranks. BatchNorm buffers stay each rank's
        own; the trainer averages them where that is due."""
        if self.size == 1:
            return network
        if sync_bn:
            network = nn.SyncBatchNorm.convert_sync_batchnorm(network)
        devices = [self.device] if self.device.type == "cuda" else None
        with warnings.catch_warnings():
            # torch 2.15 announces a successor of broadcast_buffers that 2.11 does not have.
            warnings.simplefilter("ignore", FutureWarning)
            return nn.parallel.DistributedDataParallel(
                network, device_ids=devices, broadcast_buffers=False, gradient_as_bucket_view=True
            )


def share(size: int, rank: int, world_size: int) -> np.ndarray:
    """Positions of a rank in a batch: contiguous, and the ranks' counts differ by at most one."""
    return np.arange(size * rank // world_size, size * (rank + 1) // world_size)


def share_or_last(size: int, rank: int, world_size: int) -> np.ndarray:
    """What a rank computes on: its share, or the batch's last image where it has none, since it
    must join every collective."""
    mine = share(size, rank, world_size)
    return mine if len(mine) else np.array([size - 1])


def launched_world() -> int | None:
    """The number of processes that a launcher (torchrun, or ours) has started, or None."""
    if "RANK" in os.environ and "WORLD_SIZE" in os.environ:
        return int(os.environ["WORLD_SIZE"])
    return None


def is_main_process() -> bool:
    """Whether this process speaks for all."""
    return launched_world() is None or os.environ["RANK"] == "0"


def fresh_store(store: Any, rank: int, size: int, timeout: timedelta) -> Any:
    """A part of the launcher's store that no earlier attempt of the same processes has written to.

    torchrun keeps one store over its restarts: a rank that is started again could read where the
    dead ranks were to be reached, and nothing that the launcher tells to all ranks of several
    machines counts the attempts. So rank 0 makes a name for the attempt up, and answers each rank's
    own fresh word with it; what is left of earlier attempts does not fit.

    Raises:
        RankLost: a rank does not come within the timeout.
    """
    own, until = uuid.uuid4().hex, time.monotonic() + timeout.total_seconds()
    others = list(range(1, size)) if rank == 0 else []
    if rank:
        store.set(f"hello/{rank}", own)
    name = own if rank == 0 else ""
    while others or not name:
        for other in list(others):
            if store.check([f"hello/{other}"]):
                word = store.get(f"hello/{other}").decode()
                store.set(f"welcome/{other}", f"{word} {own}")
            if store.check([f"{own}/{other}"]):
                others.remove(other)
        if rank and store.check([f"welcome/{rank}"]):
            word, offered = store.get(f"welcome/{rank}").decode().split()
            if word == own:
                name = offered
                store.set(f"{name}/{rank}", "")
        if time.monotonic() > until:
            raise RankLost(
                f"{f'ranks {others} of {size} have' if others else 'rank 0 has'} not come within "
                f"trainer.timeout_minutes={timeout.total_seconds() / 60:g}; {AGAIN}"
            )
        time.sleep(0.01)
    return dist.PrefixStore(name, store)


@contextmanager
def world_of(device_type: str, timeout_minutes: float = 30.0) -> Iterator[World]:
    """Join the process group that the launcher's environment describes (one process: none).

    CPU cores are dealt out evenly to the processes of this machine. A rank that keeps the others
    waiting for longer than the timeout is an error on all others.
    """
    size = launched_world() or 1
    rank = int(os.environ["RANK"]) if size > 1 else 0
    local_rank = int(os.environ.get("LOCAL_RANK", rank)) if size > 1 else 0
    device = torch.device(device_type)
    if device_type == "cuda":
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
    if size == 1:
        yield World(rank, size, device)
        return
    if device_type == "cpu":
        cores = len(os.sched_getaffinity(0))
        torch.set_num_threads(max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", size))))
    timeout = timedelta(minutes=timeout_minutes)
    store = fresh_store(next(dist.rendezvous("env://"))[0], rank, size, timeout)
    # NCCL ends a process that has waited too long where it stands; that it does so a little later
    # leaves the word to the hosts, who can say which rank is missing.
    backend, extra = ("nccl", 1) if device_type == "cuda" else ("gloo", 0)
    dist.init_process_group(
        backend, store=store, rank=rank, world_size=size, timeout=timeout + timedelta(minutes=extra)
    )
    control = dist.new_group(backend="gloo", timeout=timeout)
    store.set(f"host/{rank}", socket.gethostname())
    yield World(rank, size, device, control, store)
    # Not after an error: leaving could wait for ranks that wait for this one.
    dist.destroy_process_group()

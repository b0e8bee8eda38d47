"""The path of large images: files are decoded, cropped and flipped in worker processes by
torchvision, and travel to the device as uint8.

What happens to an image was drawn before, for the whole global batch; a worker only carries it
out. So nothing depends on how many workers there are.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader
from torch.utils.data import Dataset as TorchDataset
from torchvision.transforms.v2 import functional as vision

from cutmix_exp.aug.base import PixelOp, Regularizer
from cutmix_exp.data.augment import crop_boxes
from cutmix_exp.data.boxes import Framing
from cutmix_exp.data.decoding import OR_LEAVE_OUT, BadImage, decode
from cutmix_exp.data.pipeline import BatchPlan, Pipeline
from cutmix_exp.data.sources import Dataset, FileSet
from cutmix_exp.distributed import share_or_last
from cutmix_exp.errors import AGAIN, LocalError, UserError
from cutmix_exp.stopping import held_back, obey_parent


def cropped(image: Tensor, dataset: Dataset, draw: np.ndarray, mirrored: bool) -> Tensor:
    """A training image uint8 [3, S, S] from a decoded one [3, H, W].

    `pad` first resizes the shorter side to S and takes the centre, if the image is of another size.
    """
    size = dataset.image_size
    if dataset.crop == "random_resized":
        ((top, left, height, width),) = crop_boxes(dataset, draw[None], *image.shape[1:]).tolist()
        image = vision.resized_crop(image, top, left, height, width, [size, size], antialias=True)
    elif dataset.crop == "window":
        assert dataset.crop_resize is not None, "a window has one"
        image = vision.resize(image, [dataset.crop_resize] * 2, antialias=True)
        top, left = draw.tolist()
        image = image[:, top : top + size, left : left + size]
    else:
        image = framed(image, Framing(size, size))
        mode = {"zeros": "constant", "reflect": "reflect"}[dataset.padding_mode]
        image = vision.pad(image, [dataset.crop_padding], padding_mode=mode)
        top, left = draw.tolist()
        image = image[:, top : top + size, left : left + size]
    return image.flip(-1) if mirrored else image


def framed(image: Tensor, framing: Framing) -> Tensor:
    """The centre [3, size, size] of an image [3, H, W] after resizing."""
    height, width = image.shape[1:]
    if framing.resized_to(height, width) != (height, width):
        image = vision.resize(image, list(framing.resized_to(height, width)), antialias=True)
    return vision.center_crop(image, [framing.size, framing.size])


Task = tuple[int, np.ndarray | None, bool, tuple[int, ...]]
"""An image's index; how it is cropped (None: the centre, for evaluation); whether it is mirrored; the
seeds of the operations on its bytes."""


class DecodedCrops(TorchDataset):
    """What a worker does: tasks to images."""

    def __init__(self, files: FileSet, dataset: Dataset, changes: list[PixelOp]) -> None:
        self.files, self.dataset, self.changes = files, dataset, changes

    def __getitem__(self, task: Task) -> Tensor:
        index, draw, mirrored, seeds = task
        image = decode(self.files.path(index))
        if draw is None:
            return framed(image, self.dataset.framing)
        image = cropped(image, self.dataset, draw, mirrored)
        for op, seed in zip(self.changes, seeds, strict=True):
            image = op.change(image, seed)
        return image

    def __getitems__(self, tasks: list[Task]) -> tuple[Tensor | str, float]:
        """A batch uint8 [n, 3, S, S], or the message of what went wrong (an exception would reach
        the user as the worker's traceback); and the seconds that it took."""
        began = time.monotonic()
        try:
            images = torch.stack([self[task] for task in tasks])
        except UserError as error:
            return self._told(error), 0.0
        return images, time.monotonic() - began

    def _told(self, error: UserError) -> str:
        if not self.files.root.is_dir():
            return f"the data set's folder {self.files.root} is gone; bring it back, {AGAIN}"
        if isinstance(error, BadImage):
            return f"{error}, {OR_LEAVE_OUT}"
        return f"{error}; mend that, {AGAIN}"


def as_it_is(images: Any) -> Any:
    return images


class Decoder:
    """Lists of tasks to batches of images, by worker processes that work ahead.

    Attributes:
        decoded, seconds: images so far, and what decoding them took, summed over the workers.
    """

    def __init__(
        self,
        files: FileSet,
        dataset: Dataset,
        device: torch.device,
        changes: list[PixelOp] | None = None,
    ) -> None:
        self.crops = DecodedCrops(files, dataset, changes or [])
        here = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        cores = len(os.sched_getaffinity(0))
        self.workers = dataset.workers if dataset.workers is not None else max(1, cores // here)
        self.device = device
        self.decoded, self.seconds = 0, 0.0

    @property
    def rate(self) -> float:
        """Images a second that all workers together can decode; infinite before the first."""
        return max(self.workers, 1) * self.decoded / self.seconds if self.seconds else math.inf

    def now(self, tasks: list[Task]) -> Tensor:
        """One batch, decoded in this process. Raises LocalError: a file is no image."""
        return self._checked(self.crops.__getitems__(tasks))

    def ahead(self, batches: list[list[Task]] | BatchTasks) -> Iterator[Tensor]:
        """All batches, in order. Raises LocalError: a file is no image."""
        loader = DataLoader(
            self.crops,
            batch_sampler=batches,
            num_workers=self.workers,
            collate_fn=as_it_is,
            # Not spawn, which the processes of devices=N inherit: a worker would import torch anew.
            multiprocessing_context="fork" if self.workers else None,
            pin_memory=self.device.type == "cuda",
            # The loader's own seed for its workers, who draw nothing: not from torch's generator.
            generator=torch.Generator(),
            worker_init_fn=obey_parent,
        )
        with held_back():  # while the workers are started
            made = iter(loader)
        for batch in made:
            yield self._checked(batch)

    def _checked(self, made: tuple[Tensor | str, float]) -> Tensor:
        images, seconds = made
        if isinstance(images, str):
            raise LocalError(images)
        self.decoded, self.seconds = self.decoded + len(images), self.seconds + seconds
        return images.to(self.device, non_blocking=True)


class BatchTasks:
    """The tasks of an epoch's batches, made one by one as the workers ask for them; keeps the
    plans until their images have come."""

    def __init__(self, pipeline: StreamingPipeline, plans: Iterator[BatchPlan], steps: int) -> None:
        self.pipeline, self.plans, self.steps = pipeline, plans, steps
        self.waiting: list[tuple[BatchPlan, np.ndarray]] = []

    def __len__(self) -> int:
        return self.steps

    def __iter__(self) -> Iterator[list[Task]]:
        for plan in self.plans:
            held = self.pipeline.needed(plan)
            self.waiting.append((plan, held))
            yield self.pipeline.tasks(plan, held)


@dataclass(frozen=True)
class StreamedPlan(BatchPlan):
    """A plan whose images, those that one rank needs, are at hand.

    Attributes:
        held: int64 [n], sorted positions in the global batch.
        decoded: uint8 [n, 3, S, S] on the device.
    """

    held: np.ndarray
    decoded: Tensor


class StreamingPipeline(Pipeline):
    """Serves training batches from files.

    A rank pairs the images of its own share: decoding its partners as well would double the work.
    """

    def __init__(
        self,
        train: FileSet,
        dataset: Dataset,
        aug: Regularizer,
        *,
        rank: int,
        world_size: int,
        **settings: Any,
    ) -> None:
        device = settings["device"]
        super().__init__(train.labels.to(device), dataset, aug, **settings)
        self.rank, self.world_size = rank, world_size
        self.decoder = Decoder(train, dataset, device, list(aug.on_pixels.values()))

    def tasks(self, plan: BatchPlan, positions: np.ndarray) -> list[Task]:
        """What is to be done for some positions of a global batch."""
        seeds = [plan.image[name] for name in self.aug.on_pixels]
        return [
            (
                int(plan.index[p]),
                plan.crop[p],
                bool(plan.mirrored[p]),
                tuple(int(of_op[p]) for of_op in seeds),
            )
            for p in positions
        ]

    def needed(self, plan: BatchPlan) -> np.ndarray:
        """The positions whose images this rank needs, sorted: its share and the partners."""
        mine = share_or_last(len(plan), self.rank, self.world_size)
        return np.unique(np.concatenate([mine, *plan.mix.image_partners[:, mine]]))

    @property
    def decoding_rate(self) -> float:
        return self.world_size * self.decoder.rate

    def plans(self, epoch: int, first_step: int, epochs: int) -> Iterator[BatchPlan]:
        steps = self.steps_per_epoch - first_step
        tasks = BatchTasks(self, super().plans(epoch, first_step, epochs), steps)
        for decoded in self.decoder.ahead(tasks):
            plan, held = tasks.waiting.pop(0)
            drawn = {field.name: getattr(plan, field.name) for field in fields(plan)}
            yield StreamedPlan(**drawn, held=held, decoded=decoded)

    def pixels(self, plan: BatchPlan, positions: np.ndarray) -> Tensor:
        if not isinstance(plan, StreamedPlan):
            return self.decoder.now(self.tasks(plan, positions))
        return plan.decoded[self.put(np.searchsorted(plan.held, positions))]


class StreamedSet:
    """A set whose images are decoded each time it is evaluated: the centre crop of each."""

    def __init__(self, files: FileSet, dataset: Dataset, device: torch.device) -> None:
        self.labels = files.labels
        self.decoder = Decoder(files, dataset, device)

    def __len__(self) -> int:
        return len(self.labels)

    def batches(self, indices: list[np.ndarray]) -> Iterator[Tensor]:
        """The images uint8 [n, 3, S, S], on the device, of each list of indices."""
        yield from self.decoder.ahead(
            [[(int(i), None, False, ()) for i in part] for part in indices]
        )

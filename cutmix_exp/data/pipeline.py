"""From a set of images to the batches that the network sees.

`Pipeline` draws everything for a global batch and finishes it on the device: colours,
normalisation, image operations, mixing, soft labels. Where the cropped pixels come from is the
subclass's: `ResidentPipeline` cuts them from a set that lives on the device, without worker
processes; `streaming.StreamingPipeline` decodes files.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cutmix_exp.aug.base import BatchShape, MixPlan, Regularizer, mix_targets, taken
from cutmix_exp.data.augment import (
    crop_boxes,
    draw_colors,
    draw_crops,
    pad_images,
    recolor,
    resized_crops,
)
from cutmix_exp.data.sampling import epoch_order, steps_per_epoch
from cutmix_exp.data.sources import Dataset, FileSet, ImageSet
from cutmix_exp.seeding import stream

Maps = tuple[tuple[int, int], ...]
Draw = Callable[[BatchShape, float, np.random.Generator], np.ndarray]


@dataclass(frozen=True)
class BatchPlan:
    """Everything that is drawn for one global batch of B images.

    Attributes:
        index: int64 [B], which training images. Where the mixer wants guests, they follow: this
            and the next four have 2B rows.
        crop: [B, ...], see `augment.draw_crops`.
        mirrored: bool [B].
        color: float64 [B, 9] or [B, 0], see `augment.draw_colors`.
        image: the plans of the image operations, by atom; first axis B.
        mix: the mixer's plan of the batch.
    """

    index: np.ndarray
    crop: np.ndarray
    mirrored: np.ndarray
    color: np.ndarray
    image: dict[str, np.ndarray]
    mix: MixPlan

    def __len__(self) -> int:
        return self.mix.weights.shape[1]


@dataclass(frozen=True)
class Batch:
    """A rank's part of a global batch.

    Attributes:
        images: float32 [n, 3, H, W], normalised and mixed.
        targets: float32 [n, K], soft labels whose rows sum to 1.
        mix: the plan of these images, by which features may still be mixed in the network.
        global_size: B, the number of images of all ranks together.
    """

    images: Tensor
    targets: Tensor
    mix: MixPlan
    global_size: int


class Normalizer:
    """uint8 images [n, 3, H, W] to float32: x/255, minus the mean, over the std, in this order and
    bit-equal with torchvision's ToTensor and Normalize."""

    def __init__(self, dataset: Dataset, device: torch.device) -> None:
        self.mean = torch.tensor(dataset.mean, device=device)[:, None, None]
        self.std = torch.tensor(dataset.std, device=device)[:, None, None]

    def __call__(self, images: Tensor) -> Tensor:
        return self.standardize(self.unit(images))

    def unit(self, images: Tensor) -> Tensor:
        """uint8 to float32 in [0, 1]."""
        return images.float().div_(255)

    def standardize(self, images: Tensor) -> Tensor:
        """Minus the mean, over the std; in place."""
        return images.sub_(self.mean).div_(self.std)

    def inverse(self, images: Tensor) -> Tensor:
        """Normalised images back to [0, 1], for looking at them."""
        return (images * self.std + self.mean).clamp(0, 1)


class Pipeline:
    """Serves training batches. Subclasses say where cropped and flipped pixels come from.

    Args:
        labels: int64 [N], of the training images, on the device.
        shares, maps: see `BatchShape`.
    """

    def __init__(
        self,
        labels: Tensor,
        dataset: Dataset,
        aug: Regularizer,
        *,
        seed: int,
        batch_size: int,
        device: torch.device,
        shares: int = 1,
        maps: Maps = (),
        repeats: int = 1,
    ) -> None:
        self.labels = labels
        self.dataset = dataset
        self.num_classes = dataset.num_classes
        self.shape = (dataset.image_size, dataset.image_size)
        self.normalize = Normalizer(dataset, device)
        self.aug = aug
        self.seed = seed
        self.batch_size = batch_size
        self.repeats = repeats
        self.device = device
        self.shares = shares
        self.maps = maps
        self._order: tuple[int, np.ndarray] | None = None

    def pixels(self, plan: BatchPlan, positions: np.ndarray) -> Tensor:
        """Images uint8 [n, 3, H, W] at some positions of the global batch: cropped, flipped, and
        changed by the operations on bytes."""
        raise NotImplementedError

    @property
    def decoding_rate(self) -> float:
        """Images a second that can be decoded on all ranks; infinite where none need be."""
        return math.inf

    @property
    def steps_per_epoch(self) -> int:
        return steps_per_epoch(len(self.labels), self.batch_size)

    def plans(self, epoch: int, first_step: int, epochs: int) -> Iterator[BatchPlan]:
        """The plans of an epoch's steps from `first_step` on, of a training of `epochs`."""
        for step in range(first_step, self.steps_per_epoch):
            yield self.plan(epoch, step, (epoch + step / self.steps_per_epoch) / epochs)

    def plan(self, epoch: int, step: int, progress: float = 0.0) -> BatchPlan:
        """Draw what happens to one global batch; one stream per purpose (see seeding.py)."""
        if self._order is None or self._order[0] != epoch:
            count, batch_size = len(self.labels), self.batch_size
            order = epoch_order(
                self.seed, epoch, count, repeats=self.repeats, batch_size=batch_size
            )
            self._order = (epoch, order)
        index = self._order[1][step * self.batch_size : (step + 1) * self.batch_size]

        def draws(purpose: str) -> np.random.Generator:
            return stream(self.seed, purpose, epoch, step)

        shapes = [BatchShape(len(index), *self.shape, shares=self.shares, maps=self.maps)]
        if self.aug.mix.wants_guests:
            guests = draws("guests").integers(0, len(self.labels), len(index))
            index = np.concatenate([index, guests])
            shapes *= 2

        def rows(purpose: str, draw: Draw) -> np.ndarray:
            """Drawn for the batch and then for its guests, who thus shift none of its draws."""
            rng = draws(purpose)
            return np.concatenate([draw(shape, progress, rng) for shape in shapes])

        mirrored = rows("flip", lambda shape, _, rng: rng.random(shape.batch) < 0.5)
        return BatchPlan(
            index=index,
            crop=rows("crop", lambda shape, _, rng: draw_crops(self.dataset, shape.batch, rng)),
            mirrored=mirrored & self.dataset.flip,
            color=rows("color", lambda shape, _, rng: draw_colors(self.dataset, shape.batch, rng)),
            image={n: rows(f"image/{n}", op.sample) for n, op in self.aug.image.items()},
            mix=self.aug.mix.sample(shapes[0], progress, draws("mix")),
        )

    def images_at(self, plan: BatchPlan, positions: np.ndarray) -> Tensor:
        """Images [n, 3, H, W] at some positions of the global batch, all but mixed."""
        images = self.normalize.unit(self.pixels(plan, positions))
        images = self.normalize.standardize(recolor(images, plan.color[positions]))
        for name, op in self.aug.image.items():
            if name not in self.aug.on_pixels:
                images = op.apply(plan.image[name][positions], images)
        return images

    def targets_at(self, plan: BatchPlan, positions: np.ndarray) -> Tensor:
        """One-hot labels float32 [n, K] at some positions of the global batch."""
        labels = self.labels.index_select(0, self.put(plan.index[positions]))
        # Not F.one_hot, which looks at the labels first: a GPU would be waited for.
        zeros = torch.zeros(len(labels), self.num_classes, device=self.device)
        return zeros.scatter_(1, labels[:, None], 1.0)

    def pool(self, plan: BatchPlan, positions: np.ndarray) -> tuple[Tensor, list[np.ndarray]]:
        """The unmixed images that are needed at some positions [m, 3, H, W], each made once however
        often it is a source, and where in them each source's images are, int64 [n] each."""
        where = np.stack([positions, *plan.mix.image_partners[:, positions]])
        if len(where) == 1:
            return self.images_at(plan, positions), [np.arange(len(positions))]
        needed, which = np.unique(where, return_inverse=True)
        return self.images_at(plan, needed), list(which.reshape(where.shape))

    def sources(self, plan: BatchPlan, positions: np.ndarray) -> list[Tensor]:
        """The unmixed images [n, 3, H, W] that meet at each position: its own, then its partners'."""
        images, rows = self.pool(plan, positions)
        return [taken(images, row) for row in rows]

    def batch(self, plan: BatchPlan, positions: np.ndarray) -> Batch:
        """The mixed images and soft labels of some positions of the global batch."""
        images, rows = self.pool(plan, positions)
        mix, mixed = self.aug.mix.combine(plan.mix.at(positions), images, rows)
        labels = [positions, *mix.partners]
        return Batch(
            images=mixed,
            targets=mix_targets(mix, [self.targets_at(plan, p) for p in labels]),
            mix=mix,
            global_size=len(plan),
        )

    def put(self, array: np.ndarray) -> Tensor:
        """An array of the host on the device."""
        return torch.from_numpy(array).to(self.device, non_blocking=True)


class ResidentPipeline(Pipeline):
    """Serves training batches from a set that lives on the device.

    Partners are drawn from the global batch: a rank makes the partners of its share itself, from
    the same keyed draws as the rank that owns them, so that no images travel between ranks.
    """

    def __init__(
        self, train: ImageSet, dataset: Dataset, aug: Regularizer, **settings: Any
    ) -> None:
        held = train.to(settings["device"])
        super().__init__(held.labels, dataset, aug, **settings)
        self.shape = (held.images.shape[2], held.images.shape[3])
        if dataset.crop == "random_resized":
            self.images = held.images
        else:
            self.images = pad_images(held.images, dataset.crop_padding, dataset.padding_mode)
            self.windows = windows(self.images, self.shape)
            if self.device.type == "cpu":
                sides = (self.images.numpy(), self.images.numpy()[..., ::-1])
                self.views = [host_windows(side, self.shape) for side in sides]

    def pixels(self, plan: BatchPlan, positions: np.ndarray) -> Tensor:
        index, mirrored = plan.index[positions], plan.mirrored[positions]
        if self.dataset.crop == "random_resized":
            boxes = crop_boxes(self.dataset, plan.crop[positions], *self.shape)
            images = resized_crops(self.images[self.put(index)], self.put(boxes), self.shape[0])
            images = mirror(images, self.put(mirrored))
        elif self.device.type == "cpu":
            images = self.cut_on_the_host(index, plan.crop[positions], mirrored)
        else:
            corner = self.put(plan.crop[positions])
            images = self.windows[self.put(index), :, corner[:, 0], corner[:, 1]]
            images = mirror(images, self.put(mirrored))
        for name, op in self.aug.on_pixels.items():
            seeds = plan.image[name][positions].tolist()
            images = torch.stack([op.change(i, s) for i, s in zip(images, seeds, strict=True)])
        return images

    def cut_on_the_host(
        self, index: np.ndarray, corner: np.ndarray, mirrored: np.ndarray
    ) -> Tensor:
        """Windows uint8 [n, 3, H, W], some mirrored, in one pass over memory: a mirrored window is
        one of the mirrored padded image, of which NumPy has a view."""
        out = np.empty((len(index), 3, *self.shape), np.uint8)
        last = self.views[0].shape[3] - 1  # the rightmost window
        sides = ((~mirrored, corner[:, 1]), (mirrored, last - corner[:, 1]))
        for view, (which, left) in zip(self.views, sides, strict=True):
            out[which] = view[index[which], :, corner[which, 0], left[which]]
        return torch.from_numpy(out)


def host_windows(padded: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """`windows` for NumPy, which copies whole windows where torch goes pixel by pixel."""
    return np.lib.stride_tricks.sliding_window_view(padded, shape, axis=(2, 3))


def windows(padded: Tensor, shape: tuple[int, int]) -> Tensor:
    """A view [N, 3, 2p+1, 2p+1, H, W]: every window of every padded image, without a copy."""
    return padded.unfold(2, shape[0], 1).unfold(3, shape[1], 1)


def mirror(images: Tensor, which: Tensor) -> Tensor:
    """Images [n, 3, H, W], of which some (bool [n]) are mirrored."""
    return torch.where(which[:, None, None, None], images.flip(-1), images)


def make_pipeline(
    train: ImageSet | FileSet,
    dataset: Dataset,
    aug: Regularizer,
    *,
    rank: int = 0,
    world_size: int = 1,
    **settings: Any,
) -> Pipeline:
    """The pipeline that fits the set: decoded images are resident, files stream.

    Args:
        settings: as in `Pipeline`.
    """
    if isinstance(train, ImageSet):
        return ResidentPipeline(train, dataset, aug, **settings)
    from cutmix_exp.data.streaming import StreamingPipeline

    return StreamingPipeline(train, dataset, aug, rank=rank, world_size=world_size, **settings)

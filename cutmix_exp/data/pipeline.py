"""The path of small images: the whole set lives on the device as uint8; crop, flip, normalise and
mix are batched tensor work, without worker processes."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from cutmix_exp.aug.base import BatchShape, MixPlan, Regularizer, mix_targets
from cutmix_exp.data.sampling import epoch_order, steps_per_epoch
from cutmix_exp.data.sources import Dataset, ImageSet
from cutmix_exp.seeding import stream


@dataclass(frozen=True)
class BatchPlan:
    """Everything that is drawn for one global batch of B images.

    Attributes:
        index: int64 [B], which training images.
        corner: int64 [B, 2], top and left of the crop in the padded image.
        mirrored: bool [B].
        image: the plans of the image operations, by atom; first axis B.
        mix: the mixer's plan.
    """

    index: np.ndarray
    corner: np.ndarray
    mirrored: np.ndarray
    image: dict[str, np.ndarray]
    mix: MixPlan

    def __len__(self) -> int:
        return len(self.index)


@dataclass(frozen=True)
class Batch:
    """A rank's part of a global batch.

    Attributes:
        images: float32 [n, 3, H, W], normalised and mixed.
        targets: float32 [n, K], soft labels whose rows sum to 1.
        global_size: B, the number of images of all ranks together.
    """

    images: Tensor
    targets: Tensor
    global_size: int


class Normalizer:
    """uint8 images [n, 3, H, W] to float32: x/255, minus the mean, over the std, in this order and
    bit-equal with torchvision's ToTensor and Normalize."""

    def __init__(self, dataset: Dataset, device: torch.device) -> None:
        self.mean = torch.tensor(dataset.mean, device=device)[:, None, None]
        self.std = torch.tensor(dataset.std, device=device)[:, None, None]

    def __call__(self, images: Tensor) -> Tensor:
        return images.float().div_(255).sub_(self.mean).div_(self.std)

    def inverse(self, images: Tensor) -> Tensor:
        """Normalised images back to [0, 1], for looking at them."""
        return (images * self.std + self.mean).clamp(0, 1)


class ResidentPipeline:
    """Serves training batches from a set that lives on the device.

    Partners are drawn from the global batch: a rank makes the partners of its share itself, from
    the same keyed draws as the rank that owns them, so that no images travel between ranks.
    """

    def __init__(
        self,
        train: ImageSet,
        dataset: Dataset,
        aug: Regularizer,
        *,
        seed: int,
        batch_size: int,
        device: torch.device,
        repeats: int = 1,
    ) -> None:
        held = train.to(device)
        pad = dataset.crop_padding
        self.labels = held.labels
        # A view [N, 3, 2p+1, 2p+1, H, W]: every crop of every padded image, without a copy.
        height, width = held.images.shape[2:]
        padded = F.pad(held.images, (pad, pad, pad, pad))
        self.crops = padded.unfold(2, height, 1).unfold(3, width, 1)
        self.shape = (height, width)
        self.pad = pad
        self.flip = dataset.flip
        self.num_classes = dataset.num_classes
        self.normalize = Normalizer(dataset, device)
        self.aug = aug
        self.seed = seed
        self.batch_size = batch_size
        self.repeats = repeats
        self.device = device
        self._order: tuple[int, np.ndarray] | None = None

    @property
    def steps_per_epoch(self) -> int:
        return steps_per_epoch(len(self.labels), self.batch_size)

    def plan(self, epoch: int, step: int, progress: float = 0.0) -> BatchPlan:
        """Draw what happens to one global batch; one stream per purpose (see seeding.py)."""
        if self._order is None or self._order[0] != epoch:
            count, batch_size = len(self.labels), self.batch_size
            order = epoch_order(
                self.seed, epoch, count, repeats=self.repeats, batch_size=batch_size
            )
            self._order = (epoch, order)
        index = self._order[1][step * self.batch_size : (step + 1) * self.batch_size]
        shape = BatchShape(len(index), *self.shape)

        def draws(purpose: str) -> np.random.Generator:
            return stream(self.seed, purpose, epoch, step)

        mirrored = draws("flip").random(len(index)) < 0.5
        return BatchPlan(
            index=index,
            corner=draws("crop").integers(0, 2 * self.pad + 1, size=(len(index), 2)),
            mirrored=mirrored & self.flip,
            image={n: op.sample(shape, draws(f"image/{n}")) for n, op in self.aug.image.items()},
            mix=self.aug.mix.sample(shape, progress, draws("mix")),
        )

    def images_at(self, plan: BatchPlan, positions: np.ndarray) -> Tensor:
        """Images [n, 3, H, W] at some positions of the global batch, all but mixed."""
        index, corner, mirrored = (
            torch.from_numpy(a[positions]).to(self.device, non_blocking=True)
            for a in (plan.index, plan.corner, plan.mirrored)
        )
        images = self.crops[index, :, corner[:, 0], corner[:, 1]]
        images = torch.where(mirrored[:, None, None, None], images.flip(-1), images)
        images = self.normalize(images)
        for name, op in self.aug.image.items():
            images = op.apply(plan.image[name][positions], images)
        return images

    def targets_at(self, plan: BatchPlan, positions: np.ndarray) -> Tensor:
        """One-hot labels float32 [n, K] at some positions of the global batch."""
        index = torch.from_numpy(plan.index[positions]).to(self.device, non_blocking=True)
        return F.one_hot(self.labels[index], self.num_classes).float()

    def sources(self, plan: BatchPlan, positions: np.ndarray) -> list[Tensor]:
        """The unmixed images [n, 3, H, W] that meet at each position: its own, then its partners'.

        Each image is made once, however often it is a source.
        """
        where = np.stack([positions, *plan.mix.partners[:, positions]])
        if len(where) == 1:
            return [self.images_at(plan, positions)]
        needed, which = np.unique(where, return_inverse=True)
        images = self.images_at(plan, needed)
        return [images[torch.from_numpy(row)] for row in which.reshape(where.shape)]

    def batch(self, plan: BatchPlan, positions: np.ndarray) -> Batch:
        """The mixed images and soft labels of some positions of the global batch."""
        mix = plan.mix.at(positions)
        labels = [positions, *mix.partners]
        return Batch(
            images=self.aug.mix.apply(mix, self.sources(plan, positions)),
            targets=mix_targets(mix, [self.targets_at(plan, p) for p in labels]),
            global_size=len(plan),
        )

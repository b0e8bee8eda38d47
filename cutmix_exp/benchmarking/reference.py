"""What ours is compared with: a plain training loop in the style of the CutMix authors' code, and
the usual ways with PIL, torchvision and timm. Nothing of the package's fast paths is used here.
inputs.py says what a subject is.
"""

from __future__ import annotations

import io
import itertools
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torch.utils.data import Dataset as TorchDataset
from torchvision import transforms

from cutmix_exp.benchmarking.inputs import (
    CLASSES,
    MEAN,
    STD,
    Work,
    jpeg_files,
    label_of,
    random_batch,
    small_images,
)

PCA_STD = torch.tensor([0.2175, 0.0188, 0.0045])
PCA_AXES = torch.tensor(
    [[-0.5675, 0.7192, 0.4009], [-0.5808, -0.0045, -0.8140], [-0.5836, -0.6948, 0.4203]]
)


class PilSet(TorchDataset):
    """Arrays to PIL images to tensors, one by one, as torchvision's CIFAR data set does."""

    def __init__(self, transform: Any) -> None:
        self.images, self.labels = small_images()
        self.transform = transform

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.transform(Image.fromarray(self.images[index])), int(self.labels[index])


class JpegSet(TorchDataset):
    """JPEG files to tensors, one by one, as torchvision's ImageFolder does."""

    def __init__(self, folder: Path, transform: Any) -> None:
        self.files = jpeg_files(folder)
        self.transform = transform

    def __len__(self) -> int:
        return 100 * len(self.files)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        file_name = self.files[index % len(self.files)]
        with open(file_name, "rb") as file:
            image = Image.open(file).convert("RGB")
        return self.transform(image), label_of(file_name)


class JitterAndLighting:
    """The authors' ColorJitter(0.4, 0.4, 0.4) and Lighting(0.1), on a tensor [3, H, W] in [0, 1]."""

    def __call__(self, image: Tensor) -> Tensor:
        grey = (image * torch.tensor([0.299, 0.587, 0.114])[:, None, None]).sum(0, keepdim=True)
        others = [torch.zeros_like(image), grey.mean().expand_as(image), grey.expand_as(image)]
        random.shuffle(others)
        for other in others:
            image = torch.lerp(image, other, random.uniform(-0.4, 0.4))
        shift = PCA_AXES @ (PCA_STD * torch.randn(3) * 0.1)
        return image + shift[:, None, None]


def training_set(images: str) -> TorchDataset:
    """Of small images (`images` is "small"), or of the JPEG files in a folder."""
    normalize = transforms.Normalize(MEAN, STD)
    flip = transforms.RandomHorizontalFlip()
    if images == "small":
        crop = transforms.RandomCrop(32, padding=4)
        return PilSet(transforms.Compose([crop, flip, transforms.ToTensor(), normalize]))
    chain = [transforms.RandomResizedCrop(224), flip, transforms.ToTensor()]
    return JpegSet(Path(images), transforms.Compose([*chain, JitterAndLighting(), normalize]))


def endless(loader: DataLoader) -> Iterator[Any]:
    for _ in itertools.count():
        yield from loader


def loader_of(data: TorchDataset, batch: int, workers: int, shuffle: bool = True) -> DataLoader:
    return DataLoader(
        data,
        batch_size=batch,
        shuffle=shuffle,
        num_workers=workers,
        multiprocessing_context="fork" if workers else None,
        persistent_workers=workers > 0,
    )


def network(overrides: list[str]) -> nn.Module:
    """The same network as ours, so that the arithmetic is equal."""
    from cutmix_exp.composition import compose
    from cutmix_exp.config import from_dict, resolve

    config = resolve(from_dict(compose(overrides)))
    return config.model.build(config.dataset.num_classes)


def cut_and_mix(images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor, float]:
    """CutMix on a batch in the style of the authors' train.py: one box, one permutation."""
    height, width = images.shape[2:]
    lam = float(np.random.beta(1.0, 1.0))  # noqa: NPY002 (as a plain script would)
    order = torch.randperm(len(images))
    side = np.sqrt(1.0 - lam)
    y, x = np.random.randint(height), np.random.randint(width)  # noqa: NPY002
    half_y, half_x = int(height * side) // 2, int(width * side) // 2
    top, bottom = np.clip([y - half_y, y + half_y], 0, height)
    left, right = np.clip([x - half_x, x + half_x], 0, width)
    images[:, :, top:bottom, left:right] = images[order, :, top:bottom, left:right]
    lam = 1.0 - (bottom - top) * (right - left) / (height * width)
    return images, labels, labels[order], lam


def training(overrides: list[str], batch: int, images: str, workers: int = 2) -> Work:
    """Input, mixing and step: eager, fp32, NCHW, PIL images from a DataLoader."""
    model = network(overrides).train()
    optimizer = torch.optim.SGD(model.parameters(), 0.1, 0.9, nesterov=True, weight_decay=1e-4)
    batches = endless(loader_of(training_set(images), batch, workers))

    def step() -> int:
        return train_step(model, optimizer, *next(batches))

    return step


def stepping(overrides: list[str], batch: int, size: int) -> Work:
    """The step alone, on one batch at hand."""
    model = network(overrides).train()
    optimizer = torch.optim.SGD(model.parameters(), 0.1, 0.9, nesterov=True, weight_decay=1e-4)
    images, labels = torch.randn(batch, 3, size, size), torch.arange(batch) % 4
    return lambda: train_step(model, optimizer, images, labels)


def train_step(
    model: nn.Module, optimizer: torch.optim.Optimizer, images: Tensor, labels: Tensor
) -> int:
    images, one, other, lam = cut_and_mix(images, labels)
    logits = model(images)
    loss = lam * F.cross_entropy(logits, one) + (1 - lam) * F.cross_entropy(logits, other)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    loss.item()  # for the running mean
    return len(images)


def small_input(batch: int, workers: int) -> Work:
    """CIFAR batches, cropped, flipped and normalised, by PIL and torchvision."""
    batches = endless(loader_of(training_set("small"), batch, workers))
    return lambda: len(next(batches)[0])


def decoding(folder: str) -> Work:
    """One JPEG after the other by PIL: a random resized crop, flip, ToTensor, Normalize."""
    chain = [transforms.RandomResizedCrop(224), transforms.RandomHorizontalFlip()]
    chain += [transforms.ToTensor(), transforms.Normalize(MEAN, STD)]
    transform = transforms.Compose(chain)
    files = itertools.cycle([f.read_bytes() for f in jpeg_files(Path(folder))])

    def one() -> int:
        transform(Image.open(io.BytesIO(next(files))).convert("RGB"))
        return 1

    return one


def decoding_v2(folder: str) -> Work:
    """One JPEG after the other by torchvision: decode_jpeg and transforms.v2, uint8."""
    from torchvision.io import decode_jpeg
    from torchvision.transforms import v2

    transform = v2.Compose([v2.RandomResizedCrop(224, antialias=True), v2.RandomHorizontalFlip()])
    held = [
        torch.frombuffer(bytearray(f.read_bytes()), dtype=torch.uint8)
        for f in jpeg_files(Path(folder))
    ]
    files = itertools.cycle(held)

    def one() -> int:
        transform(decode_jpeg(next(files)))
        return 1

    return one


def torchvision_cutmix(batch: int) -> Work:
    from torchvision.transforms import v2

    mix, (images, labels) = v2.CutMix(num_classes=CLASSES), random_batch(batch)

    def one() -> int:
        mix(images, labels)
        return batch

    return one


def timm_cutmix(batch: int, mode: str) -> Work:
    from timm.data.mixup import Mixup

    mix = Mixup(
        mixup_alpha=0.0, cutmix_alpha=1.0, mode=mode, label_smoothing=0.0, num_classes=CLASSES
    )
    images, labels = random_batch(batch)

    def one() -> int:
        mix(images, labels)
        return batch

    return one


def evaluating(overrides: list[str], batch: int, workers: int = 2) -> Work:
    """Top-1 and loss of a network, by a plain loop under no_grad; one call is one batch."""
    model = network(overrides).eval()
    transform = transforms.Compose([transforms.ToTensor(), transforms.Normalize(MEAN, STD)])
    batches = endless(loader_of(PilSet(transform), batch, workers, shuffle=False))

    @torch.no_grad()
    def one() -> int:
        images, labels = next(batches)
        logits = model(images)
        F.cross_entropy(logits, labels).item()
        (logits.argmax(1) == labels).sum().item()
        return len(images)

    return one

"""What every evaluation has in common: a network under examination, a suite that looks at it, and
what the suite finds.

A suite only reads: neither the checkpoint nor the metrics of the training change. It is a part of
the config group `suite`, and a new one touches its class, its YAML and its test.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, ClassVar, Protocol

import numpy as np
import torch
import yaml
from torch import Tensor, nn

from cutmix_exp import schema
from cutmix_exp.composition import CONFIG_DIR
from cutmix_exp.config import Config
from cutmix_exp.data.pipeline import Normalizer
from cutmix_exp.data.sources import FileSet, ImageSet, Splits
from cutmix_exp.distributed import World
from cutmix_exp.errors import UserError
from cutmix_exp.schema import Part, option

BATCH = 250
"""Images that a network sees at once where a suite asks for no other number."""


class EvaluationSet(Protocol):
    """Images to be judged: an `ImageSet` on the device, or a `StreamedSet`.

    Attributes:
        labels: int64 [N].
    """

    @property
    def labels(self) -> Tensor: ...
    def __len__(self) -> int: ...
    def batches(self, indices: list[np.ndarray]) -> Iterator[Tensor]:
        """The images uint8 [n, 3, H, W], on the device, of each list of indices."""
        ...


def at_hand(data: ImageSet | FileSet, config: Config, device: torch.device) -> EvaluationSet:
    """A set ready to be evaluated: on the device, or decoded as it is needed."""
    if isinstance(data, ImageSet):
        return data.to(device)
    from cutmix_exp.data.streaming import StreamedSet

    return StreamedSet(data, config.dataset, device)


Work = Callable[[Tensor, Tensor, np.ndarray], dict[str, Tensor]]
"""What is done with a batch: images uint8 [b, 3, H, W] and labels int64 [b] on the device, and the
images' indices [b] in the set, to columns of b rows."""

Count = Callable[[int], Iterable[int]]
"""Counts up to a number of batches, like `range`; one that also shows how far it has come."""


def over_images(
    data: EvaluationSet, world: World, work: Work, batch: int | None = None, count: Count = range
) -> dict[str, np.ndarray]:
    """The columns that `work` makes of all images of a set, in the set's order, on every rank.

    Fixed whole batches are dealt to the ranks, the last one filled up with its last image and cut
    again, so every image is counted once and meets the same batch at any number of processes.
    """
    size, batch = len(data), min(batch or BATCH, len(data))
    numbers = range(world.rank, -(-size // batch), world.size)
    indices = [np.minimum(np.arange(n * batch, (n + 1) * batch), size - 1) for n in numbers]
    mine: list[tuple[int, dict[str, np.ndarray]]] = []
    for turn, images in zip(count(len(indices)), data.batches(indices), strict=True):
        number, index = numbers[turn], indices[turn]
        labels = data.labels[torch.from_numpy(index).to(data.labels.device)].to(images.device)
        real = min(batch, size - number * batch)
        columns = work(images, labels, index)
        mine.append((number, {n: c.detach().cpu()[:real].numpy() for n, c in columns.items()}))
    batches = sorted(
        (item for part in world.gather(mine) for item in part), key=lambda item: item[0]
    )
    return {name: np.concatenate([b[name] for _, b in batches]) for name in batches[0][1]}


@dataclass(frozen=True)
class Subject:
    """A network under examination, with its data.

    Attributes:
        name: the run_id, or `external-<data set>-<model>-<sha8>` for a checkpoint from elsewhere.
        checkpoint: the first 16 hexadecimal digits of the SHA-256 of the network's tensors.
        network: in evaluation mode, its parameters frozen (gradients flow to the images alone).
        config: resolved; of a network from elsewhere only `dataset`, `model`, `precision` and what
            follows from the hardware mean anything.
        splits: the data it was trained and is tested on.
        world: the processes that share the work.
        say: prints a line, on the first process.
        count: shows how far a suite has come, where a person looks on.
    """

    name: str
    checkpoint: str
    network: nn.Module
    config: Config
    splits: Splits
    world: World
    say: Callable[[str], None] = print
    count: Count = range

    @cached_property
    def test(self) -> EvaluationSet:
        return at_hand(self.splits.test, self.config, self.world.device)

    @cached_property
    def normalize(self) -> Normalizer:
        return Normalizer(self.config.dataset, self.world.device)

    @property
    def num_classes(self) -> int:
        return self.config.dataset.num_classes

    @property
    def image_size(self) -> int:
        """The side in pixels of the images that are evaluated."""
        return self.config.dataset.eval_size or self.config.dataset.image_size

    def at_hand(self, data: ImageSet | FileSet) -> EvaluationSet:
        """Any set of images of this subject's kind (another split, another source)."""
        return at_hand(data, self.config, self.world.device)

    def over(
        self, data: EvaluationSet, work: Work, batch: int | None = None
    ) -> dict[str, np.ndarray]:
        """`over_images` of a set, by this subject's processes."""
        return over_images(data, self.world, work, batch, self.count)

    def logits(self, pixels: Tensor) -> Tensor:
        """Logits float32 [n, K] of images float32 [n, 3, H, W] in [0, 1], normalised inside, so that
        gradients are those of the pixels. In the run's precision."""
        dtype = self.config.dtype
        mean, std = self.normalize.mean, self.normalize.std
        with torch.autocast(self.world.device.type, dtype, enabled=dtype != torch.float32):
            return self.network((pixels - mean) / std).float()

    def logits_of(self, images: Tensor, *, gradients: bool = False) -> Tensor:
        """Logits float32 [n, K] of images uint8 [n, 3, H, W], as in the classification's own
        evaluation, without gradients unless they are asked for."""
        dtype = self.config.dtype
        with (
            torch.set_grad_enabled(gradients),
            torch.autocast(self.world.device.type, dtype, enabled=dtype != torch.float32),
        ):
            return self.network(self.normalize(images)).float()


@dataclass(frozen=True)
class Findings:
    """What a suite has found.

    Attributes:
        metrics: numbers by name, `<what>` or `<condition>/<what>`; errors and accuracies in percent.
        curves: series of equal length by curve and column, e.g. {"centre_occlusion": {"size": [...],
            "top1_error": [...]}}.
        protocol: each choice that can move a number, beside the suite's own fields.
        per_image: columns of N rows in the order of the test set, for comparisons image by image.
            `correct` (bool [N]) is what paired tests use, where the suite has one such answer.
        pictures: PNG files by name.
        skipped: what could not be done, with the reason (data that is not at hand).
    """

    metrics: dict[str, float]
    curves: dict[str, dict[str, list[float]]] = field(default_factory=dict)
    protocol: dict[str, Any] = field(default_factory=dict)
    per_image: dict[str, np.ndarray] = field(default_factory=dict)
    pictures: dict[str, bytes] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Suite(Part):
    """The config group `suite`.

    Attributes:
        version: counted up when a change of the code moves the suite's numbers, so that what was
            kept of the old code is not taken for the new one's.
        name: of its YAML.
        in_all: whether `suite=all` runs it; variants of another suite stay out.
    """

    version: ClassVar[int] = 1

    name: str
    in_all: bool = option(True, identity=False)

    def parts(self) -> list[Suite]:
        """The suites that are run in its place: itself, unless it is a collection of others."""
        return [self]

    def gave(self, entry: dict[str, Any]) -> bool:
        """Whether an entry of a record is of this suite, as it is now."""
        return bool(entry["suite"] == schema.identity_of(self) and entry["version"] == self.version)

    def lacks(self, subject: Subject) -> str:
        """Why the suite cannot be run on this subject (data that is not at hand: which layout is
        expected, where it is published; or a network that does not fit); empty if it can."""
        return ""

    def run(self, subject: Subject) -> Findings:
        """Examine the subject. On every rank, with equal findings.

        Raises:
            UserError: what only shows on the way.
        """
        raise NotImplementedError


def suite_names() -> list[str]:
    return sorted(p.stem for p in (CONFIG_DIR / "suite").glob("*.yaml"))


def load_suite(name: str, changes: dict[str, Any] | None = None) -> Suite:
    """A suite of configs/suite, with some fields changed.

    Raises:
        UserError: there is no such suite or field, or a value that is not allowed.
    """
    if name not in suite_names():
        raise UserError(
            f"there is no suite '{name}'; suites: {', '.join(suite_names())}, and all of them: all"
        )
    plain = yaml.safe_load((CONFIG_DIR / "suite" / f"{name}.yaml").read_text())
    return schema.build(Suite, plain | (changes or {}), f"suite {name}")

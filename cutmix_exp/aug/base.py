"""What a regularizer is: four slots, each filled by small frozen dataclasses.

* `image`: changes one image alone (Cutout). Ordered; applied after normalisation.
* `mix`: combines each image with partners and says how their labels are weighted (CutMix, Mixup).
* `network`: acts inside the network (stochastic depth, ShakeDrop).
* `label_smoothing`: of the loss.

Image operations and mixers work in two steps. `sample` draws a plan for the whole *global* batch
on the host; `apply` is a pure function of plan and tensors. A test can therefore inject a plan,
a rank can apply its slice of it, and nothing about a draw is ever stored in an object.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor, nn

from cutmix_exp.distributed import share
from cutmix_exp.errors import UserError
from cutmix_exp.schema import Part, option, to_dict

Slot = Literal["image", "mix", "network", "label"]
Partner = Literal["permutation", "roll", "flip", "dataset"]


@dataclass(frozen=True)
class BatchShape:
    """Size of a global batch of images.

    Attributes:
        shares: in how many contiguous parts the batch falls for the pairing: 1, or the number of
            ranks where each pairs the images that it has.
        maps: height and width of the network's maps by layer, for mixers inside it: of the image,
            after the stem, after each stage.
    """

    batch: int
    height: int
    width: int
    shares: int = 1
    maps: tuple[tuple[int, int], ...] = ()

    def parts(self) -> list[np.ndarray]:
        """The positions of each share, int64."""
        return [share(self.batch, part, self.shares) for part in range(self.shares)]


@dataclass(frozen=True)
class MixPlan:
    """One draw of a mixer for the B images of a global batch, made of S sources each.

    Source 0 of an image is the image itself; `partners` says which images are the others.

    Attributes:
        partners: int64 [S-1, B], positions in the global batch; B..2B-1 are its guests, where the
            mixer wants them (`Mixer.wants_guests`).
        weights: float32 [S, B], label weight of each source; every column sums to exactly 1.
        boxes: int64 [B, 4] as (top, left, bottom, right), bottom and right exclusive; None where
            the mixer has no boxes.
        arrays: what else the mixer has drawn, by name; the first axis is the position.
        layer: where images meet: 0 as images, k as features of the network (aug/feature.py).
    """

    partners: np.ndarray
    weights: np.ndarray
    boxes: np.ndarray | None = None
    arrays: Mapping[str, np.ndarray] = field(default_factory=dict)
    layer: int = 0

    @property
    def num_sources(self) -> int:
        return len(self.weights)

    def at(self, positions: np.ndarray) -> MixPlan:
        """The plan of some positions of the batch; `partners` still point into the global batch."""
        boxes = None if self.boxes is None else self.boxes[positions]
        arrays = {name: array[positions] for name, array in self.arrays.items()}
        partners, weights = self.partners[:, positions], self.weights[:, positions]
        return MixPlan(partners, weights, boxes, arrays, self.layer)

    @property
    def image_partners(self) -> np.ndarray:
        """The partners whose images are needed, int64 [S-1, B]; none where features meet."""
        return self.partners[:0] if self.layer else self.partners


def unmixed(batch: int) -> MixPlan:
    """The plan that leaves every image and label alone."""
    return MixPlan(np.empty((0, batch), np.int64), np.ones((1, batch), np.float32))


def two_weights(host_share: np.ndarray) -> np.ndarray:
    """Label weights [2, B] float32 from the host's share [B], summing to exactly 1.

    The share is rounded to a multiple of 2**-24, the spacing of float32 just below 1: then both
    weights are representable and their sum has no rounding error, whatever the order.
    """
    host = (np.rint(np.asarray(host_share, np.float64) * 2**24) / 2**24).astype(np.float32)
    return np.stack([host, np.float32(1) - host])


def exact_weights(shares: np.ndarray) -> np.ndarray:
    """Label weights [S, B] float32 from shares [S, B] whose columns sum to 1, summing to exactly 1.

    Multiples of 2**-24 as in `two_weights`; the largest share takes up what rounding leaves.
    """
    grid = np.rint(np.asarray(shares, np.float64) * 2**24)
    grid[grid.argmax(0), np.arange(grid.shape[1])] += 2**24 - grid.sum(0)
    return (grid / 2**24).astype(np.float32)


def draw_partner(kind: Partner, shape: BatchShape, rng: np.random.Generator) -> np.ndarray:
    """Partner of each position, int64 [B]: a permutation (the authors), the previous image
    (torchvision) or the mirrored position (timm), each within a share of the batch, or a guest of
    its own, drawn from the whole data set (ildoonet/cutmix). The permutation is drawn in any case,
    so that the kind of partner does not shift what is drawn next."""
    permutation = rng.permutation(shape.batch)
    if kind == "dataset":
        return shape.batch + np.arange(shape.batch)
    if kind == "permutation" and shape.shares == 1:
        return permutation
    partners = np.empty(shape.batch, np.int64)
    for part in shape.parts():
        if kind == "permutation":
            # A share's part of a uniform permutation, ranked, is a uniform permutation of it.
            ranked = permutation[part].argsort().argsort()
        elif kind == "roll":
            ranked = np.arange(-1, len(part) - 1)
        else:
            ranked = np.arange(len(part))[::-1]
        partners[part] = part[ranked]
    return partners


def mix_targets(plan: MixPlan, sources: list[Tensor]) -> Tensor:
    """Soft labels [n, K] float32: the sources' labels [n, K] weighted as the plan says."""
    weights = on(sources[0], plan.weights)
    mixed = sources[0].float() * weights[0, :, None]
    for weight, source in zip(weights[1:], sources[1:], strict=True):
        mixed = mixed + source.float() * weight[:, None]
    return mixed


def on(images: Tensor, array: np.ndarray) -> Tensor:
    """An array of the host where the images are; a GPU is not waited for."""
    return torch.from_numpy(array).to(images.device, non_blocking=True)


def taken(images: Tensor, row: np.ndarray) -> Tensor:
    """images[row], without a copy where that is all of them in their order."""
    if len(row) == len(images) and np.array_equal(row, np.arange(len(row))):
        return images
    return images.index_select(0, on(images, row))


class PlanReceiver:
    """What a mixer has put into the network: here nothing."""

    def set(self, plan: MixPlan, positions: np.ndarray) -> None:
        """Told before each forward pass: the plan (`MixPlan.at`) of the images in it, which are at
        these positions of the global batch."""


@dataclass(frozen=True, kw_only=True)
class Mixer(Part):
    """Slot `mix`. Subclasses draw a `MixPlan` and combine images accordingly."""

    @property
    def wants_guests(self) -> bool:
        """Whether partners come from the whole data set: then a batch of B images has B guests, at
        the positions B..2B-1, which are drawn, cropped, flipped and changed as its own images."""
        return False

    @property
    def mixes_features(self) -> bool:
        """Whether it may act inside the network, on the images of one forward pass."""
        return False

    def attach(self, network: torch.nn.Module) -> PlanReceiver:
        """Prepare a network for mixing inside it."""
        return PlanReceiver()

    def resolve(self, image_size: int) -> Mixer:
        """Fill in defaults that depend on the image's side in pixels; explicit values win."""
        return self

    def sample(self, shape: BatchShape, progress: float, rng: np.random.Generator) -> MixPlan:
        """Draw a plan for a global batch; `progress` is the share of the training that is done."""
        raise NotImplementedError

    def finish(self, plan: MixPlan, sources: list[Tensor]) -> MixPlan:
        """The plan of n positions once their sources [n, C, H, W] are seen: for mixers whose boxes
        and label weights depend on the images. Partners stay as they are."""
        return plan

    def apply(self, plan: MixPlan, sources: list[Tensor]) -> Tensor:
        """Combine `plan.num_sources` image tensors [n, C, H, W] into one; inputs stay as they are."""
        raise NotImplementedError

    def combine(
        self, plan: MixPlan, images: Tensor, rows: list[np.ndarray]
    ) -> tuple[MixPlan, Tensor]:
        """`finish` and `apply` for images out of a pool that is the caller's own: it may be
        overwritten, where that saves a pass over memory. The result is that of `apply`.

        Args:
            images: [m, C, H, W].
            rows: int64 [n] for each source: where its images are in the pool.
        """
        sources = [taken(images, row) for row in rows]
        plan = self.finish(plan, sources)
        return plan, self.apply(plan, sources)


@dataclass(frozen=True, kw_only=True)
class NoMix(Mixer):
    """Off is an object: every image keeps its own pixels and label."""

    def sample(self, shape: BatchShape, progress: float, rng: np.random.Generator) -> MixPlan:
        return unmixed(shape.batch)

    def apply(self, plan: MixPlan, sources: list[Tensor]) -> Tensor:
        return sources[0]


@dataclass(frozen=True, kw_only=True)
class ImageOp(Part):
    """Slot `image`. A plan is an array whose first axis is the position in the global batch."""

    def resolve(self, image_size: int) -> ImageOp:
        """Fill in defaults that depend on the image's side in pixels; explicit values win."""
        return self

    def sample(self, shape: BatchShape, progress: float, rng: np.random.Generator) -> np.ndarray:
        raise NotImplementedError

    def apply(self, plan: np.ndarray, images: Tensor) -> Tensor:
        """Change normalised images [n, C, H, W] as the plan of those n positions says."""
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True)
class PixelOp(ImageOp):
    """An image operation on the bytes of a cropped and flipped image, before normalisation and
    before all others. It draws for itself: its plan is a seed for each image. Images that stream
    meet it in the worker processes."""

    def sample(self, shape: BatchShape, progress: float, rng: np.random.Generator) -> np.ndarray:
        """Seeds int64 [B] for torch."""
        return rng.integers(0, 2**63, shape.batch)

    def change(self, image: Tensor, seed: int) -> Tensor:
        """Another image uint8 [3, H, W], a function of image and seed."""
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True)
class NetworkOp(Part):
    """Slot `network`. Changes a freshly built network.

    What its layers draw comes from torch's default generators, which the trainer seeds at each
    step; what depends on the time comes from a `Progress`. Gates and rates are tensors, never
    Python's bools, so that a compiled network stays compiled.
    """

    def resolve(self, image_size: int) -> NetworkOp:
        """Fill in defaults that depend on the image's side in pixels; explicit values win."""
        return self

    def attach(self, model: nn.Module) -> nn.Module:
        """The network with this regularizer in it. Its parameters keep their names and values, so
        that runs with and without it share initial weights.

        Raises:
            UserError: the network has no place for it.
        """
        raise NotImplementedError


class Progress(nn.Module):
    """The share of the training that is done, for layers whose strength depends on it.

    Layers share one; the trainer fills it before each step. It is a tensor, so that a compiled
    network sees its value, and no part of the network's state.
    """

    done: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("done", torch.zeros(()), persistent=False)


def _switches(part: Part) -> dict[str, Any]:
    plain: dict[str, Any] = to_dict(part)
    return {name: value for name, value in plain.items() if name != "_target_"}


def _no_mix() -> Mixer:
    return NoMix()


@dataclass(frozen=True, kw_only=True)
class Regularizer:
    """The config group `aug`: what is in the four slots, and the atoms that put it there."""

    slots: ClassVar[tuple[str, ...]] = ("image", "mix", "network", "label")

    atoms: dict[str, Slot] = option(factory=dict, identity=False)
    image: dict[str, ImageOp] = field(default_factory=dict)
    mix: Mixer = option(factory=_no_mix)
    network: dict[str, NetworkOp] = field(default_factory=dict)
    label_smoothing: float = option(0.0, ge=0, lt=1)

    @staticmethod
    def check_raw(data: dict[str, Any]) -> None:
        """Refuse two mixers: Hydra has merged them field by field, into something nobody asked for."""
        atoms = data.get("atoms")
        if not isinstance(atoms, dict):
            return
        mixers = [name for name, slot in atoms.items() if slot == "mix"]
        if len(mixers) > 1:
            raise UserError(
                f"aug=[{','.join(mixers)}]: both fill the slot 'mix', which holds one mixer; "
                f"choose one of them: aug={mixers[0]} or aug={mixers[-1]}; "
                "aug=cutmix_or_mixup draws one of two for each batch"
            )

    def __post_init__(self) -> None:
        for slot in ("image", "network"):
            held, named = set(getattr(self, slot)), {n for n, s in self.atoms.items() if s == slot}
            if held != named:
                odd = ", ".join(sorted(held ^ named))
                raise UserError(f"the slot '{slot}' and the atoms disagree about {odd}")
        filled = {"mix": not isinstance(self.mix, NoMix), "label": self.label_smoothing > 0}
        for slot, is_filled in filled.items():
            if is_filled != (slot in self.atoms.values()):
                atoms = ", ".join(n for n, s in self.atoms.items() if s == slot)
                state = (
                    "filled, but no atom names it" if is_filled else f"empty, but {atoms} names it"
                )
                raise UserError(f"the slot '{slot}' is {state}; choose what fills it by aug=NAME")

    @property
    def name(self) -> str:
        """`baseline`, or the atoms' names joined by `+` in the order of the slots."""
        ordered = [n for slot in self.slots for n, s in self.atoms.items() if s == slot]
        return "+".join(ordered) or "baseline"

    def resolve(self, image_size: int) -> Regularizer:
        """The one place where defaults that depend on the image are filled in."""
        image = {name: op.resolve(image_size) for name, op in self.image.items()}
        network = {name: op.resolve(image_size) for name, op in self.network.items()}
        return replace(self, image=image, mix=self.mix.resolve(image_size), network=network)

    @property
    def on_pixels(self) -> dict[str, PixelOp]:
        """The image operations on bytes, in order."""
        return {name: op for name, op in self.image.items() if isinstance(op, PixelOp)}

    def protocol(self) -> dict[str, Any]:
        """Every switch that can move a number: the mixer's by name, those of the other atoms below
        their slot and name."""
        others = {
            slot: {name: _switches(op) for name, op in getattr(self, slot).items()}
            for slot in ("image", "network")
        }
        return {
            **_switches(self.mix),
            **{slot: ops for slot, ops in others.items() if ops},
            "label_smoothing": self.label_smoothing,
        }

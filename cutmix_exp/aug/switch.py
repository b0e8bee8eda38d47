"""Slot `mix`: one of two mixers for each batch."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from torch import Tensor

from cutmix_exp.aug.base import BatchShape, Mixer, MixPlan
from cutmix_exp.errors import UserError
from cutmix_exp.schema import option


@dataclass(frozen=True, kw_only=True)
class MixSwitch(Mixer):
    """One of two mixers, drawn for each batch, as in timm's `Mixup` (its mode `batch`) and
    torchvision's reference training (`RandomChoice` of MixUp and CutMix).

    Attributes:
        first, second: the two, each with its own switches, probability of mixing included.
        switch_prob: probability of the first; timm's `switch_prob` is that of CutMix.
    """

    first: Mixer
    second: Mixer
    switch_prob: float = option(0.5, ge=0, le=1)

    def __post_init__(self) -> None:
        if isinstance(self.first, MixSwitch) or isinstance(self.second, MixSwitch):
            raise UserError("MixSwitch draws one of two mixers; neither can be a MixSwitch itself")
        if self.first.mixes_features or self.second.mixes_features:
            raise UserError("MixSwitch mixes images; neither mixer can be one of features")

    @property
    def wants_guests(self) -> bool:
        return self.first.wants_guests or self.second.wants_guests

    def resolve(self, image_size: int) -> MixSwitch:
        return replace(
            self, first=self.first.resolve(image_size), second=self.second.resolve(image_size)
        )

    def sample(self, shape: BatchShape, progress: float, rng: np.random.Generator) -> MixPlan:
        chosen = self.first if rng.random() < self.switch_prob else self.second
        plan = chosen.sample(shape, progress, rng)
        is_first = np.full(shape.batch, chosen is self.first)
        return replace(plan, arrays={**plan.arrays, "is_first": is_first})

    def finish(self, plan: MixPlan, sources: list[Tensor]) -> MixPlan:
        return self._chosen(plan).finish(plan, sources)

    def apply(self, plan: MixPlan, sources: list[Tensor]) -> Tensor:
        return self._chosen(plan).apply(plan, sources)

    def combine(
        self, plan: MixPlan, images: Tensor, rows: list[np.ndarray]
    ) -> tuple[MixPlan, Tensor]:
        return self._chosen(plan).combine(plan, images, rows)

    def _chosen(self, plan: MixPlan) -> Mixer:
        return self.first if plan.arrays["is_first"][0] else self.second

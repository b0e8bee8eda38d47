"""Images with parts missing, and images between two classes (Figure 5)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from cutmix_exp.evaluation.attacks import percent, right
from cutmix_exp.evaluation.base import EvaluationSet, Findings, Subject, Suite
from cutmix_exp.evaluation.classification import read_off
from cutmix_exp.evaluation.sampling import limited
from cutmix_exp.schema import option
from cutmix_exp.seeding import stream


def sides(size: int, steps: int) -> list[int]:
    """Sides in pixels from 0 to `size` in `steps` steps of (nearly) the same length."""
    return sorted({int(i * size / steps + 0.5) for i in range(steps + 1)})


def centred_square(size: int, side: int) -> Tensor:
    """Bool [size, size]: the square of `side` pixels in the centre; where it cannot be in the very
    centre, half a pixel towards the upper left."""
    first = (size - side) // 2
    inside = torch.zeros(size, size, dtype=torch.bool)
    inside[first : first + side, first : first + side] = True
    return inside


@dataclass(frozen=True, kw_only=True)
class Occlusion(Suite):
    """Error while the centre is covered by a square of growing side, or all but the centre.

    With side 0, `centre` is the clean image; with the image's side, `boundary` is.

    Attributes:
        steps: number of steps from side 0 to the image's side.
        fill: what covers: `mean` is the training images' mean color, zero after normalisation;
            `black` is zero before it. The paper says "zeros".
        limit: number of images, a fixed stratified subset; None: all.
    """

    steps: int = option(16, ge=1)
    fill: Literal["mean", "black"] = "mean"
    limit: int | None = option(None, ge=1)

    def run(self, subject: Subject) -> Findings:
        data, index = limited(subject, self.limit)
        size = subject.image_size
        holes = sides(size, self.steps)
        masks = [centred_square(size, side).to(subject.world.device) for side in holes]
        mean = subject.normalize.mean
        cover = mean if self.fill == "mean" else torch.zeros_like(mean)

        def occlude(images: Tensor, labels: Tensor, _: np.ndarray) -> dict[str, Tensor]:
            pixels = subject.normalize.unit(images)
            centre = [right(subject, torch.where(m, cover, pixels), labels) for m in masks]
            boundary = [right(subject, torch.where(m, pixels, cover), labels) for m in masks]
            return {"centre": torch.stack(centre, 1), "boundary": torch.stack(boundary, 1)}

        hits = subject.over(data, occlude)
        metrics, curves = {}, {}
        for kind in ("centre", "boundary"):
            errors = [percent(~column) for column in hits[kind].T]
            curves[f"{kind}_occlusion"] = {
                "side": [float(side) for side in holes],
                "top1_error": errors,
            }
            metrics[f"{kind}/mean_top1_error"] = float(np.mean(errors))
            metrics[f"{kind}/half_side_top1_error"] = errors[nearest(holes, size / 2)]
        metrics["clean_top1_error"] = curves["centre_occlusion"]["top1_error"][0]
        return Findings(
            metrics=metrics,
            curves=curves,
            protocol={
                "fill": self.fill,
                "sides": holes,
                "half_side": holes[nearest(holes, size / 2)],
                "precision": subject.config.precision,
                "limit": self.limit,
            },
            per_image={"index": index, **{f"{kind}_correct": hits[kind] for kind in hits}},
        )


def nearest(values: list[int], value: float) -> int:
    """The position of the value that is nearest."""
    return int(np.abs(np.array(values) - value).argmin())


@dataclass(frozen=True)
class Pairs:
    """A set whose images come with their partners', uint8 [n, 6, H, W]."""

    data: EvaluationSet
    partner: np.ndarray

    @property
    def labels(self) -> Tensor:
        return self.data.labels

    def __len__(self) -> int:
        return len(self.partner)

    def batches(self, indices: list[np.ndarray]) -> Iterator[Tensor]:
        both = [np.concatenate([index, self.partner[index]]) for index in indices]
        for images in self.data.batches(both):
            yield torch.cat(images.chunk(2), dim=1)


@dataclass(frozen=True, kw_only=True)
class InBetween(Suite):
    """Error on images between two: blends as in Mixup, and the partner's centre in the image, as in
    CutMix.

    Of each curve, `ratio` goes from the image alone (0) to its partner alone (1): the partner's
    weight in the blend; for the square, its side over the image's. Two readings, as the paper's text
    and its appendix differ: `neither_error` counts predictions of neither class, `top1_error` those
    that are not the class with the larger share (at equal shares, that of the image).

    Attributes:
        steps: number of steps from ratio 0 to 1.
        seed: of the permutation that pairs the images, which all networks share.
        limit: number of images, a fixed stratified subset; None: all.
    """

    steps: int = option(16, ge=1)
    seed: int = option(0, ge=0)
    limit: int | None = option(None, ge=1)

    def run(self, subject: Subject) -> Findings:
        data, index = limited(subject, self.limit)
        partner = stream(self.seed, "in_between/partner").permutation(len(index))
        labels_of = data.labels.cpu()[torch.from_numpy(partner)]
        size = subject.image_size
        holes = sides(size, self.steps)
        ratios = {
            "mixup": [i / self.steps for i in range(self.steps + 1)],
            "cutmix": [side / size for side in holes],
        }
        shares = {"mixup": ratios["mixup"], "cutmix": [ratio**2 for ratio in ratios["cutmix"]]}
        masks = [centred_square(size, side).to(subject.world.device) for side in holes]

        def mixed(own: Tensor, other: Tensor, kind: str, step: int) -> Tensor:
            if kind == "cutmix":
                return torch.where(masks[step], other, own)
            share = ratios["mixup"][step]
            return own * (1 - share) + other * share

        def judge(images: Tensor, labels: Tensor, rows: np.ndarray) -> dict[str, Tensor]:
            own, other = subject.normalize.unit(images).chunk(2, dim=1)
            others = labels_of[torch.from_numpy(rows)].to(labels.device)
            columns = {}
            for kind, steps in ratios.items():
                either, larger = [], []
                for step in range(len(steps)):
                    with torch.no_grad():
                        logits = subject.logits(mixed(own, other, kind, step))
                    hits = [read_off(logits, wanted)["in_top1"] for wanted in (labels, others)]
                    either.append(hits[0] | hits[1])
                    larger.append(hits[int(shares[kind][step] > 0.5)])
                columns[f"{kind}_either"] = torch.stack(either, 1)
                columns[f"{kind}_larger"] = torch.stack(larger, 1)
            return columns

        hits = subject.over(Pairs(data, partner), judge)
        metrics, curves = {}, {}
        for kind in ratios:
            neither = [percent(~column) for column in hits[f"{kind}_either"].T]
            wrong = [percent(~column) for column in hits[f"{kind}_larger"].T]
            curves[f"in_between_{kind}"] = {
                "ratio": ratios[kind],
                "neither_error": neither,
                "top1_error": wrong,
            }
            metrics[f"{kind}/mean_neither_error"] = float(np.mean(neither))
            metrics[f"{kind}/mean_top1_error"] = float(np.mean(wrong))
        metrics["clean_top1_error"] = curves["in_between_mixup"]["top1_error"][0]
        return Findings(
            metrics=metrics,
            curves=curves,
            protocol={
                "partner": "keyed permutation of the images",
                "seed": self.seed,
                "sides": holes,
                "cutmix_partner_share": shares["cutmix"],
                "precision": subject.config.precision,
                "limit": self.limit,
            },
            per_image={"index": index, "partner": index[partner], **hits},
        )

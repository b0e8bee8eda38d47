"""Weakly supervised localisation (paper 4.2 and appendix B, Table 9, Figures 1 and 4): a network that
was trained with labels alone says by its class activation map where the object is.

The threshold on the map decides much of the result, so each number stands under three: the paper's
fixed one, the best on images that are not the test's, and the best on the test set itself (oracle).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import torch
from torch import Tensor

from cutmix_exp.data.boxes import Boxes
from cutmix_exp.data.sources import FileSet, ImageSet
from cutmix_exp.errors import UserError
from cutmix_exp.evaluation.base import Findings, Subject, Suite
from cutmix_exp.evaluation.cam import ByHead, Mapper, find_head, upsampled
from cutmix_exp.evaluation.cam_sheet import Localized, contact_sheet
from cutmix_exp.evaluation.classification import read_off
from cutmix_exp.evaluation.gradcam import Method, by_gradient
from cutmix_exp.evaluation.localization_metrics import (
    accuracy,
    judge,
    max_box_accuracy,
    max_box_accuracy_v2,
    overlaps,
    padded,
    pixel_average_precision,
    score_histograms,
)
from cutmix_exp.models.maps import normalized
from cutmix_exp.schema import option
from cutmix_exp.seeding import stream

RIGHT = 0.5
"""The overlap that a box must exceed (paper appendix B)."""


@dataclass(frozen=True)
class Located:
    """What the maps of the true classes say of N images.

    Attributes:
        largest, best: float64 [N, T], at each threshold the overlap of the largest component's box,
            and the best one of any component's.
        in_top1, in_top5: bool [N], whether the true label is among the best one or five.
        found: float64 [N, 4], the box at the fixed threshold; zeros where there is none.
        map_side: of the last feature map in pixels.
        inside, outside: int64 [N, 256], see `score_histograms`; empty where there are no masks.
    """

    largest: np.ndarray
    best: np.ndarray
    in_top1: np.ndarray
    in_top5: np.ndarray
    found: np.ndarray
    map_side: np.ndarray
    inside: np.ndarray
    outside: np.ndarray


@dataclass(frozen=True, kw_only=True)
class Localization(Suite):
    """Boxes from class activation maps against true ones.

    The map is the true class's. Where the class must be right too (top-1 localisation) that is the
    predicted class's map as well.

    Attributes:
        threshold: of the map's maximum; the paper's for all its experiments.
        normalization: of a map before the threshold: its positive part over the maximum (`max`, as
            the paper says it) or from minimum to maximum (`minmax`, wsolevaluation).
        connectivity: whether pixels touch at 4 sides or 8 sides and corners.
        step: from one threshold of the curve to the next.
        selection_images: training images on which a threshold is selected where there is no
            validation split; 0: none is.
        num_pictures: images in the contact sheet.
        method: what makes the map: `cam`, or a method of the library grad-cam (the extra `cam`) at the
            same feature map. Its ReLU is the positive part that `normalization` takes.
        layer: of the network, at whose output the map is made instead; not for `cam`.
    """

    threshold: float = option(0.15, ge=0, lt=1)
    normalization: Literal["max", "minmax"] = "max"
    connectivity: Literal[4, 8] = 8
    step: float = option(0.05, gt=0, le=0.5)
    selection_images: int = option(1000, ge=0)
    num_pictures: int = option(12, ge=0)
    method: Literal["cam", Method] = option("cam", neutral="cam")
    layer: str | None = option(None, neutral=None)

    def __post_init__(self) -> None:
        if self.method == "cam" and self.layer is not None:
            raise UserError(
                f"suite.layer={self.layer}: method=cam has its own layer; expected null, or another "
                f"method: {', '.join(get_args(Method))}"
            )

    def lacks(self, subject: Subject) -> str:
        if missing := subject.config.dataset.missing_boxes():
            return missing
        try:
            self._mapper(subject)
        except UserError as error:
            return str(error)
        return ""

    def _mapper(self, subject: Subject) -> Mapper:
        place = (subject.network, subject.image_size, subject.world.device)
        if self.method == "cam":
            return ByHead(find_head(*place))
        return by_gradient(self.method, self.layer, *place)

    @property
    def thresholds(self) -> np.ndarray:
        """float64 [T] in [0, 1), with the fixed one among them."""
        steps = np.arange(0.0, 1.0 - 1e-9, self.step).round(10)
        return np.unique(np.append(steps[np.abs(steps - self.threshold) > 1e-9], self.threshold))

    @property
    def _fixed(self) -> int:
        """The place of the fixed threshold among them."""
        return int(np.flatnonzero(self.thresholds == self.threshold)[0])

    def run(self, subject: Subject) -> Findings:
        mapper = self._mapper(subject)
        true = subject.config.dataset.boxes(subject.splits.test)
        located = self._locate(subject, mapper, subject.splits.test, true)
        metrics = self._at(located, self._fixed)
        metrics |= _under("oracle", self._oracle(located))
        chosen, selected_on = self._selected(subject, mapper)
        if chosen is not None:
            selected = self._at(located, chosen) | {"threshold": float(self.thresholds[chosen])}
            metrics |= _under("selected", selected)
        metrics |= self._threshold_free(located)
        metrics["whole_image/gt_known_localization"] = whole_image(true, subject.image_size)
        overlap = located.largest[:, self._fixed]
        localized = overlap > RIGHT
        return Findings(
            metrics=metrics,
            curves={"threshold": self._curve(located)},
            protocol={
                "map_of": "the true class",
                "upsampling": "bilinear, corners not aligned",
                "map_side": int(located.map_side[0]),
                **mapper.protocol,
                "selected_on": selected_on if chosen is not None else None,
                "images_without_box": sum(not len(boxes) for boxes in true),
                "maps_without_component": int((located.found[:, 2] == 0).sum()),
            },
            per_image={
                "correct": localized & located.in_top1,
                "localized": localized,
                "in_top1": located.in_top1,
                "iou": overlap.astype(np.float32),
                "found_box": located.found.astype(np.int16),
            },
            pictures=self._pictures(subject, mapper, true),
            skipped={} if chosen is not None else {"selected threshold": selected_on},
        )

    # ------------------------------------------------------------------------------ numbers

    def _at(self, located: Located, threshold: int) -> dict[str, float]:
        """The paper's metrics at one of the thresholds, in percent."""
        localized = located.largest[:, threshold] > RIGHT
        return {
            "top1_localization": float(accuracy(localized & located.in_top1)),
            "top5_localization": float(accuracy(localized & located.in_top5)),
            "gt_known_localization": float(accuracy(localized)),
        }

    def _oracle(self, located: Located) -> dict[str, float]:
        """Each metric at its own best threshold on the test set itself, and that of gt_known."""
        rows = [self._at(located, index) for index in range(len(self.thresholds))]
        best = {name: max(row[name] for row in rows) for name in rows[0]}
        gt_known = [row["gt_known_localization"] for row in rows]
        return best | {"threshold": float(self.thresholds[int(np.argmax(gt_known))])}

    def _threshold_free(self, located: Located) -> dict[str, float]:
        by_iou = max_box_accuracy_v2(located.best)
        metrics = {
            "max_box_acc": max_box_accuracy(located.largest),
            "max_box_acc_v2": float(np.mean(list(by_iou.values()))),
            **{f"iou{100 * iou:.0f}/max_box_acc_v2": value for iou, value in by_iou.items()},
            "top1_error": 100.0 - float(accuracy(located.in_top1)),
        }
        if located.inside.size:
            sums = located.inside.sum(0), located.outside.sum(0)
            metrics["pxap"] = pixel_average_precision(*sums)
        return metrics

    def _curve(self, located: Located) -> dict[str, list[float]]:
        rows = [self._at(located, index) for index in range(len(self.thresholds))]
        curve = {name: [row[name] for row in rows] for name in rows[0]}
        return {"threshold": self.thresholds.tolist(), **curve}

    def _selected(self, subject: Subject, mapper: Mapper) -> tuple[int | None, str]:
        """The threshold of the highest GT-known localisation on images outside of the test set, and
        which images those are; or None and the reason."""
        part: ImageSet | FileSet
        if subject.splits.val is not None:
            part, where = subject.splits.val, f"validation split ({len(subject.splits.val)} images)"
        elif self.selection_images:
            train = subject.splits.train
            drawn = stream(0, "localization").permutation(len(train))[: self.selection_images]
            part, where = train.at(np.sort(drawn)), f"{len(drawn)} training images"
        else:
            return None, "there is no validation split (dataset.val_size), and selection_images=0"
        try:
            true = subject.config.dataset.boxes(part)
        except UserError as error:
            return None, f"no boxes of the {where}: {error}"
        located = self._locate(subject, mapper, part, true)
        return int(np.argmax(accuracy(located.largest > RIGHT))), where

    # --------------------------------------------------------------------------------- maps

    def _scores(self, subject: Subject, maps: Tensor) -> np.ndarray:
        """Maps float32 [n, S, S] in [0, 1], of the images as they are evaluated, from [n, h, w]."""
        enlarged = upsampled(maps, subject.image_size)
        return normalized(enlarged, self.normalization).cpu().numpy()

    def _locate(
        self, subject: Subject, mapper: Mapper, part: ImageSet | FileSet, true: list[Boxes]
    ) -> Located:
        mask = subject.config.dataset.masks(part)
        data = subject.test if part is subject.splits.test else subject.at_hand(part)

        def work(images: Tensor, labels: Tensor, index: np.ndarray) -> dict[str, Tensor]:
            logits, maps = mapper.look(subject, images, labels)
            answer, scores = read_off(logits, labels), self._scores(subject, maps)
            boxes = padded([true[image] for image in index])
            judged = [judge(scores > t, boxes, self.connectivity) for t in self.thresholds]
            largest, best, found = (np.stack(column, 1) for column in zip(*judged, strict=True))
            pixels = [
                score_histograms(of_image, mask(int(image)).numpy())
                for image, of_image in zip(index, scores, strict=True)
                if mask
            ] or [(np.zeros(0), np.zeros(0))] * len(index)
            inside, outside = (np.stack(column) for column in zip(*pixels, strict=True))
            columns = {
                "largest": largest,
                "best": best,
                "found": found[:, self._fixed],
                "inside": inside,
                "outside": outside,
                "map_side": np.full(len(index), maps.shape[-1]),
            }
            return {name: torch.from_numpy(column) for name, column in columns.items()} | {
                "in_top1": answer["in_top1"],
                "in_top5": answer["in_top5"],
            }

        return Located(**subject.over(data, work))

    def _pictures(self, subject: Subject, mapper: Mapper, true: list[Boxes]) -> dict[str, bytes]:
        """A contact sheet of images from all over the test set, with the map of the predicted
        class, which is what a user sees who knows no label."""
        count = min(self.num_pictures, len(subject.test))
        if not count:
            return {}
        index = np.linspace(0, len(subject.test) - 1, count).round().astype(np.int64)
        images = torch.cat(list(subject.test.batches([index])))
        logits, maps = mapper.look(subject, images, None)
        predicted, scores = logits.argmax(1), self._scores(subject, maps)
        boxes = padded([true[i] for i in index])
        *_, found = judge(scores > self.threshold, boxes, self.connectivity)
        names, labels = subject.splits.class_names, subject.test.labels.cpu()[index].tolist()
        items = [
            Localized(
                image=images[i].permute(1, 2, 0).cpu().numpy(),
                scores=scores[i],
                true=true[index[i]],
                found=found[i : i + 1],
                label=names[labels[i]],
                predicted=names[int(predicted[i])],
            )
            for i in range(count)
        ]
        way = "" if self.method == "cam" else f"{self.method}, "
        title = f"{subject.name}, {way}threshold {self.threshold:g}"
        return {"cam": contact_sheet(items, title)}


def whole_image(true: list[Boxes], side: int) -> float:
    """GT-known localisation, in percent, of one who says that the object fills the image: what a
    number has to be compared with where objects are large."""
    whole = np.array([0.0, 0.0, side, side])
    return float(accuracy(overlaps(whole, padded(true)).max(1) > RIGHT))


def _under(condition: str, metrics: dict[str, float]) -> dict[str, float]:
    return {f"{condition}/{name}": value for name, value in metrics.items()}

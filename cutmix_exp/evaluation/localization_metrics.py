"""From activation maps and true boxes or masks to numbers: pure functions.

Boxes are (top, left, bottom, right), half open (data/boxes.py). Maps lie in [0, 1]; a threshold t
keeps the pixels above t. The metrics of Choe et al. (2001.07437; clovaai/wsolevaluation) are
MaxBoxAcc, MaxBoxAccV2 and PxAP.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy import ndimage

from cutmix_exp.data.boxes import Boxes

BINS = 256
"""Levels of a map's scores from which PxAP is made."""

IOUS = (0.3, 0.5, 0.7)
"""Overlaps of MaxBoxAccV2."""


@dataclass(frozen=True)
class Components:
    """The connected components of n masks, M in all.

    Attributes:
        image: int64 [M], whose component it is, in ascending order.
        boxes: float64 [M, 4].
        areas: int64 [M], in pixels.
    """

    image: np.ndarray
    boxes: Boxes
    areas: np.ndarray

    def largest(self, count: int) -> np.ndarray:
        """int64 [count]: of each of `count` images its largest component, of equal ones the first
        from the top; -1 where it has none."""
        order = np.lexsort((-self.areas, self.image))
        images, first = np.unique(self.image[order], return_index=True)
        found = np.full(count, -1)
        found[images] = order[first]
        return found


def components(masks: np.ndarray, connectivity: int) -> Components:
    """Of masks bool [n, H, W].

    Args:
        connectivity: pixels touch at 4 sides, or at 8 sides and corners.
    """
    around = np.zeros((3, 3, 3), dtype=bool)  # the images do not touch
    around[1] = ndimage.generate_binary_structure(2, 2 if connectivity == 8 else 1)
    labels, count = ndimage.label(masks, structure=around)
    slices = ndimage.find_objects(labels)
    corners = [(i.start, r.start, c.start, r.stop, c.stop) for i, r, c in slices]
    table = np.array(corners, dtype=np.int64).reshape(count, 5)
    areas = np.bincount(labels.ravel(), minlength=count + 1)[1:]
    order = np.argsort(table[:, 0], kind="stable")
    return Components(table[order, 0], table[order, 1:].astype(np.float64), areas[order])


def overlaps(one: Boxes, other: Boxes) -> np.ndarray:
    """Intersection over union float64 of boxes [..., 4] with boxes [..., 4]; 0 where neither has an
    area."""
    top_left = np.maximum(one[..., :2], other[..., :2])
    bottom_right = np.minimum(one[..., 2:], other[..., 2:])
    shared = np.clip(bottom_right - top_left, 0, None).prod(-1)
    areas = [(boxes[..., 2:] - boxes[..., :2]).prod(-1) for boxes in (one, other)]
    whole = areas[0] + areas[1] - shared
    return np.divide(shared, whole, out=np.zeros_like(shared), where=whole > 0)


def padded(boxes: list[Boxes]) -> Boxes:
    """float64 [n, m, 4] of n lists of up to m boxes, filled up with boxes of no area."""
    most = max(1, *map(len, boxes))
    return np.stack([np.pad(b.reshape(-1, 4), ((0, most - len(b)), (0, 0))) for b in boxes])


def judge(masks: np.ndarray, true: Boxes, connectivity: int) -> tuple[np.ndarray, ...]:
    """How well n masks find the true boxes.

    Args:
        masks: bool [n, H, W].
        true: float64 [n, m, 4], see `padded`.

    Returns:
        float64 [n], the overlap of the largest component's box with the nearest true box; float64
        [n], the best overlap of any component's box with a true one; float64 [n, 4], the largest
        component's box, zeros where there is none.
    """
    found = components(masks, connectivity)
    by_component = overlaps(found.boxes[:, None], true[found.image]).max(1, initial=0.0)
    best = np.zeros(len(masks))
    np.maximum.at(best, found.image, by_component)
    chosen = found.largest(len(masks))
    has = chosen >= 0
    largest, boxes = np.zeros(len(masks)), np.zeros((len(masks), 4))
    largest[has], boxes[has] = by_component[chosen[has]], found.boxes[chosen[has]]
    return largest, best, boxes


def accuracy(hits: np.ndarray) -> np.ndarray:
    """Percent of images, by column of bool [N, ...]."""
    return 100.0 * hits.mean(0)


def max_box_accuracy(largest: np.ndarray) -> float:
    """MaxBoxAcc: at the best threshold, the percent of images whose largest component's box overlaps
    by 0.5 or more. `largest` is float [N, T]."""
    return float(accuracy(largest >= 0.5).max())


def max_box_accuracy_v2(best: np.ndarray) -> dict[float, float]:
    """MaxBoxAccV2 by overlap 0.3, 0.5, 0.7, of which it is the mean: at each overlap's best threshold,
    the percent of images with any component's box that overlaps so much. `best` is [N, T]."""
    return {iou: float(accuracy(best >= iou).max()) for iou in IOUS}


def score_histograms(scores: np.ndarray, mask: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """How many pixels of the object, and of the rest, have each of 256 levels: int64 [256] each."""
    levels = np.minimum((scores * BINS).astype(np.int64), BINS - 1)
    return tuple(np.bincount(levels[of], minlength=BINS) for of in (mask, ~mask))  # type: ignore[return-value]


def pixel_average_precision(inside: np.ndarray, outside: np.ndarray) -> float:
    """PxAP: the area under precision over recall of all images' pixels, in percent.

    Args:
        inside, outside: int64 [256], the sums of `score_histograms`.
    """
    hits, false = np.cumsum(inside[::-1]), np.cumsum(outside[::-1])
    precision = hits / np.maximum(hits + false, 1)
    gained = np.diff(hits, prepend=0) / max(hits[-1], 1)
    return float(100.0 * (precision * gained).sum())

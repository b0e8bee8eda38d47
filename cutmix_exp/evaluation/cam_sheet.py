"""Images, their class activation maps, the true boxes and the found one (paper Figures 1 and 4)."""

from __future__ import annotations

from dataclasses import dataclass
from io import BytesIO
from typing import Any

import numpy as np

from cutmix_exp.data.boxes import Boxes
from cutmix_exp.evaluation.localization_metrics import overlaps

PAIRS = 3
"""Images beside each other, each with its map."""


@dataclass(frozen=True)
class Localized:
    """An image and what was found in it.

    Attributes:
        image: uint8 [H, W, 3].
        scores: float32 [H, W] in [0, 1].
        true, found: boxes [m, 4].
        label, predicted: names of the classes.
    """

    image: np.ndarray
    scores: np.ndarray
    true: Boxes
    found: Boxes
    label: str
    predicted: str


def contact_sheet(items: list[Localized], title: str) -> bytes:
    """A PNG: of each image the image with its boxes (true ones red, the found one green) and its
    map over it; above them the class, what was predicted if it is another, and the overlap."""
    from matplotlib.figure import Figure

    pairs = min(PAIRS, len(items))
    rows = -(-len(items) // pairs)
    figure = Figure(figsize=(3.6 * pairs, 2.1 * rows + 0.5))
    axes = figure.subplots(rows, 2 * pairs, squeeze=False)
    for axis in axes.flat:
        axis.set_axis_off()
    for number, item in enumerate(items):
        row, column = number // pairs, 2 * (number % pairs)
        left, right = axes[row][column], axes[row][column + 1]
        left.imshow(item.image, interpolation="nearest")
        right.imshow(item.image, interpolation="nearest")
        right.imshow(item.scores, cmap="jet", alpha=0.5, vmin=0, vmax=1)
        for axis in (left, right):
            _draw(axis, item.true, "red")
            _draw(axis, item.found, "lime")
        left.set_title(_short(item.label), fontsize=8)
        said = "" if item.predicted == item.label else f"as {_short(item.predicted, 16)}, "
        overlap = overlaps(item.found[:, None], item.true).max(initial=0.0)
        right.set_title(f"{said}IoU {overlap:.2f}", fontsize=8)
    figure.suptitle(f"{title}; true boxes red, found ones green", fontsize=9)
    figure.tight_layout()
    out = BytesIO()
    figure.savefig(out, format="png", dpi=100)
    return out.getvalue()


def _draw(axis: Any, boxes: Boxes, color: str) -> None:
    from matplotlib.patches import Rectangle

    for top, left, bottom, right in boxes:
        # A pixel's centre has whole coordinates: edges lie half a pixel before.
        corner, width, height = (left - 0.5, top - 0.5), right - left, bottom - top
        axis.add_patch(Rectangle(corner, width, height, fill=False, color=color, linewidth=1.5))


def _short(name: str, length: int = 24) -> str:
    return name if len(name) <= length else f"{name[: length - 3]}..."

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

GAP = 0.16
"""Room for the text above a picture, in pictures."""


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
    figure = Figure(figsize=(3.8 * pairs, 2.15 * rows + 0.4))
    axis = figure.add_axes((0.01, 0.01, 0.98, 0.93))  # one for all: each costs a tenth of a second
    axis.set_axis_off()
    axis.set_xlim(0, 2 * pairs + GAP * pairs)
    axis.set_ylim(rows * (1 + GAP), 0)
    axis.set_aspect("equal")
    for number, item in enumerate(items):
        row, column = divmod(number, pairs)
        top, left = row * (1 + GAP) + GAP, column * (2 + GAP)
        said = "" if item.predicted == item.label else f"as {_short(item.predicted, 16)}, "
        overlap = overlaps(item.found[:, None], item.true).max(initial=0.0)
        for place, text in ((left, _short(item.label)), (left + 1, f"{said}IoU {overlap:.2f}")):
            axis.text(place + 0.48, top - 0.03, text, fontsize=8, ha="center")
            tile = (place, place + 0.97, top + 0.97, top)  # left, right, bottom, top
            axis.imshow(item.image, interpolation="nearest", extent=tile)
            if place > left:
                axis.imshow(item.scores, cmap="jet", alpha=0.5, vmin=0, vmax=1, extent=tile)
            scale = 0.97 / np.array(item.scores.shape * 2)
            _draw(axis, item.true * scale + [top, place, top, place], "red", 2.6)
            _draw(axis, item.found * scale + [top, place, top, place], "lime", 1.3)
    figure.suptitle(f"{title}; true boxes red, found ones green", fontsize=9)
    out = BytesIO()
    figure.savefig(out, format="png", dpi=100)
    return out.getvalue()


def _draw(axis: Any, boxes: Boxes, color: str, width: float) -> None:
    from matplotlib.patches import Rectangle

    for top, left, bottom, right in boxes:
        size = (right - left, bottom - top)
        axis.add_patch(Rectangle((left, top), *size, fill=False, color=color, linewidth=width))


def _short(name: str, length: int = 24) -> str:
    return name if len(name) <= length else f"{name[: length - 3]}..."

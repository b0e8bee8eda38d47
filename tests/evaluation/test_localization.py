"""Localisation: metrics by hand and against other libraries, and the suite from pixels to findings."""

from __future__ import annotations

from dataclasses import replace
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from sklearn.metrics import average_precision_score
from torch import Tensor, nn
from torchvision.ops import box_iou

from cutmix_exp.data.boxes import Boxes
from cutmix_exp.data.sources import Dataset, ImageSet, Splits, Synthetic
from cutmix_exp.distributed import World
from cutmix_exp.errors import UserError
from cutmix_exp.evaluation import base
from cutmix_exp.evaluation.base import Findings, Subject, load_suite
from cutmix_exp.evaluation.localization_metrics import (
    components,
    judge,
    max_box_accuracy,
    max_box_accuracy_v2,
    overlaps,
    padded,
    pixel_average_precision,
    score_histograms,
)
from tests.data import trees
from tests.helpers import config_of

CPU = torch.device("cpu")
ALONE = World(0, 1, CPU)


# ------------------------------------------------------------------------------------- metrics


def drawn(*rows: str) -> np.ndarray:
    return np.array([[c == "#" for c in row] for row in rows])


MASK = drawn(
    "##....",
    "#.....",
    "..###.",
    "...#..",
    ".....#",
)


def test_components_by_hand() -> None:
    """At 4 sides the last pixel and the three corners are apart; at 8 all hang together but it."""
    four = components(MASK[None], 4)
    order = np.argsort(-four.areas)
    assert sorted(four.areas.tolist()) == [1, 3, 4]
    assert four.boxes[order].tolist() == [[2, 2, 4, 5], [0, 0, 2, 2], [4, 5, 5, 6]]
    eight = components(MASK[None], 8)
    assert eight.areas.tolist() == [3, 4, 1]
    joined = MASK.copy()
    joined[1, 1] = True
    assert components(joined[None], 8).areas.tolist() == [8, 1]
    assert components(joined[None], 4).areas.tolist() == [4, 4, 1]


def test_images_of_a_batch_do_not_touch() -> None:
    masks = np.stack([MASK, np.zeros_like(MASK), MASK, np.ones_like(MASK)])
    found = components(masks, 8)
    assert found.image.tolist() == [0, 0, 0, 2, 2, 2, 3]
    assert found.areas.tolist() == [3, 4, 1, 3, 4, 1, 30]
    assert found.largest(4).tolist() == [1, -1, 4, 6]


def test_of_equally_large_components_the_first_from_the_top_counts() -> None:
    assert components(drawn("#...", "..#.")[None], 4).largest(1).tolist() == [0]


def test_overlap_by_hand() -> None:
    """Half open boxes: 4 rows x 4 columns meet 4 x 4 in 2 x 2: 4 of 28 pixels."""
    one = np.array([0.0, 0, 4, 4])
    others = np.array([[2.0, 2, 6, 6], [0, 0, 4, 4], [4, 0, 8, 4], [0, 0, 2, 4], [1, 1, 1, 1]])
    assert overlaps(one, others).tolist() == [4 / 28, 1, 0, 0.5, 0]
    empty = np.zeros(4)
    assert overlaps(empty, empty) == 0


def test_overlap_is_that_of_inclusive_corners_with_plus_one() -> None:
    """The convention of wsolevaluation and of Pascal VOC."""

    def inclusive(a: list[int], b: list[int]) -> float:
        width = min(a[3], b[3]) - max(a[1], b[1]) + 1
        height = min(a[2], b[2]) - max(a[0], b[0]) + 1
        shared = max(0, width) * max(0, height)
        area = sum((x[2] - x[0] + 1) * (x[3] - x[1] + 1) for x in (a, b))
        return shared / (area - shared)

    a, b = [3, 5, 17, 30], [10, 0, 40, 20]
    half_open = [np.array([*x[:2], x[2] + 1, x[3] + 1], dtype=float) for x in (a, b)]
    assert overlaps(*half_open) == pytest.approx(inclusive(a, b), rel=1e-12)


CORNER = st.integers(0, 20)


@given(st.lists(st.tuples(CORNER, CORNER, st.integers(1, 9), st.integers(1, 9)), min_size=2))
def test_overlap_equals_torchvisions(rows: list[tuple[int, int, int, int]]) -> None:
    boxes = np.array([[top, left, top + h, left + w] for top, left, h, w in rows], dtype=float)
    theirs = box_iou(torch.from_numpy(boxes), torch.from_numpy(boxes)).numpy()
    assert np.allclose(overlaps(boxes[:, None], boxes), theirs)


def test_judge_by_hand() -> None:
    """The largest component (rows 2 to 4, columns 2 to 5: 6 pixels) misses the true box of the
    corner, which another component finds exactly; and of two true boxes the nearer one counts."""
    true = padded([np.array([[0.0, 0, 2, 2]]), np.array([[0.0, 0, 2, 2], [2, 2, 4, 4]])])
    largest, best, boxes = judge(np.stack([MASK, MASK]), true, 4)
    assert largest.tolist() == [0, pytest.approx(4 / 6)]
    assert best.tolist() == [1, 1]
    assert boxes.tolist() == [[2, 2, 4, 5]] * 2
    nothing = judge(np.zeros((1, 3, 3), dtype=bool), true[:1], 4)
    assert [column.tolist() for column in nothing] == [[0], [0], [[0, 0, 0, 0]]]
    without = judge(MASK[None], padded([np.zeros((0, 4))]), 4)
    assert (without[0].tolist(), without[1].tolist()) == ([0], [0])


def test_max_box_accuracy_by_hand() -> None:
    """Two thresholds, four images; an overlap of exactly 0.5 counts here, as in wsolevaluation."""
    largest = np.array([[0.5, 0.2], [0.5, 0.9], [0.1, 0.6], [0.5, 0.2]])
    assert max_box_accuracy(largest) == 75.0
    assert max_box_accuracy_v2(largest) == {0.3: 75.0, 0.5: 75.0, 0.7: 25.0}


def test_pxap_equals_scikit_learns() -> None:
    """On scores that lie on the 256 levels."""
    rng = np.random.default_rng(0)
    masks = rng.random((3, 9, 9)) < 0.3
    scores = np.clip(rng.integers(0, 256, masks.shape) + 40 * masks, 0, 255) / 256
    parts = [score_histograms(s, m) for s, m in zip(scores, masks, strict=True)]
    ours = pixel_average_precision(sum(p[0] for p in parts), sum(p[1] for p in parts))
    assert ours == pytest.approx(100 * average_precision_score(masks.ravel(), scores.ravel()))
    perfect = score_histograms(masks[0].astype(float), masks[0])
    assert pixel_average_precision(*perfect) == 100.0


# --------------------------------------------------------------------------------------- suite


class Squares(Synthetic):
    """White rectangles on black, each class one channel of the colour; with their boxes."""

    def missing_boxes(self) -> str:
        return ""

    def boxes(self, part: Any) -> list[Boxes]:
        found = []
        for image in part.images:
            rows, columns = (np.flatnonzero(image.amax(0).numpy().any(axis)) for axis in (1, 0))
            found.append(np.array([[rows[0], columns[0], rows[-1] + 1, columns[-1] + 1]], float))
        return found

    def masks(self, part: Any) -> Any:
        return lambda index: part.images[index].amax(0) > 0


SIDE = 16


def squares(count: int, seed: int, brightness: int = 255) -> ImageSet:
    """Rectangles whose sides are multiples of two, at even places."""
    rng = np.random.default_rng(seed)
    images = torch.zeros(count, 3, SIDE, SIDE, dtype=torch.uint8)
    labels = torch.arange(count) % 3
    for image, label in zip(images, labels, strict=True):
        top, left = 2 * rng.integers(0, 4, 2)
        height, width = 2 * rng.integers(1, 5, 2)
        image[label, top : top + height, left : left + width] = brightness
    return ImageSet(images, labels)


class Seer(nn.Module):
    """Its last map is the image itself, channel by channel, so the map of the true class is the
    rectangle: a CAM that is the ground-truth box. Shown to it are normalised images."""

    def __init__(self, dataset: Dataset) -> None:
        super().__init__()
        self.scale = dataset.std[0]
        self.maps = nn.Identity()
        self.fc = nn.Linear(3, 3, bias=False)
        with torch.no_grad():
            self.fc.weight.copy_(torch.eye(3))

    def forward(self, images: Tensor) -> Tensor:
        return self.fc(self.maps(images * self.scale).mean((2, 3)))


def seen_by(network: Any = None, *, val: bool = False, elsewhere: int = 255, **change: Any) -> Any:
    words = ["dataset=synthetic", "model=resnet", "device=cpu", "precision=fp32"]
    config = config_of(*words, f"dataset.image_size={SIDE}", "dataset.num_classes=3")
    # Channel values from 0 to 1: black must be no part of an object.
    values = {f: getattr(config.dataset, f) for f in ("name", "image_size", "num_classes", "std")}
    dataset = Squares(**values, mean=(0.0,) * 3)
    config = type(config)(**{**vars(config), "dataset": dataset})
    network = (network or Seer)(dataset)
    splits = Splits(
        squares(40, 0, elsewhere),
        squares(30, 2, elsewhere) if val else None,
        squares(50, 1),
        ("red", "green", "blue"),
    )
    subject = Subject("run", "0" * 16, network.eval(), config, splits, ALONE)
    suite = load_suite("localization", {"num_pictures": 0, "step": 0.25, **change})
    assert suite.lacks(subject) == ""
    return suite, subject


def found(*args: Any, **kwargs: Any) -> Findings:
    suite, subject = seen_by(*args, **kwargs)
    return suite.run(subject)  # type: ignore[no-any-return]


def test_a_map_that_is_the_true_box_localises_everything() -> None:
    got = found()
    names = ("top1_localization", "top5_localization", "gt_known_localization", "max_box_acc")
    for name in (*names, "max_box_acc_v2", "iou70/max_box_acc_v2", "pxap"):
        assert got.metrics[name] == 100.0, name
    for name in names[:3]:
        assert got.metrics[f"oracle/{name}"] == got.metrics[f"selected/{name}"] == 100.0
    assert got.metrics["top1_error"] == 0.0
    assert got.per_image["iou"].tolist() == [1.0] * 50
    assert got.per_image["correct"].all()
    assert (got.protocol["map_side"], got.protocol["features"]) == (SIDE, "maps")


def test_top1_needs_the_class_and_gt_known_does_not() -> None:
    """A network that calls red what is green: its map of the true class is black."""

    class Turned(Seer):
        def __init__(self, dataset: Dataset) -> None:
            super().__init__(dataset)
            # Sees each channel, but hears the name of the next one louder.
            with torch.no_grad():
                self.fc.weight.copy_(torch.eye(3) + 2 * torch.eye(3).roll(1, 0))

    got = found(Turned)
    assert got.metrics["top1_error"] == 100.0
    assert got.metrics["top1_localization"] == 0.0
    assert got.metrics["gt_known_localization"] == got.metrics["top5_localization"] == 100.0
    assert not got.per_image["correct"].any() and got.per_image["localized"].all()


def test_a_map_without_a_positive_part_finds_nothing() -> None:
    class Blind(Seer):
        def __init__(self, dataset: Dataset) -> None:
            super().__init__(dataset)
            with torch.no_grad():
                self.fc.weight.neg_()

    got = found(Blind)
    assert got.metrics["gt_known_localization"] == 0.0
    assert got.protocol["maps_without_component"] == 50
    assert not got.per_image["found_box"].any()


class Dim(Seer):
    """Besides the rectangle it sees its whole surroundings, four tenths as strong."""

    def forward(self, images: Tensor) -> Tensor:
        seen = images * self.scale
        return self.fc(self.maps(seen.clamp(min=0.4)).mean((2, 3)))


def test_the_threshold_decides() -> None:
    """The surroundings are in the box up to a threshold of 0.4: the fixed one fails, the selected
    one, found on other images, does not."""
    got = found(Dim)
    whole = np.array([0.0, 0, SIDE, SIDE])
    boxes = np.concatenate(seen_by()[1].config.dataset.boxes(squares(50, 1)))
    share = 100.0 * float((overlaps(whole, boxes) > 0.5).mean())
    assert share < 20
    assert got.metrics["gt_known_localization"] == pytest.approx(share)
    assert got.metrics["whole_image/gt_known_localization"] == pytest.approx(share)
    assert got.metrics["selected/gt_known_localization"] == 100.0
    assert got.metrics["selected/threshold"] == got.metrics["oracle/threshold"] == 0.5
    curve = got.curves["threshold"]
    assert curve["threshold"] == [0, 0.15, 0.25, 0.5, 0.75]
    assert curve["gt_known_localization"] == pytest.approx([share] * 3 + [100.0] * 2)
    assert found(Dim, normalization="minmax").metrics["gt_known_localization"] == 100.0


def test_the_threshold_is_selected_outside_of_the_test_set() -> None:
    assert found().protocol["selected_on"] == "40 training images"
    assert found(selection_images=7).protocol["selected_on"] == "7 training images"
    assert found(val=True).protocol["selected_on"] == "validation split (30 images)"
    for val in (False, True):
        # Fainter there, so that the surroundings are in the box up to a threshold of 0.4 / 0.65.
        faint = found(Dim, val=val, elsewhere=round(0.65 * 255))
        assert faint.metrics["selected/threshold"] == 0.75
        assert faint.metrics["oracle/threshold"] == 0.5
    without = found(selection_images=0)
    assert "selected/threshold" not in without.metrics
    assert "selection_images=0" in without.skipped["selected threshold"]


def test_it_does_not_depend_on_the_number_of_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Batches of 16: of 50 images the last one has two. Each rank's part is made first, then what
    all ranks make of the parts."""
    monkeypatch.setattr(base, "BATCH", 16)
    suite, subject = seen_by(Dim, selection_images=0)
    alone = suite.run(subject)
    parts: list[Any] = []

    class Rank(World):
        def gather(self, value: Any) -> list[Any]:
            parts.append(value)
            return [value]

    class Both(World):
        def gather(self, value: Any) -> list[Any]:
            return parts

    for rank in (0, 1):
        suite.run(replace(subject, world=Rank(rank, 2, CPU)))
    assert sum(len(batch["best"]) for part in parts for _, batch in part) == 50
    together = suite.run(replace(subject, world=Both(1, 2, CPU)))
    assert together.metrics == alone.metrics
    for name, column in alone.per_image.items():
        assert np.array_equal(together.per_image[name], column)


def test_the_picture_and_a_checkpoint_left_alone() -> None:
    suite, subject = seen_by(Dim, num_pictures=5)
    before = subject.network.fc.weight.clone()
    got = suite.run(subject)
    pixels = np.asarray(Image.open(BytesIO(got.pictures["cam"])).convert("RGB")).astype(int)
    assert min(pixels.shape[:2]) > 200
    for colour in ((255, 0, 0), (0, 255, 0)):  # the true box and the found one are drawn
        assert (np.abs(pixels - colour).sum(2) < 30).sum() > 100
    assert torch.equal(subject.network.fc.weight, before)
    assert not any(m._forward_hooks for m in subject.network.modules())


def test_what_cannot_be_localised_is_said() -> None:
    suite = load_suite("localization")
    config = config_of("dataset=synthetic", "model=resnet", "model.depth=8", "device=cpu")
    splits = config.dataset.load()
    network = config.model.build(10).eval()
    subject = Subject("run", "0" * 16, network, config, splits, ALONE)
    assert "synthetic has no boxes" in suite.lacks(subject)


@pytest.mark.slow
def test_each_published_layout_from_files_to_findings(tmp_path: Path) -> None:
    trees.tiny_imagenet(tmp_path / "tiny")
    trees.cub(tmp_path / "cub")
    words = {
        "tiny_imagenet": [f"dataset.root={tmp_path / 'tiny'}", "dataset.num_classes=3"],
        "cub": [f"dataset.root={tmp_path / 'cub'}", "dataset.num_classes=2"],
        "digits": [],
    }
    for name, more in words.items():
        size = ["dataset.image_size=64", "dataset.crop_resize=72"] if name == "cub" else []
        model = ["model=resnet", "model.depth=8", "device=cpu", "dataset.workers=0"]
        config = config_of(f"dataset={name}", *model[: 3 if name == "digits" else 4], *more, *size)
        torch.manual_seed(0)
        network = config.model.build(config.dataset.num_classes).eval()
        subject = Subject("run", "0" * 16, network, config, config.dataset.load(), ALONE)
        suite = load_suite("localization", {"num_pictures": 3})
        assert suite.lacks(subject) == ""
        got = suite.run(subject)
        assert len(got.per_image["correct"]) == len(subject.splits.test)
        assert got.pictures["cam"][:4] == b"\x89PNG"
        assert ("pxap" in got.metrics) == (name != "tiny_imagenet")
        assert all(0 <= v <= 100 for v in got.metrics.values())


def test_a_map_of_one_pixel_is_said() -> None:
    words = [
        "dataset=digits",
        "model=resnet",
        "model.depth=18",
        "model.stem=imagenet",
        "device=cpu",
    ]
    config = config_of(*words)
    network = config.model.build(10).eval()
    subject = Subject("run", "0" * 16, network, config, config.dataset.load(), ALONE)
    suite = load_suite("localization")
    assert "more than one pixel" in suite.lacks(subject)
    with pytest.raises(UserError, match="more than one pixel"):
        suite.run(subject)

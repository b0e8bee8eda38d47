"""Occlusion and in-between curves against plain loops."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from cutmix_exp.data.pipeline import Normalizer
from cutmix_exp.evaluation import base
from cutmix_exp.evaluation.base import Findings, load_suite
from cutmix_exp.evaluation.classification import predict
from cutmix_exp.evaluation.occlusion import centred_square, sides
from cutmix_exp.seeding import stream
from tests.evaluation.subjects import CPU, Small, agreed, images_of, subject_of

NETWORK = Small()
IMAGES = agreed(NETWORK, images_of(30, 8, 10))
SUBJECT = subject_of(NETWORK, IMAGES, "dataset.num_classes=10")


def found(name: str, **changes: Any) -> Findings:
    return load_suite(name, changes).run(SUBJECT)


def clean_error() -> float:
    dtype = SUBJECT.config.dtype
    scores = predict(NETWORK, SUBJECT.test, SUBJECT.normalize, SUBJECT.world, dtype)
    return scores.metrics()["top1_error"]


def normalised(image: Tensor) -> Tensor:
    return Normalizer(SUBJECT.config.dataset, CPU)(image[None])[0]


def test_sides_and_squares_by_hand() -> None:
    assert sides(32, 16) == list(range(0, 33, 2))
    assert sides(224, 16) == list(range(0, 225, 14))
    assert sides(4, 16) == [0, 1, 2, 3, 4]
    assert centred_square(4, 2).int().tolist() == [[0] * 4, [0, 1, 1, 0], [0, 1, 1, 0], [0] * 4]
    assert centred_square(4, 1).nonzero().tolist() == [[1, 1]]
    assert not centred_square(4, 0).any() and centred_square(4, 4).all()


@pytest.mark.parametrize("fill", ["mean", "black"])
def test_occlusion_is_the_plain_loop(fill: str) -> None:
    got = found("occlusion", steps=4, fill=fill).curves
    assert got["centre_occlusion"]["side"] == [0.0, 2.0, 4.0, 6.0, 8.0]
    zero = torch.zeros(3) if fill == "mean" else normalised(torch.zeros(3, 1, 1).byte())[:, 0, 0]
    for kind in ("centre", "boundary"):
        for step, side in enumerate((0, 2, 4, 6, 8)):
            wrong = 0
            for image, label in zip(IMAGES.images, IMAGES.labels, strict=True):
                seen = normalised(image)
                for row in range(8):
                    for column in range(8):
                        first = (8 - side) // 2
                        inside = all(first <= v < first + side for v in (row, column))
                        if inside == (kind == "centre"):
                            seen[:, row, column] = zero
                wrong += int(NETWORK(seen[None]).argmax() != label)
            assert got[f"{kind}_occlusion"]["top1_error"][step] == pytest.approx(100 * wrong / 30)


def test_nothing_covered_is_the_clean_error_exactly() -> None:
    scores = found("occlusion")
    clean = clean_error()
    assert 0 < clean < 100
    assert scores.curves["centre_occlusion"]["top1_error"][0] == clean
    assert scores.curves["boundary_occlusion"]["top1_error"][-1] == clean
    assert scores.metrics["clean_top1_error"] == clean
    errors = scores.curves["centre_occlusion"]["top1_error"]
    assert scores.metrics["centre/mean_top1_error"] == pytest.approx(sum(errors) / len(errors))
    assert scores.metrics["centre/half_side_top1_error"] == errors[4]
    assert scores.per_image["centre_correct"].shape == (30, 9)


def test_in_between_is_the_plain_loop() -> None:
    steps = 8  # with a square that is more than half of the side, but less of the area
    got = found("in_between", steps=steps)
    partner = stream(0, "in_between/partner").permutation(30)
    assert got.per_image["partner"].tolist() == partner.tolist()
    for kind in ("mixup", "cutmix"):
        for step in range(steps + 1):
            ratio = step / steps
            share = ratio if kind == "mixup" else ratio**2
            neither = wrong = 0
            for i in range(30):
                own, other = (IMAGES.images[j].float() / 255 for j in (i, partner[i]))
                if kind == "mixup":
                    mixed = (1 - ratio) * own + ratio * other
                else:
                    mixed, first, side = own.clone(), int(4 - 4 * ratio), int(8 * ratio)
                    square = slice(first, first + side)
                    mixed[:, square, square] = other[:, square, square]
                mean, std = SUBJECT.normalize.mean, SUBJECT.normalize.std
                said = int(NETWORK(((mixed - mean) / std)[None]).argmax())
                labels = [int(IMAGES.labels[j]) for j in (i, partner[i])]
                neither += said not in labels
                wrong += said != labels[share > 0.5]
            curve = got.curves[f"in_between_{kind}"]
            assert curve["ratio"][step] == ratio
            assert curve["neither_error"][step] == pytest.approx(100 * neither / 30)
            assert curve["top1_error"][step] == pytest.approx(100 * wrong / 30)


def test_both_ends_of_in_between_are_clean_exactly() -> None:
    """A permutation: at ratio 1 each image is seen once more, as a partner."""
    scores = found("in_between")
    for kind in ("mixup", "cutmix"):
        errors = scores.curves[f"in_between_{kind}"]["top1_error"]
        assert errors[0] == errors[-1] == clean_error()


@pytest.mark.parametrize("name", ["occlusion", "in_between"])
def test_batches_do_not_matter(name: str, monkeypatch: Any) -> None:
    whole = found(name)
    monkeypatch.setattr(base, "BATCH", 7)
    parts = found(name)
    for column, values in whole.per_image.items():
        assert np.array_equal(parts.per_image[column], values), column


def test_a_subset_is_stated() -> None:
    scores = found("occlusion", limit=10)
    assert scores.protocol["limit"] == 10
    assert len(scores.per_image["index"]) == len(scores.per_image["centre_correct"]) == 10

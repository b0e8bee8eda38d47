"""Stylized-ImageNet and conflicting cues, on small files of their published layouts."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from cutmix_exp.errors import UserError
from cutmix_exp.evaluation.base import Subject, load_suite
from cutmix_exp.evaluation.shape_texture import CATEGORIES, decisions, numbers
from tests.data.trees import SYNSETS
from tests.evaluation.subjects import Small, images_of, subject_of


class Reader(nn.Module):
    """Knows ImageNet-1k's class that the first pixel names: red + 256 * green."""

    def forward(self, images: Tensor) -> Tensor:
        raw = (images[:, :, 0, 0] * STD + MEAN) * 255
        named = (raw[:, 0] + 256 * raw[:, 1]).round().long()
        return torch.nn.functional.one_hot(named, 1000).float() * 20


MEAN, STD = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])


def subject_on(root: Path, classes: int = 1000) -> Subject:
    network = Reader() if classes == 1000 else Small(classes)
    names = SYNSETS if classes == 3 else tuple(f"n{i:08d}" for i in range(classes))
    words = (f"dataset.num_classes={classes}", f"dataset.root={root}", "dataset.workers=0")
    test = images_of(3, 16, min(classes, 10))
    return subject_of(network, test, *words, dataset="imagenet", class_names=names)


def write(file: Path, named: int) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (16, 16), (named % 256, named // 256, 0)).save(file)


def test_categories_are_the_published_ones() -> None:
    assert numbers("1-3,7") == (1, 2, 3, 7)
    assert list(CATEGORIES) == sorted(CATEGORIES) and len(CATEGORIES) == 16
    every = [c for classes in CATEGORIES.values() for c in classes]
    assert len(every) == len(set(every)) == 207  # 16-class-ImageNet's number
    from torchvision.models import AlexNet_Weights

    names = AlexNet_Weights.DEFAULT.meta["categories"]
    assert names[CATEGORIES["airplane"][0]] == "airliner"
    assert {names[c] for c in CATEGORIES["elephant"]} == {"Indian elephant", "African elephant"}
    assert {names[c] for c in CATEGORIES["clock"]} == {
        "analog clock",
        "digital clock",
        "wall clock",
    }
    assert {names[c] for c in CATEGORIES["bear"]} == {
        "brown bear",
        "American black bear",
        "ice bear",
        "sloth bear",
    }


def test_a_decision_is_by_the_mean_not_the_sum() -> None:
    """109 classes of dogs with 0.002 each have a larger sum, one of knives a larger mean."""
    probabilities = torch.zeros(1, 1000)
    probabilities[0, list(CATEGORIES["dog"])] = 0.002
    probabilities[0, CATEGORIES["knife"][0]] = 0.1
    assert list(CATEGORIES)[int(decisions(probabilities))] == "knife"


def test_shape_bias_by_hand(tmp_path: Path) -> None:
    """Of five images with a conflict three get the shape, one the texture, one neither."""
    folder = tmp_path / "style-transfer-preprocessed-512"
    for name, said in (
        ("airplane1-bicycle2", "airplane"),
        ("airplane2-cat1", "airplane"),
        ("cat1-dog3", "cat"),
        ("cat7-elephant1", "elephant"),
        ("dog4-oven1", "truck"),
        ("dog5-dog1", "dog"),  # no conflict
    ):
        shape = "".join(c for c in name.split("-")[0] if c.isalpha())
        write(folder / shape / f"{name}.png", CATEGORIES[said][0])
    suite, subject = load_suite("cue_conflict"), subject_on(tmp_path)
    assert suite.lacks(subject) == ""
    scores = suite.run(subject)
    assert scores.metrics == pytest.approx(
        {"shape_bias": 75.0, "shape_accuracy": 60.0, "texture_accuracy": 20.0}
    )
    assert scores.protocol["images_with_conflict"] == 5
    write(folder / "cat" / "cat.png", 0)
    with pytest.raises(UserError, match=r"cat\.png does not tell its cues"):
        suite.run(subject)


def test_stylized_imagenet(tmp_path: Path) -> None:
    subject, suite = subject_on(tmp_path, 3), load_suite("stylized_imagenet")
    # The data set's own val is not taken for the stylized one.
    write(tmp_path / "val" / SYNSETS[0] / "0.png", 0)
    assert "not at hand" in suite.lacks(subject)
    rng = np.random.default_rng(0)
    for label, synset in enumerate(SYNSETS):
        place = tmp_path / "Stylized-ImageNet" / "val" / synset
        place.mkdir(parents=True)
        for i in range(4):
            pixels = rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(place / f"{label}_{i}.png")
    assert suite.lacks(subject) == ""
    scores = suite.run(subject)
    files = sorted((tmp_path / "Stylized-ImageNet" / "val").glob("*/*.png"))
    right = []
    for file in files:
        image = torch.from_numpy(np.asarray(Image.open(file)).transpose(2, 0, 1).copy())[None]
        said = int(subject.network(subject.normalize(image)).argmax())
        right.append(said == SYNSETS.index(file.parent.name))
    assert scores.per_image["correct"].tolist() == right
    assert scores.metrics["top1_accuracy"] == pytest.approx(100 * np.mean(right))
    named = load_suite("stylized_imagenet", {"root": str(tmp_path / "Stylized-ImageNet")})
    assert named.run(subject).metrics == scores.metrics


def test_what_is_not_at_hand(tmp_path: Path) -> None:
    told = load_suite("stylized_imagenet").lacks(subject_on(tmp_path, 3))
    assert "rgeirhos/Stylized-ImageNet" in told and "val/<class>/*.png" in told
    told = load_suite("cue_conflict").lacks(subject_on(tmp_path))
    assert "rgeirhos/texture-vs-shape" in told and "airplane1-bicycle2.png" in told
    assert "has 3" in load_suite("cue_conflict").lacks(subject_on(tmp_path, 3))

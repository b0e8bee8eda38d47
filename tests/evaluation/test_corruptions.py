"""Suites of corruptions: on the fly, and the published layouts on small files of them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from cutmix_exp import schema
from cutmix_exp.data.folders import list_images
from cutmix_exp.data.sources import ImageSet
from cutmix_exp.errors import UserError
from cutmix_exp.evaluation import base
from cutmix_exp.evaluation.base import Findings, Subject, load_suite
from cutmix_exp.evaluation.classification import predict
from cutmix_exp.evaluation.corrupt import FROST_FILES, Corrupter
from cutmix_exp.evaluation.corruptions import (
    SEVERITIES,
    CifarC,
    mean_normalized_error,
    published_findings,
)
from cutmix_exp.evaluation.severities import ALEXNET_ERROR, CORRUPTIONS
from tests.data.trees import SYNSETS, class_trees
from tests.evaluation.subjects import Small, agreed, images_of, subject_of

NETWORK = Small()
IMAGES = agreed(NETWORK, images_of(12, 16, 10))
SUBJECT = subject_of(NETWORK, IMAGES, "dataset.num_classes=10")


def found(name: str, subject: Subject = SUBJECT, **changes: Any) -> Findings:
    suite = load_suite(name, changes)
    assert suite.lacks(subject) == ""
    return suite.run(subject)


def errors(network: Any, images: ImageSet, subject: Subject = SUBJECT) -> float:
    """In percent, image by image."""
    wrong = 0
    for image, label in zip(images.images, images.labels, strict=True):
        wrong += int(network(subject.normalize(image[None])).argmax() != label)
    return 100 * wrong / len(images)


def test_on_the_fly_is_the_plain_loop() -> None:
    names = ["gaussian_noise", "contrast", "jpeg_compression"]
    scores = found("corruptions", corruptions=names, severities=[2, 5], seed=3)
    curve = scores.curves["corruptions"]
    assert curve["severity"] == [0.0, 2.0, 5.0]
    for name in names:
        for place, severity in enumerate((2, 5)):
            corrupted = Corrupter("cifar", 3)(IMAGES.images, name, severity, np.arange(12))
            expected = errors(NETWORK, ImageSet(corrupted, IMAGES.labels))
            assert curve[name][place + 1] == pytest.approx(expected)
        mean = np.mean(curve[name][1:])
        assert scores.metrics[f"{name}/top1_error"] == pytest.approx(mean)
    means = [scores.metrics[f"{name}/top1_error"] for name in names]
    assert scores.metrics["mean_corruption_error"] == pytest.approx(np.mean(means))
    assert curve["mean_top1_error"][1] == pytest.approx(np.mean([curve[n][1] for n in names]))
    assert "mCE" not in scores.metrics
    assert scores.per_image["contrast"].shape == (12, 2)


def test_severity_0_is_the_clean_error_exactly() -> None:
    scores = found("corruptions", corruptions=["fog", "snow"])
    clean = predict(
        NETWORK, SUBJECT.test, SUBJECT.normalize, SUBJECT.world, SUBJECT.config.dtype
    ).metrics()["top1_error"]
    curve = scores.curves["corruptions"]
    assert 0 < clean < 100
    assert curve["fog"][0] == curve["snow"][0] == curve["mean_top1_error"][0] == clean
    assert scores.metrics["clean_top1_error"] == clean


def test_all_fifteen_but_frost_which_needs_photographs(tmp_path: Path) -> None:
    scores = found("corruptions", limit=3)
    assert list(scores.skipped) == ["frost"]
    assert "suite.frost_photos=FOLDER" in scores.skipped["frost"]
    assert scores.protocol["corruptions"] == [n for n in CORRUPTIONS if n != "frost"]
    assert scores.pictures["sheet"].startswith(b"\x89PNG")
    for name in FROST_FILES:
        Image.new("RGB", (200, 150), (90, 100, 110)).save(tmp_path / name)
    here, elsewhere, without = (
        schema.identity_of(load_suite("corruptions", {"frost_photos": folder}))
        for folder in (str(tmp_path), "/elsewhere", None)
    )
    assert here == elsewhere != without and str(tmp_path) not in str(here)
    with_frost = found("corruptions", corruptions=["frost"], frost_photos=str(tmp_path))
    assert not with_frost.skipped and "frost/top1_error" in with_frost.metrics
    with pytest.raises(UserError, match="frost_photos"):
        found("corruptions", corruptions=["frost"])


def test_batches_and_subsets_do_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    names = ["shot_noise", "snow"]
    strong = {"corruptions": names, "family": "imagenet"}  # so that draws decide
    whole = found("corruptions", **strong)
    monkeypatch.setattr(base, "BATCH", 5)
    parts = found("corruptions", **strong)
    some = found("corruptions", **strong, limit=7)
    index = some.per_image["index"]
    assert len(index) == 7
    for name in names:
        assert np.array_equal(parts.per_image[name], whole.per_image[name])
        assert np.array_equal(some.per_image[name], whole.per_image[name][index])


@pytest.mark.parametrize(
    "changes",
    [{"corruptions": ["rain"]}, {"corruptions": []}, {"severities": [6]}, {"severities": []}],
)
def test_what_is_not_allowed(changes: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=r"gaussian_noise|<= 5|some of 1, 2, 3, 4, 5"):
        load_suite("corruptions", changes)


def test_a_collection_of_nothing_is_refused() -> None:
    with pytest.raises(UserError, match=r"suites=\[\]: expected some of .*corruptions"):
        load_suite("robustness", {"suites": []})


def cifar_c(folder: Path, names: tuple[str, ...], count: int = 12) -> ImageSet:
    """The published layout with `count` images; returns the rows of the first corruption."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    labels = np.tile(rng.integers(0, 10, count, dtype=np.uint8), 5)
    np.save(folder / "labels.npy", labels)
    for name in reversed(names):
        colors = rng.integers(0, 256, (5 * count, 1, 1, 3))
        pixels = (colors * rng.uniform(0.5, 1, (5 * count, 32, 32, 3))).astype(np.uint8)
        np.save(folder / f"{name}.npy", pixels)
    images = torch.from_numpy(pixels).permute(0, 3, 1, 2)
    return ImageSet(images, torch.from_numpy(labels.astype(np.int64)))


@pytest.fixture
def cifar_subject(tmp_path: Path) -> Subject:
    """A network for 32 px whose data set calls itself cifar10."""
    words = ("dataset.name=cifar10", "dataset.num_classes=10", f"dataset.root={tmp_path}")
    return subject_of(NETWORK, images_of(4, 32, 10), *words)


def test_cifar_c_in_its_published_layout(tmp_path: Path, cifar_subject: Subject) -> None:
    rows = cifar_c(tmp_path / "CIFAR-10-C", ("shot_noise", "fog"))
    scores = found("cifar_c", cifar_subject)
    curve = scores.curves["corruptions"]
    assert curve["severity"] == [1.0, 2.0, 3.0, 4.0, 5.0]
    for severity in range(5):
        part = rows.at(np.arange(12) + 12 * severity)
        assert curve["shot_noise"][severity] == pytest.approx(errors(NETWORK, part, cifar_subject))
    assert scores.metrics["shot_noise/top1_error"] == pytest.approx(
        errors(NETWORK, rows, cifar_subject)
    )
    assert set(scores.skipped) == set(CORRUPTIONS) - {"shot_noise", "fog"}
    some = found("cifar_c", cifar_subject, limit=5, root=str(tmp_path / "CIFAR-10-C"))
    index = some.per_image["index"]
    assert np.array_equal(some.per_image["fog"], scores.per_image["fog"][index])


def test_each_severity_of_cifar_c_is_its_fifth_of_the_rows(
    tmp_path: Path, cifar_subject: Subject
) -> None:
    """Labels that are right for the third severity alone, to a network that reads them off."""

    class Reader(Small):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            raw = cifar_subject.normalize.inverse(images)[:, 0, 0, 0] * 255
            return torch.nn.functional.one_hot(raw.round().long(), 10).float()

    rows = np.arange(5)[:, None] * 2 + np.arange(12) % 2  # severities see 0 or 1, 2 or 3, ...
    pixels = np.zeros((60, 32, 32, 3), np.uint8) + rows.reshape(60, 1, 1, 1).astype(np.uint8)
    (tmp_path / "CIFAR-10-C").mkdir()
    np.save(tmp_path / "CIFAR-10-C" / "fog.npy", pixels)
    np.save(tmp_path / "CIFAR-10-C" / "labels.npy", np.tile(rows[2], 5).astype(np.uint8))
    subject = replace(cifar_subject, network=Reader())
    assert found("cifar_c", subject).curves["corruptions"]["fog"] == [
        100.0,
        100.0,
        0.0,
        100.0,
        100.0,
    ]


def test_a_subset_is_corrupted_by_its_places_in_the_whole_set(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    keys: list[int] = []
    corrupt = Corrupter.__call__

    def watched(self: Corrupter, images: Any, name: str, severity: int, index: Any) -> Any:
        keys.extend(index.tolist())
        return corrupt(self, images, name, severity, index)

    monkeypatch.setattr(Corrupter, "__call__", watched)
    scores = found("corruptions", corruptions=["fog"], severities=[1], limit=5)
    assert keys[:5] == scores.per_image["index"].tolist() != list(range(5))


def test_cifar_c_that_is_not_there_or_not_whole(tmp_path: Path, cifar_subject: Subject) -> None:
    suite = load_suite("cifar_c")
    told = suite.lacks(cifar_subject)
    for part in ("CIFAR-10-C is not at hand", str(tmp_path), "labels.npy", "zenodo", "suite.root="):
        assert part in told
    assert "is for cifar10" in suite.lacks(SUBJECT)
    cifar_c(tmp_path / "CIFAR-10-C", ("fog",))
    np.save(tmp_path / "CIFAR-10-C" / "fog.npy", np.zeros((7, 32, 32, 3), np.uint8))
    with pytest.raises(UserError, match=r"fog\.npy is uint8 \(7, 32, 32, 3\); expected .*60 x 32"):
        suite.run(cifar_subject)
    (tmp_path / "CIFAR-10-C" / "fog.npy").write_bytes(b"no array")
    with pytest.raises(UserError, match=r"fog\.npy cannot be read"):
        suite.run(cifar_subject)
    assert isinstance(suite, CifarC)


def imagenet_c(folder: Path, names: tuple[str, ...], classes: tuple[str, ...] = SYNSETS) -> None:
    for number, name in enumerate(names):
        for severity in SEVERITIES:
            for label, synset in enumerate(classes):
                for i in range(2):
                    place = folder / name / str(severity) / synset
                    place.mkdir(parents=True, exist_ok=True)
                    rng = np.random.default_rng([number, severity, label, i])
                    pixels = rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)
                    Image.fromarray(pixels).save(place / f"{i}.png")


def imagenet_subject(root: Path) -> Subject:
    words = ("dataset.num_classes=3", f"dataset.root={root}", "dataset.workers=0")
    test = images_of(4, 16, 3)
    return subject_of(Small(3, seed=2), test, *words, dataset="imagenet", class_names=SYNSETS)


def test_imagenet_c_in_its_published_layout(tmp_path: Path) -> None:
    subject = imagenet_subject(tmp_path)
    imagenet_c(tmp_path / "ImageNet-C", ("gaussian_noise",))
    imagenet_c(tmp_path / "ImageNet-C" / "weather", ("fog",))  # as an archive is unpacked
    scores = found("imagenet_c", subject)
    curve = scores.curves["corruptions"]
    for severity in SEVERITIES:
        folder = tmp_path / "ImageNet-C" / "weather" / "fog" / str(severity)
        files = sorted(folder.glob("*/*.png"))
        pixels = np.stack([np.asarray(Image.open(f)).transpose(2, 0, 1) for f in files])
        labels = torch.tensor([SYNSETS.index(f.parent.name) for f in files])
        part = ImageSet(torch.from_numpy(pixels.copy()), labels)
        expected = errors(subject.network, part, subject)
        assert curve["fog"][severity - 1] == pytest.approx(expected)
    assert "mCE" not in scores.metrics
    assert len(found("imagenet_c", subject, limit=3).per_image["fog"]) == 3


def test_imagenet_c_that_is_not_there_or_of_other_classes(tmp_path: Path) -> None:
    subject = imagenet_subject(tmp_path)
    suite = load_suite("imagenet_c")
    told = suite.lacks(subject)
    for part in ("not at hand", "<corruption>/<severity 1 to 5>/<class>", "zenodo", "suite.root="):
        assert part in told
    imagenet_c(tmp_path / "ImageNet-C", ("fog",), classes=SYNSETS[:2])
    assert "has 2 class folders; the network knows 3" in suite.lacks(subject)
    elsewhere = tmp_path / "elsewhere"
    imagenet_c(elsewhere, ("fog",), classes=(*SYNSETS[:2], "n00000001"))
    other = load_suite("imagenet_c", {"root": str(elsewhere)})
    assert "n00000001 is in one of them" in other.lacks(subject)


def test_mce_by_hand() -> None:
    """AlexNet's own errors give 100, half of them 50; ImageNet-1k with all fifteen alone has one."""
    alexnet = {f"{name}/top1_error": error for name, error in ALEXNET_ERROR.items()}
    assert mean_normalized_error(alexnet) == pytest.approx(100)
    assert mean_normalized_error({k: v / 2 for k, v in alexnet.items()}) == pytest.approx(50)
    one = dict.fromkeys(alexnet, 0.0) | {"fog/top1_error": 81.9324}
    assert mean_normalized_error(one) == pytest.approx(100 / 15)

    suite = load_suite("imagenet_c")
    subject = subject_of(NETWORK, images_of(4, 16, 10), "dataset.num_classes=1000")
    hits = {name: np.zeros((4, 5), dtype=bool) for name in CORRUPTIONS}
    assert isinstance(suite, type(load_suite("imagenet_c")))
    whole = published_findings(suite, subject, hits, np.arange(4), "x")  # type: ignore[arg-type]
    ratios = [100 / error for error in ALEXNET_ERROR.values()]
    assert whole.metrics["mCE"] == pytest.approx(100 * np.mean(ratios))
    assert whole.metrics["mean_corruption_error"] == 100.0
    del hits["frost"]
    partly = published_findings(suite, subject, hits, np.arange(4), "x")  # type: ignore[arg-type]
    assert "mCE" not in partly.metrics and list(partly.skipped) == ["frost"]


@pytest.mark.parametrize("name", ["fgsm", "pgd", "occlusion", "in_between", "corruptions"])
def test_images_that_stream_are_judged_like_those_at_hand(name: str, tmp_path: Path) -> None:
    """The whole set, and a subset, of files that are decoded as they are needed."""
    class_trees(tmp_path)
    files = list_images(tmp_path / "val", SYNSETS)
    held = imagenet_subject(tmp_path)
    streamed = replace(held, splits=replace(held.splits, test=files))
    (images,) = streamed.test.batches([np.arange(6)])
    assert images.shape == (6, 3, 16, 16)
    resident = replace(streamed, splits=replace(held.splits, test=ImageSet(images, files.labels)))
    changes = {"corruptions": ["shot_noise"]} if name == "corruptions" else {}
    for limit in (None, 4):
        expected = found(name, resident, limit=limit, **changes)
        got = found(name, streamed, limit=limit, **changes)
        assert got.metrics == expected.metrics
        for column, values in expected.per_image.items():
            assert np.array_equal(got.per_image[column], values), column

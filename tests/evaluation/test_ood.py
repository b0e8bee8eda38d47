"""Out-of-distribution detection: metrics by hand and against loops, sets in their published layouts
against pictures read by other means."""

from __future__ import annotations

import hashlib
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import stats
from scipy.io import savemat
from torch import Tensor

from cutmix_exp.data.sources import Cifar, ImageSet
from cutmix_exp.errors import UserError
from cutmix_exp.evaluation import calibration, ood, outliers
from cutmix_exp.evaluation.base import Subject, load_suite
from cutmix_exp.evaluation.detectors import Detector, MaxSoftmax, Score
from cutmix_exp.evaluation.ood import METRICS, SEVEN, OutOfDistribution, separation
from cutmix_exp.evaluation.outliers import NoiseImages
from tests.data.trees import class_trees, tiny_imagenet, write_image
from tests.evaluation.hand_made import CPU, by_ranks, digits_subject, few, subject_of
from tests.helpers import config_of

# -------------------------------------------------------------------------------- metrics


def test_by_hand() -> None:
    """Four inside, four outside, two of which are equal."""
    found = separation(np.array([0.9, 0.8, 0.7, 0.6]), np.array([0.75, 0.5, 0.5, 0.1]))
    # 95% of four are four: the threshold is 0.6, which 0.75 passes.
    assert found["tnr_at_tpr95"] == pytest.approx(75.0)
    # Of 16 pairs, two (0.7 and 0.6 against 0.75) are in the wrong order.
    assert found["auroc"] == pytest.approx(100 * 14 / 16)
    # Threshold 0.6: TPR 1, TNR 3/4. Threshold 0.8: TPR 1/2, TNR 1.
    assert found["detection_accuracy"] == pytest.approx(87.5)
    # Precision at 0.9, 0.8, 0.7, 0.6: 1/1, 2/2, 3/4, 4/5, each a quarter of the recall.
    assert found["aupr_in"] == pytest.approx(100 * (1 + 1 + 3 / 4 + 4 / 5) / 4)
    # Outside, from below: 0.1 (1/1), both 0.5 at once (3/3), 0.75 (4/6).
    assert found["aupr_out"] == pytest.approx(100 * (1 + 2 * 1 + 4 / 6) / 4)


def test_a_perfect_and_an_anti_perfect_detector() -> None:
    low, high = np.linspace(0, 0.4, 30), np.linspace(0.6, 1, 50)
    assert separation(high, low) == dict.fromkeys(METRICS, pytest.approx(100.0))
    worst = separation(low, high)
    assert (worst["auroc"], worst["tnr_at_tpr95"], worst["detection_accuracy"]) == (0.0, 0.0, 50.0)


def test_equal_scores_say_nothing() -> None:
    found = separation(np.full(20, 0.3), np.full(60, 0.3))
    assert (found["auroc"], found["tnr_at_tpr95"], found["detection_accuracy"]) == (50.0, 0.0, 50.0)
    assert (found["aupr_in"], found["aupr_out"]) == pytest.approx((25.0, 75.0))


def by_loops(inside: np.ndarray, outside: np.ndarray) -> dict[str, float]:
    pairs = [1.0 if a > b else 0.5 if a == b else 0.0 for a in inside for b in outside]
    thresholds = sorted({*inside.tolist(), *outside.tolist(), np.inf}, reverse=True)
    tnr, accuracy = None, 0.0
    for threshold in thresholds:
        accepted = sum(a >= threshold for a in inside)
        refused = sum(b < threshold for b in outside) / len(outside)
        accuracy = max(accuracy, (accepted / len(inside) + refused) / 2)
        if tnr is None and accepted * 100 >= 95 * len(inside):
            tnr = refused
    assert tnr is not None
    return {
        "auroc": 100 * float(np.mean(pairs)),
        "tnr_at_tpr95": 100 * tnr,
        "detection_accuracy": 100 * accuracy,
    }


@pytest.mark.parametrize("size", [1, 7, 19, 20, 21, 100])
@pytest.mark.parametrize("levels", [4, 40, 10_000])
def test_against_loops_with_ties(size: int, levels: int) -> None:
    rng = np.random.default_rng(size + levels)
    inside = rng.integers(0, levels, size) / levels + 0.2
    outside = rng.integers(0, levels, 37) / levels
    found = separation(inside, outside)
    for name, value in by_loops(inside, outside).items():
        assert found[name] == pytest.approx(value), name


def test_only_the_order_of_the_scores_counts() -> None:
    """Of scores near 1, the order is not lost by negation or squares: 1 - 1e-16 is still below 1."""
    rng = np.random.default_rng(0)
    inside, outside = rng.normal(1.0, 1.0, 80), rng.normal(0.0, 1.0, 60)
    expected = separation(inside, outside)
    for law in (np.exp, lambda x: -1e300 / (5 + x), lambda x: 1e-300 * (x + 5)):
        assert separation(law(inside), law(outside)) == expected
    assert separation(np.array([1.0]), np.array([1 - 1.2e-16]))["auroc"] == 100.0


# -------------------------------------------------------------------------------- the suite

DRAWN = ood.draw_scores


@pytest.fixture(scope="module")
def digits() -> Subject:
    return digits_subject()


@pytest.fixture(autouse=True)
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pictures take half a second each: one test has them."""
    monkeypatch.setattr(ood, "draw_scores", lambda *_: b"")
    monkeypatch.setattr(calibration, "draw_reliability", lambda *_: b"")
    monkeypatch.setattr(calibration, "draw_risks", lambda *_: b"")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a Tiny ImageNet of 400 validation images."""
    root = tmp_path_factory.mktemp("tiny")
    wnids = tuple(f"n{number:08}" for number in range(200))
    tiny_imagenet(root / "tiny-imagenet-200", wnids, each=1)
    return root


def suite(**changes: Any) -> OutOfDistribution:
    found = load_suite("ood", {"noise_images": 40, **changes})
    assert isinstance(found, OutOfDistribution)
    return found


@dataclass(frozen=True, kw_only=True)
class Rigged(Detector):
    """Knows the noise by its fractions of a byte."""

    sign: int = 1

    def prepare(self, subject: Subject) -> Score:
        def score(pixels: Tensor) -> Tensor:
            bytes_ = pixels.double() * 255
            return -self.sign * (bytes_ - bytes_.round()).abs().mean((1, 2, 3))

        return score


def test_noise_alone_needs_no_data(digits: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ood, "draw_scores", DRAWN)
    before = fingerprint(digits)
    found = suite().run(digits)
    assert {n.split("/")[0] for n in found.metrics} == {"uniform", "gaussian", "mean_at_hand"}
    assert set(found.skipped) == {*SEVEN, "svhn", "dtd", "cifar10", "cifar100"} - {
        "uniform",
        "gaussian",
    }
    said = found.skipped["isun"]
    assert "iSUN/iSUN_patches" in said and "facebookresearch/odin" in said and "suite.root" in said
    assert "Imagenet/test" in found.skipped["tinyimagenet_crop"]
    assert "tiny_imagenet" in found.skipped["tinyimagenet_crop"]
    assert str(Path.cwd()) not in "".join(found.skipped.values())  # it is kept in records
    assert {n: len(v) for n, v in found.per_image.items()} == {
        "score_in": 60,
        "score_uniform": 40,
        "score_gaussian": 40,
    }
    for name in ("uniform", "gaussian"):
        again = separation(found.per_image["score_in"], found.per_image[f"score_{name}"])
        assert {what: found.metrics[f"{name}/{what}"] for what in METRICS} == again
    assert found.pictures["scores"].startswith(b"\x89PNG")
    assert found.protocol["means"] == {"mean_at_hand": ["uniform", "gaussian"]}
    assert fingerprint(digits) == before


def fingerprint(subject: Subject) -> str:
    network = subject.network
    assert not network.training and all(p.grad is None for p in network.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in network.modules())
    state = [t.numpy().tobytes() for t in network.state_dict().values()]
    return hashlib.sha256(b"".join(state)).hexdigest()


@pytest.mark.parametrize(("sign", "auroc"), [(1, 100.0), (-1, 0.0)])
def test_rigged_detectors(digits: Subject, sign: int, auroc: float) -> None:
    found = replace(suite(), detector=Rigged(sign=sign)).run(digits)
    assert found.metrics["uniform/auroc"] == found.metrics["gaussian/auroc"] == auroc


def test_scores_of_the_test_images_are_those_of_the_classification(digits: Subject) -> None:
    scores = suite(others=[], batch_size=7).run(digits).per_image["score_in"]
    confidence = load_suite("classification").run(digits).per_image["confidence"]
    assert scores.dtype == np.float64
    assert scores == pytest.approx(confidence, rel=1e-5)


def test_scores_that_are_not_finite_are_told(digits: Subject) -> None:
    @dataclass(frozen=True, kw_only=True)
    class Broken(Detector):
        def prepare(self, subject: Subject) -> Score:
            return lambda pixels: torch.full((len(pixels),), torch.nan)

    with pytest.raises(UserError, match="60 of 60 images are not finite"):
        replace(suite(), detector=Broken()).run(digits)


def test_a_set_that_does_not_exist() -> None:
    with pytest.raises(UserError, match=r"no set lsun_crops; sets: .*lsun_crop"):
        suite(others=["lsun_crops"])


def test_the_noise_is_odins() -> None:
    """Uniform on [0, 1]; normal(0.5, 1), of which 30.85% is cut at each end. Each image hangs on
    the seed and its number alone."""
    drawn = {}
    for law in ("uniform", "gaussian"):
        images = NoiseImages(law, 0, 12, 32, CPU)  # type: ignore[arg-type]
        (whole,) = images.batches([np.arange(12)])
        parts = torch.cat(list(images.batches([np.array([5]), np.array([11, 0])])))
        assert torch.equal(parts, whole[[5, 11, 0]]) and whole.dtype == torch.float32
        assert len({image.numpy().tobytes() for image in whole}) == 12
        (other,) = NoiseImages(law, 1, 12, 32, CPU).batches([np.arange(12)])  # type: ignore[arg-type]
        assert not torch.equal(whole, other)
        drawn[law] = whole.numpy().ravel()
    assert stats.kstest(drawn["uniform"], "uniform").pvalue > 1e-3
    cut = [float((drawn["gaussian"] == end).mean()) for end in (0, 1)]
    assert cut == pytest.approx([stats.norm.cdf(-0.5)] * 2, abs=0.01)
    inside = drawn["gaussian"][(drawn["gaussian"] > 0) & (drawn["gaussian"] < 1)]
    assert stats.kstest(inside, stats.truncnorm(-0.5, 0.5, loc=0.5).cdf).pvalue > 1e-3


# ------------------------------------------------------------------- published layouts


def shown(subject: Subject, name: str, root: Path, **changes: Any) -> Tensor:
    """What the network is shown of a set: uint8 [N, 3, S, S]."""
    examined = suite(groups={"mean": [name]}, others=[], root=str(root), **changes)
    setting = examined._setting(subject)
    sources, skipped = examined._sources(subject, setting)
    assert not skipped, skipped
    images = sources[name].load(setting)
    assert images.labels.shape == (len(images),)
    return torch.cat(list(images.batches([np.arange(len(images))[::-1].copy()]))).flip(0)


def read(file: Path) -> Tensor:
    return torch.from_numpy(np.array(Image.open(file).convert("RGB"))).permute(2, 0, 1)


def odin_tree(root: Path, each: int = 3) -> Path:
    for number in range(each):
        write_image(root / f"Imagenet/test/{number}.png", number, (36, 36))
        write_image(root / f"Imagenet_resize/Imagenet_resize/{number}.png", 10 + number, (32, 32))
        write_image(root / f"LSUN/test/{number}.png", 20 + number, (36, 36))
        write_image(root / f"LSUN_resize/LSUN_resize/{number}.png", 30 + number, (32, 32))
        write_image(root / f"iSUN/iSUN_patches/iSUN_{number}.jpeg", 40 + number, (32, 32))
    return root


def test_all_seven_sets_have_a_mean(digits: Subject, tmp_path: Path) -> None:
    found = suite(root=str(odin_tree(tmp_path)), others=[]).run(digits)
    assert not found.skipped
    assert found.protocol["means"] == {"mean": list(SEVEN)}
    assert found.protocol["sets"]["lsun_crop"] == {"images": 3, "from": "ODIN's archive LSUN"}
    for what in METRICS:
        mean = sum(found.metrics[f"{name}/{what}"] for name in SEVEN) / 7
        assert found.metrics[f"mean/{what}"] == pytest.approx(mean)
    assert "mean_at_hand/auroc" not in found.metrics


def test_odins_archives(digits: Subject, tmp_path: Path) -> None:
    """Crops lose their border of two pixels, resized sets are shown as they are."""
    odin_tree(tmp_path)
    for name, file, border in (
        ("tinyimagenet_crop", "Imagenet/test/{}.png", 2),
        ("tinyimagenet_resize", "Imagenet_resize/Imagenet_resize/{}.png", 0),
        ("lsun_crop", "LSUN/test/{}.png", 2),
        ("lsun_resize", "LSUN_resize/LSUN_resize/{}.png", 0),
    ):
        for number, image in enumerate(shown(digits, name, tmp_path)):
            pixels = read(tmp_path / file.format(number))
            end = pixels.shape[1] - border
            assert torch.equal(image, pixels[:, border:end, border:end]), name
    assert shown(digits, "isun", tmp_path).shape == (3, 3, 32, 32)


def test_sets_made_of_tiny_imagenet(digits: Subject, tiny: Path) -> None:
    folder = tiny / "tiny-imagenet-200/val/images"
    crops = shown(digits, "tinyimagenet_crop", tiny)
    resized = shown(digits, "tinyimagenet_resize", tiny)
    assert crops.shape == resized.shape == (400, 3, 32, 32)
    decoded = {file.name: read(file).numpy() for file in folder.iterdir()}
    corners = set()
    for crop in crops[:10]:
        places = [found for pixels in decoded.values() for found in windows(pixels, crop.numpy())]
        assert len(places) == 1
        corners.add(places[0])
    assert len(corners) > 7  # random places
    assert torch.equal(crops, shown(digits, "tinyimagenet_crop", tiny))
    assert not torch.equal(crops, shown(digits, "tinyimagenet_crop", tiny, seed=1))
    of_pil = {
        np.array(Image.open(file).resize((32, 32), Image.Resampling.BILINEAR)).tobytes()
        for file in folder.iterdir()
    }
    assert {image.permute(1, 2, 0).numpy().tobytes() for image in resized} == of_pil


def windows(pixels: np.ndarray, crop: np.ndarray) -> list[tuple[int, int]]:
    """Where a crop lies in an image."""
    side = crop.shape[1]
    rows, columns = np.nonzero((pixels == crop[:, :1, :1]).all(0))
    return [
        (top, left)
        for top, left in zip(rows.tolist(), columns.tolist(), strict=True)
        if np.array_equal(pixels[:, top : top + side, left : left + side], crop)
    ]


def test_networks_meet_no_set_they_were_trained_on(digits: Subject, tiny: Path) -> None:
    config = config_of("dataset=tiny_imagenet", "model=resnet", "device=cpu", "precision=fp32")
    images = torch.zeros(6, 3, 64, 64, dtype=torch.uint8)
    data = ImageSet(images, torch.arange(6))
    subject = subject_of(config, replace(digits.splits, train=data, test=data))
    examined = suite(root=str(tiny), noise_images=3)
    skipped = examined._sources(subject, examined._setting(subject))[1]
    assert "was trained on such images" in skipped["tinyimagenet_resize"]
    # Another network of this size cannot be shown windows of its images.
    other = replace(config, dataset=replace(config.dataset, name="other"))
    skipped = examined._sources(replace(subject, config=other), examined._setting(subject))[1]
    assert "are not cropped to the network's 64 px" in skipped["tinyimagenet_crop"]
    assert "tinyimagenet_resize" not in skipped


def test_svhn(digits: Subject, tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (32, 32, 3, 5), dtype=np.uint8)
    (tmp_path / "svhn").mkdir()
    savemat(tmp_path / "svhn/test_32x32.mat", {"X": pixels, "y": np.ones((5, 1), np.uint8)})
    images = shown(digits, "svhn", tmp_path)
    assert all(np.array_equal(images[i].permute(1, 2, 0).numpy(), pixels[..., i]) for i in range(5))


def test_a_set_whose_files_are_damaged_is_left_out_by_name(digits: Subject, tmp_path: Path) -> None:
    (tmp_path / "svhn").mkdir()
    (tmp_path / "svhn/test_32x32.mat").write_bytes(b"no matrix")
    write_image(tmp_path / "dtd/images/woven/woven_0.jpg", 1, (40, 40))
    changes = {"root": str(tmp_path), "others": ["svhn", "dtd"]}
    examined = suite(**changes)
    for found in by_ranks(digits, 2, examined.run):
        assert "svhn/test_32x32.mat cannot be read" in found.skipped["svhn"]
        assert str(tmp_path) not in found.skipped["svhn"]  # it is kept in records
        assert set(found.protocol["sets"]) == {"uniform", "gaussian", "dtd"}
        assert "dtd/auroc" in found.metrics and "svhn/auroc" not in found.metrics
    with pytest.raises(UserError, match=r"none of the sets is at hand\nsvhn: .* cannot be read"):
        suite(root=str(tmp_path), groups={}, others=["svhn"]).run(digits)


def test_textures_in_class_folders(digits: Subject, tmp_path: Path) -> None:
    for number, (name, size) in enumerate([("banded", (40, 90)), ("woven", (50, 36))]):
        write_image(tmp_path / f"dtd/images/{name}/{name}_0.jpg", number, size)
    images = shown(digits, "dtd", tmp_path)
    whole = Image.open(tmp_path / "dtd/images/woven/woven_0.jpg")
    resized = np.array(whole.resize((32, 44), Image.Resampling.BILINEAR))
    assert np.array_equal(images[1].permute(1, 2, 0).numpy(), resized[6:38])


def test_test_images_of_other_data_sets(
    digits: Subject, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = tuple(f"c{i}" for i in range(10))
    class_trees(tmp_path / "cifar-10-images", "test", names, each=1)
    assert shown(digits, "cifar10_jpeg", tmp_path).shape == (20, 3, 32, 32)
    cifar = ImageSet(torch.arange(4 * 3 * 32 * 32).view(4, 3, 32, 32).byte(), torch.arange(4))
    monkeypatch.setattr(Cifar, "missing", lambda _: "")
    monkeypatch.setattr(Cifar, "read", lambda _: (few(cifar, 1), cifar, ("a",) * 100))
    assert torch.equal(shown(digits, "cifar100", tmp_path), cifar.images)
    config = replace(digits.config, dataset=replace(digits.config.dataset, name="cifar10_jpeg"))
    skipped = suite()._sources(replace(digits, config=config), suite()._setting(digits))[1]
    assert "was trained on such images" in skipped["cifar10"]


def test_networks_of_streamed_images_see_files_as_their_own(tmp_path: Path) -> None:
    class_trees(tmp_path, each=2)
    write_image(tmp_path / "ood/dtd/images/woven/woven_0.jpg", 3, (80, 60))
    config = config_of(
        "dataset=image_folder", f"dataset.root={tmp_path}", "dataset.image_size=32",
        "dataset.workers=0", "model=resnet", "model.depth=8", "device=cpu", "precision=fp32",
    )  # fmt: skip
    subject = subject_of(config, config.dataset.load())
    found = suite(groups={"mean": ["dtd", "uniform"]}, others=["tinyimagenet_crop"]).run(subject)
    assert {"dtd/auroc", "uniform/auroc", "mean/auroc"} <= found.metrics.keys()
    assert len(found.per_image["score_uniform"]) == 40
    # The file is a test image of the network now: it gets the same score.
    inside = subject_of(
        config, replace(subject.splits, test=subject.splits.test.at(np.array([0, 0])))
    )
    file = inside.splits.test.path(0)  # type: ignore[union-attr]
    (tmp_path / "ood/dtd/images/woven/woven_0.jpg").write_bytes(file.read_bytes())
    again = suite(groups={"mean": ["dtd"]}, others=[]).run(inside)
    assert again.per_image["score_dtd"][0] == pytest.approx(again.per_image["score_in"][0])


# ---------------------------------------------------------------- which images count


def test_odins_images(digits: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "first 1,000 of 60 test images" in suite(images="odin").lacks(digits)
    monkeypatch.setattr(ood, "ODIN_FIRST", 10)
    monkeypatch.setattr(ood, "ODIN_LAST", 50)
    assert "sorted by class" in suite(images="odin").lacks(sorted_by_class(digits))
    assert not suite(images="odin").lacks(digits)
    every = suite(others=[]).run(digits).per_image
    some = suite(others=[], images="odin").run(digits).per_image
    assert some["score_in"] == pytest.approx(every["score_in"][10:50])
    assert some["score_uniform"] == pytest.approx(every["score_uniform"][10:])


def sorted_by_class(subject: Subject) -> Subject:
    order = np.argsort(subject.splits.test.labels.numpy(), kind="stable")
    return replace(subject, splits=replace(subject.splits, test=subject.splits.test.at(order)))


def openood_tree(root: Path) -> Path:
    lists = root / "benchmark_imglist/cifar10"
    lists.mkdir(parents=True)
    sets = {"cifar10": 5, "cifar100": 4, "tin": 3, "mnist": 2, "svhn": 2, "texture": 2}
    for seed, (name, count) in enumerate({**sets, "places365": 2}.items()):
        lines = []
        for number in reversed(range(count)):
            path = f"{name}/test/{number}.png"
            mode = "L" if name == "mnist" else "RGB"
            write_image(root / "images_classic" / path, 10 * seed + number, (28, 28), mode)
            lines.append(f"{path} {number if name == 'cifar10' else -1}\n")
        (lists / f"test_{name}.txt").write_text("".join(lines))
    return root


def test_openoods_lists(digits: Subject, tmp_path: Path) -> None:
    lists = load_suite("ood_openood", {"root": str(tmp_path), "benchmark": "cifar10"})
    said = lists.lacks(digits)
    assert "benchmark_imglist/cifar10/test_cifar10.txt" in said and "OpenOOD" in said
    openood_tree(tmp_path)
    assert not lists.lacks(digits)
    found = lists.run(digits)
    sizes = {name: len(scores) for name, scores in found.per_image.items()}
    assert sizes == {
        "score_in": 5, "score_cifar100": 4, "score_tin": 3, "score_mnist": 2, "score_svhn": 2,
        "score_texture": 2, "score_places365": 2,
    }  # fmt: skip
    assert found.protocol["means"] == {
        "near": ["cifar100", "tin"],
        "far": ["mnist", "svhn", "texture", "places365"],
    }
    near = (found.metrics["cifar100/auroc"] + found.metrics["tin/auroc"]) / 2
    assert found.metrics["near/auroc"] == pytest.approx(near)
    assert set(found.skipped) == {"cifar10"}
    (tmp_path / "images_classic/tin/test/1.png").unlink()
    assert re.search(
        r"1 images that are not in .* the first is tin/test/1.png", lists.run(digits).skipped["tin"]
    )


def test_openoods_lists_come_without_the_images(digits: Subject, tmp_path: Path) -> None:
    """The archive of the lists has all sets, those of the images are one for each."""
    lists = load_suite("ood_openood", {"root": str(tmp_path), "benchmark": "cifar10"})
    images = openood_tree(tmp_path) / "images_classic"
    shutil.rmtree(images / "texture")
    (images / "tin").rename(tmp_path / "elsewhere")
    assert not lists.lacks(digits)
    found = lists.run(digits)
    assert set(found.skipped) == {"cifar10", "tin", "texture"}
    assert "test_texture.txt names in images_classic" in found.skipped["texture"]
    assert found.protocol["means"] == {
        "near_at_hand": ["cifar100"],
        "far_at_hand": ["mnist", "svhn", "places365"],
    }
    shutil.rmtree(images / "cifar10")
    assert "the first: cifar10/test/4.png" in lists.lacks(digits)


def test_a_list_gives_the_order(digits: Subject, tmp_path: Path) -> None:
    openood_tree(tmp_path)
    lists = load_suite("ood_openood", {"root": str(tmp_path), "benchmark": "cifar10"})
    assert isinstance(lists, OutOfDistribution)
    setting = lists._setting(digits)
    images = outliers.Listed("", "cifar10", "tin").load(setting)
    (first,) = images.batches([np.array([0])])
    assert torch.equal(first, torch.stack([larger(tmp_path / "images_classic/tin/test/2.png")]))


def larger(file: Path) -> Tensor:
    image = Image.open(file).resize((32, 32), Image.Resampling.BILINEAR)
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


# --------------------------------------------------------------------------- many processes


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("ood", {"noise_images": 23, "others": [], "batch_size": 9}),
        ("ood_mahalanobis", {"noise_images": 23, "others": [], "batch_size": 9}),
        ("calibration", {"batch_size": 9}),
    ],
)
def test_any_number_of_processes_finds_the_same(
    digits: Subject, tiny: Path, name: str, changes: dict[str, Any]
) -> None:
    """To the last bit, on every rank."""
    if name != "calibration":
        changes = {**changes, "root": str(tiny)}
    alone = load_suite(name, changes).run(digits)
    for found in by_ranks(digits, 3, lambda subject: load_suite(name, changes).run(subject)):
        assert found.metrics == alone.metrics and found.protocol == alone.protocol
        assert found.per_image.keys() == alone.per_image.keys()
        for column, values in found.per_image.items():
            assert np.array_equal(values, alone.per_image[column]), column


# ------------------------------------------------------------------------------- variants


VARIANTS = ["ood_odin", "ood_energy", "ood_mahalanobis"]


@pytest.mark.parametrize("name", VARIANTS)
def test_variants_leave_the_network_alone(digits: Subject, name: str) -> None:
    before = fingerprint(digits)
    found = load_suite(name, {"noise_images": 20, "others": []}).run(digits)
    assert np.isfinite(list(found.metrics.values())).all()
    assert fingerprint(digits) == before


def test_the_paper_takes_the_softmax() -> None:
    detector: Callable[..., Any] = MaxSoftmax
    assert suite().detector == detector(temperature=1.0)

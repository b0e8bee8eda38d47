"""scripts/prepare_data.py: what is there, what is missing, and ImageNet's validation images."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.io import savemat

from cutmix_exp.composition import CONFIG_DIR
from cutmix_exp.data.layout import sort_into_folders, validation_synsets
from cutmix_exp.errors import UserError
from tests.data.trees import SYNSETS, class_trees, tiny_imagenet, write_image
from tests.helpers import ROOT, refused

TRUTH = [3, 1, 2, 1, 3, 2]
"""Number of the class of each validation image."""
NUMBERS = {1: SYNSETS[2], 2: SYNSETS[0], 3: SYNSETS[1]}
"""Synset by number: not in the order of the names, as published."""
WANTED = {f"ILSVRC2012_val_{i:08}.JPEG": NUMBERS[n] for i, n in enumerate(TRUTH, start=1)}


@pytest.fixture
def prepare_data() -> Callable[[list[str]], int]:
    spec = importlib.util.spec_from_file_location("prepare_data", ROOT / "scripts/prepare_data.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    command: Callable[[list[str]], int] = module.command
    return command


@pytest.fixture
def devkit(tmp_path: Path) -> Path:
    """Ground truth and meta.mat as in ILSVRC2012_devkit_t12, with a class that has children."""
    folder = tmp_path / "devkit"
    (folder / "data").mkdir(parents=True)
    truth = "".join(f"{number}\n" for number in TRUTH)
    (folder / "data/ILSVRC2012_validation_ground_truth.txt").write_text(truth)
    fields = [("ILSVRC2012_ID", "O"), ("WNID", "O"), ("words", "O"), ("num_children", "O")]
    synsets = np.zeros((4, 1), dtype=fields)
    for row, (number, wnid) in enumerate([*NUMBERS.items(), (4, "n00001740")]):
        synsets[row, 0] = (float(number), wnid, f"word {wnid}", 3.0 if number == 4 else 0.0)
    savemat(folder / "data/meta.mat", {"synsets": synsets})
    return folder


@pytest.fixture
def imagenet(tmp_path: Path) -> Path:
    """The folder above imagenet/, whose validation images lie in one folder."""
    folder = class_trees(tmp_path / "root/imagenet", test="unused")
    for i, name in enumerate(WANTED):
        write_image(folder / "val" / name, i)
    return tmp_path / "root"


def laid_out(folder: Path) -> dict[str, str]:
    return {p.name: p.parent.name for p in folder.rglob("*.JPEG")}


def test_validation_images_are_sorted_by_the_devkit(
    prepare_data: Callable[[list[str]], int],
    imagenet: Path,
    devkit: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    words = ["dataset=imagenet", f"root={imagenet}", "dataset.num_classes=3"]
    with pytest.raises(UserError, match=r"devkit=FOLDER"):
        prepare_data(words)
    assert set(laid_out(imagenet / "imagenet/val").values()) == {"val"}, "nothing moves unasked"
    for _ in range(2):  # the second time nothing is left to do
        assert prepare_data([*words, f"devkit={devkit}"]) == 0
        assert laid_out(imagenet / "imagenet/val") == WANTED
        out = capsys.readouterr().out
        assert "ready: 12 training and 6 test images in 3 classes" in out
        assert "https://image-net.org" in out
        assert "non-commercial" in out
    assert prepare_data(words) == 0


def test_kaggles_table_serves_as_well(imagenet: Path, tmp_path: Path) -> None:
    rows = [f"{Path(n).stem},{s} 85 1 499 272 {s} 1 2 3 4\n" for n, s in reversed(WANTED.items())]
    (tmp_path / "LOC_val_solution.csv").write_text("ImageId,PredictionString\n" + "".join(rows))
    assert validation_synsets(tmp_path) == WANTED


def test_an_interrupted_move_goes_on(
    imagenet: Path, devkit: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = imagenet / "imagenet/val"
    rename, left = Path.rename, [3]

    def failing(self: Path, target: Path) -> Any:
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", failing)
    with pytest.raises(KeyboardInterrupt):
        sort_into_folders(folder, validation_synsets(devkit))
    monkeypatch.undo()
    assert sum(parent == "val" for parent in laid_out(folder).values()) == 3
    assert sort_into_folders(folder, validation_synsets(devkit)) == 3
    assert laid_out(folder) == WANTED


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ("unknown file", "1 unknown files (holiday.JPEG)"),
        ("unknown folder", "1 unknown folders (pictures)"),
        ("missing", "1 missing images (ILSVRC2012_val_00000002.JPEG)"),
        ("wrong folder", "1 images in a wrong folder (ILSVRC2012_val_00000002.JPEG)"),
        ("twice", "1 images in a folder and outside (ILSVRC2012_val_00000002.JPEG)"),
    ],
)
def test_half_known_states_are_refused(imagenet: Path, devkit: Path, fault: str, said: str) -> None:
    folder = imagenet / "imagenet/val"
    second = folder / "ILSVRC2012_val_00000002.JPEG"
    if fault == "unknown file":
        write_image(folder / "holiday.JPEG", 0)
    elif fault == "unknown folder":
        (folder / "pictures").mkdir()
    elif fault == "missing":
        second.unlink()
    elif fault == "wrong folder":
        (folder / SYNSETS[0]).mkdir()
        second.rename(folder / SYNSETS[0] / second.name)
    else:
        write_image(folder / WANTED[second.name] / second.name, 0)
    before = laid_out(folder)
    with pytest.raises(UserError, match="nothing was moved") as caught:
        sort_into_folders(folder, validation_synsets(devkit))
    assert said in str(caught.value)
    assert laid_out(folder) == before


@pytest.mark.parametrize(
    "fault", ["empty", "no meta", "no mat file", "cut off", "nothing", "unknown number"]
)
def test_a_devkit_that_is_none_is_told(devkit: Path, tmp_path: Path, fault: str) -> None:
    meta = devkit / "data/meta.mat"
    truth = devkit / "data/ILSVRC2012_validation_ground_truth.txt"
    if fault == "empty":
        devkit = tmp_path
    elif fault == "no meta":
        meta.unlink()
    elif fault == "no mat file":
        meta.write_text("<html>login first</html>")
    elif fault in ("cut off", "nothing"):
        content = meta.read_bytes()
        meta.write_bytes(content[: 0 if fault == "nothing" else len(content) // 2])
    else:
        truth.write_text("1\n4\n")
    with pytest.raises(UserError, match=f"devkit={devkit}: (there is no|its files are not)"):
        validation_synsets(devkit)


def test_every_data_set_is_told_without_moving_or_downloading(
    prepare_data: Callable[[list[str]], int],
    imagenet: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: list[Any] = []

    def urlopen(request: Any, **kwargs: Any) -> None:
        asked.append(request)
        raise OSError("no network here")

    monkeypatch.setattr("urllib.request.urlopen", urlopen)
    tiny_imagenet(imagenet / "tiny-imagenet-200")
    before = sorted(os.walk(imagenet))
    assert prepare_data([f"dataset.root={imagenet}"]) == 0
    assert sorted(os.walk(imagenet)) == before
    assert asked == []
    out = capsys.readouterr().out
    for file in (CONFIG_DIR / "dataset").glob("*.yaml"):
        assert f"\n{file.stem}: " in f"\n{out}"
    for text in (
        "cifar10 is not at hand",
        "imagenet is not at hand",
        "class folders in val",
        "not ready: ",  # three classes where there should be 200
        "dataset.num_classes=200",
        "http://cs231n.stanford.edu",
        "ready: nothing is missing",
    ):
        assert text in out


def test_a_devkit_goes_with_imagenet_alone(prepare_data: Callable[[list[str]], int]) -> None:
    for words in ([], ["dataset=digits"]):
        with pytest.raises(UserError, match="goes with dataset=imagenet"):
            prepare_data([*words, "devkit=somewhere"])


def test_a_named_set_that_is_missing_ends_the_command(tmp_path: Path) -> None:
    said = refused("dataset=tiny_imagenet", f"root={tmp_path}", script="scripts/prepare_data.py")
    assert "tiny_imagenet is not at hand" in said
    assert str(tmp_path / "tiny-imagenet-200") in said

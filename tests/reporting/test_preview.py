"""Contact sheets, and the page of regularizers, which has a row and a picture for each."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch

from cutmix_exp.composition import CONFIG_DIR
from cutmix_exp.data.sources import Splits
from cutmix_exp.reporting.preview import contact_sheet, shown, visible_methods
from tests.helpers import ROOT, config_of

METHODS = sorted({p.stem for p in CONFIG_DIR.glob("aug/*.yaml")} - {"baseline"})
PAGE = (ROOT / "docs" / "regularizers.md").read_text()
PICTURES = ROOT / "docs" / "pictures"
SAMPLES = ["dataset=samples", "dataset.image_size=32", "model=resnet", "model.depth=20"]


@pytest.fixture(scope="module")
def splits() -> Splits:
    return config_of(*SAMPLES).dataset.load()


def test_sources_are_shown_as_they_are_and_the_result_as_the_network_sees_it(
    splits: Splits,
) -> None:
    config = config_of(*SAMPLES, "aug=[cutout,mixup]")
    (image, partner, mixed), batch = shown(config, splits, 3)
    assert len(image) == len(partner) == len(mixed) == 3
    assert torch.equal(mixed, (batch.images * 0.25 + 0.5).clamp(0, 1))  # their std and mean
    plain = {i.numpy().tobytes() for i in shown(config_of(*SAMPLES), splits, 64)[0][0]}
    assert {i.numpy().tobytes() for i in (*image, *partner)} <= plain  # no hole, nothing blended
    own = batch.mix.weights[0][:, None, None, None]
    blended = torch.tensor(own) * image + torch.tensor(1 - own) * partner
    outside = (blended - mixed).abs().amax(1) < 1e-3  # of two holes of 16 x 16, which may overlap
    assert ((outside.double().mean((1, 2)) >= 0.5) & (outside.double().mean((1, 2)) < 1)).all()


def test_a_batch_is_shown_whose_parts_can_be_seen(splits: Splits) -> None:
    """One batch in two is mixed; without a choice most first batches would not do."""
    for seed in range(4):
        config = config_of(*SAMPLES, "aug=cutmix", "aug.mix.prob=0.5", f"seed={seed}")
        columns, batch = shown(config, splits, 2)
        assert len(columns) == 3 and (batch.mix.weights[0] > 0.1).all()
        assert (batch.mix.weights[0] < 0.9).all()


@pytest.mark.parametrize(("format", "magic"), [("png", b"\x89PNG"), ("jpg", b"\xff\xd8\xff")])
def test_the_suffix_is_the_format(format: str, magic: bytes, splits: Splits) -> None:
    sheet = contact_sheet(config_of(*SAMPLES, "aug=cutmix"), splits, 1, format)
    assert sheet.startswith(magic) and len(sheet) > 2000


def test_visible_methods_are_those_of_the_image_and_mix_slots() -> None:
    names = set(visible_methods())
    assert {"cutmix", "cutout", "gridmask", "feature_cutmix", "cutout_mixup"} <= names
    inside = {"adl", "dropblock", "dropout", "shakedrop", "stochastic_depth", "label_smoothing"}
    combined = {"cutmix_shakedrop", "cutout_label_smoothing", "dropblock_label_smoothing"}
    assert names == set(METHODS) - inside - combined


@pytest.mark.parametrize("name", METHODS)
def test_every_method_has_its_row(name: str) -> None:
    cells = [line.split("|")[1] for line in PAGE.splitlines() if line.count("|") > 3]
    assert any(f"`{name}`" in cell for cell in cells), f"docs/regularizers.md has no row of {name}"


def test_every_visible_method_has_its_picture_and_no_other() -> None:
    files = {p.stem: p.stat().st_size for p in PICTURES.iterdir()}
    assert sorted(files) == list(visible_methods()), "run: make pictures"
    assert {p.suffix for p in PICTURES.iterdir()} == {".jpg"}
    assert max(files.values()) < 32_000 and sum(files.values()) < 1_200_000
    shown = re.findall(r"!\[(\w+)\]\(pictures/(\w+)\.jpg\)", PAGE)
    assert sorted(name for name, _ in shown) == sorted(files)
    assert all(name == file for name, file in shown)


def test_samples_are_views_of_two_photographs() -> None:
    splits = config_of("dataset=samples").dataset.load()
    for part, size in ((splits.train, 64), (splits.test, 16)):
        assert part.images.shape == (size, 3, 128, 128) and part.images.dtype == torch.uint8
        assert np.bincount(part.labels.numpy()).tolist() == [size // 2, size // 2]
    # A temple under a bright sky, an orange flower before dark leaves.
    temple, flower = (splits.train.images[splits.train.labels == k].float() for k in (0, 1))
    assert temple.mean() > 1.4 * flower.mean()
    assert flower[:, 0, 32:96, 32:96].mean() > 1.5 * flower[:, 2, 32:96, 32:96].mean()
    again = config_of("dataset=samples").dataset.load()
    assert again.fingerprint == splits.fingerprint

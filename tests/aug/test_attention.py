"""ADL: against a plain loop over pixels, and where it acts."""

from __future__ import annotations

import copy
import math
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from cutmix_exp.aug.attention import Adl, attend, usual_places
from cutmix_exp.errors import UserError
from tests.helpers import config_of


def by_loop(features: np.ndarray, threshold: float, drops: bool) -> np.ndarray:
    out = features.copy()
    for image in out:
        height, width = image.shape[1:]
        means = [[image[:, y, x].mean() for x in range(width)] for y in range(height)]
        highest = max(max(row) for row in means)
        for y in range(height):
            for x in range(width):
                mean = means[y][x]
                if drops:
                    factor = 1.0 if mean < threshold * highest else 0.0
                else:
                    factor = 1.0 / (1.0 + math.exp(-mean))
                image[:, y, x] *= factor
    return out


@pytest.mark.parametrize("rate", [0.0, 1.0], ids=["importance", "drop"])
@pytest.mark.parametrize("threshold", [0.5, 0.9])
def test_it_equals_a_loop_over_pixels(rate: float, threshold: float) -> None:
    features = torch.rand(3, 5, 4, 6, dtype=torch.float64)
    got = attend(nn.Identity(), None, features, rate=rate, threshold=threshold)
    wanted = by_loop(features.numpy(), threshold, rate == 1.0)
    assert np.allclose(got.numpy(), wanted, rtol=1e-12)
    assert not np.allclose(wanted, features.numpy())


def test_one_coin_for_the_whole_batch() -> None:
    torch.manual_seed(0)
    features, dropped = torch.rand(4, 5, 4, 4) + 0.1, 0
    for _ in range(400):
        zeros = (attend(nn.Identity(), None, features, rate=0.75, threshold=0.9) == 0).any(1)
        by_image = zeros.any(2).any(1)
        assert by_image.all() or not by_image.any()
        dropped += int(by_image[0])
    assert dropped / 400 == pytest.approx(0.75, abs=0.07)  # 3 standard deviations


def test_nothing_happens_in_the_test() -> None:
    features = torch.rand(2, 3, 4, 4)
    assert attend(nn.Identity().eval(), None, features, rate=1.0, threshold=0.5) is features


PLACES = {
    # wsolevaluation: after block 0 of layer3, and blocks 0 and 2 of layer4.
    "model=torchvision model.architecture=resnet50": ["layer3.0", "layer4.0", "layer4.2"],
    "model=resnet_gap": ["layer3.0", "layer4.0", "layer4.2"],
    "model=resnet model.depth=50": ["stage3.0", "stage4.0", "stage4.2"],
    # After pool3, after relu4_3, after relu5_3: the second has the last pooling, the first not.
    "model=vgg_gap": ["features.16", "features.22", "features.29"],
    "model=torchvision model.architecture=vgg16": ["features.16", "features.22", "features.29"],
}


@pytest.mark.parametrize("words", PLACES)
def test_it_acts_where_wsolevaluations_does(words: str) -> None:
    config = config_of("dataset=cub", *words.split())
    with torch.device("meta"):
        network = config.model.build(200)
    assert usual_places(network) == PLACES[words]
    kinds = {"features.16": nn.MaxPool2d, "features.22": nn.ReLU, "features.29": nn.ReLU}
    for place in PLACES[words]:
        assert isinstance(network.get_submodule(place), kinds.get(place, nn.Module))


def test_it_acts_in_training_and_in_copies() -> None:
    config = config_of("dataset=digits", "model=resnet", "model.depth=8", "aug=adl")
    plain = config.model.build(10)
    changed = config.aug.network["adl"].attach(copy.deepcopy(plain))
    images = torch.randn(2, 3, 32, 32)
    assert torch.equal(plain.eval()(images), changed.eval()(images))
    for network in (changed, copy.deepcopy(changed)):  # such as a moving average's
        torch.manual_seed(0)
        assert not torch.equal(network.train()(images), plain.train()(images))


def test_places_by_name_and_their_errors() -> None:
    network = config_of("dataset=digits", "model=resnet", "model.depth=8").model.build(10)
    Adl(places=("stage1", "stem")).attach(network)
    hooks: dict[str, list[Any]] = {
        name: list(module._forward_hooks.values()) for name, module in network.named_modules()
    }
    assert {name for name, held in hooks.items() if held} == {"stage1", "stem"}
    assert all(isinstance(held[0], partial) for held in hooks.values() if held)
    with pytest.raises(UserError, match=r"no module 'stage9'; modules of it: stem, stage1"):
        Adl(places=("stage9",)).attach(network)
    with pytest.raises(UserError, match="name the modules by"):
        Adl().attach(nn.Sequential(nn.Linear(3, 3)))

"""Grad-CAM and its kin: against class activation maps, by hand, and against the library's own way."""

from __future__ import annotations

import importlib.util
from dataclasses import replace
from typing import Any, get_args

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cutmix_exp.errors import UserError
from cutmix_exp.evaluation import base
from cutmix_exp.evaluation.base import Subject, load_suite
from cutmix_exp.evaluation.cam import find_head, upsampled, watched
from cutmix_exp.evaluation.gradcam import CLASSES, Method, Tap, by_gradient, formula, tapped
from cutmix_exp.models.maps import normalized
from cutmix_exp.schema import identity_of
from tests.evaluation.hand_made import by_ranks, digits_config, few, subject_of
from tests.evaluation.test_cam import NETWORKS, library, own, uneven

CPU = torch.device("cpu")
METHODS = get_args(Method)

needs_library = pytest.mark.skipif(
    importlib.util.find_spec("pytorch_grad_cam") is None, reason="the extra `cam` is not installed"
)


def digits(network: nn.Module | None = None, test: int = 30) -> Subject:
    config = digits_config("precision=fp32")
    splits = config.dataset.load()
    splits = replace(splits, train=few(splits.train, 40), test=few(splits.test, test))
    return subject_of(config, splits, network)


# ----------------------------------------------------------------------- against class activation maps


@needs_library
@pytest.mark.parametrize("method", ["gradcam", "hirescam"])
@pytest.mark.parametrize("name", NETWORKS)
def test_behind_an_average_it_is_the_class_activation_map(name: str, method: Method) -> None:
    """Of which each pixel's gradient is a weight over the number of pixels (Selvaraju et al.,
    section 3.1): the mean of the map is the logit without its bias, over that number."""
    network = uneven(NETWORKS[name]())
    mapper = by_gradient(method, None, network, 64, CPU)
    head = find_head(network, 64, CPU)
    images, classes = torch.randn(3, 3, 96, 96), torch.tensor([0, 3, 6])
    with torch.no_grad(), watched(head) as seen:
        before = network(images)
    cam = head.maps(seen.features[0], classes)
    with torch.enable_grad(), tapped(mapper.tap) as leaves:
        logits = network(images)
    assert torch.equal(logits, before)
    assert torch.equal(leaves[0], seen.features[0])
    maps = mapper.maps(logits, classes, leaves[0])
    pixels = cam.shape[1] * cam.shape[2]
    assert maps.shape == cam.shape and pixels > 1
    assert torch.allclose(maps * pixels, cam, atol=1e-4 * float(cam.abs().max()))
    for way in ("max", "minmax"):
        assert torch.allclose(normalized(maps, way), normalized(cam, way), atol=1e-3)


@needs_library
def test_of_acol_it_is_the_first_classifier_at_the_last_map_of_the_backbone() -> None:
    """Which has no class activation map of its own: convolutions come before the average."""
    network: Any = uneven(own("model=resnet_acol", "model.architecture=resnet18"))
    mapper = by_gradient("hirescam", None, network, 64, CPU)
    images = torch.randn(2, 3, 64, 64)
    with tapped(mapper.tap) as leaves:
        logits = network(images)
    maps = mapper.maps(logits, torch.tensor([1, 2]), leaves[0])
    last = network.stages_of(images)[-1].detach().requires_grad_()
    answer = network.head.first(last)[0]
    (answer[0, 1] + answer[1, 2]).backward()
    assert torch.allclose(maps, (last * last.grad).sum(1), atol=1e-6)


# --------------------------------------------------------------------------------------- by hand


class Tiny(nn.Module):
    """Two channels of 2x2 pixels, those of the image, which are flattened."""

    def __init__(self, weights: list[list[list[float]]]) -> None:
        super().__init__()
        self.maps = nn.Conv2d(3, 2, 1, bias=False)
        self.relu = nn.ReLU(inplace=True)
        self.fc = nn.Linear(8, 2, bias=False)
        with torch.no_grad():
            self.maps.weight.copy_(torch.eye(3)[:2, :, None, None])
            self.fc.weight[0] = torch.tensor(weights).flatten()
            self.fc.weight[1] = -self.fc.weight[0]

    def forward(self, images: Tensor) -> Tensor:
        return self.fc(self.relu(self.maps(images)).flatten(1))


IMAGE = [[[1.0, 2.0], [3.0, 4.0]], [[4.0, -1.0], [-1.0, 1.0]], [[9.0, 9.0], [9.0, 9.0]]]
WEIGHTS = [[[1.0, 0.0], [0.0, 3.0]], [[-2.0, 5.0], [8.0, 2.0]]]
# A ReLU follows, so the second channel's gradient is zero where that is negative: the gradients are
# [[1, 0], [0, 3]] and [[-2, 0], [0, 2]].
BY_HAND = {
    # Means 1 and 0.
    "gradcam": [[1.0, 2.0], [3.0, 4.0]],
    "hirescam": [[1.0 - 8.0, 0.0], [0.0, 12.0 + 2.0]],
    "layercam": [[1.0, 0.0], [0.0, 12.0 + 2.0]],
}


@needs_library
@pytest.mark.parametrize("method", BY_HAND)
def test_by_hand(method: Method) -> None:
    network = Tiny(WEIGHTS).eval()
    mapper = by_gradient(method, "maps", network, 2, CPU)
    images = torch.tensor([IMAGE, IMAGE])
    with tapped(mapper.tap) as leaves:
        logits = network(images)
    assert logits[0].tolist() == [1 + 12 - 8 + 2, -7]
    maps = mapper.maps(logits, torch.tensor([0, 1]), leaves[0])
    assert maps[0].tolist() == BY_HAND[method]
    if method != "layercam":
        assert torch.equal(maps[1], -maps[0])
    else:
        assert maps[1].tolist() == [[8.0, 0.0], [0.0, 0.0]]


# ------------------------------------------------------------------------ against the library's passes


@needs_library
@pytest.mark.parametrize("method", METHODS)
def test_it_is_what_the_library_makes_of_its_own_passes(method: Method) -> None:
    """At a layer in the middle, where no two methods agree; the library takes the positive part and
    stretches each map before it enlarges it."""
    import pytorch_grad_cam
    from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget

    network = uneven(library("torchvision.resnet18"))
    images, classes = torch.randn(3, 3, 64, 64), [0, 3, 6]
    mapper = by_gradient(method, "layer3", network, 64, CPU)
    with tapped(mapper.tap) as leaves:
        logits = network(images)
    maps = mapper.maps(logits, torch.tensor(classes), leaves[0])
    ours = normalized(upsampled(normalized(F.relu(maps), "minmax"), 64), "minmax")
    theirs = getattr(pytorch_grad_cam, CLASSES[method])(network, [network.layer3])(
        images, [ClassifierOutputTarget(label) for label in classes]
    )
    assert ours.amax() > 0.9
    assert np.allclose(ours.numpy(), theirs, atol=1e-3)


@needs_library
def test_no_two_methods_agree_in_the_middle_of_a_network() -> None:
    network = uneven(library("torchvision.resnet18"))
    images, classes = torch.randn(3, 3, 64, 64), torch.tensor([0, 3, 6])
    with tapped(Tap("layer3", network.layer3)) as leaves:
        logits = network(images)
    gradient = Tap("layer3", network.layer3).gradient(logits, classes, leaves[0]).numpy()
    maps = [formula(method)(leaves[0].detach().numpy(), gradient) for method in METHODS]
    found = [normalized(torch.from_numpy(m), "max") for m in maps]
    for i, one in enumerate(found):
        assert all(not torch.allclose(one, other, atol=0.02) for other in found[:i])


# ------------------------------------------------------------------------------------ what is refused


def test_without_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "pytorch_grad_cam", None)
    subject = digits()
    said = load_suite("localization_gradcam").lacks(subject)
    assert "suite.method=gradcam is of the library grad-cam" in said
    assert said.endswith("; pip install -c constraints.txt -e '.[cam]'") and "\n" not in said
    assert not load_suite("localization").lacks(subject)


class Odd(nn.Module):
    """A layer that is called twice, one that does not count, and one that gives no map."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.aside, self.relu = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3), nn.ReLU()
        self.flat, self.fc = nn.Flatten(), nn.LazyLinear(7)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.last = nn.Identity()

    def forward(self, images: Tensor) -> Tensor:
        maps = self.relu(self.relu(self.conv(images)))
        self.aside(maps), self.pool(maps), self.last(maps.permute(0, 2, 3, 1))
        return self.fc(self.flat(maps))


@needs_library
@pytest.mark.parametrize(
    ("layer", "said"),
    [
        ("convv", r"suite.layer=convv: Odd has no such layer; some that it has: conv"),
        ("relu", "it is called 2 times, expected once"),
        ("aside", "the logits do not depend on the output of the layer 'aside'"),
        ("flat", r"its output for two images of 8 px is \[2, 144\], expected a map"),
        ("pool", r"is \[2, 4, 1, 1\], expected a map .* of more than one pixel"),
        ("last", r"is \[2, 6, 6, 4\], expected a map"),
        (None, "not the mean of a map.*gradcam can look elsewhere: suite.layer=NAME"),
    ],
)
@pytest.mark.parametrize("frozen", [True, False])
def test_layers_that_give_no_map(layer: str | None, said: str, frozen: bool) -> None:
    network = Odd().eval()
    network(torch.zeros(1, 3, 8, 8))
    network.requires_grad_(not frozen)
    with pytest.raises(UserError, match=f"(?s){said}"):
        by_gradient("gradcam", layer, network, 8, CPU)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in network.modules())


def test_a_layer_is_not_for_cam() -> None:
    with pytest.raises(UserError, match=r"suite.layer=layer3: method=cam has its own layer"):
        load_suite("localization", {"layer": "layer3"})
    with pytest.raises(UserError, match="choose one of cam, gradcam, gradcam"):
        load_suite("localization", {"method": "scorecam"})


# ---------------------------------------------------------------------------------------------- suite


def test_the_identity_of_what_was_kept_of_cam_is_as_it_was() -> None:
    assert identity_of(load_suite("localization")) == {
        "class": "Localization",
        "name": "localization",
        "threshold": 0.15,
        "normalization": "max",
        "connectivity": 8,
        "step": 0.05,
        "selection_images": 1000,
        "num_pictures": 12,
    }
    assert identity_of(load_suite("localization_gradcam"))["method"] == "gradcam"


@needs_library
def test_the_suite_finds_by_grad_cam_what_it_finds_by_cam() -> None:
    subject = digits()
    changes = {"num_pictures": 3, "step": 0.25, "selection_images": 10}
    one = load_suite("localization", changes).run(subject)
    other = load_suite("localization_gradcam", changes).run(subject)
    assert 0 < one.metrics["max_box_acc"] <= 100
    assert other.metrics == pytest.approx(one.metrics, abs=0.01)
    assert np.array_equal(other.per_image["found_box"], one.per_image["found_box"])
    assert other.protocol.pop("library").startswith("grad-cam 1.")
    assert other.protocol == one.protocol
    assert other.pictures["cam"][:4] == b"\x89PNG"
    layercam = load_suite("localization_layercam", changes).run(subject)
    assert not np.array_equal(layercam.per_image["iou"], one.per_image["iou"])


@needs_library
@pytest.mark.parametrize("frozen", [True, False])
def test_the_checkpoint_is_left_alone(frozen: bool) -> None:
    subject = digits(test=10)
    network = subject.network.requires_grad_(not frozen)
    before = {k: v.clone() for k, v in network.state_dict().items()}
    suite = load_suite("localization_gradcam", {"selection_images": 0, "num_pictures": 2})
    assert suite.lacks(subject) == ""
    suite.run(subject)
    assert all(torch.equal(before[k], v) for k, v in network.state_dict().items())
    assert all(p.grad is None and p.requires_grad != frozen for p in network.parameters())
    assert not any(m.training for m in network.modules())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in network.modules())


@needs_library
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_logits_are_those_of_the_classification(precision: Any) -> None:
    subject = digits(test=20)
    subject = replace(subject, config=replace(subject.config, precision=precision))
    mapper = by_gradient("gradcam", "stage2", subject.network, 32, CPU)
    images = subject.splits.test.images  # type: ignore[union-attr]
    with torch.no_grad():
        logits, maps = mapper.look(subject, images, None)
    assert torch.equal(logits, subject.logits_of(images)) and not logits.requires_grad
    again = mapper.look(subject, images, logits.argmax(1))[1]
    assert torch.equal(maps, again) and maps.dtype == torch.float32


@needs_library
def test_networks_that_cam_refuses_by_a_layer_at_any_number_of_ranks(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Batches of 8: of 30 images the last one has six."""
    monkeypatch.setattr(base, "BATCH", 8)
    network = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(inplace=True), nn.Flatten(), nn.LazyLinear(10)
    )
    network(torch.zeros(1, 3, 32, 32))
    subject = digits(network)
    assert "not the mean of a map" in load_suite("localization").lacks(subject)
    changes = {"layer": "0", "num_pictures": 0, "step": 0.25, "selection_images": 9}
    suite = load_suite("localization_gradcam", changes)
    assert suite.lacks(subject) == ""
    alone = suite.run(subject)
    assert (alone.protocol["features"], alone.protocol["map_side"]) == ("0", 32)
    assert len(alone.per_image["iou"]) == 30
    for found in by_ranks(subject, 2, suite.run):
        assert found.metrics == alone.metrics
        for name, column in alone.per_image.items():
            assert np.array_equal(found.per_image[name], column)

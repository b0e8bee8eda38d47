"""Class activation maps, found without knowing the network."""

from __future__ import annotations

from typing import Any

import pytest
import timm
import torch
import torchvision
from torch import Tensor, nn

from cutmix_exp.errors import UserError
from cutmix_exp.evaluation.cam import find_head, upsampled, watched
from cutmix_exp.models.maps import normalized
from tests.helpers import config_of

CPU = torch.device("cpu")


def uneven(network: nn.Module) -> nn.Module:
    """With BatchNorm statistics that are not those of a fresh network, in which a map before and
    after BN and ReLU could be taken for each other."""
    torch.manual_seed(1)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_mean, -0.2, 0.2)
            nn.init.uniform_(module.running_var, 0.5, 2.0)
            nn.init.uniform_(module.bias, -0.2, 0.2)
    return network.eval()


def library(name: str) -> nn.Module:
    kind, _, architecture = name.partition(".")
    if kind == "timm":
        return timm.create_model(architecture, num_classes=7)
    plain = {"init_weights": False, "aux_logits": False} if "google" in name else {}
    return torchvision.models.get_model(architecture, weights=None, num_classes=7, **plain)


def own(*words: str) -> nn.Module:
    return config_of("dataset=cifar100", *words).model.build(7)


NETWORKS = {
    "resnet": lambda: own("model=resnet", "model.depth=8"),
    "pyramidnet": lambda: own("model=pyramidnet", "model.depth=20", "model.alpha=12"),
    "wide_resnet": lambda: own("model=wide_resnet", "model.depth=10", "model.widen_factor=1"),
    "densenet": lambda: own("model=densenet", "model.depth=22"),
    "resnext": lambda: own("model=resnext", "model.depth=11", "model.base_width=4"),
    "vgg_gap": lambda: own("model=vgg_gap", "model.architecture=vgg11"),
    "resnet_gap": lambda: own("model=resnet_gap", "model.architecture=resnet18"),
    "vgg_spg": lambda: own("model=vgg_spg", "model.architecture=vgg11"),
    "resnet_spg": lambda: own("model=resnet_spg", "model.architecture=resnet18"),
    "timm": lambda: library("timm.resnet18"),
    "googlenet": lambda: library("torchvision.googlenet"),
    "torchvision densenet": lambda: library("torchvision.densenet121"),
    "mobilenet": lambda: library("torchvision.mobilenet_v2"),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", NETWORKS)
def test_the_mean_of_a_map_is_the_logit_without_bias(name: str, dtype: torch.dtype) -> None:
    """Which is what makes it the class's map; for every class, at another size and batch than those
    of the search, and with layers that work in place."""
    network = uneven(NETWORKS[name]())
    head = find_head(network, 64, CPU)
    images = torch.randn(3, 3, 96, 96)
    autocast = torch.autocast("cpu", dtype, enabled=dtype != torch.float32)
    with torch.no_grad(), watched(head) as seen, autocast:
        logits = network(images).float()
    (features,) = seen.features
    bias = [m for m in network.modules() if isinstance(m, nn.Linear)][-1].bias
    for label in range(7):
        maps = head.maps(features, torch.full((3,), label))
        assert maps.ndim == 3 and maps.shape[1] > 1
        tolerance = 1e-4 if dtype == torch.float32 else 0.05 * float(logits.abs().max())
        assert torch.allclose(maps.mean((1, 2)) + bias[label], logits[:, label], atol=tolerance)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("words", "side", "map_side"),
    [
        (["model=resnet_gap"], 224, 14),
        (["model=vgg_gap"], 224, 14),
        (["model=resnet", "model.depth=50", "model.last_stride=1"], 224, 14),
        (["model=torchvision", "model.architecture=inception_v3"], 299, 8),
    ],
    ids=str,
)
def test_the_papers_networks(words: list[str], side: int, map_side: int) -> None:
    sized = [f"dataset.image_size={side}", "dataset.crop_resize=320"]
    network = config_of("dataset=cub", *sized, *words).model.build(200).eval()
    head = find_head(network, side, CPU)
    with torch.no_grad(), watched(head) as seen:
        network(torch.randn(1, 3, side, side))
    assert seen.features[0].shape[2:] == (map_side, map_side)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", ["vgg_acol", "resnet_acol"])
def test_the_map_of_acol_is_the_larger_of_both_classifiers(name: str, dtype: torch.dtype) -> None:
    """Of the asked class, whatever the predicted one is; the logits are the first classifier's."""
    architecture = {"vgg": "vgg11", "resnet": "resnet18"}[name.split("_")[0]]
    words = [f"model={name}", f"model.architecture={architecture}", "model.head.channels=8"]
    network: Any = uneven(own(*words))
    head = find_head(network, 64, CPU)
    autocast = torch.autocast("cpu", dtype, enabled=dtype != torch.float32)
    with torch.no_grad(), watched(head) as seen, autocast:
        network(torch.randn(3, 3, 96, 96))
    (last,) = seen.features
    assert last.dtype == torch.float32
    for label in range(7):
        got = head.maps(last, torch.full((3,), label))
        assert got.shape == (3, 6, 6) and not got.requires_grad
        parts = []
        kept = torch.ones(3, 1, 6, 6)
        with torch.no_grad():
            for branch in (network.head.first, network.head.second):
                features = branch(last * kept)[1]
                maps = torch.einsum("c,nchw->nhw", branch.fc.weight[label], features)
                parts.append(normalized(maps, "minmax"))
                kept = (parts[0] < 0.7).float()[:, None]
        assert torch.allclose(got, torch.maximum(*parts), atol=1e-6)
        assert all(not torch.allclose(got, part, atol=1e-3) for part in parts)


def flat() -> nn.Module:
    """As VGG ends: the map is not averaged but flattened."""
    return nn.Sequential(nn.Conv2d(3, 4, 3, 16), nn.ReLU(), nn.Flatten(), nn.Linear(784, 7))


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("flat", "not the mean of a map"),
        ("torchvision.squeezenet1_1", "does not end with a linear layer"),
        ("timm.vit_tiny_patch16_224", "not the mean of a map"),
    ],
)
def test_networks_that_end_otherwise_are_refused(name: str, said: str) -> None:
    with pytest.raises(UserError, match=f"(?s)global average pooling.*{said}"):
        find_head((flat() if name == "flat" else library(name)).eval(), 224, CPU)


def test_a_map_of_one_pixel_is_refused() -> None:
    network = own("model=resnet", "model.depth=18", "model.stem=imagenet").eval()
    with pytest.raises(UserError, match="more than one pixel"):
        find_head(network, 32, CPU)


def test_nothing_stays_in_the_network() -> None:
    network = own("model=resnet", "model.depth=8").eval()
    before = {k: v.clone() for k, v in network.state_dict().items()}
    head = find_head(network, 32, CPU)
    with watched(head):
        pass
    assert not any(m._forward_hooks for m in network.modules())
    assert all(torch.equal(before[k], v) for k, v in network.state_dict().items())


def test_maps_are_normalised_by_hand() -> None:
    maps = torch.tensor([[[-2.0, 0.0], [1.0, 2.0]]])
    assert normalized(maps, "max").tolist() == [[[0, 0], [0.5, 1]]]
    assert normalized(maps, "minmax").tolist() == [[[0, 0.5], [0.75, 1]]]
    flat = torch.full((1, 2, 2), -3.0)
    assert not normalized(flat, "max").any() and not normalized(flat, "minmax").any()


def test_bilinear_by_hand() -> None:
    """Two pixels to four: the outer ones lie outside of the centres and repeat them."""
    row: Tensor = upsampled(torch.tensor([[[0.0, 1.0], [0.0, 1.0]]]), 4)[0, 0]
    assert row.tolist() == [0, 0.25, 0.75, 1]


class Wiped(nn.Module):
    """Works on its last map in place after it has been averaged."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.fc = nn.Conv2d(3, 4, 3, 16), nn.Linear(4, 7)

    def forward(self, images: Tensor) -> Tensor:
        maps = self.conv(images)
        logits: Tensor = self.fc(maps.mean((2, 3)))
        maps.zero_()
        return logits


def test_a_map_that_is_overwritten_later_is_kept() -> None:
    network = Wiped().eval()
    with torch.no_grad():
        head = find_head(network, 64, CPU)
        with watched(head) as seen:
            logits = network(torch.randn(2, 3, 64, 64))
        mean = head.maps(seen.features[0], torch.tensor([3, 3])).mean((1, 2))
        assert torch.allclose(mean + network.fc.bias[3], logits[:, 3], atol=1e-5)

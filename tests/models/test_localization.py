"""The paper's networks for localisation: torchvision's own are the oracle."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
from torch import Tensor, nn
from torchvision.models.vgg import cfgs, make_layers

from cutmix_exp.errors import UserError
from cutmix_exp.models.base import count_parameters
from cutmix_exp.training.optim import head_layers
from tests.helpers import config_of


def built(*words: str, classes: int = 5, side: int = 64) -> Any:
    sizes = [f"dataset.image_size={side}", f"dataset.crop_resize={side + 8}"]
    return config_of("dataset=cub", *sizes, *words).model.build(classes).eval()


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Weights of torchvision's small networks, away from any initialisation; of VGG's head, of 120
    million numbers, one tensor."""
    folder = tmp_path_factory.mktemp("weights")
    vgg = {f"features.{k}": v for k, v in published("vgg11").state_dict().items()}
    torch.save(published("resnet18").state_dict(), folder / "resnet18.pth")
    torch.save({**vgg, "classifier.0.weight": torch.zeros(1)}, folder / "vgg11.pth")
    return {name: folder / f"{name}.pth" for name in ("resnet18", "vgg11")}


def published(name: str) -> Any:
    """torchvision's ResNet, or the features of its VGG."""
    torch.manual_seed(3)
    if name == "vgg11":
        network: nn.Module = make_layers(cfgs["A"])
    else:
        network = torchvision.models.get_model(name, weights=None, num_classes=5)
    for tensor in network.state_dict().values():
        if tensor.is_floating_point():
            tensor.uniform_(-0.1, 0.1)
            if tensor.ndim == 1:
                tensor.abs_()  # variances
    return network.eval()


def words_for(name: str, file: Path) -> list[str]:
    model = "vgg_gap" if name == "vgg11" else "resnet_gap"
    start = ["model.pretrained=true", f"model.weights={file}"]
    return [f"model={model}", f"model.architecture={name}", *start]


def test_parameters_at_the_papers_sizes() -> None:
    with torch.device("meta"):
        vgg = config_of("dataset=imagenet", "model=vgg_gap").model.build(1000)
        resnet = config_of("dataset=imagenet", "model=resnet_gap").model.build(1000)
    # Convolutions of VGG-16 14,714,688; 9 x 512 x 1024 + 1024; 1024 x 1000 + 1000.
    assert count_parameters(vgg) == 14_714_688 + 4_719_616 + 1_025_000
    assert count_parameters(resnet) == 25_557_032


def test_resnet_is_torchvisions_up_to_the_last_stage(files: dict[str, Path]) -> None:
    """With as many classes as the weights have, the head is new all the same (paper appendix B)."""
    ours, theirs = built(*words_for("resnet18", files["resnet18"])), published("resnet18")
    maps: dict[str, Tensor] = {}
    for name, network in (("ours", ours), ("theirs", theirs)):
        network.layer3.register_forward_hook(lambda m, i, o, name=name: maps.__setitem__(name, o))
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        ours(images)
        theirs(images)
        last = ours.layer4(maps["ours"])
    assert torch.equal(maps["ours"], maps["theirs"])
    assert last.shape[2:] == maps["ours"].shape[2:]  # stride 1, and no dilation
    assert not any(c.dilation != (1, 1) for c in ours.modules() if isinstance(c, nn.Conv2d))
    assert torch.equal(ours.layer4[1].conv1.weight, theirs.layer4[1].conv1.weight)
    assert not torch.equal(ours.fc.weight, theirs.fc.weight)


def test_vgg_is_torchvisions_features_without_the_last_pooling(files: dict[str, Path]) -> None:
    ours, theirs = built(*words_for("vgg11", files["vgg11"])), published("vgg11")
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        maps = theirs[:-1](images)
        assert maps.shape[2:] == (4, 4)
        assert torch.equal(ours.features(images), maps)
        logits = ours.fc(torch.relu(ours.conv6(maps)).mean((2, 3)))
        assert torch.allclose(ours(images), logits)


def test_a_file_that_lacks_tensors_is_refused(files: dict[str, Path], tmp_path: Path) -> None:
    state = torch.load(files["resnet18"], weights_only=True)
    del state["layer2.0.conv1.weight"]
    torch.save(state, tmp_path / "half.pth")
    with pytest.raises(UserError, match=r"half.pth cannot be used: .*lacks layer2.0.conv1.weight"):
        built(*words_for("resnet18", tmp_path / "half.pth"))


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["model=resnet_gap", "model.architecture=vgg16"], "no last stage"),
        (["model=vgg_gap", "model.architecture=resnet18"], "is no VGG"),
    ],
)
def test_other_architectures_are_refused(words: list[str], said: str) -> None:
    with pytest.raises(UserError, match=said):
        config_of("dataset=cub", *words)


def test_which_layers_are_the_head() -> None:
    vgg = built("model=vgg_gap", "model.architecture=vgg11")
    assert head_layers(vgg) == [vgg.conv6, vgg.fc]
    resnet = built("model=resnet_gap", "model.architecture=resnet18")
    assert head_layers(resnet) == [resnet.fc]
    own: Any = config_of("dataset=digits", "model=resnet", "model.depth=8").model.build(10)
    assert head_layers(own) == [own.head.fc]


def test_stride_1_of_our_own_resnet_changes_no_parameter() -> None:
    words = ["dataset=cifar100", "model=resnet", "model.depth=18"]
    plain, large = config_of(*words), config_of(*words, "model.last_stride=1")
    assert plain.run_id != large.run_id
    sides: list[int] = []
    for config in (plain, large):
        network: Any = config.model.build(10)
        assert count_parameters(network) == 11_173_962
        network.stage4.register_forward_hook(lambda m, i, o: sides.append(o.shape[-1]))
        network.eval()(torch.randn(1, 3, 32, 32))
    assert sides == [4, 8]

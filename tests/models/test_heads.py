"""The localisation heads on torchvision's networks: which maps they see, weights, and what fits them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
from torch import Tensor, nn
from torchvision.models.vgg import cfgs, make_layers

from cutmix_exp.aug.attention import usual_places
from cutmix_exp.aug.feature import feature_maps
from cutmix_exp.errors import UserError
from cutmix_exp.models.base import AuxiliaryNetwork, count_parameters
from cutmix_exp.training.optim import head_layers
from tests.helpers import config_of

NAMES = ("vgg_acol", "vgg_spg", "resnet_acol", "resnet_spg")
SMALL = {"vgg": "vgg11", "resnet": "resnet18"}


def words(name: str, *more: str, side: int = 64) -> list[str]:
    sizes = [f"dataset.image_size={side}", f"dataset.crop_resize={side + 8}"]
    architecture = SMALL[name.split("_")[0]]
    narrow = [] if name.endswith("_gap") else ["model.head.channels=16"]
    chosen = ["dataset=cub", f"model={name}", f"model.architecture={architecture}"]
    return [*chosen, *narrow, *sizes, *more]


def built(name: str, *more: str) -> Any:
    return config_of(*words(name, *more)).model.build(5)


PARAMETERS = {
    # Convolutions of VGG-16 14,714,688; a 3x3 convolution of a to b channels 9ab + b.
    "vgg_acol": 14_714_688 + 2 * (4_719_616 + 9_438_208 + 1_025_000),
    # B1, B2, shared, C and two before the classifier, 512 to 512; two with one output; 512 x 1000.
    "vgg_spg": 14_714_688 + 6 * 2_359_808 + 2 * 513 + 513_000,
    # ResNet-50 without its classifier 23,508,032.
    "resnet_acol": 23_508_032 + 2 * (18_875_392 + 9_438_208 + 1_025_000),
    # B1, B2, shared 1024 to 1024 and to 1; C 2048 to 512 and to 1; 2048 x 1000.
    "resnet_spg": 23_508_032 + 3 * 9_438_208 + 1025 + 9_437_696 + 513 + 2_049_000,
}


@pytest.mark.parametrize("name", NAMES)
def test_parameters_at_the_papers_sizes(name: str) -> None:
    with torch.device("meta"):
        network = config_of("dataset=imagenet", f"model={name}").model.build(1000)
    assert count_parameters(network) == PARAMETERS[name]


def seen(network: nn.Module, images: Tensor) -> dict[str, Tensor]:
    """What enters the parts of the head and leaves the parts of the backbone."""
    found: dict[str, Tensor] = {}
    for name, module in network.named_modules():
        module.register_forward_hook(
            lambda m, inputs, output, name=name: found.update(
                {f"{name}>": output.clone()} if isinstance(output, Tensor) else {},
                **{f">{name}": inputs[0].clone()} if isinstance(inputs[0], Tensor) else {},
            )
        )
    with torch.no_grad():
        network(images, torch.eye(5)[: len(images)])
    return found


def test_stages_of_vgg() -> None:
    """B1 after the fourth pooling, B2 after the last convolution, both 1/16 of the image."""
    network = built("vgg_spg").eval()
    images = torch.randn(2, 3, 64, 64)
    found = seen(network, images)
    theirs = make_layers(cfgs["A"])
    theirs.load_state_dict(network.features.state_dict())
    pools = [i for i, m in enumerate(theirs) if isinstance(m, nn.MaxPool2d)]
    with torch.no_grad():
        assert torch.equal(found[">head.b1"], theirs[: pools[3] + 1](images))
        assert torch.equal(found[">head.b2"], theirs[:-1](images))
    assert torch.equal(found[">head.convs"], found[">head.b2"])
    assert torch.equal(found[">head.c"], found["head.convs>"])
    assert found[">head.b1"].shape[2:] == found[">head.b2"].shape[2:] == (4, 4)


def test_stages_of_resnet() -> None:
    """B1 after the first block of layer3, B2 after its last one, C after layer4."""
    network = built("resnet_spg").eval()
    found = seen(network, torch.randn(2, 3, 64, 64))
    assert torch.equal(found[">head.b1"], found["layer3.0>"])
    assert torch.equal(found[">head.b2"], found["layer3.1>"])
    assert torch.equal(found[">layer4"], found["layer3.1>"])
    assert torch.equal(found[">head.c"], found["layer4>"])
    assert found["layer4>"].shape[2:] == (4, 4)


@pytest.mark.parametrize("name", NAMES)
def test_published_weights_and_a_new_head(name: str, tmp_path: Path) -> None:
    torch.manual_seed(3)
    if name.startswith("vgg"):
        state = {f"features.{k}": v for k, v in make_layers(cfgs["A"]).state_dict().items()}
    else:
        state = torchvision.models.resnet18(weights=None, num_classes=5).state_dict()
    torch.save({**state, "classifier.0.weight": torch.zeros(1)}, tmp_path / "weights.pth")
    start = ["model.pretrained=true", f"model.weights={tmp_path / 'weights.pth'}"]
    network = built(name, *start)
    own = network.state_dict()
    kept = [key for key in own if not key.startswith("head.")]
    assert len(kept) >= 16 and all(torch.equal(own[key], state[key]) for key in kept)
    assert head_layers(network) == [network.head]
    assert isinstance(network, AuxiliaryNetwork)


@pytest.mark.parametrize("name", NAMES)
def test_the_last_linear_layer_is_the_classifier_that_counts(name: str) -> None:
    network = built(name).eval()
    last = [m for m in network.modules() if isinstance(m, nn.Linear)][-1]
    outputs: list[Tensor] = []
    last.register_forward_hook(lambda m, i, o: outputs.append(o))
    with torch.no_grad():
        logits = network(torch.randn(2, 3, 64, 64))
    assert torch.equal(outputs[0], logits)
    *_, bias = network.parameters()
    assert bias is last.bias


@pytest.mark.parametrize("name", NAMES)
def test_every_parameter_has_a_gradient_whatever_the_masks_are(name: str) -> None:
    """As DDP demands: here with maps of zeros, of which nothing is known."""
    network = built(name)
    for scale in (0.0, 1.0):
        network.zero_grad(set_to_none=True)
        targets = torch.eye(5)[:2]
        logits, *others = network(scale * torch.randn(2, 3, 64, 64), targets)
        added = network.auxiliary_losses(
            tuple(others), targets, lambda given, told: -(told * given.log_softmax(1)).sum(1)
        )
        assert added.shape == (2,)
        (logits.sum() + added.sum()).backward()
        for parameter in network.parameters():
            assert parameter.grad is not None and parameter.grad.isfinite().all()


@pytest.mark.parametrize("name", NAMES)
def test_they_compile_without_a_graph_break(name: str) -> None:
    network, images, targets = built(name).eval(), torch.randn(2, 3, 64, 64), torch.eye(5)[:2]
    torch._dynamo.reset()
    with torch.no_grad():
        compiled = torch.compile(network, fullgraph=True, backend="eager")
        for mine, theirs in zip(compiled(images, targets), network(images, targets), strict=True):
            torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize("name", NAMES)
def test_images_that_leave_one_pixel_are_refused(name: str) -> None:
    assert config_of(*words(name, side=32))
    with pytest.raises(UserError, match=f"{name} compares the pixels.*16 px leave one"):
        config_of(*words(name, side=16))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (["model=vgg_acol", "model.architecture=resnet18"], "is no VGG"),
        (["model=resnet_spg", "model.architecture=vgg16"], "no last stage"),
        (
            ["model=vgg_acol", "model.head.threshold=0.0"],
            "model.head.threshold=0.0 is out of range",
        ),
        (["model=vgg_spg", "model.head.lower=[0.8,0.1,0.1]"], "model.head: lower=.*above upper"),
        (["model=vgg_spg", "model.head.threshold=0.7"], "no field 'model.head.threshold'"),
    ],
)
def test_what_does_not_fit_is_refused(change: list[str], said: str) -> None:
    with pytest.raises(UserError, match=said):
        config_of("dataset=cub", *change)


def test_runs_without_these_heads_keep_their_names() -> None:
    """The field `head` was added after records could have been made."""
    plain = config_of("dataset=cub", "model=vgg_gap", "precision=fp32")
    ids = {config_of("dataset=cub", f"model={n}", "precision=fp32").run_id for n in NAMES}
    assert "head" not in plain.identity()["model"]
    assert len(ids) == 4
    other = config_of("dataset=cub", "model=vgg_acol", "model.head.threshold=0.8", "precision=fp32")
    assert other.run_id not in ids


@pytest.mark.parametrize("name", NAMES)
def test_attention_dropout_finds_its_places(name: str) -> None:
    plain = config_of(*words(f"{name.split('_')[0]}_gap")).model.build(5)
    assert usual_places(built(name)) == usual_places(plain)


def test_features_are_mixed_where_the_network_is_not_cut() -> None:
    network = built("resnet_acol")
    assert feature_maps(network, 64) == ((64, 64), (32, 32), (16, 16), (8, 8))
    config = config_of(*words("resnet_acol", "aug=manifold_mixup", "aug.mix.layers=[4]"))
    with pytest.raises(UserError, match=r"layers 0 \(the image\) to 3 \(bn1, layer1, layer2\)"):
        config.aug.mix.attach(network)

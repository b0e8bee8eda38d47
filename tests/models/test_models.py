"""Networks against independent definitions and torchvision's: sizes, values, gradients, errors."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torchvision
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models.densenet import DenseNet as TorchvisionDenseNet
from torchvision.models.resnet import Bottleneck as TorchvisionBottleneck
from torchvision.models.resnet import ResNet as TorchvisionResNet

from cutmix_exp.errors import UserError
from cutmix_exp.models.base import Model, StagedNetwork, blocks_per_stage, count_parameters
from cutmix_exp.models.densenet import DenseNet
from cutmix_exp.models.pyramidnet import PyramidNet, add_shortcut
from cutmix_exp.models.resnet import ResNet, ResNeXt
from cutmix_exp.models.wide_resnet import WideResNet
from tests.oracles import networks

KINDS: dict[str, type[Model]] = {
    "densenet": DenseNet,
    "pyramidnet": PyramidNet,
    "resnet": ResNet,
    "resnext": ResNeXt,
    "wide_resnet": WideResNet,
}


def model(name: str, **fields: Any) -> Model:
    return KINDS[name](name=name, **fields)


def network(name: str, classes: int = 10, image_size: int = 32, **fields: Any) -> Any:
    return model(name, **fields).resolve(image_size).build(classes)


SMALL: dict[str, dict[str, Any]] = {
    "pyramidnet bottleneck": {"name": "pyramidnet", "depth": 11, "alpha": 10},
    "pyramidnet basic": {"name": "pyramidnet", "depth": 14, "alpha": 13, "block": "basic"},
    "pyramidnet four stages": {"name": "pyramidnet", "depth": 18, "alpha": 20},
    "resnet bottleneck": {"name": "resnet", "depth": 11, "block": "bottleneck"},
    "resnet basic": {"name": "resnet", "depth": 8},
    "resnet four stages": {"name": "resnet", "depth": 18},
    "resnext": {"name": "resnext", "depth": 11, "cardinality": 4, "base_width": 8},
    "wide_resnet": {"name": "wide_resnet", "depth": 10, "widen_factor": 2},
    "densenet": {"name": "densenet", "depth": 16, "growth": 4},
}
small = pytest.mark.parametrize("fields", SMALL.values(), ids=SMALL)

# --------------------------------------------------------------------------------- parameters


@pytest.mark.parametrize(
    ("name", "fields", "image_size", "classes", "parameters"),
    [
        ("pyramidnet", {}, 32, 100, 26_844_952),
        ("pyramidnet", {"depth": 200, "alpha": 240, "block": "bottleneck"}, 32, 100, 26_844_952),
        ("pyramidnet", {}, 32, 10, 26_752_702),
        ("pyramidnet", {"depth": 110, "alpha": 64}, 32, 100, 1_725_300),
        ("pyramidnet", {"depth": 110, "alpha": 64, "block": "basic"}, 32, 100, 2_623_666),
        ("pyramidnet", {"depth": 110, "alpha": 270, "block": "basic"}, 32, 100, 28_511_307),
        ("resnet", {}, 32, 100, 1_170_868),
        ("resnet", {"depth": 110, "block": "basic"}, 32, 100, 1_736_564),
        ("resnet", {"depth": 164}, 32, 100, 1_727_284),
        ("resnet", {"depth": 20}, 32, 10, 272_474),
        ("resnet", {"depth": 18}, 32, 100, 11_220_132),
        ("resnet", {}, 224, 1000, 25_557_032),
        ("resnet", {"depth": 101}, 224, 1000, 44_549_160),
        ("resnet", {"depth": 152}, 224, 1000, 60_192_808),
        ("resnext", {}, 224, 1000, 44_177_704),
        ("pyramidnet", {}, 224, 1000, 62_368_168),
        ("wide_resnet", {}, 32, 100, 36_536_884),
        ("densenet", {}, 32, 10, 769_162),
        ("densenet", {"depth": 190, "growth": 40}, 32, 10, 25_624_430),
    ],
)
def test_the_number_of_parameters(
    name: str, fields: dict[str, Any], image_size: int, classes: int, parameters: int
) -> None:
    with torch.device("meta"):
        assert count_parameters(network(name, classes, image_size, **fields)) == parameters


# ----------------------------------------------------------------------------------- defaults


@pytest.mark.parametrize(
    ("name", "image_size", "given", "wanted"),
    [
        ("resnet", 32, {}, (110, "cifar", "cifar", "bottleneck")),
        ("resnet", 64, {}, (110, "cifar", "cifar", "bottleneck")),
        ("resnet", 224, {}, (50, "imagenet", "imagenet", "bottleneck")),
        ("resnet", 32, {"depth": 18}, (18, "imagenet", "cifar", "basic")),
        ("resnet", 32, {"depth": 50}, (50, "imagenet", "cifar", "bottleneck")),
        ("resnet", 64, {"depth": 34}, (34, "imagenet", "cifar", "basic")),
        ("resnet", 224, {"depth": 152}, (152, "imagenet", "imagenet", "bottleneck")),
        ("resnet", 224, {"depth": 20}, (20, "cifar", "imagenet", "basic")),
        ("resnet", 32, {"layout": "imagenet"}, (50, "imagenet", "cifar", "bottleneck")),
        ("resnet", 224, {"layout": "cifar"}, (110, "cifar", "imagenet", "bottleneck")),
        ("resnet", 32, {"depth": 50, "layout": "cifar"}, (50, "cifar", "cifar", "basic")),
        ("resnet", 32, {"depth": 18, "stem": "imagenet"}, (18, "imagenet", "imagenet", "basic")),
        ("resnet", 32, {"depth": 20}, (20, "cifar", "cifar", "basic")),
        ("resnet", 32, {"depth": 56}, (56, "cifar", "cifar", "basic")),
        ("resnet", 32, {"depth": 29}, (29, "cifar", "cifar", "bottleneck")),
        ("resnet", 32, {"depth": 110}, (110, "cifar", "cifar", "bottleneck")),
        ("resnet", 32, {"depth": 110, "block": "basic"}, (110, "cifar", "cifar", "basic")),
        ("resnet", 32, {"depth": 164}, (164, "cifar", "cifar", "bottleneck")),
        ("resnext", 32, {}, (29, "cifar", "cifar", "bottleneck")),
        ("resnext", 224, {}, (101, "imagenet", "imagenet", "bottleneck")),
        ("resnext", 32, {"depth": 50}, (50, "imagenet", "cifar", "bottleneck")),
        ("pyramidnet", 32, {}, (200, "cifar", "cifar", "bottleneck")),
        ("pyramidnet", 224, {}, (200, "imagenet", "imagenet", "bottleneck")),
        ("pyramidnet", 32, {"depth": 110}, (110, "cifar", "cifar", "bottleneck")),
        ("pyramidnet", 32, {"depth": 20}, (20, "cifar", "cifar", "bottleneck")),
        ("pyramidnet", 224, {"depth": 110}, (110, "cifar", "imagenet", "bottleneck")),
        ("pyramidnet", 224, {"layout": "cifar"}, (200, "cifar", "imagenet", "bottleneck")),
        ("pyramidnet", 32, {"layout": "imagenet"}, (200, "imagenet", "cifar", "bottleneck")),
        ("pyramidnet", 32, {"depth": 101}, (101, "imagenet", "cifar", "bottleneck")),
        ("pyramidnet", 224, {"depth": 34}, (34, "imagenet", "imagenet", "basic")),
    ],
)
def test_depth_layout_stem_and_block_follow_the_image(
    name: str, image_size: int, given: dict[str, Any], wanted: tuple[Any, ...]
) -> None:
    resolved: Any = model(name, **given).resolve(image_size)
    assert (resolved.depth, resolved.layout, resolved.stem, resolved.block) == wanted
    assert resolved.resolve(image_size) == resolved


def test_resnext_follows_the_image_in_its_groups() -> None:
    def groups(image_size: int, **given: Any) -> tuple[int, int]:
        resolved: Any = model("resnext", **given).resolve(image_size)
        return resolved.cardinality, resolved.base_width

    assert groups(32) == (8, 64)
    assert groups(224) == (32, 4)
    assert groups(32, depth=50) == (32, 4)
    assert groups(32, cardinality=16) == (16, 64)
    assert groups(224, base_width=8) == (32, 8)


def test_the_papers_networks_are_the_defaults() -> None:
    pyramidnet: Any = model("pyramidnet").resolve(32)
    assert (pyramidnet.depth, pyramidnet.alpha, pyramidnet.block) == (200, 240, "bottleneck")
    for image_size, alpha in ((32, 240), (64, 240), (65, 300), (224, 300)):
        pyramidnet = model("pyramidnet").resolve(image_size)
        assert (pyramidnet.depth, pyramidnet.alpha) == (200, alpha)
    wide: Any = model("wide_resnet").resolve(32)
    assert (wide.depth, wide.widen_factor) == (28, 10)


def test_resnet18_on_small_images_has_a_small_stem() -> None:
    small_stem = network("resnet", depth=18, image_size=32)
    large_stem = network("resnet", depth=18, image_size=224)
    assert len(small_stem.stages) == len(large_stem.stages) == 4
    kernels = [n.stem[0].kernel_size + n.stem[0].stride for n in (small_stem, large_stem)]
    assert kernels == [(3, 3, 1, 1), (7, 7, 2, 2)]
    pools = [[m for m in n.stem if isinstance(m, nn.MaxPool2d)] for n in (small_stem, large_stem)]
    assert [len(p) for p in pools] == [0, 1]


# ------------------------------------------------------------------------------------ oracles

ORACLES: dict[str, tuple[dict[str, Any], Callable[[], nn.Module]]] = {
    "pyramidnet-11 bottleneck": (
        {"name": "pyramidnet", "depth": 11, "alpha": 10},
        lambda: networks.ReferencePyramidNet(11, 10, 10, bottleneck=True),
    ),
    "pyramidnet-20 bottleneck": (
        {"name": "pyramidnet", "depth": 20, "alpha": 28},
        lambda: networks.ReferencePyramidNet(20, 28, 10, bottleneck=True),
    ),
    "pyramidnet-14 basic": (
        {"name": "pyramidnet", "depth": 14, "alpha": 13, "block": "basic"},
        lambda: networks.ReferencePyramidNet(14, 13, 10, bottleneck=False),
    ),
    "resnet-20 bottleneck": (
        {"name": "resnet", "depth": 20, "block": "bottleneck"},
        lambda: networks.ReferenceResNet(20, 10, bottleneck=True),
    ),
    "resnet-14 basic": (
        {"name": "resnet", "depth": 14},
        lambda: networks.ReferenceResNet(14, 10, bottleneck=False),
    ),
    "resnet-18": ({"name": "resnet", "depth": 18}, lambda: networks.ReferenceResNet18(10)),
    "wrn-16-2": (
        {"name": "wide_resnet", "depth": 16, "widen_factor": 2},
        lambda: networks.ReferenceWideResNet(16, 2, 10),
    ),
    "wrn-10-1": (  # the first block changes no shape, so its shortcut is the raw input
        {"name": "wide_resnet", "depth": 10, "widen_factor": 1},
        lambda: networks.ReferenceWideResNet(10, 1, 10),
    ),
}
FULL_DEPTH: dict[str, tuple[dict[str, Any], Callable[[], nn.Module]]] = {
    "pyramidnet-200": (
        {"name": "pyramidnet", "classes": 100},
        lambda: networks.ReferencePyramidNet(200, 240, 100, bottleneck=True),
    ),
    "pyramidnet-110 basic": (
        {"name": "pyramidnet", "depth": 110, "alpha": 270, "block": "basic", "classes": 100},
        lambda: networks.ReferencePyramidNet(110, 270, 100, bottleneck=False),
    ),
    "pyramidnet-200 four stages": (
        {"name": "pyramidnet", "classes": 1000, "image_size": 224},
        lambda: networks.ReferencePyramidNet200ImageNet(300, 1000),
    ),
    "resnet-110": (
        {"name": "resnet", "classes": 100},
        lambda: networks.ReferenceResNet(110, 100, bottleneck=True),
    ),
    "resnet-110 basic": (
        {"name": "resnet", "depth": 110, "block": "basic", "classes": 100},
        lambda: networks.ReferenceResNet(110, 100, bottleneck=False),
    ),
    "wrn-28-10": (
        {"name": "wide_resnet", "classes": 100},
        lambda: networks.ReferenceWideResNet(28, 10, 100),
    ),
}


def state(of: nn.Module) -> list[Tensor]:
    return [*of.parameters(), *of.buffers()]


def randomise(of: nn.Module) -> None:
    """Parameters and buffers away from their starting values, which would hide what they do."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for module in of.modules():
            if isinstance(module, nn.BatchNorm2d):
                assert module.running_mean is not None
                assert module.running_var is not None
                module.weight.uniform_(0.5, 1.5, generator=generator)
                module.bias.normal_(0, 0.3, generator=generator)
                module.running_mean.normal_(0, 0.3, generator=generator)
                module.running_var.uniform_(0.5, 1.5, generator=generator)


def copy_state(source: nn.Module, target: nn.Module) -> None:
    with torch.no_grad():
        for mine, theirs in zip(state(target), state(source), strict=True):
            assert mine.shape == theirs.shape
            mine.copy_(theirs)


def pair(case: tuple[dict[str, Any], Callable[[], nn.Module]]) -> tuple[nn.Module, nn.Module]:
    """Our network and the reference with the same weights."""
    torch.manual_seed(0)
    fields, reference = case
    ours, theirs = network(**fields), reference()
    randomise(theirs)
    copy_state(theirs, ours)
    return ours, theirs


def check_same(ours: nn.Module, theirs: nn.Module, images: Tensor) -> None:
    """In float64: evaluation, then training with gradients and running statistics."""

    def assert_close(mine: Tensor | None, wanted: Tensor | None) -> None:
        torch.testing.assert_close(mine, wanted, rtol=1e-9, atol=1e-11)

    with torch.no_grad():
        assert_close(ours.eval()(images), theirs.eval()(images))
    losses = []
    for each in (ours.train(), theirs.train()):
        logits = each(images)
        losses.append(F.cross_entropy(logits, torch.arange(len(images)) % logits.shape[1]))
        losses[-1].backward()
    assert_close(losses[0], losses[1])
    for mine, wanted in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert_close(mine.grad, wanted.grad)
    for held, kept in zip(ours.buffers(), theirs.buffers(), strict=True):
        assert_close(held, kept)


@pytest.mark.parametrize("case", ORACLES.values(), ids=ORACLES)
def test_forward_backward_and_statistics_equal_the_reference(case: Any) -> None:
    """In float64, where only the order of sums is left to differ, far below any real difference."""
    ours, theirs = pair(case)
    images = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    check_same(ours.double(), theirs.double(), images)


def check_same_maps(ours: nn.Module, theirs: nn.Module, their_last: nn.Module, side: int) -> None:
    """In float32: bit for bit up to the last map, which the two average by different sums."""
    maps: list[Tensor] = []
    assert isinstance(ours, StagedNetwork)
    for module in (getattr(ours, ours.stages[-1]), their_last):
        module.register_forward_hook(lambda module, inputs, output: maps.append(output))
    images = torch.randn(2, 3, side, side)
    for training in (False, True):
        maps.clear()
        with torch.no_grad():
            found, wanted = (each.train(training)(images) for each in (ours, theirs))
        assert torch.equal(maps[0], maps[1])
        torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("case", ORACLES.values(), ids=ORACLES)
def test_maps_in_float32_equal_the_reference(case: Any) -> None:
    ours, theirs = pair(case)
    blocks: Any = theirs.units if hasattr(theirs, "units") else theirs.blocks
    check_same_maps(ours, theirs, blocks[-1], side=32)


@pytest.mark.parametrize("case", FULL_DEPTH.values(), ids=FULL_DEPTH)
def test_full_depth_networks_have_the_shapes_of_the_reference(case: Any) -> None:
    fields, reference = case
    with torch.device("meta"):
        ours, theirs = network(**fields), reference()
    assert [t.shape for t in state(ours)] == [t.shape for t in state(theirs)]


TORCHVISION: dict[str, tuple[dict[str, Any], Callable[..., Any]]] = {
    "resnet18": ({"name": "resnet", "depth": 18}, torchvision.models.resnet18),
    "resnet50": ({"name": "resnet"}, torchvision.models.resnet50),
    "resnet101": ({"name": "resnet", "depth": 101}, torchvision.models.resnet101),
    "resnext101_32x4d": (
        {"name": "resnext"},
        lambda **classes: TorchvisionResNet(
            TorchvisionBottleneck, [3, 4, 23, 3], groups=32, width_per_group=4, **classes
        ),
    ),
}


def large_pair(fields: dict[str, Any], reference: Callable[[], nn.Module]) -> tuple[Any, Any]:
    """Our network for 224 px and the reference with the same weights. They are drawn once: it is
    what takes long about large networks."""
    with torch.device("meta"):
        ours, theirs = network(image_size=224, **fields), reference()
    for each in (ours, theirs):
        each.to_empty(device="cpu")
    for parameter in theirs.parameters():
        nn.init.normal_(parameter, 0, parameter[0].numel() ** -0.5)
    randomise(theirs)
    copy_state(theirs, ours)
    return ours, theirs


@pytest.mark.parametrize("name", TORCHVISION)
def test_four_stages_equal_torchvision(name: str) -> None:
    """Also the stride in the 3x3 convolution (v1.5)."""
    torch.manual_seed(0)
    fields, make = TORCHVISION[name]
    ours, theirs = large_pair(fields, lambda: make(num_classes=10))
    check_same_maps(ours, theirs, theirs.layer4, side=64)


def test_four_stage_pyramidnet_equals_the_reference() -> None:
    torch.manual_seed(0)
    ours, theirs = large_pair(
        {"name": "pyramidnet"}, lambda: networks.ReferencePyramidNet200ImageNet(300, 10)
    )
    check_same_maps(ours, theirs, theirs.units[-1], side=64)


def test_densenet_equals_torchvision() -> None:
    """Its blocks behind our stem; forward, backward and running statistics."""
    torch.manual_seed(0)
    ours = network("densenet", depth=16, growth=6)
    theirs = TorchvisionDenseNet(6, (2, 2, 2), num_init_features=12, num_classes=10)
    theirs.features.conv0 = nn.Conv2d(3, 12, 3, padding=1, bias=False)
    theirs.features.norm0 = theirs.features.relu0 = theirs.features.pool0 = nn.Identity()
    randomise(theirs)
    copy_state(theirs, ours)
    images = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    check_same(ours.double(), theirs.double(), images)


def test_densenet_keeps_a_share_of_the_maps() -> None:
    """The first block ends with 10 + 2 x 5 maps; of 20, a share of 0.33 rounded down is 6."""
    made = network("densenet", depth=16, growth=5, compression=0.33)
    widths = [m.out_channels for m in made.stage2.modules() if isinstance(m, nn.Conv2d)]
    assert made.stem.out_channels == 10
    assert widths == [6, 20, 5, 20, 5]


@pytest.mark.parametrize(
    ("name", "fields", "lengths", "groups", "width"),
    [
        ("resnet", {"depth": 101}, [3, 4, 23, 3], 1, 64),
        ("resnet", {"depth": 152}, [3, 8, 36, 3], 1, 64),
        ("resnext", {}, [3, 4, 23, 3], 32, 4),
    ],
)
def test_deep_four_stage_networks_have_torchvisions_shapes(
    name: str, fields: dict[str, Any], lengths: list[int], groups: int, width: int
) -> None:
    with torch.device("meta"):
        ours = network(name, 1000, 224, **fields)
        theirs = TorchvisionResNet(
            TorchvisionBottleneck, lengths, groups=groups, width_per_group=width
        )
    assert [t.shape for t in state(ours)] == [t.shape for t in state(theirs)]


def test_resnext29_8x64d_on_small_images() -> None:
    """Table 3 of the ResNeXt paper: 34.4M parameters with 10 classes; groups of 64, 128, 256."""
    with torch.device("meta"):
        made = network("resnext")
    assert round(count_parameters(made) / 1e6, 1) == 34.4
    grouped = [m for m in made.modules() if isinstance(m, nn.Conv2d) and m.groups > 1]
    assert [m.groups for m in grouped] == [8] * 9
    assert [m.in_channels for m in grouped] == [512] * 3 + [1024] * 3 + [2048] * 3


# -------------------------------------------------------------------------- layouts and sizes


@small
def test_channels_last_gives_the_same(fields: dict[str, Any]) -> None:
    torch.manual_seed(0)
    plain = network(**fields)
    images = torch.randn(4, 3, 32, 32)
    for training in (False, True):
        plain.to(memory_format=torch.contiguous_format).train(training)
        with torch.no_grad():
            wanted = plain(images)
            plain.to(memory_format=torch.channels_last)
            found = plain(images.contiguous(memory_format=torch.channels_last))
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


@small
def test_networks_run_under_autocast(fields: dict[str, Any]) -> None:
    torch.manual_seed(0)
    made = network(**fields).train()
    with torch.autocast("cpu", torch.bfloat16):
        logits = made(torch.randn(2, 3, 32, 32))
    assert logits.dtype == torch.bfloat16
    logits.float().sum().backward()
    for parameter in made.parameters():
        assert parameter.grad.dtype == torch.float32
        assert parameter.grad.isfinite().all()


@pytest.mark.parametrize("image_size", [31, 32, 33, 48, 64])
@small
def test_networks_take_any_image_size(fields: dict[str, Any], image_size: int) -> None:
    """An odd side is halved upwards on both paths of a block."""
    made = network(**fields, image_size=image_size).eval()
    with torch.no_grad():
        logits = made(torch.randn(1, 3, image_size, image_size))
    assert logits.shape == (1, 10)
    assert logits.isfinite().all()


@pytest.mark.parametrize(
    ("name", "fields", "smallest"),
    [
        ("pyramidnet", {"depth": 11, "alpha": 10}, 4),
        ("resnet", {"depth": 8}, 4),
        ("resnet", {"depth": 18}, 8),
        ("resnet", {"depth": 18, "stem": "imagenet"}, 32),
        ("resnet", {"depth": 8, "stem": "imagenet"}, 16),
        ("resnext", {"depth": 11, "cardinality": 2, "base_width": 4}, 4),
        ("wide_resnet", {"depth": 10, "widen_factor": 1}, 4),
        ("pyramidnet", {"depth": 18, "alpha": 10}, 8),
        ("pyramidnet", {"depth": 18, "alpha": 10, "stem": "imagenet"}, 32),
        ("densenet", {"depth": 10, "growth": 4}, 4),
    ],
)
def test_images_that_vanish_under_the_strides_are_refused(
    name: str, fields: dict[str, Any], smallest: int
) -> None:
    made = network(name, image_size=smallest, **fields).train()
    assert made(torch.randn(2, 3, smallest, smallest)).shape == (2, 10)
    with pytest.raises(UserError, match=rf"too small for {name}.*{smallest - 1} px.*{smallest}"):
        model(name, **fields).resolve(smallest - 1)


@small
def test_a_stage_is_found_by_name_and_shrinks_the_map(fields: dict[str, Any]) -> None:
    made = network(**fields).eval()
    count = 4 if fields["depth"] == 18 else 3
    assert made.stages == tuple(f"stage{k}" for k in range(1, count + 1))
    sides: list[int] = []
    for name in made.stages:
        getattr(made, name).register_forward_hook(
            lambda module, inputs, output: sides.append(output.shape[-1])
        )
    with torch.no_grad():
        made(torch.randn(1, 3, 32, 32))
    assert sides == [32, 16, 8, 4][:count]


@pytest.mark.parametrize(
    "kind", [k for k in SMALL if k not in ("resnet four stages", "pyramidnet basic")]
)
def test_networks_compile_without_a_graph_break(kind: str) -> None:
    torch.manual_seed(0)
    made = network(**SMALL[kind]).eval()
    images = torch.randn(2, 3, 8, 8)
    torch._dynamo.reset()
    with torch.no_grad():
        found = torch.compile(made, fullgraph=True, backend="eager")(images)
        assert torch.equal(found, made(images))


# ------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("name", "fields", "image_size", "said"),
    [
        ("pyramidnet", {"depth": 201}, 32, "model.depth=201.*9n.2; the nearest are 200 and 209"),
        ("pyramidnet", {"depth": 2}, 32, "model.depth=2 .*9n.2; the nearest are 11 and 20"),
        ("pyramidnet", {"depth": 111, "block": "basic"}, 32, "6n.2; the nearest are 110 and 116"),
        ("resnet", {"depth": 21}, 32, "model.depth=21 .*the nearest are 20 and 29"),
        ("resnet", {"depth": 29, "block": "basic"}, 32, "basic.*6n.2; the nearest are 26 and 32"),
        ("resnet", {"depth": 8, "block": "bottleneck"}, 32, "9n.2; the nearest are 11 and 20"),
        ("resnet", {"depth": 20, "layout": "imagenet"}, 224, "depth=20 .*18, 34, 50, 101, 152"),
        ("resnet", {"depth": 18, "block": "bottleneck"}, 32, "model.block=bottleneck.*basic"),
        ("resnet", {"depth": 50, "block": "basic"}, 224, "model.block=basic.*bottleneck"),
        ("resnext", {"block": "basic"}, 32, "model.block=basic.*model=resnet"),
        ("resnext", {"depth": 18}, 32, "model.depth=18.*50, 101, 152 or 9n.2"),
        ("resnext", {"depth": 34}, 224, "model.depth=34.*50, 101, 152 or 9n.2"),
        ("resnext", {"depth": 30}, 32, "model.depth=30.*the nearest are 29 and 38"),
        ("resnext", {"depth": 29, "layout": "imagenet"}, 224, "model.depth=29.*four-stage"),
        ("pyramidnet", {"depth": 110, "layout": "imagenet"}, 224, "18, 34, 50, 101, 152, 200"),
        ("pyramidnet", {"block": "basic"}, 224, "model.block=basic.*bottleneck"),
        ("densenet", {"depth": 101}, 32, "model.depth=101.*6n.4; the nearest are 100 and 106"),
        ("wide_resnet", {"depth": 29}, 32, "model.depth=29.*6n.4; the nearest are 28 and 34"),
        ("wide_resnet", {"depth": 4}, 32, "model.depth=4 .*6n.4; the nearest are 10 and 16"),
    ],
)
def test_what_fits_no_layout_is_refused_before_it_is_built(
    name: str, fields: dict[str, Any], image_size: int, said: str
) -> None:
    with pytest.raises(UserError, match=said):
        model(name, **fields).resolve(image_size)


def test_the_nearest_depths_of_an_error_are_allowed() -> None:
    for depth, (per_block, offset) in itertools.product(range(1, 60), ((2, 2), (3, 2), (2, 4))):
        try:
            count = blocks_per_stage("net", depth, per_block, offset)
        except UserError as error:
            near = [int(w) for w in str(error).rpartition("are ")[2].split(" and ")]
            assert len(near) == 2
            assert min(near) < depth < max(near) or depth <= 3 * per_block + offset == min(near)
            assert all(blocks_per_stage("net", d, per_block, offset) >= 1 for d in near)
        else:
            assert depth == 3 * per_block * count + offset
            assert count >= 1


# ----------------------------------------------------------------------------- initialisation


@small
def test_convolutions_start_as_he_normal_by_fan_out(fields: dict[str, Any]) -> None:
    """Variance 2/(k*k*C_out), not divided by the groups; within six standard errors."""
    torch.manual_seed(0)
    made = network(**fields)
    convolutions = [m for m in made.modules() if isinstance(m, nn.Conv2d)]
    assert convolutions
    for conv in convolutions:
        assert conv.bias is None
        variance = 2 / (conv.kernel_size[0] * conv.kernel_size[1] * conv.out_channels)
        weights, count = conv.weight.double(), conv.weight.numel()
        assert abs(weights.square().mean() / variance - 1) < 6 * math.sqrt(2 / count)
        assert abs(weights.mean()) < 6 * math.sqrt(variance / count)


@small
def test_batchnorm_starts_as_the_identity_and_linear_as_torch_does(fields: dict[str, Any]) -> None:
    torch.manual_seed(0)
    made = network(**fields)
    for norm in (m for m in made.modules() if isinstance(m, nn.BatchNorm2d)):
        assert torch.equal(norm.weight, torch.ones_like(norm.weight))
        assert torch.equal(norm.bias, torch.zeros_like(norm.bias))
    (linear,) = (m for m in made.modules() if isinstance(m, nn.Linear))
    bound = linear.in_features**-0.5
    for tensor in (linear.weight, linear.bias):
        assert tensor.abs().max() <= bound
    assert linear.weight.abs().max() > 0.9 * bound


def test_a_seed_gives_the_same_network() -> None:
    made = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        made.append(torch.cat([p.flatten() for p in network("resnet", depth=8).parameters()]))
    assert torch.equal(made[0], made[1])
    assert not torch.equal(made[0], made[2])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("channels", [3, 5])
def test_the_padded_shortcut_is_a_concatenation_with_zeros(
    dtype: torch.dtype, layout: torch.memory_format, channels: int
) -> None:
    """Bit for bit, forward and backward; 5 channels lack none."""
    torch.manual_seed(0)
    parts = [torch.randn(4, c, 6, 6, dtype=dtype).to(memory_format=layout) for c in (5, channels)]
    outcomes = []
    for slices in (True, False):
        branch, short = (p.clone().requires_grad_() for p in parts)
        if slices:
            out = add_shortcut(branch * 1.5, short)
        else:
            zeros = torch.zeros(4, 5 - channels, 6, 6, dtype=dtype)
            out = branch * 1.5 + torch.cat([short, zeros], dim=1)
        (out.float() ** 2).sum().backward()
        outcomes.append([out.detach(), branch.grad, short.grad])
    for got, expected in zip(*outcomes, strict=True):
        assert torch.equal(got, expected)


def test_a_pyramidnets_layout_follows_its_block() -> None:
    models = [
        PyramidNet(name="pyramidnet", depth=110, alpha=64, block=block).resolve(32)
        for block in ("basic", "bottleneck")
    ]
    layouts = [m.memory_format for m in models]
    assert layouts == [torch.contiguous_format, torch.channels_last]

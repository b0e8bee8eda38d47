"""Gather-Excite modules against a plain loop, and the networks' sizes against the paper's table."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from cutmix_exp.errors import UserError
from cutmix_exp.models.base import count_parameters
from cutmix_exp.models.gather_excite import GatherExcite
from tests.helpers import config_of


def network(*overrides: str, side: int = 224, classes: int = 1000) -> Any:
    config = config_of(
        "dataset=synthetic", f"dataset.image_size={side}", "model=ge_resnet", *overrides
    )
    return config.model.build(classes)


def sigmoid(x: np.ndarray) -> np.ndarray:
    return np.asarray(1 / (1 + np.exp(-x)))


def test_the_gate_of_a_channel_equals_the_loop() -> None:
    torch.manual_seed(0)
    made = GatherExcite(32, 5).double().eval()
    gather, norm = made.gather[0], made.gather[1]
    norm.running_mean.normal_()
    norm.running_var.uniform_(0.5, 2)
    maps = torch.randn(3, 32, 5, 5, dtype=torch.float64)
    made.requires_grad_(False)
    first, second = made.excite[0], made.excite[2]
    for n in range(3):
        seen = np.array([float((maps[n, c] * gather.weight[c, 0]).sum()) for c in range(32)])
        seen = (seen - norm.running_mean.numpy()) / np.sqrt(norm.running_var.numpy() + 1e-5)
        seen = np.maximum(seen * norm.weight.numpy() + norm.bias.numpy(), 0)
        small = np.maximum(first.weight.numpy()[:, :, 0, 0] @ seen + first.bias.numpy(), 0)
        gate = sigmoid(second.weight.numpy()[:, :, 0, 0] @ small + second.bias.numpy())
        np.testing.assert_allclose(
            made(maps)[n].numpy(), maps[n].numpy() * gate[:, None, None], rtol=1e-10
        )


def test_without_parameters_the_gate_is_that_of_the_mean() -> None:
    maps = torch.randn(2, 4, 3, 7, dtype=torch.float64)
    made = GatherExcite(4, None)
    assert not list(made.parameters())
    for n in range(2):
        for c in range(4):
            expected = maps[n, c].numpy() * sigmoid(maps[n, c].numpy().mean())
            np.testing.assert_allclose(made(maps)[n, c].numpy(), expected, rtol=1e-12)


@pytest.mark.parametrize(
    ("architecture", "blocks", "plain", "se", "published"),
    [
        ("resnet50", (3, 4, 6, 3), 25_557_032, 28_088_024, 33.7),
        ("resnet101", (3, 4, 23, 3), 44_549_160, 49_326_872, 58.4),
    ],
)
def test_the_number_of_parameters(
    architecture: str, blocks: tuple[int, ...], plain: int, se: int, published: float
) -> None:
    """By hand: those of the SE network (whose two 1x1 convolutions are the same), and for each block
    a weight of each pixel of the map, and scale and shift of its BatchNorm. The paper's figures are
    a little higher; they would fit the count of running means and variances as well."""
    channels, sides = (256, 512, 1024, 2048), (56, 28, 14, 7)
    gathered = sum(b * c * (s * s + 2) for b, c, s in zip(blocks, channels, sides, strict=True))
    with torch.device("meta"):
        plus = network(f"model.architecture={architecture}")
        minus = network(f"model.architecture={architecture}", "model.variant=theta_minus")
    assert count_parameters(plus) == se + gathered
    assert count_parameters(minus) == plain
    assert (se + gathered) / 1e6 == pytest.approx(published, abs=0.08)


def test_modules_end_each_branch_and_start_as_the_authors_do() -> None:
    made = network(side=64, classes=10)
    modules = [m for m in made.modules() if isinstance(m, GatherExcite)]
    assert [m.extent for m in modules] == [16] * 3 + [8] * 4 + [4] * 6 + [2] * 3
    block = made.layer1[0]
    assert isinstance(block.se, GatherExcite) and torch.equal(block.bn3.weight, torch.ones(256))
    weight = modules[0].gather[0].weight
    assert float(weight.detach().std()) == pytest.approx((2 / 16**2) ** 0.5, rel=0.05)
    for convolution in (modules[0].excite[0], modules[0].excite[2]):
        assert float(convolution.weight.detach().std()) == pytest.approx(0.01, rel=0.1)
        assert not convolution.bias.any()
    seen = []
    modules[0].register_forward_hook(
        lambda m, given, out: seen.append((given[0].clone(), out.clone()))
    )
    made.train()(torch.randn(2, 3, 64, 64)).sum().backward()
    (given, out), inner = seen[0], modules[0]
    assert torch.allclose(out, given * inner.excite(inner.gather(given)), atol=1e-5)
    assert all(p.grad is not None and p.grad.isfinite().all() for p in made.parameters())


def test_the_name_and_what_cannot_be_had() -> None:
    assert config_of("dataset=synthetic", "model=ge_resnet").model.name == "ge_resnet50"
    with pytest.raises(UserError, match="nobody publishes"):
        config_of("dataset=synthetic", "model=ge_resnet", "model.pretrained=true")
    with pytest.raises(UserError, match="resnet50, resnet101, resnet152"):
        config_of("dataset=synthetic", "model=ge_resnet", "model.architecture=resnet18")
    with pytest.raises(UserError, match=r"16x16, not 20x20.*theta_minus"):
        network(side=64, classes=10)(torch.zeros(1, 3, 80, 80))
    assert isinstance(network("model.variant=theta_minus", side=64, classes=3), nn.Module)

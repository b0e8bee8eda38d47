"""BatchNorm in groups equals plain BatchNorm run on each group alone, on one process or many."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from cutmix_exp.distributed import share
from cutmix_exp.models.base import Model
from cutmix_exp.models.batchnorm import (
    BatchGroups,
    GroupedBatchNorm2d,
    group_batchnorm,
    micro_batches,
)
from cutmix_exp.models.resnet import ResNet

CHANNELS = 3


def plain_norm() -> nn.BatchNorm2d:
    """A BatchNorm layer in the middle of a training, with unusual constants."""
    generator = torch.Generator().manual_seed(0)
    norm = nn.BatchNorm2d(CHANNELS, eps=1e-3, momentum=0.3)
    assert norm.running_mean is not None
    assert norm.running_var is not None
    with torch.no_grad():
        norm.weight.normal_(generator=generator)
        norm.bias.normal_(generator=generator)
    norm.running_mean.normal_(generator=generator)
    norm.running_var.uniform_(0.5, 2, generator=generator)
    return norm


def grouped(sizes: list[int]) -> GroupedBatchNorm2d:
    groups = BatchGroups()
    groups.sizes = sizes
    return GroupedBatchNorm2d.convert(plain_norm(), groups)


def features(batch: int) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    shift = torch.arange(batch)[:, None, None, None]
    return torch.randn(batch, CHANNELS, 4, 5, generator=generator) * (1 + shift) + shift


def groups_of(batch: int, num_groups: int, positions: np.ndarray | None = None) -> list[int]:
    groups = BatchGroups()
    groups.set(batch, num_groups, np.arange(batch) if positions is None else positions)
    return groups.sizes


# -------------------------------------------------------------------------------------- layer


@pytest.mark.parametrize("sizes", [[4, 4], [3, 4], [2, 2, 2, 2], [5, 1, 2], [8], []], ids=str)
def test_each_group_is_normalised_alone(sizes: list[int]) -> None:
    x = features(sum(sizes) or 8)
    norm, mine = grouped(sizes), x.clone().requires_grad_()
    weight = torch.randn_like(x)
    out = norm(mine)
    (out * weight).sum().backward()

    apart = [plain_norm() for _ in sizes or [8]]
    theirs = x.clone().requires_grad_()
    parts = theirs.split(sizes or [8])
    wanted = torch.cat([n(part) for n, part in zip(apart, parts, strict=True)])
    (wanted * weight).sum().backward()

    assert torch.equal(out, wanted)
    assert torch.equal(mine.grad, theirs.grad)  # type: ignore[arg-type]
    for name in ("weight", "bias"):
        total = sum(getattr(n, name).grad for n in apart)
        torch.testing.assert_close(getattr(norm, name).grad, total)
    for name in ("running_mean", "running_var"):
        mean = torch.stack([getattr(n, name) for n in apart]).mean(0)
        assert torch.equal(getattr(norm, name), mean)
    assert norm.num_batches_tracked == 1


def test_the_groups_of_a_batch_differ_from_the_whole() -> None:
    x = features(8)
    assert not torch.allclose(grouped([4, 4])(x), plain_norm()(x))


def test_running_statistics_move_from_step_to_step() -> None:
    norm, x = grouped([4, 4]), features(8)
    seen = []
    for step in range(3):
        norm(x + step)
        assert norm.running_mean is not None
        seen.append(norm.running_mean.clone())
        assert norm.num_batches_tracked == step + 1
    assert not torch.equal(seen[0], seen[1])
    assert not torch.equal(seen[1], seen[2])


@pytest.mark.parametrize("sizes", [[4, 4], [8], [1, 7]], ids=str)
def test_evaluation_is_plain_batchnorm(sizes: list[int]) -> None:
    norm, plain = grouped(sizes).eval(), plain_norm().eval()
    kept = {name: tensor.clone() for name, tensor in norm.state_dict().items()}
    for batch in (8, 5):
        assert torch.equal(norm(features(batch)), plain(features(batch)))
    for name, tensor in norm.state_dict().items():
        assert torch.equal(tensor, kept[name])


def test_conversion_keeps_constants_and_shares_the_parameters() -> None:
    plain = plain_norm()
    norm = GroupedBatchNorm2d.convert(plain, BatchGroups())
    assert norm.weight is plain.weight
    assert norm.bias is plain.bias
    assert (norm.eps, norm.momentum, norm.num_features) == (1e-3, 0.3, CHANNELS)


def test_states_are_interchangeable() -> None:
    norm, plain = grouped([4, 4]), nn.BatchNorm2d(CHANNELS, eps=1e-3)
    norm(features(8))
    plain.load_state_dict(norm.state_dict())
    assert torch.equal(plain.eval()(features(6)), norm.eval()(features(6)))
    other = grouped([4, 4])
    other.load_state_dict(plain.state_dict())
    assert list(norm.state_dict()) == list(plain.state_dict())
    assert torch.equal(other.eval()(features(6)), norm.eval()(features(6)))


def test_batches_of_bf16_keep_their_dtype() -> None:
    norm = grouped([4, 4])
    assert norm(features(8).bfloat16()).dtype == torch.bfloat16
    assert norm.running_mean is not None
    assert norm.running_mean.dtype == torch.float32


# ------------------------------------------------------------------------------------- groups


@pytest.mark.parametrize("num_groups", [1, 2, 4, 8])
@pytest.mark.parametrize("batch", [8, 13, 16, 29, 63, 64])
def test_partial_batches_fall_into_as_many_groups_as_full_ones(batch: int, num_groups: int) -> None:
    sizes = groups_of(batch, num_groups)
    assert len(sizes) == num_groups
    assert sum(sizes) == batch
    assert max(sizes) - min(sizes) <= 1


def test_a_full_batch_falls_into_equal_groups() -> None:
    assert groups_of(64, 2) == [32, 32]
    assert groups_of(64, 1) == [64]


@pytest.mark.parametrize("batch", [1, 2, 3, 5, 7])
def test_a_batch_smaller_than_the_groups_leaves_none_empty(batch: int) -> None:
    """As under DataParallel, where replicas without images do not run. The statistics of an
    empty group would be the old running ones, and dilute those of the others."""
    assert groups_of(batch, 8) == [1] * batch


@pytest.mark.parametrize("world_size", [1, 2, 4])
@pytest.mark.parametrize("num_groups", [4, 8])
@pytest.mark.parametrize("batch", [8, 9, 15, 29, 64])
def test_the_groups_of_all_ranks_are_those_of_one_process(
    batch: int, num_groups: int, world_size: int
) -> None:
    ranks = [
        groups_of(batch, num_groups, share(batch, rank, world_size)) for rank in range(world_size)
    ]
    assert list(itertools.chain(*ranks)) == groups_of(batch, num_groups)
    assert {len(sizes) for sizes in ranks} == {num_groups // world_size}


@pytest.mark.parametrize("world_size", [2, 4])
@pytest.mark.parametrize("batch", [15, 16])
def test_ranks_together_compute_what_one_process_does(batch: int, world_size: int) -> None:
    x = features(batch)
    one = grouped(groups_of(batch, 4))
    wanted = one(x)
    outputs: list[Tensor] = []
    means: list[Any] = []
    variances: list[Any] = []
    for rank in range(world_size):
        positions = share(batch, rank, world_size)
        norm = grouped(groups_of(batch, 4, positions))
        outputs.append(norm(x[positions]))
        means.append(norm.running_mean)
        variances.append(norm.running_var)
    assert torch.equal(torch.cat(outputs), wanted)
    torch.testing.assert_close(torch.stack(means).mean(0), one.running_mean)
    torch.testing.assert_close(torch.stack(variances).mean(0), one.running_var)


# ------------------------------------------------------------------------------------ network


def small_network() -> nn.Module:
    torch.manual_seed(0)
    model: Model = ResNet(name="resnet", depth=8)
    return model.resolve(32).build(10)


def test_every_batchnorm_of_a_network_is_replaced_and_shares_the_groups() -> None:
    network, groups = small_network(), BatchGroups()
    wanted = {n for n, m in network.named_modules() if isinstance(m, nn.BatchNorm2d)}
    names, parameters = list(network.state_dict()), list(network.parameters())
    group_batchnorm(network, groups)
    found = {n: m for n, m in network.named_modules() if isinstance(m, nn.BatchNorm2d)}
    assert set(found) == wanted
    assert len(wanted) == 9
    assert all(isinstance(m, GroupedBatchNorm2d) and m.groups is groups for m in found.values())
    assert list(network.state_dict()) == names
    assert all(a is b for a, b in zip(network.parameters(), parameters, strict=True))


def test_a_grouped_network_is_the_plain_one_on_each_group() -> None:
    network, plain, groups = small_network(), small_network(), BatchGroups()
    group_batchnorm(network, groups)
    images = torch.randn(7, 3, 32, 32)
    groups.set(7, 2, np.arange(7))
    assert groups.sizes == [3, 4]
    with torch.no_grad():
        found = network(images)
        wanted = torch.cat([plain(part) for part in images.split([3, 4])])
    torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("count", [1, 2, 4])
def test_micro_batches_leave_the_statistics_of_one_pass(count: int) -> None:
    images = torch.randn(10, 3, 16, 16)
    found = []
    for parts in (1, count):
        network, groups = small_network(), BatchGroups()
        group_batchnorm(network, groups)
        for _ in range(2):
            with micro_batches(network, parts) as after_each, torch.no_grad():
                for part in range(parts):
                    positions = share(10, part, parts)
                    groups.set(10, 4, positions)
                    network(images[positions])
                    after_each()
        found.append(network.state_dict())
    for name, wanted in found[0].items():
        torch.testing.assert_close(found[1][name], wanted)
    assert found[1]["stem.1.num_batches_tracked"] == 2

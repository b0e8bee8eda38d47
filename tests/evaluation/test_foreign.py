"""Tensors from elsewhere: the authors' names give the authors' network; nothing is executed."""

from __future__ import annotations

import os
import pickle
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torchvision
from torch import Tensor, nn

from cutmix_exp.errors import UserError
from cutmix_exp.evaluation.foreign import digest, load_into, read_state
from cutmix_exp.models.pyramidnet import PyramidNet
from cutmix_exp.models.resnet import ResNet, ResNeXt
from tests.oracles.networks import ReferencePyramidNet, ReferenceResNet


def shaken(network: nn.Module) -> nn.Module:
    """With running statistics that are not the initial ones, so that they matter."""
    for name, buffer in network.named_buffers():
        if "running" in name:
            nn.init.uniform_(buffer, 0.5, 1.5)
    return network.eval()


def authors_names(network: nn.Module, per_stage: int) -> dict[str, Tensor]:
    """The reference network's tensors under the names of the authors' resnet.py or pyramidnet.py,
    saved from DataParallel."""
    out = {}
    for name, tensor in network.state_dict().items():
        found = re.fullmatch(r"(?:units|blocks)\.(\d+)\.(.+)", name)
        if found:
            stage, block = divmod(int(found[1]), per_stage)
            name = f"layer{stage + 1}.{block}.{found[2]}"
        name = name.replace("project_conv", "downsample.0").replace("project_bn", "downsample.1")
        name = re.sub(r"^stem_conv", "conv1", re.sub(r"^stem_bn", "bn1", name))
        name = re.sub(r"^(final|head|last)_bn", "bn_final", re.sub(r"^linear", "fc", name))
        out[f"module.{name}"] = tensor
    return out


@pytest.mark.parametrize(
    ("theirs", "per_stage", "ours"),
    [
        (lambda: ReferencePyramidNet(20, 28, 10, bottleneck=True), 2, (PyramidNet, 20, 28)),
        (lambda: ReferenceResNet(20, 10, bottleneck=True), 2, (ResNet, 20, None)),
    ],
    ids=["pyramidnet", "resnet"],
)
def test_the_authors_files_are_read(theirs: Any, per_stage: int, ours: Any, tmp_path: Path) -> None:
    torch.manual_seed(0)
    reference = shaken(theirs())
    state = authors_names(reference, per_stage)
    file = tmp_path / "model_best.pth.tar"
    optimizer = {"state": {}, "param_groups": [{"lr": 0.25, "params": [0]}]}
    best = np.float64(14.23)  # their training script kept NumPy's numbers
    torch.save(
        {"epoch": 299, "arch": "x", "state_dict": state, "best_err1": best, "optimizer": optimizer},
        file,
    )
    cls, depth, alpha = ours
    chosen = {"alpha": alpha} if alpha else {"block": "bottleneck"}
    network = cls(name="x", depth=depth, **chosen).resolve(32).build(10).eval()
    load_into(network, read_state(file), "the file")
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.allclose(network(images), reference(images), atol=1e-5)


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        (torchvision.models.resnet18, ResNet(name="x", depth=18)),
        (torchvision.models.resnet50, ResNet(name="x", depth=50)),
        (torchvision.models.resnext50_32x4d, ResNeXt(name="x", depth=50)),
    ],
    ids=["resnet18", "resnet50", "resnext50"],
)
def test_torchvisions_names_are_those_of_the_authors_imagenet_files(theirs: Any, ours: Any) -> None:
    torch.manual_seed(0)
    reference = shaken(theirs(num_classes=7))
    state = {n: t for n, t in reference.state_dict().items() if "num_batches" not in n}  # as of old
    network = ours.resolve(224).build(7).eval()
    load_into(network, state, "the file")
    images = torch.randn(1, 3, 96, 96)
    with torch.no_grad():
        assert torch.allclose(network(images), reference(images), atol=1e-5)


def test_what_does_not_fit_is_named() -> None:
    network = ResNet(name="x", depth=8).resolve(32).build(10)
    state = dict(network.state_dict())
    state["head.fc.weight"] = torch.zeros(100, 64)
    del state["stem.0.weight"]
    state["stage9.weight"] = torch.zeros(1)
    with pytest.raises(
        UserError, match=r"lacks stem.0.weight; it has besides stage9.weight; .*head"
    ):
        load_into(network, state, "the file")


class Malicious:
    def __reduce__(self) -> Any:
        return os.system, ("touch was_here",)


def test_nothing_in_a_file_is_executed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"state_dict": Malicious()}, "a.pth")
    Path("b.pth").write_bytes(pickle.dumps(Malicious()))
    for name in ("a.pth", "b.pth"):
        with pytest.raises(UserError, match="more than tensors"):
            read_state(Path(name))
    assert not Path("was_here").exists()


def test_what_is_no_checkpoint_is_told(tmp_path: Path) -> None:
    (tmp_path / "a.pth").write_bytes(b"PK\x03\x04 cut off")
    torch.save([1, 2], tmp_path / "b.pth")
    torch.save({"state_dict": {"epoch": 3}}, tmp_path / "c.pth")
    with pytest.raises(UserError, match="cannot be read"):
        read_state(tmp_path / "a.pth")
    for name in ("b.pth", "c.pth"):
        with pytest.raises(UserError, match="no network's tensors"):
            read_state(tmp_path / name)


def test_the_digest_is_of_tensors_not_of_files_or_layouts() -> None:
    torch.manual_seed(0)
    network = ResNet(name="x", depth=8).resolve(32).build(10)
    before = digest(network)
    assert digest(network.to(memory_format=torch.channels_last)) == before  # type: ignore[call-overload]
    with torch.no_grad():
        network.head.fc.bias[0] += 1e-6
    assert digest(network) != before

"""timm and torchvision by name: the libraries' own networks are the oracle. No network is needed:
weights come from files, and the server that does not answer is a closed port."""

from __future__ import annotations

import copy
import time
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torchvision
from safetensors.torch import save_file
from torch import nn

from cutmix_exp.composition import compose
from cutmix_exp.config import from_dict, resolve
from cutmix_exp.errors import UserError
from cutmix_exp.models import library
from cutmix_exp.models.base import count_parameters
from cutmix_exp.models.batchnorm import BatchGroups, group_batchnorm
from cutmix_exp.models.library import LibraryModel, Published, TimmModel, TorchvisionModel
from tests.helpers import config_of

KINDS: dict[str, type[LibraryModel]] = {"timm": TimmModel, "torchvision": TorchvisionModel}
CLOSED = "http://127.0.0.1:9/"


def model(kind: str, architecture: str, **fields: Any) -> Any:
    return KINDS[kind](name=kind, architecture=architecture, **fields)


def same(ours: nn.Module, theirs: nn.Module, side: int) -> None:
    images = torch.randn(2, 3, side, side)
    with torch.no_grad():
        assert torch.equal(ours.eval()(images), theirs.eval()(images))


# --------------------------------------------------------------------------------------- making


@pytest.mark.parametrize(
    ("kind", "architecture", "side", "parameters"),
    [
        ("timm", "resnet50", 224, 25_557_032),
        ("timm", "seresnet50", 224, 28_088_024),  # 28.1M in the paper's Table 3
        ("timm", "vit_tiny_patch16_224", 224, 5_717_416),
        ("torchvision", "vgg16", 224, 138_357_544),
        ("torchvision", "inception_v3", 299, 23_834_568),  # without the auxiliary head
        ("torchvision", "googlenet", 224, 6_624_904),
        ("torchvision", "vit_b_16", 224, 86_567_656),
        ("torchvision", "maxvit_t", 224, 30_919_624),
        ("torchvision", "regnet_y_400mf", 224, 4_344_144),  # computes with tensors when it is made
    ],
)
def test_a_network_by_name(kind: str, architecture: str, side: int, parameters: int) -> None:
    resolved = model(kind, architecture).resolve(side)
    assert resolved.name == f"{kind}.{architecture}"
    assert resolved.resolve(side) == resolved
    assert resolved.normalization() is None
    if not architecture.startswith("regnet"):
        with torch.device("meta"):
            assert count_parameters(resolved.build(1000)) == parameters


@pytest.mark.parametrize(
    ("kind", "architecture", "side"),
    [
        ("timm", "test_resnet", 40),
        ("timm", "test_vit", 48),
        ("torchvision", "squeezenet1_1", 40),
        ("torchvision", "googlenet", 64),
        ("torchvision", "inception_v3", 96),
    ],
)
def test_networks_train_on_plain_logits(kind: str, architecture: str, side: int) -> None:
    """In training mode too, where the auxiliary heads would answer; under autocast."""
    torch.manual_seed(0)
    made = model(kind, architecture).resolve(side).build(5)
    made.train().to(memory_format=torch.channels_last)
    with torch.autocast("cpu", torch.bfloat16):
        logits = made(torch.randn(2, 3, side, side).to(memory_format=torch.channels_last))
    assert logits.shape == (2, 5)
    nn.functional.cross_entropy(logits.float(), torch.tensor([0, 4])).backward()
    for name, parameter in made.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all()


def test_options_reach_the_constructor() -> None:
    made = model("timm", "test_vit", options={"drop_path_rate": 0.25, "qkv_bias": 0, "depth": 3})
    network: Any = made.resolve(32).build(5)
    assert len(network.blocks) == 3
    assert network.blocks[-1].drop_path1.drop_prob == 0.25
    assert network.blocks[0].attn.qkv.bias is None
    made = model("torchvision", "squeezenet1_1", options={"dropout": 0.375})
    assert [m.p for m in made.resolve(64).build(5).modules() if isinstance(m, nn.Dropout)] == [
        0.375
    ]


def test_networks_for_one_size_are_made_for_the_images() -> None:
    network: Any = model("timm", "test_vit").resolve(32).build(5)
    assert network.patch_embed.img_size == (32, 32)
    network = model("torchvision", "vit_b_32").resolve(64).build(5)
    assert network.image_size == 64


# -------------------------------------------------------------------------------------- identity


def test_configs_name_the_architecture() -> None:
    config = config_of("dataset=synthetic", "model=timm", "model.architecture=test_resnet")
    assert config.run_id.split("-")[:3] == ["synthetic", "timm.test_resnet", "baseline"]
    assert config.dataset.mean == (0.5, 0.5, 0.5)
    other = ("dataset=synthetic", "model=timm", "model.architecture=test_resnet")
    options = config_of(*other, "model.options={drop_path_rate: 0.05, drop_rate: 0}")
    added = ("+model.options.drop_path_rate=0.05", "+model.options.drop_rate=0")
    assert config_of(*other, *added).run_id == options.run_id
    turned = config_of(*other, "model.options={drop_rate: 0.0, drop_path_rate: 0.05}")
    assert options.run_id == turned.run_id != config.run_id
    assert from_dict(options.to_dict()).run_id == options.run_id
    assert config_of(*other, "model.name=mine").model.name == "mine"


def test_se_resnet_starts_like_our_resnet() -> None:
    config = config_of("dataset=synthetic", "model=se_resnet")
    assert config.model.name == "timm.seresnet50"
    network: Any = config.model.build(10)
    assert torch.equal(network.layer1[0].bn3.weight, torch.ones(256))


def test_pretrained_networks_bring_their_normalisation() -> None:
    overrides = ["dataset=digits", "model=timm", "model.pretrained=true"]
    config = config_of(*overrides, "model.architecture=test_vit")
    cfg = timm.get_pretrained_cfg("test_vit")
    assert cfg is not None
    assert config.model.name == f"timm.test_vit.{cfg.tag}"
    assert (config.dataset.mean, config.dataset.std) == (cfg.mean, cfg.std) == ((0.5,) * 3,) * 2
    assert resolve(config) == config
    overrides[1] = "model=torchvision"
    config = config_of(*overrides, "model.architecture=resnet18")
    assert config.model.name == "torchvision.resnet18.IMAGENET1K_V1"
    assert config.dataset.mean == (0.485, 0.456, 0.406)


def test_the_tag_chooses_the_weights() -> None:
    def full(kind: str, architecture: str) -> str:
        return str(model(kind, architecture, pretrained=True).resolve(64).architecture)

    assert full("torchvision", "resnet50") == "resnet50.IMAGENET1K_V2"  # torchvision's default
    assert full("torchvision", "resnet50.IMAGENET1K_V1") == "resnet50.IMAGENET1K_V1"
    assert full("timm", "resnet50.tv_in1k") == "resnet50.tv_in1k"


# --------------------------------------------------------------------------------------- weights


def weights_of(network: nn.Module, file: Path) -> Path:
    """Save weights away from any initialisation, with running statistics that show."""
    for tensor in network.state_dict().values():
        if tensor.is_floating_point():
            tensor.uniform_(0.01, 0.1)
    if file.suffix == ".safetensors":
        save_file(network.state_dict(), file)
    else:
        torch.save(network.state_dict(), file)
    return file


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize(
    ("kind", "architecture", "side"),
    [
        ("timm", "test_resnet", 64),
        ("timm", "test_vit", 160),
        ("torchvision", "squeezenet1_1", 64),
        ("torchvision", "shufflenet_v2_x0_5", 64),
    ],
)
def test_weights_from_a_file(
    kind: str, architecture: str, side: int, suffix: str, tmp_path: Path
) -> None:
    """With as many classes as theirs the whole network is theirs, otherwise all but the head."""
    theirs: Any = (
        timm.create_model(architecture)
        if kind == "timm"
        else torchvision.models.get_model(architecture)
    )
    file = weights_of(theirs, tmp_path / f"weights{suffix}")
    resolved = model(kind, architecture, pretrained=True, weights=str(file)).resolve(side)
    same(resolved.build(1000), theirs, side)
    torch.manual_seed(0)
    new = resolved.build(5).state_dict()
    differing = [k for k, v in theirs.state_dict().items() if not torch.equal(v, new[k])]
    assert len({key.rpartition(".")[0] for key in differing}) == 1  # the head
    assert all(new[key].shape[0] == 5 for key in differing)


def test_positions_of_a_vit_follow_the_images(tmp_path: Path) -> None:
    theirs = timm.create_model("test_vit")
    file = weights_of(theirs, tmp_path / "weights.pth")
    resolved = model("timm", "test_vit", pretrained=True, weights=str(file)).resolve(64)
    network: Any = resolved.build(1000)
    assert network.pos_embed.shape[1] == 1 + 4 * 4
    assert torch.equal(network.patch_embed.proj.weight, theirs.patch_embed.proj.weight)


def test_auxiliary_heads_and_old_names_of_torchvisions_files(tmp_path: Path) -> None:
    theirs = torchvision.models.googlenet(init_weights=False, transform_input=True)
    file = weights_of(theirs, tmp_path / "googlenet.pth")
    fields = {"pretrained": True, "weights": str(file)}
    same(model("torchvision", "googlenet", **fields).resolve(64).build(1000), theirs, 64)

    densenet = torchvision.models.densenet121()
    weights_of(densenet, file)
    old = {
        k.replace("norm1", "norm.1").replace("conv2", "conv.2"): v
        for k, v in torch.load(file).items()
    }
    assert any(".norm.1." in key for key in old)
    torch.save(old, file)
    same(model("torchvision", "densenet121", **fields).resolve(64).build(1000), densenet, 64)


def test_a_checkpoint_of_a_run_is_a_file_of_weights(tmp_path: Path) -> None:
    theirs = torchvision.models.squeezenet1_1(num_classes=5)
    state = {"run_id": "x", "step": 3, "model": theirs.state_dict()}
    torch.save(state, tmp_path / "best.pt")
    fields = {"pretrained": True, "weights": str(tmp_path / "best.pt")}
    same(model("torchvision", "squeezenet1_1", **fields).resolve(64).build(5), theirs, 64)


def test_the_identity_has_the_files_content_and_not_its_place(tmp_path: Path) -> None:
    base = ["dataset=synthetic", "model=timm", "model.architecture=test_resnet"]
    base += ["model.pretrained=true"]
    files = [tmp_path / "a.pth", tmp_path / "b.pth", tmp_path / "c.pth"]
    for file, content in zip(files, (b"one", b"one", b"other"), strict=True):
        file.write_bytes(content)
    configs = [config_of(*base, f"model.weights={file}") for file in files]
    assert configs[0].run_id == configs[1].run_id != configs[2].run_id
    assert config_of(*base).run_id not in [c.run_id for c in configs]
    files[0].write_bytes(b"changed")
    with pytest.raises(UserError, match="another file than before"):
        resolve(configs[0])


@pytest.mark.parametrize(
    ("kind", "other"), [("timm", "test_vit"), ("timm", None), ("torchvision", None)]
)
@pytest.mark.parametrize("classes", [5, 1000])
def test_a_file_that_does_not_fit_is_refused(
    kind: str, other: str | None, classes: int, tmp_path: Path
) -> None:
    """Weights of another network, or with one tensor missing: nothing stays random unsaid."""
    name = "test_resnet" if kind == "timm" else "squeezenet1_1"
    make: Any = timm.create_model if kind == "timm" else torchvision.models.get_model
    state = make(other or name).state_dict()
    if other is None:
        state.pop(next(iter(state)))
    torch.save(state, tmp_path / "weights.pth")
    made = model(kind, name, pretrained=True, weights=str(tmp_path / "weights.pth")).resolve(64)
    with pytest.raises(
        UserError, match=r"weights.pth cannot be used.*\n(.*\n)*.*model.weights=FILE"
    ):
        made.build(classes)


class Harmful:
    def __reduce__(self) -> Any:
        return (print, ("executed",))


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_in_a_file_is_executed(
    kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.save({"state_dict": {"weight": Harmful()}}, tmp_path / "weights.pth")
    name = "test_resnet" if kind == "timm" else "squeezenet1_1"
    made = model(kind, name, pretrained=True, weights=str(tmp_path / "weights.pth")).resolve(64)
    with pytest.raises(UserError, match=r"weights.pth cannot be used"):
        made.build(5)
    assert "executed" not in capsys.readouterr().out


@pytest.mark.parametrize("kind", KINDS)
def test_without_a_network_the_weights_are_said_to_be_missing(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    nothing = Published(f"{CLOSED}weights.pth", CLOSED, tmp_path, None)
    monkeypatch.setattr(KINDS[kind], "published", lambda self: nothing)
    name = "test_resnet" if kind == "timm" else "squeezenet1_1"
    resolved = model(kind, name, pretrained=True).resolve(64)
    started = time.monotonic()
    with pytest.raises(UserError) as caught:
        resolved.build(5)
    assert time.monotonic() - started < 10
    for said in (
        resolved.name,
        "not at hand",
        f"{CLOSED}weights.pth",
        str(tmp_path),
        "model.weights=FILE",
    ):
        assert said in str(caught.value)


def test_downloaded_weights_are_found_without_a_network(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(library, "unreachable", lambda url: "no network")
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    theirs = torchvision.models.squeezenet1_1()
    resolved = model("torchvision", "squeezenet1_1", pretrained=True).resolve(64)
    place = resolved.published()
    (tmp_path / "checkpoints").mkdir()
    weights_of(theirs, tmp_path / "checkpoints" / Path(place.url).name)
    assert (place.file, resolved.published().file) != (None, None)
    same(resolved.build(1000), theirs, 64)

    import huggingface_hub

    cached = weights_of(timm.create_model("test_resnet"), tmp_path / "model.safetensors")
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda repo, name: str(cached))
    small = timm.create_model("test_resnet", checkpoint_path=str(cached))
    same(model("timm", "test_resnet", pretrained=True).resolve(64).build(1000), small, 64)


# ---------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("kind", "architecture", "fields", "side", "said"),
    [
        ("timm", "resnet5", {}, 32, ["no such network", "resnet50", "list_models"]),
        ("timm", "hf-hub:timm/resnet18", {}, 32, ["no such network"]),
        ("torchvision", "resnet500", {}, 32, ["no such network", "resnet50"]),
        ("torchvision", "fasterrcnn_resnet50_fpn", {}, 224, ["no such network"]),
        ("timm", "test_vit", {}, 40, ["40 px", "16x16"]),
        (
            "timm",
            "vit_tiny_patch16_224",
            {"options": {"img_size": 224.0}},
            32,
            ["cannot take images of 32 px", "224"],
        ),
        ("torchvision", "vit_b_16", {}, 40, ["40 px", "patch size"]),
        ("torchvision", "maxvit_t", {}, 32, ["32 px", "partition size"]),
        ("torchvision", "inception_v3", {}, 32, ["cannot take images of 32 px", "image_size"]),
        ("torchvision", "alexnet", {}, 32, ["cannot take images of 32 px"]),
        (
            "timm",
            "test_resnet",
            {"options": {"drop_pth_rate": 0.1}},
            32,
            ["no option 'drop_pth_rate'", "did you mean 'drop_path_rate'", "zero_init_last"],
        ),
        (
            "torchvision",
            "vgg11",
            {"options": {"dropuot": 0.1}},
            32,
            ["no option 'dropuot'", "did you mean 'dropout'"],
        ),
        ("torchvision", "resnet18", {"options": {"num_classes": 3.0}}, 32, ["num_classes"]),
        ("timm", "resnet50.tv_in1k", {}, 32, ["tv_in1k", "model.pretrained=true"]),
        ("timm", "resnet50", {"weights": "x.pth"}, 32, ["x.pth", "model.pretrained=true"]),
        ("timm", "resnet50.tv", {"pretrained": True}, 32, ["no such weights", "tv_in1k"]),
        (
            "torchvision",
            "resnet50.V1",
            {"pretrained": True},
            32,
            ["no such weights", "IMAGENET1K_V2, IMAGENET1K_V1"],
        ),
        (
            "timm",
            "resnet50",
            {"pretrained": True, "weights": "/nowhere/x.pth"},
            32,
            ["/nowhere/x.pth cannot be read", "No such file"],
        ),
        ("timm", "resnet152c", {"pretrained": True, "options": {"in_chans": 1.0}}, 64, ["64 px"]),
    ],
)
def test_what_cannot_be_had_is_refused_before_it_is_built(
    kind: str, architecture: str, fields: dict[str, Any], side: int, said: list[str]
) -> None:
    with pytest.raises(UserError) as caught:
        model(kind, architecture, **fields).resolve(side)
    for text in said:
        assert text in str(caught.value)


def test_an_architecture_without_weights() -> None:
    name = next(n for n in timm.list_models("*resnet*") if not timm.list_pretrained(f"{n}*"))
    with pytest.raises(UserError, match="publishes no weights"):
        model("timm", name, pretrained=True).resolve(64)


def test_options_are_numbers() -> None:
    with pytest.raises(UserError, match=r"model.options.act_layer='gelu'.*number"):
        from_dict(compose(["model=timm", "model.options={act_layer: gelu}"]))


def test_batchnorm_of_another_kind_is_not_grouped_in_silence() -> None:
    network = model("timm", "test_efficientnet").resolve(64).build(5)
    with pytest.raises(UserError, match=r"BatchNormAct2d.*bn_group_size"):
        group_batchnorm(copy.deepcopy(network), BatchGroups())
    plain = model("timm", "test_resnet").resolve(64).build(5)
    group_batchnorm(plain, BatchGroups())
    group_batchnorm(plain, BatchGroups())  # grouped ones are left as they are

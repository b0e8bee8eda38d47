"""Regularizers inside the network: rates, gradients, places, and noise that is keyed by the step."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torchvision.ops import drop_block2d

from cutmix_exp.aug.attention import Adl
from cutmix_exp.aug.base import NetworkOp, Progress
from cutmix_exp.aug.network import (
    DropBlock,
    DropBlockLayer,
    Dropout,
    DropoutLinear,
    ShakeDrop,
    ShakeDropLayer,
    StochasticDepth,
    StochasticDepthLayer,
    TwoFactors,
)
from cutmix_exp.composition import CONFIG_DIR
from cutmix_exp.config import Config
from cutmix_exp.data.sources import Splits
from cutmix_exp.distributed import World
from cutmix_exp.errors import UserError
from cutmix_exp.models.pyramidnet import PyramidNet
from cutmix_exp.models.resnet import ResNet, ResNeXt
from cutmix_exp.models.wide_resnet import WideResNet
from cutmix_exp.training.logging import NoLog, Reporter
from cutmix_exp.training.trainer import Trainer, make_model
from tests.helpers import TINY, config_of

MODELS = {
    "resnet": ResNet(name="resnet", depth=8).resolve(32),
    "bottleneck": ResNet(name="resnet", depth=11).resolve(32),
    "resnext": ResNeXt(name="resnext", depth=11, cardinality=2, base_width=4).resolve(32),
    "pyramidnet": PyramidNet(name="pyramidnet", depth=11, alpha=12).resolve(32),
    "wide_resnet": WideResNet(name="wide_resnet", depth=10, widen_factor=1),
}
OPS: dict[str, NetworkOp] = {
    "stochastic_depth": StochasticDepth(),
    "shakedrop": ShakeDrop(),
    "dropblock": DropBlock(shortcut=True).resolve(32),
    "dropout": Dropout(),
    "adl": Adl(),
}


def built(model: str) -> nn.Module:
    torch.manual_seed(0)
    return MODELS[model].build(10)


def layers_of(model: nn.Module, kind: type[nn.Module]) -> list[Any]:
    return [m for m in model.modules() if isinstance(m, kind)]


# -------------------------------------------------------------------------- every regularizer


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("model", MODELS)
def test_parameters_keep_names_and_values(model: str, op: str) -> None:
    plain, changed = built(model), OPS[op].attach(built(model))
    before, after = plain.state_dict(), changed.state_dict()
    assert list(before) == list(after)
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert [n for n, _ in plain.named_parameters()] == [n for n, _ in changed.named_parameters()]


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("model", MODELS)
def test_it_acts_in_training_alone(model: str, op: str) -> None:
    network = OPS[op].attach(built(model))
    for clock in layers_of(network, Progress):
        clock.done.fill_(1.0)
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        network.train()
        assert len({network(images).numpy().tobytes() for _ in range(20)}) > 1
        network.eval()
        evaluated = network(images)
        assert torch.equal(evaluated, network(images))
        if op in ("dropblock", "dropout"):
            plain = built(model).eval()
            plain.load_state_dict(network.state_dict())
            assert torch.equal(plain(images), evaluated)


LAYERS = {
    "stochastic depth": StochasticDepthLayer(0.4, per_image=True, inverse=False),
    "inverse": StochasticDepthLayer(0.4, per_image=False, inverse=True),
    "shakedrop": ShakeDropLayer(0.4, (-1, 1), (0, 1), per_element=False),
    "shakedrop, elements": ShakeDropLayer(0.4, (-1, 1), (0, 1), per_element=True),
    "dropblock": DropBlockLayer(0.4, 2, None),
}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("layer", LAYERS)
def test_dtype_and_layout_stay_and_inputs_are_left_alone(
    layer: str, dtype: torch.dtype, training: bool
) -> None:
    maps = torch.randn(6, 4, 5, 7).to(dtype)
    for layout in (torch.contiguous_format, torch.channels_last):
        given = maps.contiguous(memory_format=layout).detach().requires_grad_()
        made = LAYERS[layer].train(training)(given)
        made.sum().backward()
        assert torch.equal(given, maps)
        assert (made.dtype, made.stride()) == (dtype, given.stride())
        assert given.grad is not None and given.grad.dtype == dtype


def test_no_recompilation_over_fifty_steps() -> None:
    """fullgraph: there is no graph break either. The progress and the gates change at each step."""
    torch._dynamo.reset()
    counters.clear()
    network = built("resnet").train()
    for op in OPS.values():
        network = op.attach(network)
    (clock,) = set(layers_of(network, Progress))
    compiled = torch.compile(network, backend="eager", fullgraph=True)
    outputs = []
    for step in range(50):
        torch.manual_seed(step)
        clock.done.fill_(step / 50)
        outputs.append(compiled(torch.ones(2, 3, 8, 8)))
        outputs[-1].sum().backward()
    assert counters["stats"]["unique_graphs"] == 1
    assert len({float(o.sum().detach()) for o in outputs}) == 50


NETWORK_ATOMS = ["adl", "dropblock", "dropout", "shakedrop", "stochastic_depth"]
OTHER_ATOMS = sorted(p.stem for p in (CONFIG_DIR / "aug").glob("*.yaml") if p.stem != "baseline")


@pytest.mark.parametrize("other", OTHER_ATOMS)
def test_each_composes_with_every_other_atom(other: str) -> None:
    """All at once with it, and an optimizer step's worth of gradients."""
    more = [a for a in NETWORK_ATOMS if a not in config_of(f"aug={other}").aug.atoms]
    config = config_of(*TINY, f"aug=[{','.join([other, *more])}]")
    assert set(config.aug.network) >= set(NETWORK_ATOMS)
    network = make_model(config).train()
    network(torch.randn(2, 3, 8, 8)).sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in network.parameters())


def test_combinations_are_their_lists() -> None:
    for name in ("cutmix_shakedrop", "dropblock_label_smoothing", "cutout_label_smoothing"):
        atoms = list(config_of(f"aug={name}").aug.atoms)
        one, two = config_of(f"aug={name}"), config_of(f"aug=[{','.join(atoms)}]")
        assert one.run_id == two.run_id
        assert len(atoms) == 2
    assert config_of("aug=cutmix_shakedrop").aug.name == "cutmix+shakedrop"
    assert config_of("aug=dropblock_label_smoothing").aug.label_smoothing == 0.1


# -------------------------------------------------------------------- what does not fit is said


class Headless(nn.Module):
    def forward(self, images: Tensor) -> Tensor:
        return images.mean((2, 3))


@pytest.mark.parametrize("op", OPS)
def test_a_network_without_a_place_is_refused(op: str) -> None:
    with pytest.raises(UserError, match="Headless") as caught:
        OPS[op].attach(Headless())
    assert "model=resnet" in str(caught.value)
    assert "drop_path" not in str(caught.value)


@pytest.mark.parametrize("op", ["stochastic_depth", "shakedrop", "dropblock"])
def test_layers_that_append_their_maps_are_no_residual_blocks(op: str) -> None:
    network = make_model(config_of("model=densenet", "model.depth=10"))
    with pytest.raises(UserError, match="residual blocks"):
        OPS[op].attach(network)


def test_a_network_with_stochastic_depth_of_its_own_is_pointed_to() -> None:
    import timm

    with torch.device("meta"):
        network = timm.create_model("resnet18")
    for op in ("stochastic_depth", "shakedrop", "dropblock"):
        with pytest.raises(UserError, match=r"ResNet.*model\.options\.drop_path_rate"):
            OPS[op].attach(network)
    assert isinstance(Dropout().attach(network).fc, DropoutLinear)


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("aug.network.shakedrop.alpha=[1.0]", ["alpha=[1.0]", "[low,high]"]),
        ("aug.network.shakedrop.beta=[1.0,0.0]", ["beta=[1.0, 0.0]", "[low,high]"]),
        ("aug.network.shakedrop.rate=1.0", ["rate=1.0", "< 1"]),
        ("aug.network.shakedrop.granularity=batch", ["batch", "image, element"]),
    ],
)
def test_wrong_values_are_refused(override: str, said: list[str]) -> None:
    with pytest.raises(UserError) as caught:
        config_of("aug=shakedrop", override)
    assert all(text in str(caught.value) for text in said)


# ------------------------------------------------------------------------------ decay by depth


def test_rates_decay_linearly_or_are_uniform() -> None:
    assert StochasticDepth().rates(4) == [0.0625, 0.125, 0.1875, 0.25]
    assert StochasticDepth(rate=0.5).rates(5) == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.5])
    assert StochasticDepth(decay="uniform").rates(3) == [0.25] * 3
    shaken = ShakeDrop().rates(66)
    assert (shaken[0], shaken[-1]) == (pytest.approx(0.5 / 66), 0.5)  # PyramidNet-200 has 66 units


@pytest.mark.parametrize("model", MODELS)
def test_the_rates_are_dealt_in_the_order_of_the_forward_pass(model: str) -> None:
    network = ShakeDrop().attach(built(model))
    assert [layer.rate for layer in layers_of(network, ShakeDropLayer)] == pytest.approx(
        [0.5 / 3, 1.0 / 3, 0.5]
    )
    called: list[float] = []
    for layer in layers_of(network, ShakeDropLayer):
        layer.register_forward_hook(lambda m, *_: called.append(m.rate))
    network(torch.randn(2, 3, 8, 8))
    assert called == sorted(called) and len(called) == 3


# ---------------------------------------------------------------------------- stochastic depth


def draws_of(layer: nn.Module, maps: Tensor, count: int) -> Tensor:
    torch.manual_seed(1)
    layer.train()
    return torch.stack([layer(maps) for _ in range(count)])


def test_a_gate_of_the_whole_batch_and_of_each_image() -> None:
    ones = torch.ones(8, 2, 3, 3)
    for per_image in (False, True):
        layer = StochasticDepthLayer(0.25, per_image=per_image, inverse=False)
        made = draws_of(layer, ones, 1000)
        assert set(made.unique().tolist()) == {0.0, 1.0}
        of_images = made.mean((2, 3, 4))
        assert set(of_images.unique().tolist()) == {0.0, 1.0}  # whole branches
        together = bool((of_images.std(1) == 0).all())
        assert together != per_image
        gates = 8000 if per_image else 1000
        assert float(made.mean()) == pytest.approx(0.75, abs=5 * (0.1875 / gates) ** 0.5)


@pytest.mark.parametrize("inverse", [False, True])
def test_the_mean_over_draws_is_the_evaluated_branch(inverse: bool) -> None:
    maps = torch.randn(3, 2, 2, 2, dtype=torch.float64)
    layer = StochasticDepthLayer(0.4, per_image=False, inverse=inverse)
    mean = draws_of(layer, maps, 20_000).mean(0)
    evaluated = layer.eval()(maps)
    torch.testing.assert_close(mean, evaluated, rtol=0.03, atol=0)
    torch.testing.assert_close(evaluated, maps if inverse else 0.6 * maps)


def test_a_closed_branch_has_no_gradient() -> None:
    maps = torch.randn(40, 2, 2, 2, requires_grad=True)
    torch.manual_seed(0)
    made = StochasticDepthLayer(0.5, per_image=True, inverse=True)(maps)
    made.sum().backward()
    assert maps.grad is not None
    is_open = made.detach().abs().sum((1, 2, 3)) > 0
    assert 0 < int(is_open.sum()) < 40
    torch.testing.assert_close(maps.grad, 2.0 * is_open[:, None, None, None].expand(maps.shape))


# ----------------------------------------------------------------------------------- ShakeDrop


def test_two_factors_by_hand() -> None:
    """y = 2 * shake(x^2), shake with alpha -0.5 and beta 0.25, at x = 3: y = 2 * -0.5 * 9 = -9,
    and dy/dx as it is passed back = 2 * 0.25 * 2x = 3."""
    x = torch.tensor([3.0], requires_grad=True)
    y = 2 * TwoFactors.apply(x * x, torch.tensor([-0.5]), torch.tensor([0.25]))
    y.backward()
    assert y.item() == -9.0
    assert x.grad is not None and x.grad.item() == 3.0


def test_equal_factors_are_a_multiplication() -> None:
    factor = torch.rand(3, 1, 1, 1, dtype=torch.float64)
    maps = torch.randn(3, 2, 2, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: TwoFactors.apply(x, factor, factor), maps)


@pytest.mark.parametrize("rate", [0.0, 1.0])
def test_an_open_branch_is_itself_and_a_closed_one_has_both_factors(rate: float) -> None:
    maps = torch.randn(4, 2, 3, 3, requires_grad=True)
    arriving = torch.randn(4, 2, 3, 3)
    made = ShakeDropLayer(rate, (-0.5, -0.5), (0.25, 0.25), per_element=False)(maps)
    made.backward(arriving)
    assert torch.equal(made, maps if rate == 0 else -0.5 * maps)
    assert maps.grad is not None
    assert torch.equal(maps.grad, arriving if rate == 0 else 0.25 * arriving)


@pytest.mark.parametrize("per_element", [False, True])
def test_one_gate_and_alpha_and_beta_for_each(per_element: bool) -> None:
    layer = ShakeDropLayer(0.5, (-1, 1), (0, 1), per_element=per_element)
    ahead, back, closed = [], [], 0
    torch.manual_seed(0)
    for _ in range(400):
        ones = torch.ones(5, 2, 3, 3, requires_grad=True)
        made = layer(ones)
        made.sum().backward()
        assert ones.grad is not None
        if bool((made == 1).all()):
            assert bool((ones.grad == 1).all())
            continue
        closed += 1
        count = 5 * 2 * 3 * 3 if per_element else 5
        assert len(made.detach().unique()) == len(ones.grad.unique()) == count
        same_in_image = (made == made[:, :1, :1, :1]).all() and (
            ones.grad == ones.grad[:, :1, :1, :1]
        ).all()
        assert bool(same_in_image) != per_element
        ahead.append(made.detach()[:, 0, 0, 0])
        back.append(ones.grad[:, 0, 0, 0])
    assert closed == pytest.approx(200, abs=50)
    a, b = torch.cat(ahead).numpy(), torch.cat(back).numpy()
    for drawn, low, high in ((a, -1, 1), (b, 0, 1)):
        assert low <= drawn.min() < low + 0.02 and high - 0.02 < drawn.max() <= high
        counts = np.histogram(drawn, 5, (low, high))[0]
        assert abs(counts - len(drawn) / 5).max() < 5 * (len(drawn) / 5) ** 0.5
    assert abs(np.corrcoef(a, b)[0, 1]) < 5 / len(a) ** 0.5


@pytest.mark.parametrize(
    ("alpha", "factor"), [((-1.0, 1.0), 0.7), ((0.0, 0.0), 0.7), ((0.0, 1.0), 0.85)]
)
def test_shakedrop_evaluates_to_its_expectation(alpha: tuple[float, float], factor: float) -> None:
    layer = ShakeDropLayer(0.3, alpha, (0, 1), per_element=False)
    maps = torch.randn(4, 1, 2, 2, dtype=torch.float64)
    torch.testing.assert_close(layer.eval()(maps), factor * maps)
    mean = draws_of(layer, torch.ones(4, 1, 2, 2, dtype=torch.float64), 8000).mean()
    assert float(mean) == pytest.approx(factor, abs=0.03)


# ----------------------------------------------------------------------------------- DropBlock


def exact_rates(height: int, width: int, block: int, asked: float) -> np.ndarray:
    """Drop probability of each unit [H, W]: the number of squares that cover it, counted one by
    one, each seeded with the probability of the authors' formula."""
    tall, wide = min(block, height), min(block, width)
    covered = np.zeros((height, width))
    fits = 0
    for top in range(height - tall + 1):
        for left in range(width - wide + 1):
            covered[top : top + tall, left : left + wide] += 1
            fits += 1
    gamma = asked * height * width / (tall * wide) / fits
    return np.asarray(1 - (1 - gamma) ** covered)


ON_CIFAR = [(32, 32, 4), (16, 16, 4), (8, 8, 4)]
ON_IMAGENET = [(14, 14, 7), (7, 7, 7)]
SIZES = [*ON_CIFAR, *ON_IMAGENET, (8, 8, 7), (4, 4, 7), (9, 5, 3), (1, 1, 4)]


@pytest.mark.parametrize(("height", "width", "block"), SIZES)
def test_the_measured_rate_is_the_asked_one(height: int, width: int, block: int) -> None:
    expected = exact_rates(height, width, block, 0.1)
    assert expected.mean() == pytest.approx(0.1, rel=0.1)
    torch.manual_seed(0)
    channels = 200 if height > 8 else 2000
    made = DropBlockLayer(0.1, block, None)(torch.ones(20, channels, height, width))
    dropped = (made == 0).double().mean((0, 1)).numpy()
    draws = 20 * channels
    np.testing.assert_allclose(dropped, expected, atol=6 * (0.25 / draws) ** 0.5, rtol=0)
    assert dropped.mean() == pytest.approx(expected.mean(), rel=0.05)
    assert float(made.mean()) == pytest.approx(1, rel=1e-5)  # by the share of ones
    assert len(made.unique()) == 2


@pytest.mark.parametrize(("side", "block"), [(16, 7), (14, 7), (8, 7), (7, 7), (16, 3)])
def test_odd_blocks_drop_as_often_as_torchvisions(side: int, block: int) -> None:
    torch.manual_seed(0)
    ones = torch.ones(20, 500, side, side)
    mine = float((DropBlockLayer(0.1, block, None)(ones) == 0).double().mean())
    theirs = float((drop_block2d(ones, 0.1, block) == 0).double().mean())
    assert mine == pytest.approx(theirs, rel=0.1)


@pytest.mark.parametrize("block", [1, 2, 3, 4, 7])
def test_what_is_dropped_is_made_of_whole_squares(block: int) -> None:
    torch.manual_seed(0)
    made = DropBlockLayer(0.2, block, None)(torch.ones(4, 25, 9, 7))
    side = min(block, 7)
    found = 0
    for mask in (made == 0).flatten(0, 1).numpy():
        covered = np.zeros_like(mask)
        for top in range(9 - side + 1):
            for left in range(7 - side + 1):
                square = mask[top : top + side, left : left + side]
                if square.all():
                    covered[top : top + side, left : left + side] = True
                    found += 1
        np.testing.assert_array_equal(mask, covered)
    assert found > 10


def test_each_channel_and_image_has_its_own_mask() -> None:
    torch.manual_seed(0)
    masks = DropBlockLayer(0.3, 3, None)(torch.ones(5, 6, 16, 16)) == 0
    assert len({m.numpy().tobytes() for m in masks.flatten(0, 1)}) == 30


def test_the_drop_rate_grows_with_the_progress() -> None:
    progress = Progress()
    layer, ones = DropBlockLayer(0.2, 4, progress), torch.ones(20, 200, 16, 16)
    torch.manual_seed(0)
    for done in (0.0, 0.5, 1.0):
        progress.done.fill_(done)
        expected = exact_rates(16, 16, 4, 0.2 * done).mean()
        assert float((layer(ones) == 0).double().mean()) == pytest.approx(expected, rel=0.05)


def test_everything_may_be_dropped() -> None:
    made = DropBlockLayer(1.0, 4, None)(torch.ones(1, 1, 4, 4))
    assert torch.equal(made, torch.zeros(1, 1, 4, 4))


def test_on_imagenet_it_is_where_its_authors_have_it() -> None:
    op = DropBlock().resolve(224)
    assert (op.block, op.shortcut) == (7, True)
    with torch.device("meta"):
        network = op.attach(ResNet(name="resnet").resolve(224).build(1000))
    places = {
        name: [(m.rate, m.block) for m in layers_of(getattr(network, name), DropBlockLayer)]
        for name in ("stem", "stage1", "stage2", "stage3", "stage4", "head")
    }
    assert [len(p) for p in places.values()] == [0, 0, 0, 6 * 4, 3 * 4, 0]
    for name, rate in (("stage4", 0.1), ("stage3", 0.025)):
        assert np.allclose(places[name], (rate, 7))
    block: Any = network.stage4[0]
    assert [isinstance(m, nn.Sequential) for m in block.branch] == [
        False, False, True, False, False, True, False, False, False
    ]  # fmt: skip
    assert isinstance(block.branch[-1], DropBlockLayer)
    assert isinstance(block.shortcut[-1], DropBlockLayer)


def test_on_cifar_it_is_on_the_branches_of_the_last_two_stages() -> None:
    config = config_of("dataset=cifar100", "model=pyramidnet", "model.depth=20", "aug=dropblock")
    op = config.aug.network["dropblock"]
    assert op == DropBlock(block=4, shortcut=False)
    network = make_model(config)
    found = [
        [m.rate for m in layers_of(getattr(network, name), DropBlockLayer)]
        for name in ("stage1", "stage2", "stage3")
    ]
    assert found == [[], pytest.approx([0.025] * 6), pytest.approx([0.1] * 6)]
    assert len(layers_of(network, Progress)) == 1


def test_its_places_can_be_chosen() -> None:
    op = DropBlock(stages=(1,), stage_factor=1.0, scheduled=False, shortcut=True, block=2)
    network = op.attach(built("pyramidnet"))
    assert [m.rate for m in layers_of(network, DropBlockLayer)] == pytest.approx([0.1] * 4)
    assert layers_of(network, Progress) == []
    for stages in ((4,), (3, 4), ()):
        with pytest.raises(UserError, match=r"stages=.*\[1, 2, 3\]"):
            DropBlock(stages=stages, block=2).attach(built("resnet"))


def test_explicit_values_win() -> None:
    op = DropBlock(block=5, shortcut=True)
    assert op.resolve(32) == op.resolve(224) == op


# ------------------------------------------------------------------------------------- dropout


@pytest.mark.parametrize("model", MODELS)
def test_dropout_is_of_the_classifiers_input(model: str) -> None:
    network = Dropout(rate=0.25).attach(built(model))
    ((name, layer),) = [(n, m) for n, m in network.named_modules() if isinstance(m, DropoutLinear)]
    assert name.endswith("fc") and layer.out_features == 10
    with torch.no_grad():
        layer.weight.fill_(1.0)
        layer.bias.fill_(0.0)
        torch.manual_seed(0)
        features = torch.eye(layer.in_features)  # so that an output tells of one feature
        made = torch.stack([layer(features)[:, 0] for _ in range(2000 // layer.in_features + 50)])
    torch.testing.assert_close(made.unique(), torch.tensor([0.0, 4 / 3]))
    tolerance = 5 * (0.1875 / made.numel()) ** 0.5
    assert float((made == 0).double().mean()) == pytest.approx(0.25, abs=tolerance)
    assert torch.equal(layer.eval()(features), torch.ones(layer.in_features, 10))


# ------------------------------------------------------------------- noise, keyed by the step

RUN = [
    "dataset=synthetic",
    "dataset.num_classes=4",
    "dataset.train_size=90",
    "dataset.test_size=20",
    "dataset.image_size=16",
    "schedule.batch_size=20",
    "schedule.lr=0.05",
    "schedule.epochs=2",
    "precision=fp32",
    *TINY[1:],
]


def trainer_of(config: Config, splits: Splits | None = None) -> Trainer:
    world = World(0, 1, torch.device("cpu"))
    made = Trainer(config, splits or config.dataset.load(), world, Reporter(active=False))
    made.network.train()
    return made


def logits_of(t: Trainer, epoch: int, step: int, rank: int = 0) -> Tensor:
    t.world, t.epoch = World(rank, 2, torch.device("cpu")), epoch
    t.key_noise(step, 0.5)
    return t.model(torch.ones(4, 3, 16, 16)).detach()


@pytest.mark.parametrize("atom", NETWORK_ATOMS)
def test_noise_is_a_function_of_epoch_step_and_rank(atom: str) -> None:
    t = trainer_of(config_of(*RUN, f"aug={atom}"))
    keys = [(e, s, r) for e in (0, 1) for s in (0, 1, 2) for r in (0, 1)]
    drawn = [logits_of(t, *key) for key in keys]
    torch.rand(7)
    again = [logits_of(t, *key) for key in reversed(keys)][::-1]
    assert all(map(torch.equal, drawn, again))
    if atom not in ("adl", "stochastic_depth"):  # of whose few coins two steps may well be equal
        assert len({d.numpy().tobytes() for d in drawn}) == len(keys)
    assert len({d.numpy().tobytes() for d in drawn[::2]}) > 1
    assert any(not torch.equal(*pair) for pair in zip(drawn[::2], drawn[1::2], strict=True))


class Stop(Exception):
    """In the place of a crash."""


@pytest.mark.parametrize(
    "words",
    [
        ["aug=[cutmix,shakedrop,dropblock]"],
        ["aug=[dropout,stochastic_depth]", "trainer.accumulate=2"],
    ],
    ids=str,
)
def test_resumed_in_mid_epoch_it_ends_with_the_same_bits(tmp_path: Path, words: list[str]) -> None:
    config = config_of(*RUN, *words, f"runs_dir={tmp_path}")
    splits = config.dataset.load()
    unbroken = trainer_of(config, splits)
    unbroken.fit(NoLog())
    assert unbroken.step == 10

    def stop() -> None:
        if broken.step == 7:
            broken.save()
            raise Stop

    broken = trainer_of(config, splits)
    broken.after_step = stop
    with pytest.raises(Stop):
        broken.fit(NoLog())
    torch.rand(5)
    resumed = trainer_of(config, splits)
    assert resumed.resume() and resumed.step == 7
    resumed.fit(NoLog())
    for name, tensor in unbroken.model.state_dict().items():
        assert torch.equal(tensor, resumed.model.state_dict()[name]), name


def test_micro_batches_draw_their_own_noise(tmp_path: Path) -> None:
    config = config_of(*RUN, "aug=shakedrop", "trainer.accumulate=2", f"runs_dir={tmp_path}")
    t = trainer_of(config)
    (last,) = layers_of(t.model, ShakeDropLayer)[-1:]
    last.rate = 1.0
    ratios: list[Tensor] = []
    last.register_forward_hook(lambda m, given, made: ratios.append((made / given[0])[:, 0, 0, 0]))
    t.key_noise(0, 0.0)
    t.train_step(t.pipeline.plan(0, 0))
    assert len(ratios) == 2 and not torch.allclose(ratios[0], ratios[1])


def test_the_layers_know_the_progress(tmp_path: Path) -> None:
    t = trainer_of(config_of(*RUN, "aug=dropblock", f"runs_dir={tmp_path}"))
    (clock,) = layers_of(t.model, Progress)
    seen: list[float] = []
    t.after_step = lambda: seen.append(float(clock.done))
    t.fit(NoLog())
    assert seen == pytest.approx([step / 10 for step in range(10)])
    assert not [name for name in t.model.state_dict() if "done" in name]

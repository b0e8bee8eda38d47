"""Mixing inside the network against the same done by hand, stage by stage."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from cutmix_exp.aug.base import BatchShape, MixPlan
from cutmix_exp.aug.feature import FeatureCutMix, FeatureMixer, ManifoldMixup, feature_maps
from cutmix_exp.distributed import share
from cutmix_exp.errors import UserError
from cutmix_exp.models.base import StagedNetwork
from cutmix_exp.models.pyramidnet import PyramidNet
from cutmix_exp.models.resnet import ResNet
from cutmix_exp.seeding import stream
from cutmix_exp.training.trainer import make_model
from tests.helpers import TINY, config_of

BATCH = 6
MODELS = {
    "resnet": lambda: ResNet(name="resnet", depth=8).resolve(16).build(4),
    "pyramidnet": lambda: PyramidNet(name="p", depth=11, alpha=6).resolve(16).build(4),
}


def network(name: str = "resnet") -> StagedNetwork:
    torch.manual_seed(0)
    built = MODELS[name]()
    assert isinstance(built, StagedNetwork)
    return built.train()


def plan_of(mixer: FeatureMixer, maps: Any, shares: int = 1, step: int = 0) -> MixPlan:
    shape = BatchShape(BATCH, 16, 16, shares=shares, maps=maps)
    return mixer.sample(shape, 0.5, stream(3, "mix", 0, step))


def by_hand(made: StagedNetwork, images: Tensor, plan: MixPlan) -> Tensor:
    """The forward pass, with the features mixed image by image after the drawn layer."""
    features = images
    for number, name in enumerate(["image", "stem", *made.stages]):
        if number:
            features = made.get_submodule(name)(features)
        if number != plan.layer:
            continue
        mixed = features.clone()
        for i, partner in enumerate(plan.partners[0]):
            if plan.boxes is None:
                own, other = (float(w) for w in plan.weights[:, i])
                mixed[i] = own * features[i] + other * features[partner]
            else:
                top, left, bottom, right = plan.boxes[i]
                mixed[i, :, top:bottom, left:right] = features[partner, :, top:bottom, left:right]
        features = mixed
    return made.head(features)


def ours(made: nn.Module, mixer: FeatureMixer, images: Tensor, plan: MixPlan) -> Tensor:
    everything = np.arange(BATCH)
    mixer.attach(made).set(plan.at(everything), everything)
    sources = [images, *(images[torch.from_numpy(p)] for p in plan.partners)]
    return made(mixer.apply(plan.at(everything), sources))


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("layer", [0, 1, 2, 3, 4])
@pytest.mark.parametrize("kind", [ManifoldMixup, FeatureCutMix])
def test_features_are_mixed_after_the_layer(kind: Any, layer: int, model: str) -> None:
    mixer = kind(prob=1.0, layers=(layer,))
    made, reference = network(model), network(model)
    plan = plan_of(mixer, feature_maps(made, 16))
    assert plan.layer == layer and plan.num_sources == 2
    images = torch.randn(BATCH, 3, 16, 16)
    got = ours(made, mixer, images, plan)
    torch.testing.assert_close(got, by_hand(reference, images, plan), atol=2e-6, rtol=1e-5)
    unmixed = network(model)(images)
    assert (got - unmixed).abs().max() > 1e-3


def test_maps_are_those_of_the_stages() -> None:
    assert feature_maps(network(), 16) == ((16, 16), (16, 16), (16, 16), (8, 8), (4, 4))
    assert feature_maps(nn.Conv2d(3, 1, 1), 16) == ((16, 16),)


def test_label_weights_are_areas_of_the_layers_map() -> None:
    mixer = FeatureCutMix(prob=1.0, layers=(4,))
    for step in range(20):
        plan = plan_of(mixer, feature_maps(network(), 16), step=step)
        assert plan.boxes is not None and plan.boxes.max() <= 4
        top, left, bottom, right = plan.boxes[0]
        assert plan.weights[0, 0] == 1 - (bottom - top) * (right - left) / 16


def test_layers_are_drawn_uniformly_and_do_not_depend_on_the_share() -> None:
    mixer = ManifoldMixup(prob=1.0)
    maps = feature_maps(network(), 16)
    drawn = [plan_of(mixer, maps, step=step) for step in range(600)]
    layers, counts = np.unique([p.layer for p in drawn], return_counts=True)
    assert layers.tolist() == [0, 2, 3] and (np.abs(counts - 200) < 60).all()
    for step in range(10):
        one, two = (plan_of(mixer, maps, shares=n, step=step) for n in (1, 2))
        assert one.layer == two.layer and np.array_equal(one.weights, two.weights)


@pytest.mark.parametrize("shares", [2, 3, 4])
def test_partners_are_of_the_same_forward_pass(shares: int) -> None:
    plan = plan_of(ManifoldMixup(prob=1.0, layers=(2,)), feature_maps(network(), 16), shares)
    for part in range(shares):
        mine = share(BATCH, part, shares)
        assert sorted(plan.partners[0, mine]) == mine.tolist()


def test_evaluation_and_a_batch_that_the_coin_left_alone_are_not_mixed() -> None:
    mixer = ManifoldMixup(prob=0.0, layers=(2,))
    images = torch.randn(BATCH, 3, 16, 16)
    made = network()
    plan = plan_of(mixer, feature_maps(made, 16))
    torch.testing.assert_close(ours(made, mixer, images, plan), network()(images))

    always = ManifoldMixup(prob=1.0, layers=(2,))
    made = network().eval()
    plan = plan_of(always, feature_maps(made, 16))
    torch.testing.assert_close(ours(made, always, images, plan), network().eval()(images))


def test_it_works_compiled() -> None:
    mixer = FeatureCutMix(prob=1.0, layers=(2,))
    made, reference = network(), network()
    plan = plan_of(mixer, feature_maps(made, 16))
    images = torch.randn(BATCH, 3, 16, 16)
    everything = np.arange(BATCH)
    mixer.attach(made).set(plan.at(everything), everything)
    torch._dynamo.reset()
    got = torch.compile(made, backend="eager")(images)
    torch.testing.assert_close(got, by_hand(reference, images, plan), atol=2e-6, rtol=1e-5)


def test_layers_that_the_network_lacks_are_refused() -> None:
    with pytest.raises(UserError, match=r"layers 0 \(the image\) to 4 \(stem, stage1"):
        ManifoldMixup(layers=(0, 7)).attach(network())
    with pytest.raises(UserError, match="give one or more"):
        ManifoldMixup(layers=())
    with pytest.raises(UserError, match="has no features"):
        FeatureCutMix(partner="dataset")


@pytest.mark.parametrize("aug", ["manifold_mixup", "feature_cutmix"])
def test_the_trainer_mixes_inside_the_network(aug: str) -> None:
    """Three steps with two micro-batches: the assertion on partners holds, the loss is finite, and
    the weights are not those of a training with the same labels and no mixing of features."""
    from cutmix_exp.distributed import World
    from cutmix_exp.training.logging import Reporter
    from cutmix_exp.training.trainer import Trainer

    words = [*TINY, f"aug={aug}", "aug.mix.prob=1.0", "aug.mix.layers=[2]", "trainer.accumulate=2"]
    config = config_of(*words, "schedule.batch_size=16", "precision=fp32")
    assert config.pairing_shares == 2
    splits = config.dataset.load()
    states = []
    for broken in (False, True):
        world = World(0, 1, torch.device("cpu"))
        trainer = Trainer(config, splits, world, Reporter(active=False))
        trainer.network.train()
        if broken:
            trainer.features.set = lambda plan, positions: None  # type: ignore[method-assign]
        for step in range(3):
            trainer.train_step(trainer.pipeline.plan(0, step))
        assert torch.isfinite(trainer.sums.values).all()
        states.append(trainer.model.state_dict()["head.fc.weight"].clone())
    assert not torch.equal(*states)
    assert (
        config.run_id != config_of(*words[:-1], "schedule.batch_size=16", "precision=fp32").run_id
    )
    assert make_model(config) is not None

"""The four slots of a regularizer: names, combinations, and what is refused."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch

from cutmix_exp.aug.base import (
    BatchShape,
    MixPlan,
    NetworkOp,
    NoMix,
    Partner,
    Regularizer,
    draw_partner,
    unmixed,
)
from cutmix_exp.aug.image import Cutout
from cutmix_exp.aug.mix import CutMix, Mixup
from cutmix_exp.composition import compose
from cutmix_exp.config import Config, from_dict
from cutmix_exp.errors import UserError
from cutmix_exp.schema import build, to_dict
from cutmix_exp.seeding import stream

ATOMS = ["baseline", "cutmix", "mixup", "cutout"]


def config(*atoms: str) -> Config:
    return from_dict(compose([f"aug=[{','.join(atoms)}]"]))


# -------------------------------------------------------------------------------------- names


def test_without_atoms_the_name_is_baseline() -> None:
    assert Regularizer().name == "baseline"
    assert Regularizer().mix == NoMix()


@pytest.mark.parametrize("order", list(itertools.permutations(["n", "m", "i", "l"])), ids="".join)
def test_the_name_follows_the_order_of_the_slots(order: tuple[str, ...]) -> None:
    slots: dict[str, Any] = {"i": "image", "m": "mix", "n": "network", "l": "label"}
    regularizer = Regularizer(
        atoms={name: slots[name] for name in order},
        image={"i": Cutout()},
        mix=CutMix(),
        network={"n": NetworkOp()},
        label_smoothing=0.1,
    )
    assert regularizer.name == "i+m+n+l"


def test_atoms_of_one_slot_keep_their_order() -> None:
    ops = {"b": Cutout(size=2), "a": Cutout(size=4)}
    regularizer = Regularizer(atoms={"b": "image", "a": "image"}, image=dict(ops))
    assert regularizer.name == "b+a"
    assert list(regularizer.resolve(32).image) == ["b", "a"]


@pytest.mark.parametrize("pair", list(itertools.permutations(ATOMS, 2)), ids="+".join)
def test_every_pair_of_atoms_builds_under_its_name_or_is_refused(pair: tuple[str, str]) -> None:
    if set(pair) == {"cutmix", "mixup"}:
        with pytest.raises(UserError, match=rf"aug=\[{pair[0]},{pair[1]}\].*one mixer"):
            config(*pair)
        return
    if "baseline" in pair:
        with pytest.raises(UserError, match="'baseline' is no regularizer"):
            config(*pair)
        return
    aug = config(*pair).aug
    named = [atom for atom in ("cutout", "cutmix", "mixup") if atom in pair]
    assert aug.name == "+".join(named)
    assert aug.image == ({"cutout": Cutout()} if "cutout" in pair else {})
    mixers = {"cutmix": CutMix(), "mixup": Mixup()}
    assert aug.mix == next((mixers[a] for a in pair if a in mixers), NoMix())
    assert aug == config(*reversed(pair)).aug


@pytest.mark.parametrize("pair", [("cutmix", "mixup"), ("mixup", "cutmix")], ids="+".join)
def test_the_error_about_two_mixers_names_both_ways_out(pair: tuple[str, str]) -> None:
    with pytest.raises(UserError) as caught:
        config(*pair)
    assert "aug=cutmix" in str(caught.value)
    assert "aug=mixup" in str(caught.value)


def test_a_file_of_two_atoms_equals_their_list() -> None:
    assert from_dict(compose(["aug=cutout_mixup"])).aug == config("cutout", "mixup").aug


# ------------------------------------------------------------------------------- disagreement


@pytest.mark.parametrize(
    ("slots", "said"),
    [
        ({"image": {"cutout": Cutout()}}, "cutout"),
        ({"atoms": {"cutout": "image"}}, "cutout"),
        ({"atoms": {"hole": "image"}, "image": {"cutout": Cutout()}}, "hole"),
        ({"network": {"shakedrop": NetworkOp()}}, "shakedrop"),
        ({"atoms": {"shakedrop": "network"}}, "shakedrop"),
        ({"atoms": {"cutout": "mix"}, "image": {"cutout": Cutout()}}, "cutout"),
        ({"mix": CutMix()}, "mix"),
        ({"atoms": {"cutmix": "mix"}}, "cutmix"),
        ({"atoms": {"cutmix": "mix"}, "mix": NoMix()}, "cutmix"),
        ({"label_smoothing": 0.1}, "label"),
        ({"atoms": {"label_smoothing": "label"}}, "label"),
    ],
    ids=str,
)
def test_atoms_and_slots_that_disagree_are_refused(slots: dict[str, Any], said: str) -> None:
    """Or a run would carry the name of what it does not do."""
    with pytest.raises(UserError, match=said):
        Regularizer(**slots)


@pytest.mark.parametrize("atoms", ["cutmix", ["cutmix"]], ids=str)
def test_atoms_that_are_no_mapping_are_refused(atoms: Any) -> None:
    with pytest.raises(UserError, match="atoms"):
        build(Regularizer, {"atoms": atoms}, "aug")


def test_an_unknown_slot_is_refused() -> None:
    with pytest.raises(UserError, match="image, mix, network, label"):
        build(Regularizer, {"atoms": {"cutmix": "mixer"}}, "aug")


def test_a_regularizer_survives_plain_containers() -> None:
    regularizer = Regularizer(
        atoms={"cutout": "image", "cutmix": "mix"},
        image={"cutout": Cutout(size=3)},
        mix=CutMix(prob=0.25, box_law="unbiased"),
    )
    assert build(Regularizer, to_dict(regularizer)) == regularizer


# -------------------------------------------------------------------------------- resolution


def test_resolve_reaches_every_part() -> None:
    regularizer = config("cutout", "cutmix").aug.resolve(32)
    assert regularizer.image == {"cutout": Cutout(size=16)}
    assert regularizer.mix == CutMix(prob=0.5)
    assert regularizer.name == "cutout+cutmix"
    assert config("cutout", "cutmix").aug.resolve(224).image == {"cutout": Cutout(size=112)}


def test_protocol_has_every_switch_of_the_mixer() -> None:
    assert config("mixup").aug.resolve(32).protocol() == {
        "prob": 1.0,
        "alpha": 1.0,
        "partner": "permutation",
        "granularity": "batch",
        "prob_schedule": "constant",
        "label_smoothing": 0.0,
    }
    assert config("baseline").aug.protocol() == {"label_smoothing": 0.0}


# --------------------------------------------------------------------------------------- plans


@pytest.mark.parametrize("batch", [1, 2, 7])
def test_partners_of_each_kind(batch: int) -> None:
    def draw(kind: Partner) -> np.ndarray:
        return draw_partner(kind, BatchShape(batch, 4, 4), stream(0, "mix"))

    assert sorted(draw("permutation")) == list(range(batch))
    assert draw("roll").tolist() == [(i - 1) % batch for i in range(batch)]
    assert draw("flip").tolist() == [batch - 1 - i for i in range(batch)]


def test_permutations_are_all_drawn() -> None:
    drawn = {
        tuple(draw_partner("permutation", BatchShape(3, 4, 4), stream(0, "mix", step=s)))
        for s in range(100)
    }
    assert drawn == set(itertools.permutations(range(3)))


def test_a_plan_at_some_positions_keeps_pointing_into_the_batch() -> None:
    plan = MixPlan(
        partners=np.array([[3, 2, 1, 0]]),
        weights=np.array([[0.1, 0.2, 0.3, 0.4], [0.9, 0.8, 0.7, 0.6]], np.float32),
        boxes=np.arange(16).reshape(4, 4),
    )
    part = plan.at(np.array([2, 0]))
    assert part.partners.tolist() == [[1, 3]]
    np.testing.assert_array_equal(part.weights, plan.weights[:, [2, 0]])
    assert part.boxes is not None
    assert part.boxes.tolist() == [[8, 9, 10, 11], [0, 1, 2, 3]]


def test_the_unmixed_plan_has_one_source_of_weight_one() -> None:
    plan = unmixed(5)
    assert (plan.num_sources, plan.partners.shape, plan.boxes) == (1, (0, 5), None)
    np.testing.assert_array_equal(plan.weights, np.ones((1, 5), np.float32))


def test_no_mix_is_the_identity_and_draws_nothing() -> None:
    rng, images = stream(0, "mix"), torch.randn(5, 3, 4, 4)
    plan = NoMix().sample(BatchShape(5, 4, 4), 0.5, rng)
    assert plan.num_sources == 1
    assert NoMix().apply(plan, [images]) is images
    assert rng.random() == stream(0, "mix").random()


def test_partners_within_shares_are_uniform_permutations_of_them() -> None:
    shape = BatchShape(7, 4, 4, shares=2)  # shares of three and four
    seen: dict[tuple[int, ...], int] = {}
    for step in range(1200):
        partners = draw_partner("permutation", shape, stream(0, "mix", step=step))
        assert sorted(partners[:3]) == [0, 1, 2] and sorted(partners[3:]) == [3, 4, 5, 6]
        seen[tuple(partners[:3])] = seen.get(tuple(partners[:3]), 0) + 1
    assert len(seen) == 6 and all(abs(count - 200) < 60 for count in seen.values())
    for kind in ("roll", "flip"):
        partners = draw_partner(kind, shape, stream(0, "mix"))
        wanted = {"roll": [2, 0, 1, 6, 3, 4, 5], "flip": [2, 1, 0, 6, 5, 4, 3]}[kind]
        assert partners.tolist() == wanted

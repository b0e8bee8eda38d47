"""CutMix or Mixup, drawn for each batch."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.stats import beta, binom, kstest

from cutmix_exp.aug.base import BatchShape
from cutmix_exp.aug.mix import CutMix, Mixup
from cutmix_exp.aug.switch import MixSwitch
from cutmix_exp.composition import compose
from cutmix_exp.config import from_dict
from cutmix_exp.errors import UserError
from cutmix_exp.seeding import stream
from tests.helpers import config_of

SHAPE = BatchShape(6, 8, 8)
FIRST, SECOND = CutMix(prob=1.0, alpha=2.0), Mixup(prob=1.0, alpha=0.2)


@pytest.mark.parametrize("switch_prob", [0.0, 0.3, 1.0])
def test_the_first_is_drawn_with_its_probability(switch_prob: float) -> None:
    mixer = MixSwitch(first=FIRST, second=SECOND, switch_prob=switch_prob)
    steps = 1000
    plans = [mixer.sample(SHAPE, 0.0, stream(0, "mix", step=step)) for step in range(steps)]
    low, high = binom.interval(0.9999, steps, switch_prob)
    assert low <= sum(plan.boxes is not None for plan in plans) <= high


def test_each_has_its_own_alpha() -> None:
    mixer = MixSwitch(first=Mixup(prob=1.0, alpha=2.0), second=Mixup(prob=1.0, alpha=0.2))
    plans = [mixer.sample(SHAPE, 0.0, stream(0, "mix", step=step)) for step in range(2000)]
    for is_first, alpha in ((True, 2.0), (False, 0.2)):
        lams = [p.weights[0, 0] for p in plans if p.arrays["is_first"][0] == is_first]
        assert kstest(np.array(lams, float), beta(alpha, alpha).cdf).pvalue > 0.001


def test_a_batch_is_mixed_by_the_one_that_was_drawn() -> None:
    mixer = MixSwitch(first=FIRST, second=SECOND)
    images = torch.randn(6, 3, 8, 8)
    seen = set()
    for step in range(20):
        plan = mixer.sample(SHAPE, 0.0, stream(0, "mix", step=step)).at(np.array([4, 1]))
        sources = [images[[4, 1]], images[plan.partners[0]]]
        chosen = FIRST if plan.boxes is not None else SECOND
        assert torch.equal(mixer.apply(plan, sources), chosen.apply(plan, sources))
        seen.add(chosen)
    assert seen == {FIRST, SECOND}


def test_guests_are_wanted_if_either_wants_them() -> None:
    guest = Mixup(prob=1.0, partner="dataset")
    assert MixSwitch(first=FIRST, second=guest).wants_guests
    assert MixSwitch(first=guest, second=SECOND).wants_guests
    assert not MixSwitch(first=FIRST, second=SECOND).wants_guests


def test_both_are_resolved_and_set_from_the_command_line() -> None:
    config = config_of("dataset=cifar100", "aug=cutmix_or_mixup", "aug.mix.second.alpha=0.2")
    assert config.aug.mix == MixSwitch(first=CutMix(prob=1.0), second=Mixup(prob=1.0, alpha=0.2))
    unset = MixSwitch(first=CutMix(), second=Mixup())
    assert unset.resolve(32) == MixSwitch(first=CutMix(prob=0.5), second=Mixup(prob=1.0))


def test_a_switch_of_switches_is_refused() -> None:
    inner = MixSwitch(first=FIRST, second=SECOND)
    for pair in ((inner, FIRST), (FIRST, inner)):
        with pytest.raises(UserError, match="neither"):
            MixSwitch(first=pair[0], second=pair[1])


def test_two_mixers_are_pointed_to_the_switch() -> None:
    with pytest.raises(UserError, match="aug=cutmix_or_mixup"):
        from_dict(compose(["aug=[cutmix,mixup]"]))


def test_mixers_of_features_cannot_be_switched() -> None:
    from cutmix_exp.aug.feature import ManifoldMixup

    with pytest.raises(UserError, match="mixes images"):
        MixSwitch(first=CutMix(), second=ManifoldMixup())

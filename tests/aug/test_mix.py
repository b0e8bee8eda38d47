"""CutMix and Mixup against slow references, torchvision, and the published statistics."""

from __future__ import annotations

import itertools
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binom
from torch import Tensor
from torch.nn import functional as F
from torchvision.transforms import v2

from cutmix_exp.aug.base import (
    BatchShape,
    Mixer,
    MixPlan,
    NoMix,
    Partner,
    mix_targets,
    two_weights,
    unmixed,
)
from cutmix_exp.aug.mix import BoxLaw, CutMix, Granularity, Mixup, cut_boxes
from cutmix_exp.seeding import stream
from tests.oracles import mixing

LAWS: list[BoxLaw] = ["official", "unbiased"]
PARTNERS: list[Partner] = ["permutation", "roll", "flip"]
GRANULARITIES: list[Granularity] = ["batch", "sample"]
ORACLE_BOX = {"official": mixing.official_box, "unbiased": mixing.unbiased_box}
HEIGHT, WIDTH, CLASSES = 5, 9, 4


class Script:
    """A generator whose draws the test has chosen; centres are told apart by their range."""

    def __init__(
        self,
        lam: np.ndarray,
        permutation: np.ndarray,
        centre_y: np.ndarray,
        centre_x: np.ndarray,
        coin: float = 0.0,
    ) -> None:
        self.lam, self.order, self.coin = lam, permutation, coin
        self.centres = {HEIGHT: centre_y, WIDTH: centre_x}

    def random(self, n: int) -> np.ndarray:
        return np.full(n, self.coin)

    def beta(self, a: float, b: float, n: int) -> np.ndarray:
        assert n == len(self.lam)
        return self.lam

    def permutation(self, n: int) -> np.ndarray:
        assert n == len(self.order)
        return self.order

    def integers(self, low: int, high: int, n: int) -> np.ndarray:
        assert (low, n) == (0, len(self.lam))
        return self.centres[high]


def script(batch: int, granularity: Granularity, seed: int) -> Script:
    rng = np.random.default_rng(seed)
    n = 1 if granularity == "batch" else batch
    return Script(
        lam=rng.random(n),
        permutation=rng.permutation(batch),
        centre_y=rng.integers(0, HEIGHT, n),
        centre_x=rng.integers(0, WIDTH, n),
    )


def expected_partner(kind: Partner, permutation: np.ndarray) -> list[int]:
    n = len(permutation)
    return {
        "permutation": [int(p) for p in permutation],
        "roll": [(i - 1) % n for i in range(n)],
        "flip": [n - 1 - i for i in range(n)],
    }[kind]


def some_images(batch: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, 3, HEIGHT, WIDTH, generator=generator)


def some_labels(batch: int) -> Tensor:
    """One-hot; images 0 and CLASSES share a label."""
    return F.one_hot(torch.arange(batch) % CLASSES, CLASSES).float()


def mix_all(mixer: Mixer, plan: MixPlan, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """The whole batch mixed by a plan: images and targets."""
    return (
        mixer.apply(plan, [images, *(images[p] for p in plan.partners)]),
        mix_targets(plan, [labels, *(labels[p] for p in plan.partners)]),
    )


def on_grid(exact: np.ndarray) -> np.ndarray:
    """Label weights as they are kept: multiples of 2**-24, so that float32 sums have no error."""
    return (np.rint(exact * 2**24) / 2**24).astype(np.float32)


# ------------------------------------------------------------------------------------- CutMix


@pytest.mark.parametrize("correct_lambda", [True, False])
@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("partner", PARTNERS)
@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize("batch", [1, 2, 7])
def test_cutmix_equals_the_reference(
    batch: int, law: BoxLaw, partner: Partner, granularity: Granularity, correct_lambda: bool
) -> None:
    mixer = CutMix(
        prob=1.0,
        partner=partner,
        granularity=granularity,
        box_law=law,
        correct_lambda=correct_lambda,
    )
    images, labels = some_images(batch), some_labels(batch)
    for seed in range(4):
        draws: Any = script(batch, granularity, seed)
        plan = mixer.sample(BatchShape(batch, HEIGHT, WIDTH), 0.0, draws)
        mixed, targets = mix_all(mixer, plan, images, labels)

        others = expected_partner(partner, draws.order)
        for i in range(batch):
            j = 0 if granularity == "batch" else i
            lam = float(draws.lam[j])
            box = ORACLE_BOX[law](
                HEIGHT, WIDTH, lam, int(draws.centres[HEIGHT][j]), int(draws.centres[WIDTH][j])
            )
            wanted_images, wanted_targets = mixing.cutmix(
                images.numpy(), labels.numpy(), others, [box] * batch, lam, correct_lambda
            )
            assert mixed.dtype == targets.dtype == torch.float32
            np.testing.assert_array_equal(mixed[i].numpy(), wanted_images[i])
            np.testing.assert_array_equal(targets[i].numpy(), on_grid(wanted_targets[i]))


@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize(("height", "width"), [(5, 9), (8, 8), (32, 7)])
def test_boxes_equal_the_reference_for_all_centres(law: BoxLaw, height: int, width: int) -> None:
    lams = [0.0, 1e-9, *np.linspace(0.003, 0.997, 40), 1 - 1e-9, 1.0]
    centres = list(itertools.product(range(height), range(width)))
    y, x = np.array(centres).T
    for lam in lams:
        boxes = cut_boxes(law, height, width, np.full(len(y), lam), y, x)
        assert boxes.dtype == np.int64
        wanted = [ORACLE_BOX[law](height, width, float(lam), *centre) for centre in centres]
        np.testing.assert_array_equal(boxes, wanted)


@pytest.mark.parametrize("law", LAWS)
@given(
    lam=st.floats(0, 1),
    height=st.integers(1, 300),
    width=st.integers(1, 300),
    where=st.tuples(st.floats(0, 1, exclude_max=True), st.floats(0, 1, exclude_max=True)),
)
@settings(max_examples=200, deadline=None, derandomize=True)
def test_boxes_equal_the_reference_at_any_size(
    law: BoxLaw, lam: float, height: int, width: int, where: tuple[float, float]
) -> None:
    y, x = int(where[0] * height), int(where[1] * width)
    box = cut_boxes(law, height, width, np.array([lam]), np.array([y]), np.array([x]))[0]
    assert tuple(box) == ORACLE_BOX[law](height, width, lam, y, x)


def test_the_laws_differ_where_a_side_is_odd() -> None:
    lam, centre = np.array([1 - (3 / 8) ** 2]), np.array([4])  # a side of 3 of 8 pixels
    assert cut_boxes("official", 8, 8, lam, centre, centre).tolist() == [[3, 3, 5, 5]]
    assert cut_boxes("unbiased", 8, 8, lam, centre, centre).tolist() == [[3, 3, 6, 6]]


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_a_batch_shares_its_box_and_lambda_unless_per_sample(granularity: Granularity) -> None:
    plan = CutMix(prob=1.0, granularity=granularity).sample(
        BatchShape(64, 32, 32), 0.0, stream(0, "mix")
    )
    assert plan.boxes is not None
    distinct = len(np.unique(plan.boxes, axis=0))
    assert distinct == 1 if granularity == "batch" else distinct > 50


# -------------------------------------------------------------------------------------- Mixup


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("partner", PARTNERS)
@pytest.mark.parametrize("batch", [1, 2, 7])
def test_mixup_equals_the_reference(batch: int, partner: Partner, granularity: Granularity) -> None:
    """Pixels in 64ths and lambdas in 256ths: every product and sum is exact in float32."""
    mixer = Mixup(prob=1.0, partner=partner, granularity=granularity)
    images, labels = (some_images(batch) * 64).round() / 64, some_labels(batch)
    for seed in range(4):
        draws: Any = script(batch, granularity, seed)
        draws.lam = np.rint(draws.lam * 256) / 256
        plan = mixer.sample(BatchShape(batch, HEIGHT, WIDTH), 0.0, draws)
        mixed, targets = mix_all(mixer, plan, images, labels)

        others = expected_partner(partner, draws.order)
        for i in range(batch):
            lam = float(draws.lam[0 if granularity == "batch" else i])
            wanted_images, wanted_targets = mixing.mixup(
                images.numpy(), labels.numpy(), others, lam
            )
            assert mixed.dtype == targets.dtype == torch.float32
            np.testing.assert_array_equal(mixed[i].numpy(), wanted_images[i])
            np.testing.assert_array_equal(targets[i].numpy(), wanted_targets[i])


def test_mixup_of_any_lambda_is_as_near_the_reference_as_float32_can_be() -> None:
    """Two products and one sum round by at most half a unit each; the weight by 2**-25."""
    images, labels = some_images(7), some_labels(7)
    mixer = Mixup(prob=1.0)
    for seed in range(4):
        draws: Any = script(7, "batch", seed)
        plan = mixer.sample(BatchShape(7, HEIGHT, WIDTH), 0.0, draws)
        mixed, targets = mix_all(mixer, plan, images, labels)
        wanted_images, wanted_targets = mixing.mixup(
            images.numpy(), labels.numpy(), list(draws.order), float(draws.lam[0])
        )
        size = (images.abs() + images[draws.order].abs()).numpy()
        assert (abs(mixed.numpy() - wanted_images) <= 2.5 * 2**-24 * size).all()
        np.testing.assert_array_equal(targets.numpy(), on_grid(wanted_targets))


# -------------------------------------------------------------------------------- torchvision


def torchvision_draws(
    monkeypatch: pytest.MonkeyPatch,
    transform: Any,
    lam: float,
    centre: tuple[int, int] | None = None,
) -> None:
    """Make torchvision's own `make_params` draw this lambda and this centre (y, x)."""
    drawn = torch.tensor([lam], dtype=torch.float64)
    transform._dist = SimpleNamespace(sample=lambda shape: drawn)
    if centre is not None:
        by_range = {HEIGHT: centre[0], WIDTH: centre[1], 8: centre[0], 16: centre[1]}
        monkeypatch.setattr(
            torch, "randint", lambda high, size: torch.full(size, by_range[int(high)])
        )


def cutmix_plan(lam: float, batch: int, height: int, width: int, y: int, x: int) -> MixPlan:
    """The plan of CutMix with torchvision's partner for one given draw."""
    boxes = cut_boxes("official", height, width, np.array([lam]), np.array([y]), np.array([x]))
    top, left, bottom, right = boxes[0]
    share = 1 - (bottom - top) * (right - left) / (height * width)
    partner = np.roll(np.arange(batch), 1)
    return MixPlan(partner[None], two_weights(np.full(batch, share)), boxes.repeat(batch, 0))


@pytest.mark.parametrize("lam", [0.0, 0.1, 0.37, 0.5, 0.81, 0.99, 1.0])
@pytest.mark.parametrize("centre", [(0, 0), (3, 5), (7, 15), (4, 1)])
def test_cutmix_equals_torchvision(
    monkeypatch: pytest.MonkeyPatch, lam: float, centre: tuple[int, int]
) -> None:
    """8x16 pixels: each share of the area is a float32 number, so the labels too are equal."""
    images, labels = torch.randn(6, 3, 8, 16), torch.arange(6) % CLASSES
    transform = v2.CutMix(num_classes=CLASSES)
    torchvision_draws(monkeypatch, transform, lam, centre)
    wanted_images, wanted_targets = transform(images, labels)

    plan = cutmix_plan(lam, 6, 8, 16, *centre)
    mixed, targets = mix_all(CutMix(prob=1.0), plan, images, F.one_hot(labels, CLASSES))
    assert torch.equal(mixed, wanted_images)
    assert torch.equal(targets, wanted_targets)


@pytest.mark.parametrize("lam", [0.02, 0.2, 0.61, 0.9])
@pytest.mark.parametrize("centre", [(0, 0), (2, 4), (4, 8)])
def test_cutmix_equals_torchvision_on_odd_sizes(
    monkeypatch: pytest.MonkeyPatch, lam: float, centre: tuple[int, int]
) -> None:
    """Shares of 45 pixels are no float32 numbers: torchvision takes the nearest ones, which need
    not add up to 1; ours are multiples of 2**-24, which do. Each is within 2**-25 of the share."""
    images, labels = some_images(6), torch.arange(6) % CLASSES
    transform = v2.CutMix(num_classes=CLASSES)
    torchvision_draws(monkeypatch, transform, lam, centre)
    wanted_images, wanted_targets = transform(images, labels)

    plan = cutmix_plan(lam, 6, HEIGHT, WIDTH, *centre)
    mixed, targets = mix_all(CutMix(prob=1.0), plan, images, F.one_hot(labels, CLASSES))
    assert torch.equal(mixed, wanted_images)
    assert (targets - wanted_targets).abs().max() <= 2**-24


@pytest.mark.parametrize("lam", [0.0, 1 / 1024, 0.3, 0.5, 0.77, 1.0])
def test_mixup_equals_torchvision(monkeypatch: pytest.MonkeyPatch, lam: float) -> None:
    """Bit for bit, once lambda is a multiple of 2**-24: both round two products and one sum."""
    lam = float(on_grid(np.array(lam)))
    images, labels = some_images(6), torch.arange(6) % CLASSES
    transform = v2.MixUp(num_classes=CLASSES)
    torchvision_draws(monkeypatch, transform, lam)
    wanted_images, wanted_targets = transform(images, labels)

    draws: Any = script(6, "batch", seed=0)
    draws.lam = np.array([lam])
    mixer = Mixup(prob=1.0, partner="roll")
    plan = mixer.sample(BatchShape(6, HEIGHT, WIDTH), 0.0, draws)
    mixed, targets = mix_all(mixer, plan, images, F.one_hot(labels, CLASSES))
    assert torch.equal(mixed, wanted_images)
    assert torch.equal(targets, wanted_targets)


# ------------------------------------------------------------------------------------- labels


@given(st.lists(st.floats(0, 1), min_size=1, max_size=8))
@settings(max_examples=300, deadline=None, derandomize=True)
def test_two_weights_are_exact_and_sum_to_one(shares: list[float]) -> None:
    host, partner = two_weights(np.array(shares))
    assert host.dtype == partner.dtype == np.float32
    np.testing.assert_array_equal(host + partner, np.float32(1))
    for weight in (host, partner):
        assert ((weight >= 0) & (weight <= 1)).all()
        scaled = weight.astype(np.float64) * 2**24
        np.testing.assert_array_equal(scaled, np.rint(scaled))
    assert (abs(host.astype(np.float64) - shares) <= 2**-25).all()


@pytest.mark.parametrize("share", [0.0, 5e-324, 2**-25, 2**-24, 1 / 3, 1 - 2**-25, 1 - 2**-53, 1.0])
def test_two_weights_at_the_edges(share: float) -> None:
    host, partner = two_weights(np.array([share]))
    assert host[0] + partner[0] == np.float32(1)
    assert abs(float(host[0]) - share) <= 2**-25


@pytest.mark.parametrize(
    "mixer",
    [
        CutMix(prob=0.7, granularity="sample", alpha=0.3),
        CutMix(prob=1.0),
        CutMix(prob=1.0, correct_lambda=False),
        Mixup(prob=0.7, granularity="sample", alpha=0.2),
        Mixup(prob=1.0),
        NoMix(),
    ],
    ids=str,
)
@given(seed=st.integers(0, 2**31), batch=st.integers(1, 40), classes=st.integers(2, 12))
@settings(max_examples=60, deadline=None, derandomize=True)
def test_every_target_has_mass_exactly_one(
    mixer: Mixer, seed: int, batch: int, classes: int
) -> None:
    plan = mixer.sample(BatchShape(batch, 13, 11), 0.0, np.random.default_rng(seed))
    labels = F.one_hot(torch.arange(batch) % classes, classes)
    targets = mix_targets(plan, [labels, *(labels[p] for p in plan.partners)])
    assert targets.dtype == torch.float32
    assert targets.min() >= 0
    assert torch.equal(targets.sum(1), torch.ones(batch))


def test_each_source_of_a_plan_gives_its_weight() -> None:
    """More than two sources, as in RICAP."""
    plan = MixPlan(
        partners=np.array([[1, 0], [0, 0]]),
        weights=np.array([[0.5, 0.25], [0.25, 0.5], [0.25, 0.25]], np.float32),
    )
    sources = [torch.eye(3)[[0, 1]], torch.eye(3)[[1, 0]], torch.eye(3)[[2, 2]]]
    wanted = torch.tensor([[0.5, 0.25, 0.25], [0.5, 0.25, 0.25]])
    assert torch.equal(mix_targets(plan, sources), wanted)


# --------------------------------------------------------------------------------- statistics

# paper.md, end of section 3: mean lambda, share of lambda = 1, share of lambda < 0.5.
TABLE = {
    (32, 0.1): (0.731, 0.292, 0.226),
    (32, 0.25): (0.721, 0.135, 0.202),
    (32, 0.5): (0.711, 0.040, 0.175),
    (32, 1.0): (0.701, 0.004, 0.145),
    (32, 2.0): (0.694, 0.0, 0.113),
    (32, 4.0): (0.690, 0.0, 0.085),
    (224, 0.1): (0.713, 0.199, 0.268),
    (224, 0.25): (0.701, 0.051, 0.241),
    (224, 0.5): (0.692, 0.006, 0.208),
    (224, 1.0): (0.682, 0.0, 0.176),
    (224, 2.0): (0.675, 0.0, 0.142),
    (224, 4.0): (0.671, 0.0, 0.114),
}


def drawn_lambdas(side: int, alpha: float, draws: int) -> np.ndarray:
    mixer = CutMix(prob=1.0, alpha=alpha, granularity="sample")
    plan = mixer.sample(BatchShape(draws, side, side), 0.0, stream(0, "statistics"))
    return plan.weights[0].astype(np.float64)


@pytest.mark.parametrize(("side", "alpha"), TABLE)
def test_lambda_has_the_published_statistics(side: int, alpha: float) -> None:
    """400,000 draws, because the table's own 0.713 (224 px, alpha 0.1) is off by 0.0017."""
    lam = drawn_lambdas(side, alpha, 400_000)
    found = (lam.mean(), (lam == 1).mean(), (lam < 0.5).mean())
    assert found == pytest.approx(TABLE[side, alpha], abs=0.003)


@pytest.mark.parametrize("side", [32, 224])
def test_lambda_has_the_mean_of_the_official_sampler(side: int) -> None:
    """Standard errors 0.0003 and 0.0010; the bound is three of their difference."""
    wanted = mixing.official_lambda_statistics(side, side, alpha=1.0, draws=40_000, seed=1)
    assert drawn_lambdas(side, 1.0, 400_000).mean() == pytest.approx(wanted, abs=0.003)


@pytest.mark.parametrize("alpha", [0.5, 1.0, 4.0])
def test_mixup_draws_lambda_from_beta(alpha: float) -> None:
    mixer = Mixup(prob=1.0, alpha=alpha, granularity="sample")
    lam = mixer.sample(BatchShape(200_000, 1, 1), 0.0, stream(0, "statistics")).weights[0]
    variance = 1 / (4 * (2 * alpha + 1))
    assert lam.mean() == pytest.approx(0.5, abs=5 * (variance / 200_000) ** 0.5)
    assert lam.var() == pytest.approx(variance, abs=0.001)


# --------------------------------------------------------------------------------- the coin

SHAPE = BatchShape(6, 32, 32)


def same(one: MixPlan, other: MixPlan) -> bool:
    assert (one.boxes is None) == (other.boxes is None)
    pairs = [(one.partners, other.partners), (one.weights, other.weights)]
    if one.boxes is not None and other.boxes is not None:
        pairs.append((one.boxes, other.boxes))
    return all(np.array_equal(a, b) for a, b in pairs)


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("kind", [CutMix, Mixup])
def test_prob_zero_never_mixes_and_one_always(
    kind: type[CutMix | Mixup], granularity: Granularity
) -> None:
    never, always = (kind(prob=p, granularity=granularity) for p in (0.0, 1.0))
    for step in range(200):
        rng = stream(0, "mix", step=step)
        assert same(never.sample(SHAPE, 0.0, rng), unmixed(6))
        assert always.sample(SHAPE, 0.0, stream(0, "mix", step=step)).num_sources == 2
    images = some_images(6)
    assert never.apply(unmixed(6), [images]) is images


@pytest.mark.parametrize("kind", [CutMix, Mixup])
@pytest.mark.parametrize("prob", [0.1, 0.5])
def test_prob_is_the_share_of_mixed_batches(kind: type[CutMix | Mixup], prob: float) -> None:
    mixer = kind(prob=prob)
    plans = [mixer.sample(SHAPE, 0.0, stream(0, "mix", step=step)) for step in range(1000)]
    mixed = sum(plan.num_sources == 2 for plan in plans)
    low, high = binom.interval(0.9999, 1000, prob)
    assert low <= mixed <= high


def test_prob_is_the_share_of_mixed_samples() -> None:
    mixer = Mixup(prob=0.5, granularity="sample")
    weights = mixer.sample(BatchShape(10_000, 8, 8), 0.0, stream(0, "mix")).weights
    low, high = binom.interval(0.9999, 10_000, 0.5)
    assert low <= (weights[0] < 1).sum() <= high


@pytest.mark.parametrize("kind", [CutMix, Mixup])
def test_the_coin_shifts_no_other_draw(kind: type[CutMix | Mixup]) -> None:
    mixed = 0
    for step in range(60):
        sometimes, always = (
            kind(prob=p).sample(SHAPE, 0.0, stream(0, "mix", step=step)) for p in (0.5, 1.0)
        )
        if sometimes.num_sources == 2:
            mixed += 1
            assert same(sometimes, always)
    assert 0 < mixed < 60


@pytest.mark.parametrize("kind", [CutMix, Mixup])
def test_the_coins_of_samples_shift_no_other_draw(kind: type[CutMix | Mixup]) -> None:
    shape = BatchShape(200, 32, 32)
    sometimes, always = (
        kind(prob=p, granularity="sample").sample(shape, 0.0, stream(0, "mix")) for p in (0.5, 1.0)
    )
    mixed = sometimes.weights[0] < 1
    assert 60 < mixed.sum() < 140
    np.testing.assert_array_equal(sometimes.partners, always.partners)
    np.testing.assert_array_equal(sometimes.weights[:, mixed], always.weights[:, mixed])
    np.testing.assert_array_equal(sometimes.weights[0, ~mixed], np.float32(1))
    if sometimes.boxes is not None:
        assert always.boxes is not None
        np.testing.assert_array_equal(sometimes.boxes[mixed], always.boxes[mixed])
        top, left, bottom, right = sometimes.boxes[~mixed].T
        assert not ((bottom - top) * (right - left)).any()


def test_the_kind_of_partner_shifts_no_other_draw() -> None:
    boxes = [
        CutMix(prob=1.0, partner=kind).sample(SHAPE, 0.0, stream(0, "mix")).boxes
        for kind in PARTNERS
    ]
    np.testing.assert_array_equal(boxes[0], boxes[1])
    np.testing.assert_array_equal(boxes[0], boxes[2])


# -------------------------------------------------------------------------------- resolution


@pytest.mark.parametrize(("side", "prob"), [(32, 0.5), (64, 1.0), (224, 1.0)])
def test_prob_follows_the_image_size(side: int, prob: float) -> None:
    assert CutMix().resolve(side) == CutMix(prob=prob)
    assert Mixup().resolve(side) == Mixup(prob=1.0)


@pytest.mark.parametrize("side", [32, 224])
@pytest.mark.parametrize("prob", [0.0, 0.3, 1.0])
def test_an_explicit_prob_wins(side: int, prob: float) -> None:
    assert CutMix(prob=prob).resolve(side) == CutMix(prob=prob)
    assert Mixup(prob=prob).resolve(side) == Mixup(prob=prob)


# ------------------------------------------------------------------------------------- apply


def given_plan(lam: float, batch: int = 4) -> MixPlan:
    """CutMix or Mixup with the mirrored position; the box is all or nothing."""
    box = (0, 0, HEIGHT, WIDTH) if lam == 0 else (2, 3, 2, 3)
    return MixPlan(
        partners=np.arange(batch)[::-1].copy()[None],
        weights=two_weights(np.full(batch, lam)),
        boxes=np.tile(np.array(box, np.int64), (batch, 1)),
    )


@pytest.mark.parametrize("mixer", [CutMix(), Mixup()], ids=str)
def test_lambda_zero_swaps_and_one_is_the_identity(mixer: Mixer) -> None:
    images, labels = some_images(4), some_labels(4)
    mixed, targets = mix_all(mixer, given_plan(0.0), images, labels)
    assert torch.equal(mixed, images.flip(0))
    assert torch.equal(targets, labels.flip(0))
    mixed, targets = mix_all(mixer, given_plan(1.0), images, labels)
    assert torch.equal(mixed, images)
    assert torch.equal(targets, labels)


def mixed_plan() -> MixPlan:
    plan = CutMix(prob=1.0, granularity="sample").sample(
        BatchShape(6, HEIGHT, WIDTH), 0.0, stream(1, "mix")
    )
    assert (plan.weights[0] < 1).any()
    return plan


@pytest.mark.parametrize("mixer", [CutMix(), Mixup(), NoMix()], ids=str)
def test_apply_leaves_its_inputs_alone(mixer: Mixer) -> None:
    sources = [some_images(6, seed) for seed in (0, 1)]
    kept = [s.clone() for s in sources]
    plan = mixed_plan()
    mixer.apply(plan, sources)
    labels = [some_labels(6), some_labels(6).flip(0)]
    kept_labels = [s.clone() for s in labels]
    mix_targets(plan, labels)
    assert all(map(torch.equal, sources + labels, kept + kept_labels))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("mixer", [CutMix(), Mixup()], ids=str)
def test_the_result_has_the_dtype_of_the_images(mixer: Mixer, dtype: torch.dtype) -> None:
    sources = [some_images(6, seed).to(dtype) for seed in (0, 1)]
    mixed = mixer.apply(mixed_plan(), sources)
    assert mixed.dtype == dtype
    if isinstance(mixer, CutMix):
        wide = mixer.apply(mixed_plan(), [s.double() for s in sources])
        assert torch.equal(mixed.double(), wide)


@pytest.mark.parametrize("mixer", [CutMix(), Mixup()], ids=str)
def test_channels_last_images_give_the_same(mixer: Mixer) -> None:
    sources = [some_images(6, seed) for seed in (0, 1)]
    other = [s.contiguous(memory_format=torch.channels_last) for s in sources]
    assert other[0].stride() != sources[0].stride()
    assert torch.equal(mixer.apply(mixed_plan(), sources), mixer.apply(mixed_plan(), other))


@pytest.mark.parametrize("mixer", [CutMix(), Mixup()], ids=str)
def test_a_slice_of_the_plan_gives_a_slice_of_the_result(mixer: Mixer) -> None:
    sources, plan = [some_images(6, seed) for seed in (0, 1)], mixed_plan()
    positions = np.array([4, 1, 5])
    part = mixer.apply(plan.at(positions), [s[positions] for s in sources])
    assert torch.equal(part, mixer.apply(plan, sources)[positions])

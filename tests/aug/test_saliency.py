"""SaliencyMix: the saliency against a slow reference, and boxes around its peak."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy import stats

from cutmix_exp.aug.base import BatchShape, MixPlan, Regularizer, mix_targets
from cutmix_exp.aug.saliency import SaliencyMix, fine_grained_saliency
from cutmix_exp.data.pipeline import ResidentPipeline
from cutmix_exp.distributed import share
from tests.aug.test_patch import draw, some
from tests.data.test_pipeline import DATASET, noise
from tests.oracles import mixing


@pytest.mark.parametrize("size", [(20, 31), (6, 9), (3, 3)])
def test_saliency_equals_the_reference(size: tuple[int, int]) -> None:
    images = torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(1))
    found = fine_grained_saliency(images)
    for saliency, image in zip(found, images, strict=True):
        wanted = mixing.fine_grained_saliency(image.numpy().astype(float))
        np.testing.assert_allclose(saliency, wanted, rtol=1e-9, atol=1e-9)


def test_an_image_without_contrast_has_a_finite_saliency() -> None:
    assert torch.isfinite(fine_grained_saliency(torch.ones(1, 3, 8, 8))).all()


@pytest.mark.parametrize("granularity", ["batch", "sample"])
def test_the_box_is_around_the_partners_peak(granularity: str) -> None:
    images, _ = some(BatchShape(6, 16, 20))
    labels = torch.eye(6)
    peaks = [
        divmod(int(mixing.fine_grained_saliency(image.astype(float)).argmax()), 20)
        for image in images.numpy()
    ]
    assert len(set(peaks)) == 6
    mixer = SaliencyMix(prob=1.0, granularity=granularity)  # type: ignore[arg-type]
    for step in range(5):
        plan = draw(mixer, BatchShape(6, 16, 20), step)
        sources = [images, *(images[p] for p in plan.partners)]
        final = mixer.finish(plan, sources)
        mixed = mixer.apply(final, sources).numpy()
        targets = mix_targets(final, [labels, *(labels[p] for p in final.partners)])
        partner = plan.partners[0]
        for i in range(6):
            looked_at = partner[0] if granularity == "batch" else partner[i]
            lam = float(plan.arrays["lam"][i])
            box = mixing.official_box(16, 20, lam, *peaks[looked_at])
            wanted, wanted_targets = mixing.cutmix(
                images.numpy(), labels.numpy(), partner.tolist(), [box] * 6, lam, True
            )
            np.testing.assert_array_equal(mixed[i], wanted[i])
            np.testing.assert_allclose(targets[i], wanted_targets[i], atol=2**-23)
    assert (final.weights[2:] == 0).all()


def test_lambda_is_drawn_from_beta() -> None:
    plan = draw(SaliencyMix(prob=1.0, granularity="sample", alpha=2.0), BatchShape(5_000, 4, 4))
    assert stats.kstest(plan.arrays["lam"], stats.beta(2, 2).cdf).pvalue > 0.001


def test_unmixed_samples_stay_as_they_are() -> None:
    images, _ = some()
    mixer = SaliencyMix(prob=0.5, granularity="sample")
    plan = draw(mixer, step=1)
    sources = [images, images[plan.partners[0]]]
    final = mixer.finish(plan, sources)
    whole = plan.arrays["lam"] == 1
    assert 0 < whole.sum() < 7
    assert torch.equal(mixer.apply(final, sources)[whole], images[whole])
    np.testing.assert_array_equal(final.weights[0, whole], 1)


@pytest.mark.parametrize("granularity", ["batch", "sample"])
def test_ranks_see_the_same_saliency(granularity: str) -> None:
    aug = Regularizer(
        atoms={"s": "mix"},
        mix=SaliencyMix(prob=1.0, granularity=granularity),  # type: ignore[arg-type]
    )
    source = ResidentPipeline(
        noise(23), DATASET, aug, seed=0, batch_size=8, device=torch.device("cpu")
    )
    plan = source.plan(0, 1)
    whole = source.batch(plan, np.arange(8))
    assert (whole.targets.amax(1) < 1).any()
    ranks = [source.batch(plan, share(8, rank, 3)) for rank in range(3)]
    assert torch.equal(torch.cat([r.images for r in ranks]), whole.images)
    assert torch.equal(torch.cat([r.targets for r in ranks]), whole.targets)


def test_prob_follows_the_authors_commands() -> None:
    for side, prob in ((32, 0.5), (224, 1.0)):
        assert SaliencyMix().resolve(side) == SaliencyMix(prob=prob)


def test_finish_leaves_an_unmixed_plan_alone() -> None:
    plan = draw(SaliencyMix(prob=0.0))
    images, _ = some()
    mixer = SaliencyMix(prob=0.0)
    assert mixer.finish(plan, [images]) is plan
    assert mixer.apply(plan, [images]) is images
    assert isinstance(replace(plan), MixPlan)

"""What any mixer must hold to, asked of all of ours and, to compare, of torchvision's and timm's.

docs/conformance.md is the result; `python -m tests.aug.test_conformance` writes it.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch
from timm.data.mixup import Mixup as TimmMixup
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.nn import functional as F
from torchvision.transforms import v2

from cutmix_exp.aug.base import BatchShape, Mixer, NoMix, mix_targets
from cutmix_exp.aug.feature import feature_maps
from cutmix_exp.aug.mix import CutMix
from cutmix_exp.composition import CONFIG_DIR, compose
from cutmix_exp.config import from_dict
from cutmix_exp.models.resnet import ResNet
from cutmix_exp.seeding import stream
from tests.helpers import ROOT

SIDE, STEPS = 12, 8
DOCUMENT = ROOT / "docs" / "conformance.md"

BLENDS = {
    "mixup": "blends images",
    "manifold_mixup": "blends images",
    "cutmix_or_mixup": "may blend images",
    "between_class": "blends images",
    "between_class_plus": "blends images",
    "vh_mixup": "blends images",
    "vh_bcplus": "blends images",
    "torchvision MixUp": "blends images",
    "timm Mixup": "blends images",
}
NOT_BY_AREA = {
    "cutmix_one_hot": "the label of the larger part alone",
    "cutmix_complete_label": "half of each label",
    "fmix": "the drawn lambda, less than a pixel away",
}


def mixers() -> dict[str, Mixer]:
    """The mixers of configs/aug by their names, made to mix every batch; those that mix features
    do so at layer 0, the image (tests/aug/test_feature.py looks inside the network)."""
    found = {}
    for file in sorted((CONFIG_DIR / "aug").glob("*.yaml")):
        aug = from_dict(compose([f"aug={file.stem}"])).aug.resolve(SIDE)
        if aug.name == file.stem and not isinstance(aug.mix, NoMix):
            always = {"prob": 1.0} if hasattr(aug.mix, "prob") else {}
            at_image = {"layers": (0,)} if aug.mix.mixes_features else {}
            found[aug.name] = replace(aug.mix, **always, **at_image)  # type: ignore[arg-type]
    return found


MIXERS = mixers()
Mix = Callable[[Tensor, int], tuple[Tensor, Tensor]]
"""2B images and a step to the B mixed images and their targets over 2B classes; image i has class
i. Who wants guests takes the second half for them."""


def ours(mixer: Mixer) -> Mix:
    def mix(images: Tensor, step: int) -> tuple[Tensor, Tensor]:
        batch = len(images) // 2
        plan = mixer.sample(BatchShape(batch, SIDE, SIDE), 1.0, stream(0, "mix", step=step))
        where = [np.arange(batch), *plan.partners]
        sources, labels = [images[p] for p in where], torch.eye(len(images))
        plan = mixer.finish(plan, sources)
        return mixer.apply(plan, sources), mix_targets(plan, [labels[p] for p in where])

    return mix


def foreign(make: Callable[[int], Any]) -> Mix:
    def mix(images: Tensor, step: int) -> tuple[Tensor, Tensor]:
        torch.manual_seed(step)
        np.random.seed(step)  # noqa: NPY002 - timm draws from it
        batch = len(images) // 2
        return make(len(images))(images[:batch], torch.arange(batch))

    return mix


def timm(**alphas: float) -> Callable[[int], Any]:
    return lambda k: TimmMixup(**alphas, label_smoothing=0.0, num_classes=k)


SUBJECTS: dict[str, Mix] = {
    **{name: ours(mixer) for name, mixer in MIXERS.items()},
    "torchvision CutMix": foreign(lambda k: v2.CutMix(num_classes=k)),
    "torchvision MixUp": foreign(lambda k: v2.MixUp(num_classes=k)),
    "timm CutMix": foreign(timm(mixup_alpha=0.0, cutmix_alpha=1.0)),
    "timm Mixup": foreign(timm(mixup_alpha=1.0, cutmix_alpha=0.0)),
}

# --------------------------------------------------------------------------------- properties


def coded(count: int) -> Tensor:
    """Images [count, 3, SIDE, SIDE] whose pixels say which image, row and column they are of."""
    grid = torch.meshgrid(
        torch.arange(count), torch.arange(SIDE), torch.arange(SIDE), indexing="ij"
    )
    return torch.stack([g.float() for g in grid], dim=1)


def mass_is_one(mix: Mix) -> bool:
    sums = [mix(coded(12), step)[1].sum(1) for step in range(STEPS)]
    return all(torch.equal(s, torch.ones(6)) for s in sums)


def pixels_have_an_origin(mix: Mix) -> bool:
    """Each pixel is a whole pixel of one image, in all channels."""
    for step in range(STEPS):
        mixed, _ = mix(coded(12), step)
        image, row, column = mixed.permute(1, 0, 2, 3).round().long()
        if not (image.min() >= 0 and image.max() < 12 and row.max() < SIDE and column.max() < SIDE):
            return False
        if not torch.equal(coded(12)[image, :, row, column].permute(0, 3, 1, 2), mixed):
            return False
    return True


def labels_are_shares(mix: Mix) -> bool:
    """The label weight of each image is its share of the pixels."""
    for step in range(STEPS):
        mixed, targets = mix(coded(12), step)
        shares = F.one_hot(mixed[:, 0].round().long(), 12).double().mean((1, 2))
        if (shares - targets).abs().max() > 2**-23:
            return False
    return True


def batches_of(size: int) -> Callable[[Mix], bool]:
    def any_size_goes(mix: Mix) -> bool:
        try:
            for step in range(STEPS):
                mixed, targets = mix(coded(2 * size), step)
                if mixed.shape != (size, 3, SIDE, SIDE) or targets.shape != (size, 2 * size):
                    return False
        except (AssertionError, ValueError, RuntimeError, IndexError):
            return False
        return True

    return any_size_goes


def half_precision(mix: Mix) -> bool:
    """16-bit images stay so, and their labels' mass is 1 (within their precision)."""
    for dtype in (torch.float16, torch.bfloat16):
        for step in range(STEPS):
            mixed, targets = mix(coded(12).to(dtype), step)
            near = mix(coded(12), step)[0]
            if mixed.dtype != dtype or (targets.float().sum(1) - 1).abs().max() > 1e-6:
                return False
            if (mixed.float() - near).abs().max() > 32 * torch.finfo(dtype).eps:
                return False
    return True


def layout_is_kept(mix: Mix) -> bool:
    for layout in (torch.contiguous_format, torch.channels_last):
        for step in range(STEPS):
            images = torch.randn(12, 3, SIDE, SIDE).contiguous(memory_format=layout)
            if not mix(images, step)[0].is_contiguous(memory_format=layout):
                return False
    return True


def inputs_are_left_alone(mix: Mix) -> bool:
    for step in range(STEPS):
        images = coded(12)
        mix(images, step)
        if not torch.equal(images, coded(12)):
            return False
    return True


@dataclass(frozen=True, eq=False)
class Property:
    """A column of the table, how to find it out, and where it does not apply."""

    title: str
    holds: Callable[[Mix], bool]
    exempt: dict[str, str]


PROPERTIES = [
    Property("label mass exactly 1", mass_is_one, {}),
    Property("pixels have an origin", pixels_have_an_origin, BLENDS),
    Property("labels = shares of pixels", labels_are_shares, BLENDS | NOT_BY_AREA),
    Property("odd batch", batches_of(7), {}),
    Property("one image", batches_of(1), {}),
    Property("fp16, bf16", half_precision, {}),
    Property("layout kept", layout_is_kept, {}),
    Property("inputs untouched", inputs_are_left_alone, {}),
]


@functools.cache
def holds(name: str, prop: Property) -> bool:
    return prop.holds(SUBJECTS[name])


# -------------------------------------------------------------------------------------- tests


@pytest.mark.parametrize("prop", PROPERTIES, ids=lambda p: p.title)
@pytest.mark.parametrize("name", MIXERS)
def test_our_mixers_conform(name: str, prop: Property) -> None:
    if name not in prop.exempt:
        assert holds(name, prop)


@pytest.mark.parametrize("name", MIXERS)
def test_partners_named_by_the_plan_are_the_origins(name: str) -> None:
    if name in BLENDS:
        return
    mixer = MIXERS[name]
    for step in range(STEPS):
        plan = mixer.sample(BatchShape(6, SIDE, SIDE), 1.0, stream(0, "mix", step=step))
        named = np.stack([np.arange(6), *plan.partners])
        sources = [coded(12)[p] for p in named]
        mixed = mixer.apply(mixer.finish(plan, sources), sources)
        for i in range(6):
            assert set(mixed[i, 0].unique().tolist()) <= set(named[:, i])


@pytest.mark.parametrize("name", MIXERS)
def test_slices_of_a_plan_make_slices_of_the_batch(name: str) -> None:
    mixer, images = MIXERS[name], torch.randn(14, 3, SIDE, SIDE)
    labels = torch.eye(14)
    for step in range(4):
        plan = mixer.sample(BatchShape(7, SIDE, SIDE), 0.9, stream(0, "mix", step=step))

        def mixed(positions: np.ndarray) -> tuple[Tensor, Tensor]:
            part = plan.at(positions)  # noqa: B023 - called in this turn of the loop
            where = [positions, *part.partners]
            sources = [images[p] for p in where]
            part = mixer.finish(part, sources)
            return mixer.apply(part, sources), mix_targets(part, [labels[p] for p in where])

        whole = mixed(np.arange(7))
        for world in (2, 3):
            ranks = [mixed(p) for p in np.array_split(np.arange(7), world)]
            for found, wanted in zip(zip(*ranks, strict=True), whole, strict=True):
                assert torch.equal(torch.cat(found), wanted)


class Lambda:
    """A generator that draws one value from every Beta distribution."""

    def __init__(self, rng: np.random.Generator, value: float) -> None:
        self.rng, self.value = rng, value

    def beta(self, a: float, b: float, size: Any) -> np.ndarray:
        return np.full(size, self.value)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.rng, name)


@pytest.mark.parametrize("batch", [6, 4])
@pytest.mark.parametrize("name", MIXERS)
def test_combining_a_pool_gives_what_apply_gives(name: str, batch: int) -> None:
    """Of the whole batch, whose images are then overwritten, and of a part with a larger pool; at
    both granularities."""
    mixer = MIXERS[name]
    kinds = ["batch", "sample"] if hasattr(mixer, "granularity") else [None]
    for kind, step in itertools.product(kinds, range(4)):
        made = mixer if kind is None else replace(mixer, granularity=kind)  # type: ignore[call-arg]
        images = torch.randn(12, 3, SIDE, SIDE)
        drawn = made.sample(BatchShape(6, SIDE, SIDE), 1.0, stream(0, "mix", step=step))
        positions = np.arange(batch)
        plan = drawn.at(positions)
        rows = [positions, *plan.partners]
        pool = images.clone() if mixer.wants_guests or batch < 6 else images[:6].clone()
        sources = [images[row] for row in rows]
        finished = made.finish(plan, sources)
        got_plan, got = made.combine(plan, pool, rows)
        assert torch.equal(got, made.apply(finished, sources))
        np.testing.assert_array_equal(got_plan.weights, finished.weights)


NO_LAMBDA = {"cutmix_fixed_size", "resizemix", "vh_mixup", "vh_bcplus"}


@pytest.mark.parametrize("lam", [0.0, 1.0])
@pytest.mark.parametrize("name", [n for n in MIXERS if n not in NO_LAMBDA])
def test_lambda_one_is_the_image_and_zero_its_last_partner(name: str, lam: float) -> None:
    """Boxes that are clipped at the border leave something of the image at lambda 0: not asked."""
    mixer, images = MIXERS[name], torch.randn(12, 3, SIDE, SIDE)
    clipped = isinstance(mixer, CutMix) or name in ("saliencymix", "cutmix_or_mixup")
    if isinstance(mixer, CutMix) and mixer.centre == "uniform":
        mixer, clipped = replace(mixer, box_law="inside"), False
    if lam == 0 and clipped:
        return
    draws: Any = Lambda(stream(0, "mix"), lam)
    plan = mixer.sample(BatchShape(6, SIDE, SIDE), 1.0, draws)
    sources = [images[:6], *(images[p] for p in plan.partners)]
    plan = mixer.finish(plan, sources)
    wanted = 0 if lam == 1 else len(sources) - 1
    assert torch.equal(mixer.apply(plan, sources), sources[wanted])
    if name != "cutmix_complete_label":
        np.testing.assert_array_equal(plan.weights[wanted], 1)


COMPILED_BATCHES = 100


@pytest.mark.parametrize("name", MIXERS)
def test_a_compiled_network_is_compiled_once_for_all_batches(name: str) -> None:
    """Half of the batches are mixed (where the mixer has a coin), features at any of its layers:
    type and layout of what the network gets stay the same, and what is drawn is no constant of the
    traced program. What breaks of the graph make is made within ten batches."""
    drawn = from_dict(compose([f"aug={name}"])).aug.resolve(SIDE).mix
    mixer: Any = replace(drawn, **({"prob": 0.5} if hasattr(drawn, "prob") else {}))  # type: ignore
    network: Any = nn.Conv2d(3, 4, 3)
    if mixer.mixes_features:
        network = ResNet(name="resnet", depth=8).resolve(SIDE).build(4)
    maps = feature_maps(network, SIDE) if mixer.mixes_features else ()
    receiver = mixer.attach(network)
    torch._dynamo.reset()
    counters.clear()
    compiled = torch.compile(network.train(), backend="eager")
    images, rows = torch.randn(8, 3, SIDE, SIDE), np.arange(4)
    for step in range(COMPILED_BATCHES):
        shape = BatchShape(4, SIDE, SIDE, maps=maps)
        plan = mixer.sample(shape, 0.5, stream(0, "mix", step=step))
        sources = [images[p] for p in (rows, *plan.image_partners)]
        plan = mixer.finish(plan, sources)
        receiver.set(plan, rows)
        compiled(mixer.apply(plan, sources))
        if step == 9:
            known = counters["stats"]["unique_graphs"]
    assert counters["stats"]["unique_graphs"] == known
    assert known == 1 or mixer.mixes_features  # whose hooks are breaks of the graph


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", MIXERS)
def test_a_plan_makes_the_same_on_cpu_and_gpu(name: str) -> None:
    """Plans are drawn on the host, so it is one and the same plan."""
    mixer, images = MIXERS[name], torch.randn(12, 3, SIDE, SIDE)
    for step in range(STEPS):
        plan = mixer.sample(BatchShape(6, SIDE, SIDE), 1.0, stream(0, "mix", step=step))
        sources = [images[p] for p in (np.arange(6), *plan.partners)]
        there = [s.cuda() for s in sources]
        made = mixer.apply(mixer.finish(plan, there), there)
        assert made.is_cuda
        torch.testing.assert_close(made.cpu(), mixer.apply(mixer.finish(plan, sources), sources))


# -------------------------------------------------------------------------------------- table


def document() -> str:
    lines = [
        "# Conformance of mixers",
        "",
        "Written by `python -m tests.aug.test_conformance`, which asks every mixer of `configs/aug`",
        "and, to compare, torchvision's and timm's; the tests demand ours and this file. A dash:",
        "does not apply, for the reason below.",
        "",
        "| mixer | " + " | ".join(p.title for p in PROPERTIES) + " |",
        "| --- |" + " --- |" * len(PROPERTIES),
    ]
    for name in SUBJECTS:
        cells = [
            "-" if name in p.exempt else "yes" if holds(name, p) else "**no**" for p in PROPERTIES
        ]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    lines += ["", "| mixer | why a property does not apply |", "| --- | --- |"]
    lines += [f"| {name} | {why} |" for name, why in (BLENDS | NOT_BY_AREA).items()]
    lines += [
        "",
        "Ours, whose plans can be looked at, are held to more by the same tests: the partners that a plan",
        "names are the origins; lambda 1 is the image and lambda 0 its last partner (where there is a",
        "lambda, and no box is clipped at the border); two and three ranks together make the batch of one;",
        f"a compiled network is compiled once for {COMPILED_BATCHES} batches; CPU and GPU make the same of",
        "a plan (tested where there is a GPU).",
    ]
    return "\n".join(lines) + "\n"


def test_the_document_says_what_was_found() -> None:
    assert DOCUMENT.read_text() == document(), "run: python -m tests.aug.test_conformance"


def test_exceptions_are_of_mixers_that_exist() -> None:
    assert set(BLENDS | NOT_BY_AREA) <= set(SUBJECTS)
    assert set(MIXERS) >= NO_LAMBDA


if __name__ == "__main__":
    DOCUMENT.write_text(document())

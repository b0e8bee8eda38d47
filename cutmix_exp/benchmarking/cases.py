"""What is measured: each case puts ours beside named alternatives, on the same work."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from typing import Any, Literal

OURS = "ours"


@dataclass(frozen=True)
class Variant:
    """A subject (a function of ours.py or reference.py) with its arguments.

    Attributes:
        cores: those that the process may use; None is all.
    """

    module: Literal["ours", "reference"]
    name: str
    arguments: dict[str, Any] = field(default_factory=dict)
    cores: tuple[int, ...] | None = None


@dataclass(frozen=True)
class Case:
    """Variants that take turns; the first is ours, and the best of the others is what it is
    compared with.

    Attributes:
        group: the sub-command.
        unit: of the figures.
        goal: the ratio that is asked for; None is for information.
        seconds: how long each turn lasts at least.
        rounds: how many turns.
        quantity: `rate` per second, `memory` in bytes (the ratio is ours over theirs, and is to
            stay below the goal), or `latency`: seconds for one (the ratio is the goal's limit over
            ours, `limit` seconds).
    """

    name: str
    group: str
    title: str
    variants: dict[str, Variant]
    goal: float | None
    unit: str = "images/s"
    seconds: float = 2.0
    rounds: int = 3
    quantity: Literal["rate", "memory", "latency"] = "rate"
    limit: float | None = None


PLAIN = "plain loop"
"""Eager, fp32, NCHW, PIL images from a DataLoader with two workers, default environment."""

SMALL = {
    "resnet20": ("ResNet-20", ["model=resnet", "model.depth=20"], 128, 2.8),
    "resnet18": ("ResNet-18", ["model=resnet", "model.depth=18"], 128, 2.8),
    "resnet110": ("ResNet-110", ["model=resnet", "model.depth=110"], 64, 3.0),
    "pyramidnet110": (
        "PyramidNet-110 of basic blocks (alpha 64)",
        ["model=pyramidnet", "model.depth=110", "model.alpha=64", "model.block=basic"],
        64,
        3.0,
    ),
    "pyramidnet200": ("PyramidNet-200", ["model=pyramidnet"], 64, 4.0),
    "wrn28_10": ("WRN-28-10", ["model=wide_resnet"], 32, 4.0),
}
"""Title, overrides, batch and goal of the training epoch, by name."""
HEAVY = {"pyramidnet200": 2, "wrn28_10": 2, "resnet50": 2}
"""Rounds of those whose single step takes seconds on a CPU."""
DATA = ["dataset=synthetic", "dataset.num_classes=100"]


def small(name: str, group: str, subject: str, **arguments: Any) -> Case:
    title, overrides, batch, goal = SMALL[name]
    plain = {"overrides": [*DATA, *overrides], "batch": batch, **arguments}
    return Case(
        f"{group}_{name}",
        group,
        f"{title}, batch {batch}, 32x32",
        {
            OURS: Variant("ours", subject, {"overrides": overrides, "batch": batch, **arguments}),
            PLAIN: Variant("reference", subject, plain),
        },
        goal if group == "epoch" else None,
        rounds=HEAVY.get(name, 3),
    )


def epochs(jpegs: str) -> list[Case]:
    """Input, mixing and training step together."""
    overrides, batch = ["model=resnet", "model.depth=50"], 16
    large = Case(
        "epoch_resnet50",
        "epoch",
        f"ResNet-50, batch {batch}, JPEG 500x375 to 224x224",
        {
            OURS: Variant(
                "ours", "training", {"overrides": overrides, "batch": batch, "images": jpegs}
            ),
            PLAIN: Variant(
                "reference",
                "training",
                {
                    "overrides": ["dataset=image_folder", f"dataset.root={jpegs}", *overrides],
                    "batch": batch,
                    "images": jpegs,
                },
            ),
        },
        3.5,
        rounds=HEAVY["resnet50"],
    )
    return [*(small(name, "epoch", "training", images="small") for name in SMALL), large]


def steps(jpegs: str) -> list[Case]:
    """The step alone, on a batch at hand."""
    return [small(name, "step", "stepping", size=32) for name in SMALL]


def inputs(jpegs: str) -> list[Case]:
    loaders = {
        f"PIL DataLoader, {workers} workers": Variant(
            "reference", "small_input", {"batch": 128, "workers": workers}
        )
        for workers in (0, 1, 2)
    }
    title = "CIFAR input (crop, flip, normalise), bit-equal with torchvision's"
    ours = {OURS: Variant("ours", "small_input", {"batch": 128})}
    return [Case("input", "input", title, {**ours, **loaders}, 25.0, seconds=1.5, rounds=5)]


def mixes(jpegs: str) -> list[Case]:
    """With the draws and the soft labels. On one core: the tensors are too small to be shared."""

    def case(granularity: str, title: str, other: str, variant: Variant, goal: float) -> Case:
        ours = Variant("ours", "mixing", {"batch": 128, "granularity": granularity}, (0,))
        variants = {OURS: ours, other: variant}
        return Case(f"mix_{granularity}", "mix", title, variants, goal, seconds=0.5, rounds=7)

    theirs = Variant("reference", "torchvision_cutmix", {"batch": 128}, (0,))
    timm = Variant("reference", "timm_cutmix", {"batch": 128, "mode": "elem"}, (0,))
    return [
        case(
            "batch", "CutMix, one box a batch of 128, 32x32", "torchvision v2.CutMix", theirs, 2.5
        ),
        case("sample", "CutMix, one box a sample of 128, 32x32", "timm Mixup(elem)", timm, 8.0),
    ]


def decodes(jpegs: str) -> list[Case]:
    variants = {
        OURS: Variant("ours", "decoding", {"folder": jpegs}, (0,)),
        "PIL, ToTensor, Normalize": Variant("reference", "decoding", {"folder": jpegs}, (0,)),
    }
    v2 = {"torchvision v2, uint8": Variant("reference", "decoding_v2", {"folder": jpegs}, (0,))}
    return [
        Case("decode", "decode", "JPEG 500x375 to 224x224, one core", variants, 1.8, rounds=5),
        Case(
            "decode_v2",
            "decode",
            "JPEG 500x375 to 224x224, one core",
            {OURS: variants[OURS], **v2},
            None,
            rounds=5,
        ),
    ]


def startups(jpegs: str) -> list[Case]:
    variants = {
        OURS: Variant("ours", "first_step"),
        "import torch, torchvision, timm": Variant("ours", "imports"),
    }
    title = "Command to first training step, digits"
    return [
        Case(
            "startup",
            "startup",
            title,
            variants,
            1.0,
            unit="s",
            seconds=0.0,
            quantity="latency",
            limit=8.0,
        )
    ]


def scalings(jpegs: str) -> list[Case]:
    """A network with many weights for its arithmetic, whose ranks exchange much at each step, and
    one with few."""
    # With fewer cores the goal could not be met: nothing is asked then.
    goal = 1.85 if len(os.sched_getaffinity(0)) > 1 else None

    def case(network: str, batch: int) -> Case:
        title, overrides, *_ = SMALL[network]

        def on(ranks: int) -> Variant:
            arguments = {"overrides": overrides, "batch": batch, "ranks": ranks}
            return Variant("ours", "scaling", arguments, (0,))

        variants = {OURS: on(2), "one process, one core": on(1)}
        title = f"Two processes, a core each: {title}, batch {batch}"
        return Case(f"scaling_{network}", "scaling", title, variants, goal, seconds=3.0)

    return [case("resnet18", 64), case("resnet110", 128)]


def arithmetic(jpegs: str) -> list[Case]:
    """What the machine itself can do: it bounds what bf16 can give."""
    variants = {
        OURS: Variant("ours", "products", {"precision": "bf16"}),
        "fp32": Variant("ours", "products", {"precision": "fp32"}),
    }
    title = "The machine's matrix products, bf16 beside fp32"
    return [Case("arithmetic", "arithmetic", title, variants, None, unit="MFLOP/s", seconds=1.0)]


def memories(jpegs: str) -> list[Case]:
    title, _, batch, _ = SMALL["pyramidnet200"]
    case = small("pyramidnet200", "memory", "stepping", size=32)
    return [
        Case(
            "memory",
            "memory",
            f"Peak memory of training {title}, batch {batch}",
            case.variants,
            0.5,
            unit="GiB",
            seconds=0.0,
            rounds=1,
            quantity="memory",
        )
    ]


def evaluations(jpegs: str) -> list[Case]:
    overrides = SMALL["resnet18"][1]
    plain = {"overrides": [*DATA, *overrides], "batch": 100}
    variants = {
        OURS: Variant("ours", "evaluating", {"overrides": overrides}),
        "plain loop, no_grad": Variant("reference", "evaluating", plain),
    }
    return [Case("evaluation", "evaluation", "Evaluation, ResNet-18, 32x32", variants, 4.0)]


GROUPS = {
    "arithmetic": arithmetic,
    "startup": startups,
    "input": inputs,
    "mix": mixes,
    "decode": decodes,
    "evaluation": evaluations,
    "scaling": scalings,
    "memory": memories,
    "epoch": epochs,
    "step": steps,
}
ALL = [name for name in GROUPS if name != "step"]
"""What `all` runs: the epoch holds the step."""

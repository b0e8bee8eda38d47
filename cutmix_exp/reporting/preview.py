"""A contact sheet: what a regularizer makes of images and labels."""

from __future__ import annotations

import functools
from dataclasses import replace
from io import BytesIO

import numpy as np
import torch

from cutmix_exp.aug.base import Regularizer
from cutmix_exp.composition import CONFIG_DIR, compose
from cutmix_exp.config import Config, from_dict
from cutmix_exp.data.pipeline import Batch, BatchPlan, Pipeline
from cutmix_exp.data.sources import Splits
from cutmix_exp.distributed import World
from cutmix_exp.training.trainer import make_model, training_pipeline


def mixed_plan(pipeline: Pipeline, tries: int = 50) -> BatchPlan:
    """The first batch whose images are mixed, if possible in parts that can be seen: the coin may
    leave batches alone, a part may be tiny, and features may meet inside the network instead.
    Drawn as at the training's end, where what grows with it is in full force."""
    steps = pipeline.steps_per_epoch
    plans = [pipeline.plan(n // steps, n % steps, progress=1.0) for n in range(tries)]
    mixed = [plan for plan in plans if plan.mix.num_sources > 1 and not plan.mix.layer]
    clear = [plan for plan in mixed if 0.1 < plan.mix.weights[0].mean() < 0.9]
    return [*clear, *mixed, plans[0]][0]


@functools.cache
def visible_methods() -> tuple[str, ...]:
    """The options of the group `aug` that act on images, on labels by mixing, and nowhere else."""
    augs = {
        f.stem: from_dict(compose([f"aug={f.stem}"])).aug for f in CONFIG_DIR.glob("aug/*.yaml")
    }
    seen = {"image", "mix"}
    found = [name for name, aug in augs.items() if aug.atoms and seen >= {*aug.atoms.values()}]
    return tuple(sorted(found))


def shown(config: Config, splits: Splits, rows: int) -> tuple[list[torch.Tensor], Batch]:
    """Some images in [0, 1], each float32 [rows, 3, H, W]: of the data set (cropped and flipped),
    their partners, and last what the network sees; and the batch that they are of."""
    alone = World(0, 1, torch.device("cpu"))
    pipeline = training_pipeline(config, splits, alone, lambda: make_model(config))
    bare = replace(config, aug=Regularizer())  # the same crops and flips, and nothing else
    plain = training_pipeline(bare, splits, alone, lambda: make_model(bare))
    plan = mixed_plan(pipeline)
    positions = np.arange(min(rows, len(plan)))
    batch = pipeline.batch(plan, positions)
    columns = [*plain.sources(plan, positions), batch.images]
    return [pipeline.normalize.inverse(images) for images in columns], batch


def contact_sheet(config: Config, splits: Splits, rows: int = 8, format: str = "png") -> bytes:
    """A picture with one line per image: what meets (the image, then its partners), what the
    network sees, and its soft label; lambda is the label weight of the image itself.

    Args:
        format: that matplotlib writes: png, jpg, webp, ...
    """
    from matplotlib.figure import Figure

    columns, batch = shown(config, splits, rows)
    count = len(batch.images)
    partners = [f"partner {i + 1}" for i in range(len(columns) - 2)]
    titles = ["image", *(["partner"] if len(partners) == 1 else partners), "to the network"]

    figure = Figure(figsize=(1.6 * len(columns) + 1.5, 1.6 * count + 0.6))
    axes = figure.subplots(count, len(columns) + 1, squeeze=False)
    for row in range(count):
        for axis, images in zip(axes[row], columns, strict=False):
            axis.imshow(images[row].permute(1, 2, 0).numpy(), interpolation="nearest")
        label = label_text(batch.targets[row], splits.class_names)
        own = float(batch.mix.weights[0, row])
        axes[row][-1].text(0, 0.5, f"lambda {own:.3f}\n{label}", va="center", fontsize=10)
        for axis in axes[row]:
            axis.set_axis_off()
    for axis, title in zip(axes[0], titles, strict=False):
        axis.set_title(title, fontsize=11)
    figure.suptitle(f"{config.aug.name} on {config.dataset.name}, seed {config.seed}", fontsize=12)
    figure.tight_layout()
    out = BytesIO()
    if format in ("jpg", "jpeg"):
        figure.savefig(out, format=format, dpi=72, pil_kwargs={"quality": 60, "optimize": True})
    else:
        figure.savefig(out, format=format, dpi=80)
    return out.getvalue()


def label_text(target: torch.Tensor, class_names: tuple[str, ...]) -> str:
    """The classes that have a part in a soft label [K], the largest first."""
    order = target.argsort(descending=True)
    return "\n".join(f"{class_names[i]}: {float(target[i]):.3f}" for i in order if target[i] > 0)

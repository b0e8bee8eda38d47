"""A contact sheet: what a regularizer makes of images and labels."""

from __future__ import annotations

from io import BytesIO

import numpy as np
import torch

from cutmix_exp.config import Config
from cutmix_exp.data.pipeline import BatchPlan, Pipeline
from cutmix_exp.data.sources import Splits
from cutmix_exp.distributed import World
from cutmix_exp.training.trainer import make_model, training_pipeline


def first_mixed_plan(pipeline: Pipeline, tries: int = 50) -> BatchPlan:
    """The first batch whose images are mixed: the coin may leave batches alone, and features may
    meet inside the network instead. Drawn as at the training's end, where what grows with it is
    in full force."""
    steps = pipeline.steps_per_epoch
    for number in range(tries):
        plan = pipeline.plan(number // steps, number % steps, progress=1.0)
        if plan.mix.num_sources > 1 and not plan.mix.layer:
            return plan
    return pipeline.plan(0, 0, progress=1.0)


def contact_sheet(config: Config, splits: Splits, rows: int = 8) -> bytes:
    """A PNG with one line per image: its sources (the image, then its partners), the mixed image
    that the network sees, and its soft label; lambda is the label weight of the image itself."""
    from matplotlib.figure import Figure

    alone = World(0, 1, torch.device("cpu"))
    pipeline = training_pipeline(config, splits, alone, lambda: make_model(config))
    plan = first_mixed_plan(pipeline)
    positions = np.arange(min(rows, len(plan)))
    batch = pipeline.batch(plan, positions)
    sources = pipeline.sources(plan, positions)
    mix = config.aug.mix.finish(plan.mix.at(positions), sources)
    columns = [*sources, batch.images]
    partners = [f"partner {i + 1}" for i in range(len(columns) - 2)]
    titles = ["image", *(["partner"] if len(partners) == 1 else partners), "mixed"]

    figure = Figure(figsize=(1.6 * len(columns) + 2.6, 1.6 * len(positions) + 0.6))
    axes = figure.subplots(len(positions), len(columns) + 1, squeeze=False)
    for row in range(len(positions)):
        for axis, images in zip(axes[row], columns, strict=False):
            shown = pipeline.normalize.inverse(images[row]).permute(1, 2, 0).numpy()
            axis.imshow(shown, interpolation="nearest")
        label = label_text(batch.targets[row], splits.class_names)
        own = float(mix.weights[0, row])
        axes[row][-1].text(0, 0.5, f"lambda {own:.3f}\n{label}", va="center", fontsize=10)
        for axis in axes[row]:
            axis.set_axis_off()
    for axis, title in zip(axes[0], titles, strict=False):
        axis.set_title(title, fontsize=11)
    figure.suptitle(f"{config.aug.name} on {config.dataset.name}, seed {config.seed}", fontsize=12)
    figure.tight_layout()
    out = BytesIO()
    figure.savefig(out, format="png", dpi=80)
    return out.getvalue()


def label_text(target: torch.Tensor, class_names: tuple[str, ...]) -> str:
    """The classes that have a part in a soft label [K], the largest first."""
    order = target.argsort(descending=True)
    return "\n".join(f"{class_names[i]}: {float(target[i]):.3f}" for i in order if target[i] > 0)

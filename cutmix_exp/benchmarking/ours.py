"""This project's own paths as subjects: the trainer's step, its pipelines, mixers and evaluation.

inputs.py says what a subject is.
"""

from __future__ import annotations

import dataclasses
import itertools
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import torch

from cutmix_exp.aug.base import BatchShape, mix_targets, taken
from cutmix_exp.benchmarking import worker
from cutmix_exp.benchmarking.inputs import CLASSES, JPEGS, SMALL, Work, random_batch
from cutmix_exp.composition import compose
from cutmix_exp.config import DTYPES, Config, from_dict, resolve
from cutmix_exp.data.pipeline import BatchPlan
from cutmix_exp.data.sources import FileSet
from cutmix_exp.distributed import World, world_of
from cutmix_exp.evaluation.classification import predict
from cutmix_exp.seeding import stream
from cutmix_exp.training.logging import Reporter
from cutmix_exp.training.optim import set_rate
from cutmix_exp.training.trainer import Trainer

WORLDS = ExitStack()
"""Process groups, which last as long as the process."""
ALONE = World(0, 1, torch.device("cpu"))


def config_of(overrides: list[str], images: str = "small") -> Config:
    """A resolved config on the benchmark's small images, or on the JPEG files in a folder."""
    data = ["dataset=synthetic", f"dataset.train_size={SMALL}", f"dataset.num_classes={CLASSES}"]
    if images != "small":
        data = ["dataset=image_folder", f"dataset.root={images}"]
        data += ["dataset.color_jitter=0.4", "dataset.lighting=0.1"]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    scratch = tempfile.gettempdir()
    return resolve(
        from_dict(compose([*data, *overrides, f"device={device}", f"runs_dir={scratch}"]))
    )


def trainer_of(config: Config, world: World) -> Trainer:
    splits = config.dataset.load()
    if isinstance(splits.train, FileSet):  # the few files many times over: an epoch of some length
        many = np.tile(np.arange(len(splits.train)), 6400 // JPEGS)
        splits = dataclasses.replace(splits, train=splits.train.at(many))
    trainer = Trainer(config, splits, world, Reporter(active=False))
    trainer.network.train()
    return trainer


def endless_plans(trainer: Trainer) -> Iterator[tuple[int, BatchPlan]]:
    for trainer.epoch in itertools.count():
        epochs = max(trainer.config.epochs, trainer.epoch + 1)
        yield from enumerate(trainer.pipeline.plans(trainer.epoch, 0, epochs))


def one_step(trainer: Trainer, number: int, plan: BatchPlan) -> int:
    """What the trainer does for one batch."""
    set_rate(trainer.optimizer, trainer.config.schedule, 0, number, 1000)
    trainer.key_noise(number, 0.0)
    trainer.train_step(plan)
    return len(plan)


def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def training(overrides: list[str], batch: int, images: str) -> Work:
    """Input, mixing and step, as train.py does them."""
    config = config_of([*overrides, f"schedule.batch_size={batch}", "aug=cutmix"], images)
    trainer = trainer_of(config, World(0, 1, device()))
    plans = endless_plans(trainer)
    return lambda: one_step(trainer, *next(plans))


def stepping(overrides: list[str], batch: int, size: int) -> Work:
    """The step alone: the same decoded batch again and again."""
    config = config_of(
        [
            *overrides,
            f"schedule.batch_size={batch}",
            "aug=cutmix",
            "dataset.train_size=1000",
            f"dataset.image_size={size}",
        ]
    )
    trainer = trainer_of(config, World(0, 1, device()))
    plan = trainer.pipeline.plan(0, 0)
    held = trainer.pipeline.batch(plan, np.arange(batch))
    trainer.pipeline.batch = lambda plan, positions: held  # type: ignore[method-assign]
    return lambda: one_step(trainer, 0, plan)


def start_others(overrides: list[str], batch: int, ranks: int) -> None:
    """Make this process rank 0 and start the others, a core each; they end with it, since they
    share its process group."""
    known = {"WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks)}
    known |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(worker.free_port())}
    os.environ.update(known, RANK="0", LOCAL_RANK="0")
    for rank in range(1, ranks):
        subprocess.Popen(
            worker.command(
                "ours", "scaling", [rank], overrides=overrides, batch=batch, ranks=ranks
            ),
            env={**os.environ, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
        )


def scaling(overrides: list[str], batch: int, ranks: int) -> Work:
    """Training on some cores, a process on each; one call is four steps of all."""
    if ranks > 1 and "RANK" not in os.environ:  # the process that was asked
        start_others(overrides, batch, ranks)
    world = WORLDS.enter_context(world_of("cpu"))
    config = config_of(
        [*overrides, f"schedule.batch_size={batch}", "aug=cutmix", f"devices={ranks}"]
    )
    trainer = trainer_of(config, world)
    plans = endless_plans(trainer)

    def four_steps() -> int:
        return sum(one_step(trainer, *next(plans)) for _ in range(4))

    if not world.is_main:
        while world.broadcast(None):
            four_steps()
        raise SystemExit(0)

    def all_together() -> int:
        world.broadcast(True)
        return four_steps()

    return all_together


def small_input(batch: int) -> Work:
    """CIFAR batches, cropped, flipped and normalised; bit-equal with torchvision's (a test)."""
    config = config_of([f"schedule.batch_size={batch}", "aug=baseline", "model.depth=20"])
    trainer = trainer_of(config, ALONE)
    plans, everything = endless_plans(trainer), np.arange(batch)

    def one() -> int:
        return len(trainer.pipeline.images_at(next(plans)[1], everything))

    return one


def decoding(folder: str) -> Work:
    """One JPEG after the other to a random resized crop, flipped or not, uint8."""
    from cutmix_exp.data.augment import draw_crops
    from cutmix_exp.data.streaming import DecodedCrops

    config = config_of([], folder)
    splits = config.dataset.load()
    assert isinstance(splits.train, FileSet)
    crops = DecodedCrops(splits.train, config.dataset, [])
    rng = np.random.default_rng(0)
    draws = draw_crops(config.dataset, 1000, rng)
    tasks = itertools.cycle(
        (i % len(splits.train), draws[i], bool(rng.random() < 0.5), ()) for i in range(1000)
    )

    def one() -> int:
        crops[next(tasks)]
        return 1

    return one


def mixing(batch: int, granularity: str) -> Work:
    """CutMix of a batch at hand, its draws and soft labels included."""
    mixer = config_of(
        ["aug=cutmix", "aug.mix.prob=1.0", f"aug.mix.granularity={granularity}"]
    ).aug.mix
    images, labels = random_batch(batch)
    targets = torch.nn.functional.one_hot(labels, CLASSES).float()
    steps, everything, shape = itertools.count(), np.arange(batch), BatchShape(batch, 32, 32)

    def one() -> int:
        plan = mixer.sample(shape, 1.0, stream(0, "mix", step=next(steps)))
        rows = [everything, *plan.partners]
        mixer.combine(plan, images, rows)
        mix_targets(plan, [taken(targets, row) for row in rows])
        return batch

    return one


def evaluating(overrides: list[str]) -> Work:
    """Predictions for 500 images, as after each epoch."""
    config = config_of([*overrides, "dataset.test_size=500"])
    world = World(0, 1, device())
    trainer = trainer_of(config, world)
    network, normalize = trainer.model, trainer.pipeline.normalize

    def one() -> int:
        return len(predict(network, trainer.test, normalize, world, config.dtype).label)

    return one


def products(precision: str, side: int = 640) -> Work:
    """Matrix products of this side; counts millions of floating-point operations."""
    one, two = torch.randn(2, side, side, device=device()).to(DTYPES[precision])

    def product() -> int:
        torch.mm(one, two)
        if one.is_cuda:
            torch.cuda.synchronize()
        return round(2 * side**3 / 1e6)

    return product


FIRST_STEP = """
import os, runpy, sys
sys.argv[0] = {train!r}
from cutmix_exp import startup
def stop(train_step):
    def stepped(*args):
        train_step(*args)
        os._exit(0)
    return stepped
import cutmix_exp.config
from cutmix_exp.training import trainer
trainer.Trainer.train_step = stop(trainer.Trainer.train_step)
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def first_step() -> Work:
    """From the command to the end of the first training step on the digits."""
    train = str(Path(__file__).resolve().parents[2] / "train.py")
    folder = tempfile.mkdtemp()
    overrides = ["dataset=digits", "model=resnet", "model.depth=20", "aug=cutmix", "force=true"]
    program = [sys.executable, "-c", FIRST_STEP.format(train=train), *overrides, "device=cpu"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}

    def one() -> int:
        subprocess.run(
            [*program, f"runs_dir={folder}"], check=True, env=environment, stdout=subprocess.DEVNULL
        )
        return 1

    return one


def imports() -> Work:
    """What a script that imports torch, torchvision and timm pays before its first line."""

    def one() -> int:
        subprocess.run([sys.executable, "-c", "import torch, torchvision, timm"], check=True)
        return 1

    return one

"""The trainer: one loop for every experiment. It names no method: what a regularizer does is in
the batch that the pipeline serves, in the network, and in the smoothing of the loss."""

from __future__ import annotations

import contextlib
import functools
import math
import os
import time
from collections.abc import Callable, Iterator
from typing import Any, Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from cutmix_exp.aug.base import Progress
from cutmix_exp.aug.feature import feature_maps
from cutmix_exp.config import Config
from cutmix_exp.data.pipeline import Batch, BatchPlan, Pipeline, make_pipeline
from cutmix_exp.data.sources import Splits
from cutmix_exp.distributed import World, share, share_or_last
from cutmix_exp.errors import Interrupted, UserError
from cutmix_exp.evaluation.base import EvaluationSet, at_hand
from cutmix_exp.evaluation.classification import Predictions, predict
from cutmix_exp.models.batchnorm import BatchGroups, group_batchnorm, micro_batches
from cutmix_exp.seeding import stream, torch_seed
from cutmix_exp.training.checkpoint import (
    LAST,
    load_checkpoint,
    newest_sound,
    save_checkpoint,
    save_last,
)
from cutmix_exp.training.ema import make_average
from cutmix_exp.training.logging import Line, Reporter
from cutmix_exp.training.loss import lesson_of, soft_losses
from cutmix_exp.training.optim import make_optimizer, set_rate
from cutmix_exp.training.state import restore, state_of, state_of_rank

T = TypeVar("T")
PROBE = 2000
"""Training images, without augmentation, on which the train error is measured after each epoch."""


class Log(Protocol):
    """Where metrics go: see training/logging.py."""

    def write(self, line: Line) -> None: ...
    def grid(self, images: Tensor) -> None: ...
    def close(self, metrics: dict[str, float]) -> None: ...


class TrainingFailed(UserError):
    """The training cannot go on."""


class RunningSums:
    """Sums over the images of an epoch, on the device: reading them is what synchronises."""

    def __init__(self, device: torch.device) -> None:
        # loss, top-1 and top-5 error against the mixed targets, number of images
        self.values = torch.zeros(4, dtype=torch.float64, device=device)

    @torch.no_grad()
    def add(self, losses: Tensor, logits: Tensor, targets: Tensor) -> None:
        best = logits.topk(min(5, logits.shape[1]), dim=1).indices
        mass = targets.gather(1, best)  # of the label, on each of the best classes
        rows = [losses, 1 - mass[:, 0], 1 - mass.sum(1), torch.ones_like(losses)]
        self.values += torch.stack(rows).double().sum(1)

    def load(self, values: list[float]) -> None:
        self.values.copy_(torch.tensor(values, dtype=torch.float64))


def timed(phase: str) -> Callable[[Callable[..., T]], Callable[..., T]]:
    """Counts the time in a method of the trainer as that phase's."""

    def wrap(method: Callable[..., T]) -> Callable[..., T]:
        @functools.wraps(method)
        def measured(self: Trainer, *args: Any, **named: Any) -> T:
            began = time.monotonic()
            try:
                return method(self, *args, **named)
            finally:
                self.phases[phase] += time.monotonic() - began

        return measured

    return wrap


class Trainer:
    """Trains one network for one config.

    Attributes:
        epoch, epoch_step, step: where the training stands: finished epochs, finished steps of the
            current epoch, and optimizer steps in all.
        lines: the lines of metrics.jsonl so far.
        seconds: time spent in training steps and evaluations, over all starts of the run.
        phases: seconds of this start by phase. On a GPU, which works on while the host goes ahead,
            `input` is what the host spends on it, and `step` holds the waiting.
        fingerprint: of the data.
        warning: of what `resume` has found.
        asked_to_stop: returns the number of a signal, or 0; looked at after each step.
    """

    def __init__(self, config: Config, splits: Splits, world: World, report: Reporter) -> None:
        self.config, self.world, self.report = config, world, report
        self.fingerprint = splits.fingerprint
        set_determinism(config.trainer.deterministic)
        device = world.device
        self.test = at_hand(splits.test, config, device)
        self.val = None if splits.val is None else at_hand(splits.val, config, device)
        # Drawn, since a set may be ordered by class; the same images in every run on the set.
        drawn = stream(0, "probe").permutation(len(splits.train))[:PROBE]
        self.probe = at_hand(splits.train.at(np.sort(drawn)), config, device)

        self.model = make_model(config).to(memory_format=config.model.memory_format)
        self.model.to(world.device)
        self.pipeline = training_pipeline(config, splits, world, lambda: self.model)
        self.groups = BatchGroups()
        if config.trainer.bn_group_size is not None:
            group_batchnorm(self.model, self.groups)
        self.features = config.aug.mix.attach(self.model)
        self.average = make_average(config.schedule, self.model)
        self.clocks = [m for m in self.model.modules() if isinstance(m, Progress)]
        self.lesson = lesson_of(self.model)
        trained = compiled(self.model, config)
        self.network: nn.Module = world.wrap(trained, sync_bn=config.trainer.sync_bn)
        self.optimizer = make_optimizer(config.schedule, self.model)
        self.scaler = torch.amp.GradScaler(world.device.type, enabled=config.precision == "fp16")

        self.epoch = self.epoch_step = self.step = 0
        self.lines: list[Line] = []
        self.seconds = 0.0
        self.phases = dict.fromkeys(("input", "step", "evaluation", "checkpoint"), 0.0)
        self.warning = ""
        self.sums = RunningSums(world.device)
        self.checkpoints = config.run_dir / "checkpoints"
        self.after_step: Callable[[], None] = lambda: None
        self.asked_to_stop: Callable[[], int] = lambda: 0
        self.wishes: Callable[[], list[int]] = nothing

    # ---------------------------------------------------------------------------- training

    @property
    def finished(self) -> bool:
        limit = self.config.trainer.max_steps or math.inf
        return self.epoch >= self.config.epochs or self.step >= limit

    def fit(self, log: Log) -> Predictions:
        """Train to the end; returns the predictions of the last network on the test set (of its
        moving average, where the recipe has one).

        Raises:
            TrainingFailed: the loss is not finite.
            Interrupted: a rank was asked to stop; a checkpoint is written.
        """
        self.network.train()
        self.clock = self.saved_at = time.monotonic()
        self.show_images(log)
        predictions = None
        with self.profiler():
            while not self.finished:
                self.train_epoch()
                predictions = self.finish_epoch(log)
                if self.finished or self.epoch % self.config.checkpoint.every_epochs == 0:
                    self.save()
        return predictions or self.predict(self.test)

    def train_epoch(self) -> None:
        total = self.pipeline.steps_per_epoch
        progress = f"epoch {self.epoch + 1}/{self.config.epochs}"
        self.epoch_clock, self.epoch_images, self.epoch_waited = time.monotonic(), 0, 0.0
        self.input_before = self.phases["input"]
        plans = self.pipeline.plans(self.epoch, self.epoch_step, self.config.epochs)
        for epoch_step in self.report.steps(progress, self.epoch_step, total):
            waiting = time.monotonic()
            plan = next(plans)
            waited = time.monotonic() - waiting
            self.epoch_waited += waited
            self.phases["input"] += waited
            set_rate(self.optimizer, self.config.schedule, self.epoch, epoch_step, total)
            self.key_noise(epoch_step, (self.epoch + epoch_step / total) / self.config.epochs)
            self.train_step(plan)
            self.epoch_images += len(plan)
            self.epoch_step, self.step = epoch_step + 1, self.step + 1
            self.after_step()
            if self.finished:
                break
            self.meet()

    def key_noise(self, epoch_step: int, done: float) -> None:
        """Seed what the network draws by itself in this step, on this rank: a resumed run draws
        what the unbroken one would have. And tell its layers the share of the training done."""
        seed = torch_seed(self.config.seed, "network", self.epoch, epoch_step, self.world.rank)
        torch.default_generator.manual_seed(seed)
        if self.world.device.type == "cuda":
            torch.cuda.manual_seed(seed)
        for clock in self.clocks:
            clock.done.fill_(done)

    @timed("step")
    def train_step(self, plan: BatchPlan) -> None:
        """One update: forward, loss, backward of each micro-batch, then the optimizer and the average.

        The loss is the mean over the global batch, whatever the ranks' shares: DDP averages over
        the ranks, hence the factor.
        """
        parts = self.parts(len(plan))
        with micro_batches(self.model, len(parts)) as after_each:
            for number, (positions, weight) in enumerate(parts, start=1):
                batch = self.make_batch(plan, positions)
                self.groups.set(len(plan), self.config.bn_groups, positions)
                self.features.set(batch.mix, positions)
                with self.no_sync(number < len(parts)):
                    answer = self.answer(batch)
                    losses = self.lesson.losses(answer, batch.targets, self.losses)
                    scale = weight * self.world.size / batch.global_size
                    self.scaler.scale(losses.sum() * scale).backward()
                if weight:
                    self.sums.add(losses, answer[0], batch.targets)
                after_each()
        if self.world.device.type == "cpu":  # reading a loss on a GPU would make it wait
            # The gradient is the ranks' mean: a loss that is not finite shows on all of them.
            self.require_finite("training loss", [float(self.sums.values[0]), self.any_gradient()])
        self.clip()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        self.average.update(self.epoch, self.step)

    def make_batch(self, plan: BatchPlan, positions: np.ndarray) -> Batch:
        """The images and targets of some positions; made within the step, but input's time."""
        began = time.monotonic()
        batch = self.pipeline.batch(plan, positions)
        spent = time.monotonic() - began
        self.phases["input"] += spent
        self.phases["step"] -= spent
        return batch

    def answer(self, batch: Batch) -> tuple[Tensor, ...]:
        """What the network answers, logits [n, K] first, in fp32 or better."""
        with self.autocast():
            answer = self.lesson.ask(self.network, batch.images, batch.targets)
        return tuple(a.to(torch.promote_types(a.dtype, torch.float32)) for a in answer)

    def losses(self, logits: Tensor, targets: Tensor) -> Tensor:
        """The recipe's loss [n] of logits [n, K] with soft targets [n, K], in fp32 or better."""
        config, targets = self.config, targets.to(logits.dtype)
        return soft_losses(config.schedule, logits, targets, config.aug.label_smoothing)

    def clip(self) -> None:
        """Scale the gradients, which are the ranks' mean by now, down to the recipe's norm."""
        norm = self.config.schedule.clip_norm
        if norm is not None:
            self.scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(self.model.parameters(), norm)

    def parts(self, batch: int) -> list[tuple[np.ndarray, float]]:
        """This rank's micro-batches as (positions in the global batch, weight 1).

        A rank without images (a last batch smaller than the number of ranks) takes an image of
        another with weight 0, so that it joins every collective.
        """
        rank, size, accumulate = self.world.rank, self.world.size, self.config.trainer.accumulate
        mine = range(rank * accumulate, (rank + 1) * accumulate)
        cut = [share(batch, part, size * accumulate) for part in mine]
        return [(p, 1.0) for p in cut if len(p)] or [(share_or_last(batch, rank, size), 0.0)]

    def autocast(self) -> torch.autocast:
        dtype = self.config.dtype
        return torch.autocast(self.world.device.type, dtype, enabled=dtype != torch.float32)

    def no_sync(self, wanted: bool) -> contextlib.AbstractContextManager[None]:
        """Leave gradients where they are until the last micro-batch."""
        if wanted and isinstance(self.network, nn.parallel.DistributedDataParallel):
            return self.network.no_sync()
        return contextlib.nullcontext()

    def any_gradient(self) -> float:
        """One number that is not finite if the loss was not: of the gradient of the last bias."""
        *_, bias = self.model.parameters()
        return 0.0 if bias.grad is None else float(bias.grad.sum())

    def require_finite(self, what: str, values: list[float]) -> None:
        """Raises TrainingFailed if one of the values is not finite."""
        if all(map(math.isfinite, values)):
            return
        last = self.checkpoints / LAST
        kept = (
            f"the last good checkpoint is {last}" if last.exists() else "there is no checkpoint yet"
        )
        raise TrainingFailed(
            f"the {what} is not finite: epoch {self.epoch + 1}, at or before step "
            f"{self.step + 1}; {kept}\n"
            f"try a lower schedule.lr (now {self.config.schedule.lr}) or precision=fp32 "
            f"(now {self.config.precision})"
        )

    @contextlib.contextmanager
    def profiler(self) -> Iterator[None]:
        """With `profile`, leaves a trace of steps 3 to 6 in the run's `profile`."""
        if not self.config.profile:
            yield
            return
        folder = self.config.run_dir / "profile"
        with torch.profiler.profile(
            schedule=torch.profiler.schedule(wait=1, warmup=1, active=4, repeat=1),
            on_trace_ready=torch.profiler.tensorboard_trace_handler(str(folder)),
        ) as trace:
            self.after_step = trace.step
            yield
        if not folder.exists():
            self.report.say("profile=true left no trace: it takes three training steps or more")

    # -------------------------------------------------------------------------- evaluation

    def predict(self, data: EvaluationSet, network: nn.Module | None = None) -> Predictions:
        """Of the network that counts: the moving average, where the recipe has one."""
        network = self.average.network if network is None else network
        normalize, dtype = self.pipeline.normalize, self.config.dtype
        return predict(network, data, normalize, self.world, dtype, self.report.batches)

    def raw_metrics(self, data: EvaluationSet) -> dict[str, float]:
        """`raw_top1_error`, ...: of the trained network, where it is not the one that counts."""
        if self.average.network is self.model:
            return {}
        metrics = self.predict(data, self.model).metrics()
        return {f"raw_{name}": value for name, value in metrics.items()}

    @timed("evaluation")
    def finish_epoch(self, log: Log) -> Predictions:
        """Evaluate and log; counts the epoch as finished if it is."""
        elapsed = max(time.monotonic() - self.epoch_clock, 1e-9)
        ranks = self.world.gather(self.sums.values.tolist())
        loss, top1, top5, count = (sum(column) for column in zip(*ranks, strict=True))
        self.require_finite("training loss", [loss])
        self.sums.values.zero_()
        self.world.average_([b for b in self.buffers().values() if b.is_floating_point()])
        train = {
            "loss": loss / count,
            "top1_error": 100.0 * top1 / count,
            "top5_error": 100.0 * top5 / count,
            "lr": self.optimizer.param_groups[0]["lr"],
            "images_per_second": self.epoch_images / elapsed,
            "data_wait": 100.0 * self.epoch_waited / elapsed,
            "input_ceiling": self.input_ceiling(),
        }
        if self.config.trainer.max_steps is None:
            probe = self.predict(self.probe).metrics()
            train |= {f"clean_{name}": value for name, value in probe.items()}
        new = [self.line("train", train)]
        if self.val is not None:
            values = self.predict(self.val).metrics() | self.raw_metrics(self.val)
            new.append(self.line("val", values))
        predictions = self.predict(self.test)
        new.append(self.line("test", predictions.metrics() | self.raw_metrics(self.test)))
        self.require_finite(
            "loss in evaluation mode",
            [line[n] for line in new for n in ("loss", "clean_loss", "raw_loss") if n in line],
        )
        for line in new:
            log.write(line)
        self.lines += new
        if self.epoch_step == self.pipeline.steps_per_epoch:
            self.epoch, self.epoch_step = self.epoch + 1, 0
        if self.val is not None and best_epoch(self.lines, "val") == new[-1]["epoch"]:
            self.save_best()
        self.report.say(
            f"epoch {new[-1]['epoch']}/{self.config.epochs}  step {self.step}  "
            f"lr {train['lr']:g}  train loss {train['loss']:.4f}  "
            + "".join(f"{n['split']} error {n['top1_error']:.2f} %  " for n in new[1:])
            + f"{train['images_per_second']:.0f} images/s ({train['data_wait']:.0f} % waiting for data; "
            f"the input alone: {train['input_ceiling']:,.0f} images/s)"
        )
        return predictions

    def input_ceiling(self) -> float:
        """Images a second that the input would give a network that takes no time: as in this epoch,
        and no more than can be decoded, as far as the run has seen."""
        spent = self.phases["input"] - self.input_before
        return min(self.epoch_images / max(spent, 1e-9), self.pipeline.decoding_rate)

    def line(self, split: str, values: dict[str, float]) -> Line:
        place = {"step": self.step, "epoch": self.epoch + 1, "split": split}
        return place | values | {"time": round(time.time(), 3)}

    def show_images(self, log: Log) -> None:
        """One grid of the first batch, as the network sees it."""
        count = min(self.config.logging.grid, self.config.schedule.batch_size, len(self.probe))
        if count and self.world.is_main:
            images = self.pipeline.batch(self.pipeline.plan(0, 0), np.arange(count)).images
            log.grid(self.pipeline.normalize.inverse(images).cpu())

    # ------------------------------------------------------------------------- checkpoints

    def buffers(self) -> dict[str, Tensor]:
        """Of the network and its average: each rank's own until the epoch's end."""
        return dict(self.model.named_buffers()) | self.average.buffers()

    def meet(self) -> None:
        """After a step: save if that is due on a rank; save and stop if one was asked to.

        What the ranks wish is exchanged during the next step, and known after it: to wait for it
        would cost a round trip at each step. An epoch's end waits, since evaluations are long.
        """
        due = time.monotonic() - self.saved_at > 60 * self.config.checkpoint.every_minutes
        earlier, self.wishes = self.wishes, self.world.ask([self.asked_to_stop(), int(due)])
        wait = self.world.size == 1 or self.epoch_step == self.pipeline.steps_per_epoch
        signum, due_somewhere = self.wishes() if wait else earlier()
        if signum or due_somewhere:
            self.save()
        if signum:
            raise Interrupted(signum)

    @timed("checkpoint")
    def save(self) -> None:
        """Write last.pt; the one before it is kept."""
        now = time.monotonic()
        self.seconds += now - self.clock
        self.clock = self.saved_at = now
        self.wishes = nothing  # what was asked for before this is done
        ranks = self.world.gather(state_of_rank(self))
        self.require_finite("training loss", [part["sums"][0] for part in ranks])
        if self.world.is_main:
            save_last(self.checkpoints, state_of(self, ranks))
        self.world.barrier()

    def save_best(self) -> None:
        if self.world.is_main:
            best = {"run_id": self.config.run_id, "model": self.average.network.state_dict()}
            save_checkpoint(self.checkpoints / "best.pt", best | {"step": self.step})

    def resume(self) -> bool:
        """Continue from the last sound checkpoint, if there is one.

        Raises:
            UserError: no checkpoint is sound, it is of another run, or the data has changed.
        """
        found = self.world.together(
            lambda: newest_sound(self.checkpoints) if self.world.is_main else None
        )
        file, self.warning = self.world.broadcast(found) or (None, "")
        if file is None:
            return False
        state = self.world.together(lambda: load_checkpoint(file))
        self.rehearse()
        self.world.together(lambda: restore(self, state))
        return True

    def rehearse(self) -> None:
        """Take the run's first step once more, before what it changes is restored.

        DistributedDataParallel sums gradients in an order that it learns in its first backward
        pass. Without this, a resumed run of three ranks or more would sum those of its first step
        in another order than the unbroken run, and differ from it by rounding.
        """
        if self.world.size > 1:
            self.network.train()
            self.key_noise(0, 0.0)
            self.train_step(self.pipeline.plan(0, 0))


def nothing() -> list[int]:
    """No signal, and no checkpoint is due."""
    return [0, 0]


def training_pipeline(
    config: Config, splits: Splits, world: World, network: Callable[[], nn.Module]
) -> Pipeline:
    """What serves a config's training batches. `network` is asked for only by mixers inside it,
    which must know the sizes of its maps."""
    inside = config.aug.mix.mixes_features
    return make_pipeline(
        splits.train,
        config.dataset,
        config.aug,
        seed=config.seed,
        batch_size=config.schedule.batch_size,
        device=world.device,
        shares=config.pairing_shares,
        maps=feature_maps(network(), config.dataset.image_size) if inside else (),
        rank=world.rank,
        world_size=world.size,
        repeats=config.schedule.repeated_augmentation,
    )


def make_model(config: Config, *, blank: bool = False) -> nn.Module:
    """The network with the initial weights of the run's seed, whatever else was drawn before.

    Args:
        blank: without weights that would be loaded (`Model.blank`).
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(torch_seed(config.seed, "init"))
        make = config.model.blank if blank else config.model.build
        network = make(config.dataset.num_classes)
    for op in config.aug.network.values():
        network = op.attach(network)
    return network


def compiled(model: nn.Module, config: Config) -> nn.Module:
    """The network as it is trained: the model, compiled if the config says so."""
    if not config.trainer.compile:
        return model
    torch.use_deterministic_algorithms(config.trainer.deterministic)  # tells inductor as well
    chosen: Any = torch.compile(model, mode=config.trainer.compile_mode)
    return chosen


def set_determinism(on: bool) -> None:
    """The same bits from the same inputs on the same hardware; fp32 in full precision."""
    torch.set_float32_matmul_precision("highest")  # fp32 is fp32: no TF32 on GPUs
    torch.backends.cudnn.allow_tf32 = False
    if on:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # what cuBLAS asks for
    # Not use_deterministic_algorithms: that imports inductor, which `compiled` tells by itself.
    torch.set_deterministic_debug_mode("error" if on else "default")
    # Filling fresh memory costs time and hides nothing here.
    setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)  # noqa: B010
    torch.backends.cudnn.benchmark = not on


def best_epoch(lines: list[Line], split: str) -> int:
    """The epoch of the lowest top-1 error; of equal ones the last, as in the authors' code."""
    scored = [line for line in lines if line["split"] == split]
    return int(min(reversed(scored), key=lambda line: line["top1_error"])["epoch"])

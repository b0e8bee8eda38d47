"""What a run says while it trains: metrics.jsonl, TensorBoard, and the terminal."""

from __future__ import annotations

import json
import shutil
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor

from cutmix_exp.config import Config
from cutmix_exp.files import write_text

Line = dict[str, Any]


class RunLog:
    """metrics.jsonl and its mirror in TensorBoard, written by rank 0.

    The lines of a checkpoint are the truth: a resumed run writes both files anew from them, so
    that each step is there once.
    """

    def __init__(self, run_dir: Path, config: Config, lines: list[Line]) -> None:
        from torch.utils.tensorboard import SummaryWriter

        threading.excepthook = quiet_about_files
        self.file = run_dir / "metrics.jsonl"
        write_text(self.file, "".join(json.dumps(line) + "\n" for line in lines))
        shutil.rmtree(run_dir / "tb", ignore_errors=True)
        self.config = config
        self.board = SummaryWriter(str(run_dir / "tb"))
        self.board.add_text("config", f"```yaml\n{yaml.safe_dump(config.to_dict())}```")
        for line in lines:
            self._mirror(line)

    def write(self, line: Line) -> None:
        with open(self.file, "a") as file:
            file.write(json.dumps(line) + "\n")
        self._mirror(line)
        self.board.flush()

    def _mirror(self, line: Line) -> None:
        for key, value in line.items():
            if key not in ("step", "epoch", "split", "time"):
                tag = f"{line['split']}/{key}"
                self.board.add_scalar(tag, value, line["step"], walltime=line["time"])

    def grid(self, images: Tensor) -> None:
        """A picture of images [n, 3, H, W] in [0, 1]."""
        if len(images):
            self.board.add_images("augmented training images", images, 0)

    def close(self, metrics: dict[str, float]) -> None:
        """Write the hyper-parameters with the final metrics, and end the files."""
        from torch.utils.tensorboard.summary import hparams

        config = self.config
        chosen = {
            "dataset": config.dataset.name,
            "model": config.model.name,
            "aug": config.aug.name,
            "seed": config.seed,
            "precision": config.precision,
            "epochs": config.epochs,
            "batch_size": config.schedule.batch_size,
            "lr": config.schedule.lr,
            "bn_group_size": config.bn_group_size,
        }
        for summary in hparams(chosen, metrics):
            self.board._get_file_writer().add_summary(summary)
        for name, value in metrics.items():
            self.board.add_scalar(name, value, 0)
        self.board.close()


def quiet_about_files(args: threading.ExceptHookArgs) -> None:
    """TensorBoard writes in a thread of its own and raises that thread's error again in ours; there
    a full disk is told without a traceback."""
    if not isinstance(args.exc_value, OSError):
        threading.__excepthook__(args)


class NoLog:
    """The log of all ranks but the first."""

    def write(self, line: Line) -> None:
        pass

    def grid(self, images: Tensor) -> None:
        pass

    def close(self, metrics: dict[str, float]) -> None:
        pass


class Reporter:
    """The terminal: a bar that moves where a person looks on, plain lines in a log file."""

    def __init__(self, active: bool) -> None:
        self.active = active
        self.console = Console(soft_wrap=True, highlight=False)
        self.started = time.monotonic()

    def say(self, text: str) -> None:
        if self.active:
            self.console.print(text, markup=False)

    def steps(self, text: str, first: int, total: int) -> Iterator[int]:
        """Count the steps first..total-1 of a piece of work."""
        if not (self.active and self.console.is_terminal):
            yield from range(first, total)
            return
        columns = (TextColumn(text), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        with Progress(*columns, console=self.console, transient=True) as bar:
            task = bar.add_task("", total=total, completed=first)
            for step in range(first, total):
                yield step
                bar.update(task, completed=step + 1)

    def batches(self, total: int) -> Iterator[int]:
        """Count the batches of an evaluation."""
        return self.steps("evaluation", 0, total)

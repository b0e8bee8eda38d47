"""Examine a trained network: python scripts/evaluate.py run=RUN suite=NAME (see README.md)."""

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import yaml

from cutmix_exp import cli
from cutmix_exp.errors import UserError
from cutmix_exp.evaluate import evaluate
from cutmix_exp.evaluation.base import load_suite, suite_names
from cutmix_exp.launch import in_processes
from cutmix_exp.subject import find


@dataclass(frozen=True, kw_only=True)
class Options:
    """Run a suite on a network; what it finds goes into the network's record.

    run=RUN              a run_id, a run's directory, a checkpoint file, timm:NAME or
                         torchvision:NAME (weights that these publish)
    suite=NAME           a file of configs/suite, or all: every one that the data at hand allows,
                         and a report card of them in RESULTS_DIR/cards
    weights=last         of a run: last or best (by the validation split)
    runs_dir=runs        where runs are
    results_dir=results  where records are that are committed
    force=true           run what the record has already

    suite.FIELD=VALUE changes a field of the suite. Every other name=value is, for a run, what of the
    machine may differ (device=cpu, precision=fp32, dataset.root=FOLDER, ...), for a checkpoint from
    elsewhere an override of train.py that says what it is: model=pyramidnet dataset=cifar100.
    """

    run: str
    suite: str
    weights: str = "last"
    runs_dir: str = "runs"
    results_dir: str = "results"
    force: bool = False


def command(arguments: list[str]) -> int:
    rest: list[str] = []
    options = cli.parse(Options, arguments, rest=rest)
    changes: dict[str, Any] = {}
    for word in [w for w in rest if w.startswith("suite.")]:
        name, _, value = word.removeprefix("suite.").partition("=")
        changes[name] = yaml.safe_load(value)
        rest.remove(word)
    every = options.suite == "all"
    if every and changes:
        raise UserError(
            "suite=all runs every suite as its file says; name one to change its fields"
        )
    suites = [load_suite(n, changes) for n in (suite_names() if every else [options.suite])]
    if every:
        suites = [suite for suite in suites if suite.in_all]
    origin = find(options.run, Path(options.runs_dir), options.weights, rest)
    work = partial(
        evaluate,
        origin,
        suites,
        Path(options.results_dir),
        force=options.force,
        demanded=not every,
        card=every,
    )
    in_processes(origin.config, work)
    return 0


if __name__ == "__main__":
    cli.main(command)

"""Search for hyper-parameters on the validation split: python scripts/search.py (see README.md)."""

from dataclasses import dataclass

from cutmix_exp import cli
from cutmix_exp.sweeps import search


@dataclass(frozen=True, kw_only=True)
class Options(search.Search):
    """Search for the hyper-parameters with the least validation error, by Optuna.

    trials=20               in all; the same command with more of them goes on
    metric=val/top1_error   or val/loss, val/top5_error; on held-out images: dataset.val_size=N
    epoch=best              or last: which epoch's value counts
    optimise_test=false     true allows metric=test/..., which makes the test error worthless
    study=NAME              default: it follows from what is searched
    sampler_seed=0          of what Optuna draws
    jobs=N, retries=1, engine=local   as of run_table.py: trials at a time, ...

    Every other name=value is handed to train.py; those with several values are searched:

    python scripts/search.py dataset=digits model=resnet model.depth=8 budget=smoke \\
        dataset.val_size=200 aug=cutmix,mixup 'schedule.lr=tag(log,interval(0.01,1.0))'
    """


def command(arguments: list[str]) -> int:
    words: list[str] = []
    options = cli.parse(Options, arguments, rest=words)
    return search.search(options, words)


if __name__ == "__main__":
    cli.main(command)

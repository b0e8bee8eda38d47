"""Speed beside the alternatives, in one run on this machine: python scripts/benchmark.py all"""

import os
import tempfile
from dataclasses import dataclass
from pathlib import Path

from cutmix_exp import cli
from cutmix_exp.benchmarking.cases import ALL, GROUPS, Case
from cutmix_exp.benchmarking.inputs import write_jpegs
from cutmix_exp.benchmarking.report import (
    HEADER,
    draw,
    keep,
    load,
    machine,
    machine_name,
    rows,
    write_page,
)
from cutmix_exp.benchmarking.runner import run
from cutmix_exp.errors import UserError
from cutmix_exp.schema import option


@dataclass(frozen=True, kw_only=True)
class Options:
    """Measure this project beside plain PyTorch, PIL, torchvision and timm.

    python scripts/benchmark.py COMMAND [name=value ...]

    arithmetic   the machine's own matrix products, bf16 beside fp32
    startup      command to first training step
    input        CIFAR batches: crop, flip, normalise
    mix          CutMix of a batch
    decode       JPEG files to 224x224
    evaluation   predictions of a network
    scaling      two processes against one
    memory       peak memory of a training step
    epoch        input, mixing and training step, model by model
    step         the training step alone
    all          all but `step`: ten minutes or more on two cores
    table        write the page and the chart from the JSON file, measure nothing

    effort=1.0         length of the turns; above 1 also their number
    only=TEXT          of the cases, those whose name contains this
    out=FOLDER         default: results/benchmarks
    """

    effort: float = option(1.0, gt=0)
    only: str = ""
    out: str = "results/benchmarks"


def say(text: str) -> None:
    print(text, flush=True)


def command(arguments: list[str]) -> int:
    names = [word for word in arguments if "=" not in word and not word.startswith("-")]
    options = cli.parse(Options, [word for word in arguments if word not in names])
    allowed = [*GROUPS, "all", "table"]
    names = names or ["all"]
    if len(names) != 1 or names[0] not in allowed:
        raise UserError(
            f"expected one command of: {', '.join(allowed)}; got {' '.join(names) or 'none'}"
        )
    (name,) = names
    file = Path(options.out) / f"{machine_name(machine())}.json"
    if name == "table":
        files = sorted(Path(options.out).glob("*.json"))
        if not files:
            raise UserError(
                f"there are no results in {options.out}; measure some: benchmark.py all"
            )
        for each in files:
            publish(each)
        return 0
    with tempfile.TemporaryDirectory() as folder:
        if name in ("all", "epoch", "decode"):
            write_jpegs(Path(folder))
        chosen = [
            case for group in (ALL if name == "all" else [name]) for case in GROUPS[group](folder)
        ]
        measure([case for case in chosen if options.only in case.name], options, file)
    return 0


def measure(cases: list[Case], options: Options, file: Path) -> None:
    """Measure one case after the other; each is kept as soon as it is done."""
    if not cases:
        raise UserError(f"only={options.only} leaves no case")
    busy = os.getloadavg()[0] > 0.5
    if busy:
        say("note: other programs are running on this machine; the rounds will differ more")
    failed = []
    for number, case in enumerate(cases, start=1):
        try:
            keep(
                file,
                [
                    run(
                        case,
                        options.effort,
                        lambda text, n=number: say(f"[{n}/{len(cases)}] {text}"),
                    )
                ],
            )
        except UserError as error:
            failed.append(f"{error}")
            say(f"failed: {error}")
    if file.exists():
        publish(file)
    if failed:
        raise UserError(f"{len(failed)} of {len(cases)} cases failed: {'; '.join(failed)}")


def publish(file: Path) -> None:
    """Print the table; write the page and the chart beside the file."""
    whole = load(file)
    write_page(file.with_suffix(".md"), whole)
    draw(file.with_suffix(".png"), whole)
    say("")
    for row in [HEADER, *rows(whole)]:
        say(" | ".join(row))
    say(f"\n{file}, with {file.with_suffix('.md').name} and {file.with_suffix('.png').name}")


if __name__ == "__main__":
    cli.main(command)

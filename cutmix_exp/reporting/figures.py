"""The paper's Figures 2 and 3 (and curves of our own), drawn from the records of their tables."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np

from cutmix_exp.reporting.evaluations import entries_of, with_findings
from cutmix_exp.reporting.record import Record
from cutmix_exp.reporting.statistics import Summary, summarize
from cutmix_exp.reporting.tables import Line, Section, Table, sections


@dataclass(frozen=True)
class Figure:
    """A picture that is made from one table.

    Attributes:
        name: of the file, without `.png`.
        table: name of the table.
        draw: puts a section of the table into matplotlib's axes.
    """

    name: str
    table: str
    draw: Callable[[Any, Section], None]


def draw_curves(axes: Any, section: Section, labels: Sequence[str] = ()) -> None:
    """Test errors by epoch: the mean of the seeds, and the range they span.

    Args:
        labels: of the rows that are shown; all by default.
    """
    for line in _with_curves(section, labels):
        curves = np.array([_curve(r) for r in line.records])
        epochs = np.arange(1, curves.shape[1] + 1)
        (drawn,) = axes.plot(epochs, curves.mean(0), linewidth=1.2, label=_legend(line, section))
        if len(curves) > 1:
            axes.fill_between(
                epochs, curves.min(0), curves.max(0), color=drawn.get_color(), alpha=0.2
            )
    axes.set(xlabel="epoch", ylabel="top-1 error on the test set (%)")
    shown = [_curve(r) for line in _with_curves(section, labels) for r in line.records]
    if shown:  # errors fall fast at first: the axis ends where the curves can be told apart
        lowest = [min(curve) for curve in shown]
        highest = max(max(curve) for curve in shown)
        axes.set_ylim(0.8 * min(lowest), min(1.05 * highest, 4 * max(lowest)) + 0.1)


def draw_values(axes: Any, section: Section) -> None:
    """Errors by row, last and best epoch: mean and 95% interval, with the baseline's means as lines."""
    baseline = section.table.baseline_of(section.table.rows[-1])
    rows = [row for row in section.table.rows if row.label != baseline]
    place = {row.label: i for i, row in enumerate(rows)}
    for i, (selection, style) in enumerate((("last", "o"), ("best", "s"))):
        found = [(line, summarize(line.top1(selection))) for line in section.lines if line.records]
        points = [(place[line.row.label], s) for line, s in found if line.row.label in place]
        x = [at + 0.1 * (2 * i - 1) for at, _ in points]
        axes.errorbar(
            x,
            [s.mean for _, s in points],
            yerr=[_half_width(s) for _, s in points],
            fmt=style,
            capsize=3,
            color=f"C{i}",
            label=f"{selection} epoch, 95% interval",
        )
        for line, s in found:
            if line.row.label == baseline:
                text = f"baseline, {selection} epoch"
                axes.axhline(s.mean, color=f"C{i}", linestyle="--", linewidth=1, label=text)
    axes.set_xticks(range(len(rows)), [row.label.replace(": ", "\n") for row in rows])
    axes.set_xlim(-0.5, len(rows) - 0.5)
    axes.set(ylabel="top-1 error on the test set (%)")


@dataclass(frozen=True)
class Precisions:
    """Draws the training loss by epoch of one row's runs in two precisions or more, and in an inset
    what each differs by from the last precision's first run; says how far precisions and seeds lie apart.

    Attributes:
        label: of the row.
    """

    label: str

    def __call__(self, axes: Any, section: Section) -> None:
        lines = _with_curves(section, (self.label,))
        if len(lines) < 2:
            return
        runs = [record for line in lines for record in line.records]
        inset = axes.inset_axes((0.4, 0.4, 0.57, 0.52))
        reference = lines[-1].records[0]
        epochs = np.arange(1, len(_losses(reference)) + 1)
        for number, record in enumerate(runs):
            style = {"color": f"C{number}", "linewidth": 1.2}
            axes.plot(epochs, _losses(record), label=_run(record), **style)
            inset.plot(epochs, _losses(record) - _losses(reference), **style)
        inset.set_title(f"difference from {_run(reference)}", fontsize=8)
        inset.tick_params(labelsize=8)
        inset.grid(alpha=0.3)
        told = [f"{what}: {gap:.4f}" for what, gap in loss_gaps(runs).items()]
        axes.set_xlabel("epoch\nmean difference of an epoch: " + "; ".join(told), fontsize=9)
        axes.set(ylabel=f"training loss, {self.label}")


def loss_gaps(runs: Sequence[Record]) -> dict[str, float]:
    """How far training losses lie apart, the mean of |a - b| over epochs and pairs: of two
    precisions with one seed, and of two seeds in one precision. What has no pair is left out."""
    gaps: dict[str, list[float]] = {}
    for a, b in combinations(runs, 2):
        (one, other), same_seed = (r["protocol"] for r in (a, b)), a["seed"] == b["seed"]
        if one["bn_group_size"] != other["bn_group_size"]:
            continue
        if (one["precision"] == other["precision"]) == same_seed:
            continue
        precision = one["precision"]
        what = (
            f"{precision} to {other['precision']}, same seed"
            if same_seed
            else f"seeds of {precision}"
        )
        gaps.setdefault(what, []).append(float(np.abs(_losses(a) - _losses(b)).mean()))
    return {what: float(np.mean(found)) for what, found in gaps.items()}


def _losses(record: Record) -> np.ndarray:
    return np.array(record["history"]["train/loss"])


def _run(record: Record) -> str:
    return f"{record['protocol']['precision']}, seed {record['seed']}"


def _paper_curves(axes: Any, section: Section) -> None:
    draw_curves(axes, section, ("Baseline", "CutMix"))


@dataclass(frozen=True)
class Evaluated:
    """Draws a curve that a suite has found of each network: the mean of the seeds.

    Attributes:
        suite, curve: where a record has it.
        x, y: the curve's columns.
        labels: of the axes.
    """

    suite: str
    curve: str
    x: str
    y: str
    labels: tuple[str, str]

    def __call__(self, axes: Any, section: Section) -> None:
        for line in section.lines:
            found = [entry for entry in entries_of(line.records, self.suite) if entry]
            curves = [e["curves"][self.curve] for e in found if self.curve in e["curves"]]
            if curves:
                mean = np.mean([curve[self.y] for curve in curves], axis=0)
                axes.plot(curves[0][self.x], mean, marker=".", label=_legend(line, section))
        axes.set(xlabel=self.labels[0], ylabel=self.labels[1])


def _figure5(name: str, table: str) -> tuple[Figure, ...]:
    """The four panels of the paper's Figure 5, of the networks of a table."""
    sides = {"centre": "covered", "boundary": "uncovered"}
    occluded = tuple(
        Figure(
            f"{name}_{kind}",
            table,
            Evaluated(
                "occlusion",
                f"{kind}_occlusion",
                "side",
                "top1_error",
                (f"side of the {state} square in the centre (px)", "top-1 error (%)"),
            ),
        )
        for kind, state in sides.items()
    )
    between = tuple(
        Figure(
            f"{name}_{kind.lower()}",
            table,
            Evaluated(
                "in_between",
                f"in_between_{kind.lower()}",
                "ratio",
                "neither_error",
                (f"combination ratio of two images, by {kind}", "neither class predicted (%)"),
            ),
        )
        for kind in ("Mixup", "CutMix")
    )
    return occluded + between


FIGURES = (
    *_figure5("figure5_imagenet", "figure5_imagenet"),
    *_figure5("figure5_cifar10_jpeg", "evaluations_cifar10_jpeg"),
    *_figure5("figure5_tiny_imagenet", "evaluations_tiny_imagenet"),
    Figure("figure2_cifar100_pyramidnet200", "cifar100_pyramidnet200", _paper_curves),
    Figure("figure2_imagenet_resnet50", "imagenet_resnet50", _paper_curves),
    Figure("figure3_alpha", "alpha_ablation", draw_values),
    Figure("figure3_layer", "layer_ablation", draw_values),
    Figure("curves_cifar10_jpeg_resnet20", "cifar10_jpeg_resnet20", draw_curves),
    Figure("precisions_cifar10_jpeg", "cifar10_jpeg_resnet20", Precisions("Baseline, 15 epochs")),
    Figure("curves_tiny_imagenet", "tiny_imagenet", draw_curves),
)


def draw(figure: Figure, table: Table, records: list[Record]) -> bytes | None:
    """The figure as PNG, at the table's own budget or the first that has something to show; None
    where there are no records for it."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    for section in map(with_findings, sections(table, records)):
        if not section.has_records:
            continue
        drawing, axes = pyplot.subplots(figsize=(7, 4.5), layout="constrained")
        try:
            figure.draw(axes, section)
            if not axes.has_data():
                continue
            counts = sorted({len(line.records) for line in section.lines if line.records})
            seeds = " to ".join(str(n) for n in dict.fromkeys((counts[0], counts[-1])))
            axes.set_title(f"{table.title}\nbudget {section.budget}, seeds: {seeds}", fontsize=10)
            axes.grid(alpha=0.3)
            drawing.legend(loc="outside lower center", ncols=3, fontsize=8)
            out = io.BytesIO()
            drawing.savefig(out, format="png", dpi=120)
            return out.getvalue()
        finally:
            pyplot.close(drawing)
    return None


def _with_curves(section: Section, labels: Sequence[str]) -> list[Line]:
    """The lines that are shown, without records whose curve is not whole."""
    lines = [line for line in section.lines if not labels or line.row.label in labels]
    whole = [
        Line(n.row, n.config, [r for r in n.records if len(_curve(r)) == _epochs(r)]) for n in lines
    ]
    return [line for line in whole if line.records]


def _curve(record: Record) -> list[float]:
    return list(record["history"].get("test/top1_error", []))


def _epochs(record: Record) -> int:
    return int(record["config"]["schedule"]["epochs"])


def _legend(line: Line, section: Section) -> str:
    """The row's label, with the protocol where the row has several."""
    same = [other for other in section.lines if other.row.label == line.row.label]
    if len(same) == 1:
        return line.row.label
    return f"{line.row.label} ({line.protocol('precision')}, BN {line.protocol('bn_group_size')})"


def _half_width(summary: Summary) -> float:
    width = (summary.high - summary.low) / 2
    return 0.0 if np.isnan(width) else width

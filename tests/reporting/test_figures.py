"""Figures: drawn where there are records, and nowhere else; the axes hold the records' numbers."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pytest
from matplotlib import pyplot

from cutmix_exp.config import Config
from cutmix_exp.evaluation.base import load_suite
from cutmix_exp.reporting.figures import (
    FIGURES,
    Precisions,
    draw,
    draw_curves,
    draw_values,
    loss_gaps,
)
from cutmix_exp.reporting.tables import load_table, row_config, sections, table_names
from cutmix_exp.schema import identity_of
from scripts.make_tables import write_figure
from tests.reporting.test_evaluations import entry
from tests.reporting.test_tables import BASELINE, CUTMIX, record

matplotlib.use("Agg")
BY_NAME = {figure.name: figure for figure in FIGURES}


def with_curve(overrides: list[str], seed: int, last: float) -> dict[str, Any]:
    """A record of 300 epochs that ends at an error."""
    made = record(overrides, seed, last)
    made["history"] = {"test/top1_error": list(np.linspace(90.0, last, 300))}
    made["history"]["train/loss"] = list(np.linspace(5.0, 0.1, 300))
    errors = [last, 50.0, 90.0]
    sides = {"side": [0.0, 16.0, 32.0], "top1_error": errors}
    ratios = {"ratio": [0.0, 0.5, 1.0], "neither_error": errors}
    curves = {
        "occlusion": {"centre_occlusion": sides, "boundary_occlusion": sides},
        "in_between": {"in_between_mixup": ratios, "in_between_cutmix": ratios},
    }
    made["evaluations"] = {name: {**entry(name), "curves": c} for name, c in curves.items()}
    return made


@pytest.fixture
def axes() -> Any:
    drawing, made = pyplot.subplots()
    yield made
    pyplot.close(drawing)


def test_curves_are_the_mean_of_the_seeds(axes: Any) -> None:
    records = [with_curve(CUTMIX, 0, 14.0), with_curve(CUTMIX, 1, 16.0)]
    records += [with_curve(BASELINE, 0, 17.0)]
    cutoff = with_curve(BASELINE, 1, 99.0)  # a curve that is not whole is left out
    cutoff["history"]["test/top1_error"].pop()
    (section,) = sections(load_table("cifar100_pyramidnet200"), [*records, cutoff])
    draw_curves(axes, section, ("Baseline", "CutMix"))
    curves = {line.get_label(): line.get_xydata() for line in axes.lines}
    assert set(curves) == {"Baseline", "CutMix"}
    assert tuple(curves["CutMix"][-1]) == (300, 15.0)
    assert tuple(curves["Baseline"][-1]) == (300, 17.0)


def test_losses_of_precisions_and_seeds_are_told_apart(axes: Any) -> None:
    table = load_table("cifar10_jpeg_resnet20")
    words = [*table.common, "aug=baseline", "schedule.epochs=2"]
    table = replace(table, rows=(replace(table.rows[0], overrides=tuple(words[-2:])),))

    def run(precision: str, seed: int, loss: list[float]) -> dict[str, Any]:
        made = record(words, seed, 10.0)
        made["protocol"] = made["protocol"] | {"precision": precision}
        made["history"] = {"test/top1_error": [20.0, 10.0], "train/loss": loss}
        return made

    runs = [run("bf16", 0, [2.0, 1.0]), run("fp32", 0, [2.5, 0.9]), run("fp32", 1, [2.4, 0.7])]
    # By hand: |2 - 2.5| and |1 - 0.9|; |2.5 - 2.4| and |0.9 - 0.7|. Another precision with another
    # seed says nothing.
    gaps = {"bf16 to fp32, same seed": 0.3, "seeds of fp32": 0.15}
    assert loss_gaps(runs) == pytest.approx(gaps)
    other_groups = run("fp32", 0, [9.0, 9.0])  # a third difference, of neither kind
    other_groups["protocol"] = other_groups["protocol"] | {"bn_group_size": 7}
    assert loss_gaps([*runs, other_groups]) == pytest.approx(gaps)
    (section,) = sections(table, runs)
    Precisions(table.rows[0].label)(axes, section)
    curves = {line.get_label(): list(line.get_ydata()) for line in axes.lines}
    assert curves["fp32, seed 1"] == [2.4, 0.7] and len(curves) == 3
    (inset,) = axes.child_axes
    assert [list(line.get_ydata()) for line in inset.lines][1] == [0.0, 0.0]
    assert "0.3000" in axes.get_xlabel() and "0.1500" in axes.get_xlabel()


def test_one_precision_alone_draws_nothing(axes: Any) -> None:
    table = load_table("cifar10_jpeg_resnet20")
    made = record([*table.common, *table.rows[0].overrides], 0, 10.0)
    made["history"] = {"test/top1_error": [10.0] * 15, "train/loss": [1.0] * 15}
    Precisions(table.rows[0].label)(axes, sections(table, [made])[0])
    assert not axes.has_data()


def test_values_stand_over_their_rows(axes: Any) -> None:
    records = [record(BASELINE, 0, 17.0), record(CUTMIX, 0, 14.0), record(CUTMIX, 1, 15.0)]
    records += [record([*CUTMIX, "aug.mix.alpha=0.25"], 0, 16.0)]
    (section,) = sections(load_table("alpha_ablation"), records)
    draw_values(axes, section)
    labels = [text.get_text() for text in axes.get_xticklabels()]
    assert labels == ["0.1", "0.25", "0.5", "1.0", "2.0", "4.0"]
    last, best = (bars.lines[0].get_xydata() for bars in axes.containers)
    assert last[:, 1].tolist() == [16.0, 14.5] and np.rint(last[:, 0]).tolist() == [1, 3]
    assert best[:, 1].tolist() == [15.5, 14.0]
    heights = [line.get_ydata()[0] for line in axes.lines if line.get_linestyle() == "--"]
    assert heights == [17.0, 16.5]


def test_files_are_made_only_where_there_are_records(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    figure = BY_NAME["figure2_cifar100_pyramidnet200"]
    file = tmp_path / f"{figure.name}.png"
    write_figure(figure, [with_curve(CUTMIX, 0, 14.0)], tmp_path)
    assert file.read_bytes().startswith(b"\x89PNG") and file.stat().st_size > 5000
    cutout = ["dataset=cifar100", "model=pyramidnet", "aug=cutout"]
    write_figure(figure, [with_curve(cutout, 0, 14.0)], tmp_path)  # no row of this figure
    assert not file.exists() and "no records" in capsys.readouterr().out


def test_curves_of_suites_are_the_mean_of_the_seeds(axes: Any) -> None:
    cutmix = ["dataset=imagenet", "model=resnet", "aug=cutmix"]
    records = [with_curve(cutmix, 0, 20.0), with_curve(cutmix, 1, 24.0)]
    records.append(record([*cutmix[:2], "aug=mixup"], 0, 22.0))  # not examined
    figure = BY_NAME["figure5_imagenet_centre"]
    (section,) = sections(load_table(figure.table), records)
    figure.draw(axes, section)
    (line,) = axes.lines
    assert line.get_label() == "CutMix"
    assert line.get_xydata().tolist() == [[0.0, 22.0], [16.0, 50.0], [32.0, 90.0]]


def test_curves_of_other_settings_are_left_out(axes: Any) -> None:
    cutmix = ["dataset=imagenet", "model=resnet", "aug=cutmix"]
    records = [with_curve(cutmix, 0, 20.0), with_curve(cutmix, 1, 24.0)]
    shorter = records[1]["evaluations"]["occlusion"]
    shorter["suite"] = identity_of(replace(load_suite("occlusion"), steps=2))
    shorter["curves"] = {"centre_occlusion": {"side": [0.0, 32.0], "top1_error": [24.0, 90.0]}}
    figure = BY_NAME["figure5_imagenet_centre"]
    (section,) = sections(load_table(figure.table), records)
    figure.draw(axes, section)
    (line,) = axes.lines
    assert line.get_xydata().tolist() == [[0.0, 20.0], [16.0, 50.0], [32.0, 90.0]]


@pytest.mark.parametrize("figure", FIGURES, ids=lambda f: f.name)
def test_every_figure_can_be_drawn(figure: Any) -> None:
    """From two records of each row that is available, in two precisions."""
    assert figure.table in table_names()
    table = load_table(figure.table)
    assert draw(figure, table, []) is None
    rows = [row for row in table.rows if isinstance(row_config(table, row), Config)]
    records = [with_curve(table.overrides(row), 0, 20.0) for row in rows[:2]]
    protocols = [{**made["protocol"], "precision": "fp16"} for made in records]
    records += [{**made, "protocol": p} for made, p in zip(records, protocols, strict=True)]
    for made in records:
        made["config"]["schedule"]["epochs"] = 300
    if rows:
        assert draw(figure, replace(table, rows=tuple(rows)), records) is not None

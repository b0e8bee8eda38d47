"""A report card: all that is known of one network on one page, with its pictures."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np

from cutmix_exp.files import write_bytes, write_text
from cutmix_exp.reporting.examined import Examined
from cutmix_exp.reporting.markdown import bullets, table_of
from cutmix_exp.reporting.statistics import bootstrap_mean


def write_card(of: Examined, folder: Path) -> Path:
    """Write `<folder>/<name>.md` and its pictures below `<folder>/<name>/`; returns the page."""
    pictures = folder / of.name
    parts = [f"# {of.name}\n", *_head(of), "", *_training(of)]
    for suite, entry in sorted(of.record["evaluations"].items()):
        parts += [f"## {suite}\n", *bullets(_conditions(of, suite, entry)), ""]
        parts += [_metrics(entry["metrics"]), *_choices(entry)]
        shown = []
        for name, curve in entry["curves"].items():
            file = pictures / f"{suite}-curve-{name}.png"
            write_bytes(file, draw_curve(name, curve))
            shown.append(file)
        for file in sorted(of.evaluations.glob(f"{suite}-*.png")):
            if not _is_of_a_longer_name(file.name, suite, list(of.record["evaluations"])):
                write_bytes(pictures / file.name, file.read_bytes())
                shown.append(pictures / file.name)
        parts += [f"![{file.stem}]({of.name}/{file.name})\n" for file in shown]
        parts += bullets([f"not done: {n}: {_first(why)}" for n, why in entry["skipped"].items()])
        parts.append("")
    left_out = of.record.get("evaluations_left_out", {})
    missing = {n: why for n, why in left_out.items() if n not in of.record["evaluations"]}
    if missing:
        parts += ["## Left out\n", *bullets([f"`{n}`: {why}" for n, why in missing.items()]), ""]
    page = folder / f"{of.name}.md"
    write_text(page, "\n".join(parts))
    return page


def _head(of: Examined) -> list[str]:
    config, record = of.record["config"], of.record
    texts = [f"Data set {record['dataset']}, model {record['model']}."]
    if record["status"] == "external":
        texts.append("A network from elsewhere: how it was trained is not known here.")
    else:
        texts.append(
            f"Regularizer {record['aug']}, {config['schedule']['epochs']} epochs, seed "
            f"{record['seed']}, trained in {record['protocol']['precision']}, BatchNorm group "
            f"{record['protocol']['bn_group_size']}."
        )
        cost = record["cost"]
        texts.append(
            f"Training: {cost['wall_seconds'] / 3600:.2f} h on {cost['device']} x {cost['world_size']}, "
            f"{cost['images_per_second']:.0f} images/s, {cost['parameters']:,} parameters."
        )
    return bullets([*texts, "All suites look at the network of the last epoch, unless said."])


def _training(of: Examined) -> list[str]:
    metrics = of.record.get("metrics")
    return ["## Training\n", _metrics(metrics), ""] if metrics else []


def _conditions(of: Examined, suite: str, entry: dict) -> list[str]:
    cost = entry["cost"]
    texts = [
        f"{entry['precision']} on {cost['device']} x {cost['world_size']}, "
        f"{cost['wall_seconds']:.0f} s; checkpoint {entry['checkpoint']}."
    ]
    correct = of.correct(suite)
    if correct is not None:
        spread = bootstrap_mean(100.0 * (~correct.astype(bool)), seed=0)
        texts.append(
            f"Wrong: {spread.mean:.2f} % of {len(correct):,} images, 95% bootstrap interval over "
            f"images {spread.low:.2f} to {spread.high:.2f}."
        )
    return texts


def _choices(entry: dict) -> list[str]:
    """A table of the suite's fields and protocol, as far as they say something."""
    known = {**entry["suite"], **entry["protocol"]}
    hidden = ("class", "name")
    rows = [[k, _shown(v)] for k, v in known.items() if k not in hidden and v is not None]
    return [table_of(["choice", "value"], rows)] if rows else []


def _shown(value: object) -> str:
    """A value for people: of a part its class and fields, lists without brackets."""
    if isinstance(value, dict):
        held = {k: v for k, v in value.items() if k != "class" and v is not None}
        fields = ", ".join(f"{k} {_shown(v)}" for k, v in held.items())
        if "class" not in value:
            return fields
        return f"{value['class']} ({fields})" if fields else str(value["class"])
    if isinstance(value, (list, tuple)):
        return ", ".join(_shown(v) for v in value)
    if isinstance(value, bool):
        return "yes" if value else "no"
    return str(value)


def _metrics(metrics: dict[str, float]) -> str:
    return table_of(["number", "value"], [[name, f"{v:.4g}"] for name, v in metrics.items()])


def _is_of_a_longer_name(file: str, suite: str, suites: list[str]) -> bool:
    """Whether a picture belongs to another suite whose name begins with this one's."""
    return any(s != suite and s.startswith(suite) and file.startswith(f"{s}-") for s in suites)


def _first(text: str) -> str:
    return text.splitlines()[0]


def draw_curve(name: str, curve: dict[str, list[float]]) -> bytes:
    """A PNG of a curve's columns over its first one."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    (x_name, x), *columns = curve.items()
    drawing, axes = pyplot.subplots(figsize=(5, 3.2), layout="constrained")
    try:
        for column, values in columns:
            axes.plot(
                x, np.asarray(values, dtype=float), marker=".", label=column.replace("_", " ")
            )
        axes.set(xlabel=x_name.replace("_", " "), title=name.replace("_", " "))
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
        out = io.BytesIO()
        drawing.savefig(out, format="png", dpi=90)
        return out.getvalue()
    finally:
        pyplot.close(drawing)

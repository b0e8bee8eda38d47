"""Results of one machine: JSON, a table, and a chart."""

from __future__ import annotations

import json
import os
import platform
import re
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

from cutmix_exp.benchmarking.runner import Result
from cutmix_exp.errors import UserError
from cutmix_exp.files import write_atomically, write_json, write_text
from cutmix_exp.reporting.record import PACKAGES, cpu_name, provenance

MIXING_SHARE = 0.1
"""Percent of a ResNet-18 training step that mixing may take."""


def machine() -> dict[str, Any]:
    """What the figures were measured on."""
    flags = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    return {
        "cpu": cpu_name(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "flags": [f for f in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if f in flags.split()],
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "system": platform.platform(),
    }


def title(found: dict[str, Any]) -> str:
    """What tells a machine from others in its page and chart."""
    flags = f" ({', '.join(found['flags'])})" if found["flags"] else ""
    return f"{found['gpu'] or found['cpu']}, {found['cores']} cores{flags}"


def machine_name(found: dict[str, Any]) -> str:
    """A file name: the processor, or the GPU, and the number of cores."""
    slug = re.sub(r"[^a-z0-9]+", "-", str(found["gpu"] or found["cpu"]).lower()).strip("-")
    fast = next((f for f in ("amx_bf16", "avx512_bf16") if f in found["flags"]), "fp32")
    return f"{slug}-{found['cores']}-cores-{fast.replace('_', '-')}"


def keep(file: Path, results: list[Result]) -> dict[str, Any]:
    """Put results into the machine's file, beside those of other cases; returns all of it."""
    whole = load(file) if file.exists() else {"cases": {}}
    known = provenance()
    now = {
        "measured": datetime.now(timezone.utc).strftime("%Y-%m-%d"),
        "git_commit": known["git_commit"],
        "packages": {name: known["packages"][name] for name in PACKAGES},
        "python": known["python"],
        "load": round(os.getloadavg()[2], 2),
    }
    whole["machine"] = machine()
    for result in results:
        whole["cases"][result.case.name] = {**result.to_dict(), **now}
    write_json(file, whole)
    return whole


def load(file: Path) -> dict[str, Any]:
    """Raises UserError if the file holds no results."""
    try:
        whole = json.loads(file.read_text())
        return {"machine": whole.get("machine"), "cases": dict(whole["cases"])}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{file} holds no benchmark results: {error}") from None


def figure(case: dict[str, Any], value: float) -> str:
    scaled = value / 2**30 if case["quantity"] == "memory" else value
    return f"{scaled:,.0f}" if scaled >= 100 else f"{scaled:.3g}"


def spread(case: dict[str, Any], name: str) -> str:
    """The median, and the lowest and highest round."""
    values = sorted(case["figures"][name])
    low, middle, high = values[0], _median(values), values[-1]
    return f"{figure(case, middle)} ({figure(case, low)} to {figure(case, high)}) {case['unit']}"


def _median(values: list[float]) -> float:
    ordered, half = sorted(values), len(values) // 2
    return ordered[half] if len(ordered) % 2 else (ordered[half - 1] + ordered[half]) / 2


def rows(whole: dict[str, Any]) -> list[list[str]]:
    """The table's rows: work, ours, the alternative, ratio, goal, whether it is met."""
    out = []
    for case in whole["cases"].values():
        goal = "-" if case["goal"] is None else f"{case['goal']:g}"
        if case["quantity"] == "memory":
            goal = f"at most {goal}"
        if case["quantity"] == "latency":
            goal = "at most 8 s"
        met = {True: "yes", False: "no", None: "-"}[case["met"]]
        ratios = sorted(case["ratios"])
        ratio = f"{case['ratio']:.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})"
        if case["quantity"] == "latency":
            ratio = "-"
        other = f"{case['other']}: {spread(case, case['other'])}"
        title = case["title"] + (" (unsteady)" if unsteady(case) else "")
        out.append([title, spread(case, "ours"), other, ratio, goal, met])
    return [*out, *_mixing_row(whole["cases"])]


def _mixing_row(cases: dict[str, Any]) -> list[list[str]]:
    if not {"mix_batch", "epoch_resnet18"} <= cases.keys():
        return []
    mixing = _median(cases["mix_batch"]["figures"]["ours"])
    training = _median(cases["epoch_resnet18"]["figures"]["ours"])
    percent = 100 * training / mixing
    met = "yes" if percent <= MIXING_SHARE else "no"
    share = f"{percent:.2g} % of the time"
    return [["CutMix in a ResNet-18 step", share, "-", "-", f"at most {MIXING_SHARE} %", met]]


UNSTEADY = 0.3
"""A case whose rounds differ by more than this share of their median is marked."""


def unsteady(case: dict[str, Any]) -> bool:
    """Whether rounds of ours or of what it is compared with differ by more than `UNSTEADY`."""
    both = (case["figures"][name] for name in ("ours", case["other"]))
    return any(max(values) - min(values) > UNSTEADY * _median(values) for values in both)


HEADER = ["work", "ours", "alternative (best of those measured)", "ratio", "goal", "met"]


def markdown(whole: dict[str, Any]) -> str:
    """The page of one machine."""
    found = whole["machine"]
    table = [HEADER, ["---"] * len(HEADER), *rows(whole)]
    dates = sorted({case["measured"] for case in whole["cases"].values()})
    return "\n".join(
        [
            f"# Speed: {title(found)}",
            "",
            "Written by `python scripts/benchmark.py`, or from its JSON alone by `table`. Variants run in",
            "processes of their own and take turns; figures are medians over the rounds (lowest to",
            "highest); a ratio is the median of the rounds' ratios. Unsteady: rounds differ by more than",
            f"{UNSTEADY:.0%} of their median.",
            "",
            f"{found['memory_gib']} GiB; measured {' to '.join(sorted({dates[0], dates[-1]}))}.",
            "",
            *("| " + " | ".join(row) + " |" for row in table),
            "",
        ]
    )


def write_page(file: Path, whole: dict[str, Any]) -> None:
    write_text(file, markdown(whole))


def draw(file: Path, whole: dict[str, Any]) -> None:
    """The chart of ratios with their goals."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    cases = [c for c in whole["cases"].values() if c["quantity"] == "rate" and c["goal"]]
    if not cases:
        return
    canvas, axes = pyplot.subplots(figsize=(9, 0.5 * len(cases) + 1.4))
    places = range(len(cases))[::-1]
    ratios = [case["ratio"] for case in cases]
    errors = [
        [max(0.0, r - min(c["ratios"])) for r, c in zip(ratios, cases, strict=True)],
        [max(0.0, max(c["ratios"]) - r) for r, c in zip(ratios, cases, strict=True)],
    ]
    axes.barh(places, ratios, xerr=errors, color="#4c72b0", ecolor="#333333", height=0.6)
    axes.scatter(
        [c["goal"] for c in cases],
        places,
        marker="|",
        s=200,
        color="#c44e52",
        label="goal",
        zorder=3,
    )
    axes.axvline(1.0, color="#333333", linewidth=0.8)
    axes.set_yticks(list(places), [f"{c['title']}\nvs {c['other']}" for c in cases], fontsize=7)
    axes.set_xscale("log")
    axes.set_xlabel("times as fast as the alternative (line: lowest to highest round)")
    axes.set_title(title(whole["machine"]))
    axes.legend(loc="lower right")
    canvas.tight_layout()
    write_atomically(file, lambda out: canvas.savefig(out, format="png", dpi=110))
    pyplot.close(canvas)

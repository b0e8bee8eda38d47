"""Pieces of Markdown and CSV that all tables share."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Sequence

from cutmix_exp.reporting.statistics import Difference, Summary


def mean_and_spread(summary: Summary, expected: int | None = None, digits: int = 2) -> str:
    """`mean ± standard deviation`, with n where it is not the `expected` number of seeds."""
    if summary.n == 0:
        return ""
    spread = "" if math.isnan(summary.std) else f" ± {summary.std:.{digits}f}"
    count = "" if expected in (None, summary.n) else f" (n={summary.n})"
    return f"{summary.mean:.{digits}f}{spread}{count}"


def bullets(texts: Sequence[str]) -> list[str]:
    return [f"* {text}" for text in texts]


def table_of(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "".join("| " + " | ".join(cells) + " |\n" for cells in lines)


def interval(of: Summary | Difference) -> str:
    return "" if math.isnan(of.low) else f"{of.low:.2f} to {of.high:.2f}"


def number(value: float, digits: int = 4) -> str:
    return "" if math.isnan(value) else f"{value:.{digits}f}"


def csv_of(rows: Sequence[dict[str, object]]) -> str:
    out = io.StringIO()
    writer = csv.DictWriter(out, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue()

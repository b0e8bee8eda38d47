"""Tables: rows are configs/table/*.yaml, cells are made from records alone.

A row finds its records by the hash of its resolved overrides (`Config.cell`). Records that differ
in precision or BatchNorm group size never share a cell: each combination is a line of its own.
"""

from __future__ import annotations

import csv
import io
import math
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import numpy as np
import yaml

from cutmix_exp import schema
from cutmix_exp.config import CONFIG_DIR, Budget, Config, Hardware, compose, from_dict, resolve
from cutmix_exp.errors import UserError
from cutmix_exp.reporting.record import Record, read_record
from cutmix_exp.schema import option

BUDGETS = ("paper", "medium", "short", "smoke")
METRICS = ("top1_error_last", "top1_error_best", "top5_error_best")
ANY_HARDWARE = Hardware(gpus=1, gpu_bf16=True, cpu_bf16=True)
"""Rows are resolved for no machine in particular: what depends on it is not in a cell's hash."""


@dataclass(frozen=True, kw_only=True)
class Defaults:
    """What a table's claims have in common.

    Attributes:
        selection: `best` epoch on the test set, or `last`.
        runs: number of runs behind a number; None: not said.
        source: who published it, where.
    """

    selection: Literal["best", "last"] = "best"
    runs: int | None = None
    source: str = ""


@dataclass(frozen=True, kw_only=True)
class Claim:
    """One published number; what it leaves out is the table's default."""

    top1_error: float = option(ge=0, le=100)
    top5_error: float | None = option(None, ge=0, le=100)
    selection: Literal["best", "last"] | None = None
    runs: int | None = None
    source: str | None = None


@dataclass(frozen=True, kw_only=True)
class Row:
    """A line of a table: what train.py is told, and what others have published."""

    label: str
    overrides: tuple[str, ...]
    published: tuple[Claim, ...] = ()
    note: str = ""


@dataclass(frozen=True, kw_only=True)
class Table:
    """A file of configs/table.

    Attributes:
        common: overrides of every row.
        budget: what is run and shown where nothing else is asked for.
        seeds: number of seeds, counted from 0.
        caveat: printed below the table.
    """

    name: str
    title: str
    common: tuple[str, ...] = ()
    budget: str = "paper"
    seeds: int = option(3, ge=1)
    claims: Defaults = field(default_factory=Defaults)
    caveat: str = ""
    rows: tuple[Row, ...]

    def overrides(self, row: Row) -> list[str]:
        return [*self.common, *row.overrides]


def table_names() -> list[str]:
    return sorted(p.stem for p in (CONFIG_DIR / "table").glob("*.yaml"))


def load_table(name: str) -> Table:
    """Raises UserError if there is no such table, or its file is wrong."""
    file = CONFIG_DIR / "table" / f"{name}.yaml"
    if name not in table_names():
        raise UserError(f"there is no table '{name}'; tables: {', '.join(table_names())}")
    return schema.build(Table, {"name": name, **yaml.safe_load(file.read_text())}, f"table {name}")


def load_budget(name: str) -> Budget:
    """Raises UserError if there is no such budget."""
    if name not in BUDGETS:
        raise UserError(f"there is no budget '{name}'; budgets: {', '.join(BUDGETS)}")
    text = (CONFIG_DIR / "budget" / f"{name}.yaml").read_text()
    return schema.build(Budget, yaml.safe_load(text), f"budget {name}")


def row_configs(table: Table) -> list[Config]:
    """The unresolved config of each row."""
    return [from_dict(compose(table.overrides(row))) for row in table.rows]


def load_records(folder: Path) -> list[Record]:
    """All complete records of a folder, in the order of their names."""
    records = [read_record(p) for p in sorted(folder.glob("*.json"))]
    return [r for r in records if r["status"] == "complete"]


@dataclass(frozen=True)
class Line:
    """One line of a rendered table: a row, and its records of one protocol (or none)."""

    row: Row
    config: Config
    records: list[Record]

    def values(self, metric: str) -> list[float]:
        return [r["metrics"][f"test/{metric}"] for r in self.records]

    def cell(self, metric: str) -> str:
        return mean_and_spread(self.values(metric))

    def protocol(self, name: str) -> str:
        return str(self.records[0]["protocol"][name]) if self.records else ""

    @property
    def seeds(self) -> str:
        return " ".join(str(r["seed"]) for r in self.records)


def mean_and_spread(values: list[float]) -> str:
    """`mean ± standard deviation (n)` in percent; `not run` without values."""
    if not values:
        return "not run"
    mean = f"{np.mean(values):.2f}"
    return f"{mean} (n=1)" if len(values) == 1 else f"{mean} ± {std(values):.2f} (n={len(values)})"


def std(values: list[float]) -> float:
    """The sample standard deviation (n-1)."""
    return float(np.std(values, ddof=1)) if len(values) > 1 else math.nan


def lines_of(table: Table, configs: list[Config], records: list[Record]) -> list[Line]:
    """The lines of a table: for each row and protocol its records, ordered by seed."""
    lines = []
    for row, config in zip(table.rows, configs, strict=True):
        cell = config.cell()
        groups: dict[tuple[str, int], list[Record]] = {}
        for record in sorted(records, key=lambda r: (r["seed"], r["run_id"])):
            if record["cell"] == cell:
                protocol = record["protocol"]
                key = (protocol["precision"], protocol["bn_group_size"])
                groups.setdefault(key, []).append(record)
        lines += [Line(row, config, groups[key]) for key in sorted(groups)] or [
            Line(row, config, [])
        ]
    return lines


def sections(table: Table, records: list[Record]) -> list[tuple[str, list[Line]]]:
    """The table at its own budget, and at every other that has records."""
    unresolved = row_configs(table)
    seen: set[tuple[str, ...]] = set()
    out = []
    for budget in sorted(BUDGETS, key=lambda b: (b != table.budget, BUDGETS.index(b))):
        configs = [
            resolve(replace(c, budget=load_budget(budget), device="auto"), ANY_HARDWARE)
            for c in unresolved
        ]
        cells = tuple(c.cell() for c in configs)
        if cells in seen:  # every row fixes its own epochs
            continue
        seen.add(cells)
        lines = lines_of(table, configs, records)
        if budget == table.budget or any(line.records for line in lines):
            out.append((budget, lines))
    return out


def render(table: Table, records: list[Record]) -> tuple[str, str]:
    """Markdown and CSV of a table."""
    origin = f"Generated from records; the rows are those of configs/table/{table.name}.yaml."
    parts = [f"# {table.title}\n", f"{origin}\n"]
    rows: list[dict[str, object]] = []
    for budget, lines in sections(table, records):
        parts.append(f"## Budget: {budget}\n")
        parts.append(_markdown(table, lines))
        parts += [f"* {text}" for text in _caveats(table, lines)]
        parts.append("")
        rows += [_csv_row(table, budget, line) for line in lines]
    if table.caveat:
        parts.append(f"{table.caveat}\n")
    out = io.StringIO()
    writer = csv.DictWriter(out, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return "\n".join(parts), out.getvalue()


HEAD = (
    "Method",
    "epochs",
    "published top-1 / top-5",
    "top-1, last epoch",
    "top-1, best epoch",
    "top-5, best epoch",
    "seeds",
    "precision",
    "BN group",
)


def _markdown(table: Table, lines: list[Line]) -> str:
    out = ["| " + " | ".join(HEAD) + " |", "| --- " + "| --- " * (len(HEAD) - 1) + "|"]
    for line in lines:
        cells = [
            line.row.label,
            str(line.config.epochs),
            _claims(table, line.row),
            *(line.cell(m) for m in METRICS),
            line.seeds,
            line.protocol("precision"),
            line.protocol("bn_group_size"),
        ]
        out.append("| " + " | ".join(cells) + " |")
    return "\n".join(out) + "\n"


def _claims(table: Table, row: Row) -> str:
    texts = []
    for claim in row.published:
        numbers = [f"{claim.top1_error:.2f}"]
        if claim.top5_error is not None:
            numbers.append(f"{claim.top5_error:.2f}")
        texts.append(f"{' / '.join(numbers)} ({claim.selection or table.claims.selection})")
    return ", ".join(texts)


def _caveats(table: Table, lines: list[Line]) -> list[str]:
    found = [r for line in lines for r in line.records]
    configs = [line.config for line in lines]
    recipes = sorted({f"batch {c.schedule.batch_size}, lr {c.schedule.lr:g}" for c in configs})
    texts = [
        "Errors in %, mean ± standard deviation over seeds. The best epoch is chosen on the test set: "
        "the paper's rule, which flatters, and not all methods equally.",
        f"Data set: {', '.join(sorted({c.dataset.name for c in configs}))}. "
        f"Recipe: {'; '.join(recipes)}.",
    ]
    if found:
        devices = {f"{r['cost']['device']} x {r['cost']['world_size']}" for r in found}
        texts.append(f"Hardware: {', '.join(sorted(devices))}.")
    claims = {_source(table, c) for line in lines for c in line.row.published}
    if claims:
        texts.append(f"Published: {'; '.join(sorted(claims))}.")
    return texts + [f"{row.label}: {row.note}." for row in table.rows if row.note]


def _source(table: Table, claim: Claim) -> str:
    runs = claim.runs or table.claims.runs
    return (claim.source or table.claims.source) + (f" (mean of {runs} runs)" if runs else "")


def _csv_row(table: Table, budget: str, line: Line) -> dict[str, object]:
    claim = line.row.published[0] if line.row.published else None
    out: dict[str, object] = {
        "table": table.name,
        "budget": budget,
        "row": line.row.label,
        "epochs": line.config.epochs,
        "published_top1_error": claim.top1_error if claim else "",
        "published_top5_error": claim.top5_error if claim else "",
        "n": len(line.records),
        "seeds": line.seeds,
        "precision": line.protocol("precision"),
        "bn_group_size": line.protocol("bn_group_size"),
    }
    for metric in METRICS:
        values = line.values(metric)
        out[f"{metric}_mean"] = f"{np.mean(values):.4f}" if values else "not run"
        out[f"{metric}_std"] = f"{std(values):.4f}" if len(values) > 1 else ""
    return out

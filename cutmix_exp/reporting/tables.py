"""Tables: rows are configs/table/*.yaml, cells are made from records alone.

A row finds its records by the hash of its resolved overrides (`Config.cell`). Records that differ
in precision or BatchNorm group size never share a cell: each combination is a line of its own.
`render.py` prints what is put together here.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import numpy as np
import yaml

from cutmix_exp import schema
from cutmix_exp.composition import CONFIG_DIR, compose
from cutmix_exp.config import Budget, Config, Hardware, from_dict, resolve
from cutmix_exp.errors import UserError
from cutmix_exp.reporting.record import Record, read_record
from cutmix_exp.reporting.statistics import (
    Comparison,
    Difference,
    Summary,
    compare,
    holm,
    paired_difference,
    summarize,
)
from cutmix_exp.schema import option

BUDGETS = ("paper", "medium", "short", "smoke")
ANY_HARDWARE = Hardware(gpus=1, gpu_bf16=True, cpu_bf16=True)
"""Rows are resolved for no machine in particular: what depends on it is not in a cell's hash."""

PublishedRule = Literal["last", "best", "median_last_10"]
"""How the epoch of a published number was chosen; ours is then chosen in the same way."""
PUBLISHED_RULES: tuple[PublishedRule, ...] = ("last", "best", "median_last_10")
PAIRED = ("last", "best")
"""The selections whose differences to the baseline are tested."""


@dataclass(frozen=True, kw_only=True)
class Claim:
    """One published number; what it leaves out is the table's default.

    Attributes:
        top1_error, top5_error: in percent.
        others: numbers of tasks that this code does not have, by name.
        selection: how the epoch was chosen.
        runs: number of runs behind the number; None: not said.
        source: who published it, where.
    """

    top1_error: float | None = option(None, ge=0, le=100)
    top5_error: float | None = option(None, ge=0, le=100)
    others: dict[str, float] = field(default_factory=dict)
    selection: PublishedRule | None = None
    runs: int | None = option(None, ge=1)
    source: str | None = None


@dataclass(frozen=True, kw_only=True)
class Row:
    """A line of a table: what train.py is told, and what others have published.

    Attributes:
        overrides: none: others' number, quoted and not run.
        published: one number for each selection rule.
        published_as: `TABLE/LABEL` of the row that holds the numbers of this one.
        reruns: what others got in the same setting; shown, and compared with nothing.
        baseline: label of the row that this one is compared with; its own: with none.
        note: printed below the table.
    """

    label: str
    overrides: tuple[str, ...] = ()
    published: tuple[Claim, ...] = ()
    published_as: str | None = None
    reruns: tuple[Claim, ...] = ()
    baseline: str | None = None
    note: str = ""

    def __post_init__(self) -> None:
        rules = [claim.selection for claim in self.published]
        if len(set(rules)) < len(rules):
            raise UserError(f"the row '{self.label}' has two published numbers of one selection")
        if self.published and self.published_as:
            raise UserError(f"the row '{self.label}' has both published and published_as")
        if any(claim.top1_error is None or not claim.source for claim in self.reruns):
            raise UserError(f"a rerun of the row '{self.label}' has no top1_error or no source")

    def claim(self, rule: PublishedRule) -> Claim | None:
        found = [c for c in self.published if c.selection == rule and c.top1_error is not None]
        return found[0] if found else None


@dataclass(frozen=True, kw_only=True)
class Column:
    """A number that a suite has found, as a column of a table.

    Attributes:
        label: the heading; published numbers name it among their `others`.
        suite, metric: where a record has it: evaluations/<suite>/metrics/<metric>.
        digits: behind the point.
    """

    label: str
    suite: str
    metric: str
    digits: int = option(1, ge=0)


@dataclass(frozen=True, kw_only=True)
class Table:
    """A file of configs/table.

    Attributes:
        columns: of a table of evaluations: what is shown of each network; none: its test errors.
        upright: whether those numbers run down the page, where there are many.
        common: overrides of every row.
        budget: what is run and shown where nothing else is asked for.
        seeds: number of seeds, counted from 0.
        claims: what the published numbers have in common.
        margin: points within which a published number counts as reproduced.
        assumed_std: standard deviation over seeds, in points, that is assumed where fewer than two
            seeds show one. The default is that of five public runs of PyramidNet-200 (0.39 without,
            0.42 with CutMix; clovaai/CutMix-PyTorch issue 7).
        caveat: printed below the table.
    """

    name: str
    title: str
    common: tuple[str, ...] = ()
    budget: str = "paper"
    seeds: int = option(3, ge=1)
    claims: Claim = field(default_factory=Claim)
    margin: float = option(0.5, gt=0)
    assumed_std: float = option(0.4, gt=0)
    caveat: str = ""
    columns: tuple[Column, ...] = ()
    upright: bool = False
    rows: tuple[Row, ...]

    def __post_init__(self) -> None:
        labels = [row.label for row in self.rows]
        if len(set(labels)) < len(labels):
            raise UserError("two rows have the same label")
        headings = {column.label for column in self.columns}
        for row in self.rows:
            named = {name for claim in row.published for name in claim.others}
            if self.columns and named - headings:
                raise UserError(f"'{row.label}' names no column: {', '.join(named - headings)}")
            if row.baseline is not None and row.baseline not in labels:
                raise UserError(f"the baseline '{row.baseline}' of '{row.label}' is no row")

    def overrides(self, row: Row) -> list[str]:
        return [*self.common, *row.overrides]

    def row(self, label: str) -> Row:
        found = [row for row in self.rows if row.label == label]
        if not found:
            raise UserError(f"table {self.name} has no row '{label}'")
        return found[0]

    def baseline_of(self, row: Row) -> str | None:
        """The label of the row that a row is compared with: the first one with runs, if not named."""
        first = next((r.label for r in self.rows if r.overrides), None)
        label = row.baseline or first
        return None if label == row.label else label


def table_names() -> list[str]:
    return sorted(p.stem for p in (CONFIG_DIR / "table").glob("*.yaml"))


def load_table(name: str) -> Table:
    """A table with its claims completed.

    Raises:
        UserError: there is no such table, or its file is wrong.
    """
    file = CONFIG_DIR / "table" / f"{name}.yaml"
    if name not in table_names():
        raise UserError(f"there is no table '{name}'; tables: {', '.join(table_names())}")
    table = schema.build(Table, {"name": name, **yaml.safe_load(file.read_text())}, f"table {name}")
    return replace(table, rows=tuple(_with_claims(table, row) for row in table.rows))


def _with_claims(table: Table, row: Row) -> Row:
    """The row with its published numbers, each with its selection, runs and source."""
    if row.published_as is not None:
        other, _, label = row.published_as.partition("/")
        published = load_table(other).row(label).published
        return replace(row, published=published, published_as=None)
    default = table.claims
    reruns = tuple(
        replace(claim, selection=claim.selection or default.selection or "best")
        for claim in row.reruns
    )
    published = tuple(
        replace(
            claim,
            selection=claim.selection or default.selection or "best",
            runs=claim.runs or default.runs,
            source=claim.source or default.source or "",
        )
        for claim in row.published
    )
    return replace(row, published=published, reruns=reruns)


def load_budget(name: str) -> Budget:
    """Raises UserError if there is no such budget."""
    if name not in BUDGETS:
        raise UserError(f"there is no budget '{name}'; budgets: {', '.join(BUDGETS)}")
    text = (CONFIG_DIR / "budget" / f"{name}.yaml").read_text()
    return schema.build(Budget, yaml.safe_load(text), f"budget {name}")


@functools.cache
def _composed(overrides: tuple[str, ...]) -> Config | UserError:
    try:
        config = from_dict(compose(list(overrides)))
        resolve(replace(config, device="auto"), ANY_HARDWARE)
    except UserError as error:
        return error
    return config


def row_config(table: Table, row: Row) -> Config | UserError | None:
    """The unresolved config of a row; the error that says what of it is not available yet;
    None for a row that is quoted only."""
    return _composed(tuple(table.overrides(row))) if row.overrides else None


def load_records(folder: Path) -> list[Record]:
    """All records of a folder of complete runs and of networks from elsewhere, in the order of
    their names."""
    records = [read_record(p) for p in sorted(folder.glob("*.json"))]
    return [r for r in records if r["status"] in ("complete", "external")]


def top1_error(record: Record, selection: str) -> float | None:
    """A run's test error by `last`, `best`, `val_selected`, `median_last_10` (of the last ten
    epochs) or `gap` (last minus best); None where the run does not have it."""
    metrics = record["metrics"]
    if selection == "gap":
        return float(metrics["test/top1_error_last"] - metrics["test/top1_error_best"])
    if selection == "median_last_10":
        curve = record["history"].get("test/top1_error", [])
        whole = len(curve) == record["config"]["schedule"]["epochs"]
        return float(np.median(curve[-10:])) if whole and len(curve) >= 10 else None
    value = metrics.get(f"test/top1_error_{selection}")
    return None if value is None else float(value)


def top5_error(record: Record, selection: str) -> float | None:
    value = record["metrics"].get(f"test/top5_error_{selection}")
    return None if value is None else float(value)


@dataclass(frozen=True)
class Line:
    """One line of a rendered table: a row, and its records of one protocol (or none)."""

    row: Row
    config: Config | None
    records: list[Record]

    @property
    def state(self) -> str:
        """What stands in a line without records."""
        if not self.row.overrides:
            return "quoted"
        return "not run" if self.config else "not available yet"

    def by_seed(self, selection: str) -> dict[int, float]:
        """Top-1 errors by seed."""
        found = {r["seed"]: top1_error(r, selection) for r in self.records}
        return {seed: value for seed, value in found.items() if value is not None}

    def top1(self, selection: str) -> list[float]:
        return list(self.by_seed(selection).values())

    def top5(self, selection: str) -> list[float]:
        found = [top5_error(r, selection) for r in self.records]
        return [value for value in found if value is not None]

    def protocol(self, name: str) -> str:
        return str(self.records[0]["protocol"][name]) if self.records else ""

    @property
    def seeds(self) -> str:
        return " ".join(str(r["seed"]) for r in self.records)

    @property
    def seeds_counted(self) -> str:
        """The seeds and, since a lone 0 would read as none, how many they are."""
        return f"{self.seeds} (n={len(self.records)})" if self.records else ""

    @property
    def own_group(self) -> int | None:
        """The BatchNorm group size, where the row's overrides set it."""
        return self.config.trainer.bn_group_size if self.config else None


def lines_of(table: Table, configs: list[Config | None], records: list[Record]) -> list[Line]:
    """The lines of a table: for each row and protocol its records, ordered by seed."""
    lines = []
    for row, config in zip(table.rows, configs, strict=True):
        groups: dict[tuple[str, int, str], list[Record]] = {}
        own = [record for record in records if _is_of(record, config)]
        for record in sorted(own, key=lambda r: (r["seed"], r["run_id"])):
            protocol = record["protocol"]
            experiment = record["run_id"].rpartition("-s")[0]
            key = (protocol["precision"], protocol["bn_group_size"], experiment)
            groups.setdefault(key, []).append(record)
        lines += [Line(row, config, groups[key]) for key in sorted(groups)] or [
            Line(row, config, [])
        ]
    return lines


def _is_of(record: Record, config: Config | None) -> bool:
    if config is None or record.get("cell") != config.cell():  # a network from elsewhere has none
        return False
    group = config.trainer.bn_group_size
    return group is None or record["protocol"]["bn_group_size"] == group


@dataclass(frozen=True)
class Section:
    """A table at one budget."""

    table: Table
    budget: str
    lines: list[Line]

    @property
    def has_records(self) -> bool:
        return any(line.records for line in self.lines)


def sections(table: Table, records: list[Record]) -> list[Section]:
    """The table at its own budget, and at every other that has records.

    A row that fixes its own epochs is the same at every budget and stands in the first section,
    and so do rows without runs.
    """
    unresolved = [row_config(table, row) for row in table.rows]
    seen: set[tuple[str, int | None]] = set()
    out: list[Section] = []
    for budget in sorted(BUDGETS, key=lambda b: (b != table.budget, BUDGETS.index(b))):
        rows, configs = [], []
        for row, config in zip(table.rows, unresolved, strict=True):
            resolved = None
            if isinstance(config, Config):
                asked = replace(config, budget=load_budget(budget), device="auto")
                try:
                    resolved = resolve(asked, ANY_HARDWARE)
                except UserError:  # a warm-up that is longer than so small a budget
                    if budget == table.budget:
                        raise
                    continue
                key = (resolved.cell(), resolved.trainer.bn_group_size)
                if key in seen:
                    continue
                seen.add(key)
            elif out:
                continue
            rows.append(row)
            configs.append(resolved)
        section = Section(
            table, budget, lines_of(replace(table, rows=tuple(rows)), configs, records)
        )
        if budget == table.budget or section.has_records:
            out.append(section)
    return out


@dataclass(frozen=True)
class Result:
    """What is said about a line.

    Attributes:
        top1, top5: summaries by selection.
        baseline: label of the row it is compared with; None where there is no such line.
        differences: to the baseline, by selection.
        p_holm: p-values of those, corrected over the section.
        comparisons: with the published numbers, by selection.
    """

    line: Line
    top1: dict[str, Summary]
    top5: dict[str, Summary]
    baseline: str | None
    differences: dict[str, Difference]
    p_holm: dict[str, float]
    comparisons: dict[PublishedRule, Comparison]


TOP1 = ("last", "val_selected", "best", "gap", "median_last_10")
TOP5 = ("last", "val_selected", "best")


def results(section: Section) -> list[Result]:
    """The statistics of every line of a section."""
    baselines = [_baseline_line(section, line) for line in section.lines]
    differences: dict[str, list[Difference]] = {
        s: [
            paired_difference(line.by_seed(s), other.by_seed(s)) if other else Difference(0)
            for line, other in zip(section.lines, baselines, strict=True)
        ]
        for s in PAIRED
    }
    corrected = {s: holm([d.p for d in differences[s]]) for s in PAIRED}
    return [
        Result(
            line=line,
            top1={s: summarize(line.top1(s)) for s in TOP1},
            top5={s: summarize(line.top5(s)) for s in TOP5},
            baseline=other.row.label if other else None,
            differences={s: differences[s][i] for s in PAIRED},
            p_holm={s: corrected[s][i] for s in PAIRED},
            comparisons=_comparisons(section, line),
        )
        for i, (line, other) in enumerate(zip(section.lines, baselines, strict=True))
    ]


def _baseline_line(section: Section, line: Line) -> Line | None:
    """The records that a line is compared with: its baseline row's, of the same protocol.

    Where both rows set the BatchNorm group size themselves, it is what the table studies.
    """
    label = section.table.baseline_of(line.row)
    for other in section.lines:
        if other.row.label != label or not other.records or not line.records:
            continue
        chosen = line.own_group is not None and other.own_group is not None
        names = ("precision",) if chosen else ("precision", "bn_group_size")
        if all(line.protocol(n) == other.protocol(n) for n in names):
            return other
    return None


def _comparisons(section: Section, line: Line) -> dict[PublishedRule, Comparison]:
    """Published numbers are of the whole recipe, so they are compared with nothing else."""
    out: dict[PublishedRule, Comparison] = {}
    for rule in PUBLISHED_RULES if section.budget == "paper" else ():
        claim = line.row.claim(rule)
        if claim is not None and claim.top1_error is not None:
            table = section.table
            found = compare(line.top1(rule), claim.top1_error, table.margin, table.assumed_std)
            if found is not None:
                out[rule] = found
    return out

"""Tables of what suites have found (paper Tables 9, 11, 12, A2): published beside ours."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from typing import Any

from cutmix_exp import schema
from cutmix_exp.evaluation.base import Suite, load_suite
from cutmix_exp.reporting.markdown import bullets, csv_of, mean_and_spread, number, table_of
from cutmix_exp.reporting.record import Record
from cutmix_exp.reporting.statistics import Summary, summarize
from cutmix_exp.reporting.tables import Column, Line, Row, Section, Table, sections

Entry = dict[str, Any]

_as_it_is = cache(load_suite)
"""A suite by its name, read once for all cells."""


def render_evaluations(table: Table, records: list[Record]) -> tuple[str, str]:
    """Markdown and CSV of a table with columns: rows are networks, cells what a suite found of
    those of the last epoch; then the networks from elsewhere that were examined by these suites."""
    origin = f"Generated from records; the rows are those of configs/table/{table.name}.yaml."
    parts = [f"# {table.title}\n", f"{origin}\n"]
    rows: list[dict[str, object]] = []
    for section in map(with_findings, sections(table, records)):
        parts += _markdown(section)
        rows += [_csv_row(section, line, c) for line in section.lines for c in table.columns]
    parts += _others(table, records)
    if table.caveat:
        parts.append(f"{table.caveat}\n")
    return "\n".join(parts), csv_of(rows)


def with_findings(section: Section) -> Section:
    """Without the lines of which no suite of the table has seen a network, where another line of the
    same row (of another precision, say) has been seen."""
    suites = dict.fromkeys(column.suite for column in section.table.columns)
    seen = [line for line in section.lines if any(any(entries_of(line.records, s)) for s in suites)]
    rows = [line.row.label for line in seen]
    lines = [line for line in section.lines if line in seen or line.row.label not in rows]
    return replace(section, lines=lines)


def entries_of(records: Sequence[Record], suite: str) -> list[Entry | None]:
    """What a suite has found of each network, as far as it can stand in one cell: by the suite's own
    settings as they are now, and in one precision: that of the training, or else the first one's.
    None: not run, or so that it cannot."""
    own = _as_it_is(suite)
    every = [record.get("evaluations", {}).get(suite) for record in records]
    found = [entry if entry and own.gave(entry) else None for entry in every]
    precisions = [entry["precision"] for entry in found if entry]
    trained = records[0].get("protocol", {}).get("precision") if records else None
    chosen = trained if trained in precisions else next(iter(precisions), None)
    return [entry if entry and entry["precision"] == chosen else None for entry in found]


def values_of(records: Sequence[Record], column: Column) -> list[float]:
    """A suite's number of each network that has it."""
    found = [
        entry["metrics"].get(column.metric) for entry in entries_of(records, column.suite) if entry
    ]
    return [float(value) for value in found if value is not None]


def published_of(row: Row, column: Column) -> float | None:
    found = [claim.others[column.label] for claim in row.published if column.label in claim.others]
    return found[0] if found else None


def _markdown(section: Section) -> list[str]:
    table = section.table
    grid = _upright(section) if table.upright else _by_method(section)
    return [f"## Budget: {section.budget}\n", table_of(*grid), *bullets(_caveats(section)), ""]


def _by_method(section: Section) -> tuple[list[str], list[list[str]]]:
    """Heading and rows with a network a row."""
    table = section.table
    published = {c.label for row in table.rows for c in table.columns if _has(row, c)}
    head = ["Method", "epochs"]
    for column in table.columns:
        head += [f"{column.label}: published"] * (column.label in published) + [column.label]
    rows = []
    for line in section.lines:
        cells = [line.row.label, str(line.config.epochs) if line.config else ""]
        for column in table.columns:
            cells += [_published(line, column)] * (column.label in published)
            cells.append(_cell(line, column))
        rows.append([*cells, line.seeds_counted, _protocol(line)])
    return [*head, "seeds", "protocol"], rows


def _upright(section: Section) -> tuple[list[str], list[list[str]]]:
    """Heading and rows with a number a row, and a column for each network, with its published numbers
    before it where it has any."""
    columns = section.table.columns
    quoted = {line.row.label for line in section.lines if any(_has(line.row, c) for c in columns)}
    head = ["Number"]
    for line in section.lines:
        name = line.row.label
        head += [f"{name}: published"] * (name in quoted) + [name]

    def row(name: str, cells: list[tuple[str, str]]) -> list[str]:
        """Of a published number and ours for each network."""
        out = [name]
        for line, (published, ours) in zip(section.lines, cells, strict=True):
            out += [published] * (line.row.label in quoted) + [ours]
        return out

    lines = section.lines
    rows = [row(c.label, [(_published(n, c), _cell(n, c)) for n in lines]) for c in columns]
    if section.has_records:
        rows.append(row("seeds", [("", line.seeds_counted) for line in lines]))
        rows.append(row("protocol", [("", _protocol(line)) for line in lines]))
    return head, rows


def _protocol(line: Line) -> str:
    if not line.records:
        return ""
    return f"{line.protocol('precision')}, BN {line.protocol('bn_group_size')}"


def _published(line: Line, column: Column) -> str:
    value = published_of(line.row, column)
    return "" if value is None else f"{value:.{column.digits}f}"


def _has(row: Row, column: Column) -> bool:
    return published_of(row, column) is not None


def _cell(line: Line, column: Column) -> str:
    values = values_of(line.records, column)
    if not values:
        return line.state if not line.records else "not run"
    return mean_and_spread(summarize(values), len(line.records), column.digits)


def _caveats(section: Section) -> list[str]:
    table = section.table
    texts = [
        "The networks are those of the last epoch; mean ± sample standard deviation over seeds. "
        "Suites: " + ", ".join(dict.fromkeys(f"`{c.suite}`" for c in table.columns)) + ".",
    ]
    suites = dict.fromkeys(c.suite for c in table.columns)
    entries = [e for line in section.lines for s in suites for e in entries_of(line.records, s)]
    if done := [entry for entry in entries if entry]:
        devices = sorted({f"{e['cost']['device']}, {e['precision']}" for e in done})
        texts.append(f"Evaluated on: {'; '.join(devices)}.")
    if left_out := _left_out(section):
        texts.append(f"In records, but not shown: {'; '.join(left_out)}.")
    sources = [c.source for line in section.lines for c in line.row.published if c.source]
    if sources:
        texts.append(f"Published: {'; '.join(dict.fromkeys(sources))}.")
        if section.budget != "paper":
            texts.append(
                "Published numbers are of the whole recipe: not to be compared with these."
            )
    return texts + [f"{r.label}: {r.note}." for r in table.rows if r.note]


def _left_out(section: Section) -> list[str]:
    """What records have that cannot stand in a cell: findings of other settings than the suite's own
    now (a part of the images, say), and of another precision than the others."""
    told: dict[str, list[str]] = {}
    for name in dict.fromkeys(c.suite for c in section.table.columns):
        for line in section.lines:
            shown = entries_of(line.records, name)
            for record, entry in zip(line.records, shown, strict=True):
                held = record["evaluations"].get(name)
                if held is None or entry is not None:
                    continue
                labels = told.setdefault(f"`{name}` {_how(held, _as_it_is(name))}", [])
                labels += [line.row.label] * (line.row.label not in labels)
    return [f"{what} ({', '.join(labels)})" for what, labels in told.items()]


def _how(entry: Entry, suite: Suite) -> str:
    """In what an entry differs from the suite as it is now, or else its precision."""
    held, own = entry["suite"], schema.identity_of(suite)
    said = [f"{key}={held.get(key)}" for key in own | held if held.get(key) != own.get(key)]
    said += [f"version {entry['version']}"] * (entry["version"] != suite.version)
    return f"with {', '.join(said)}" if said else f"in {entry['precision']}"


def _others(table: Table, records: list[Record]) -> list[str]:
    """Networks from elsewhere with findings for this table, on its data sets."""
    datasets = {w.partition("=")[2] for w in table.common if w.startswith("dataset=")}
    rows = []
    for record in records:
        if record["status"] != "external" or record["dataset"] not in datasets:
            continue
        found = [values_of([record], column) for column in table.columns]
        if any(found):
            cells = [
                f"{v[0]:.{c.digits}f}" if v else "not run"
                for v, c in zip(found, table.columns, strict=True)
            ]
            rows.append([record["run_id"], *cells])
    if not rows:
        return []
    head = ["Network", *(column.label for column in table.columns)]
    return ["## Networks from elsewhere\n", table_of(head, rows), ""]


def _csv_row(section: Section, line: Line, column: Column) -> dict[str, object]:
    values = values_of(line.records, column)
    summary: Summary = summarize(values)
    published = published_of(line.row, column)
    return {
        "table": section.table.name,
        "budget": section.budget,
        "row": line.row.label,
        "column": column.label,
        "suite": column.suite,
        "metric": column.metric,
        "state": "run" if values else ("not run" if line.records else line.state),
        "epochs": line.config.epochs if line.config else "",
        "precision": line.protocol("precision"),
        "bn_group_size": line.protocol("bn_group_size"),
        "n": len(values),
        "seeds": line.seeds,
        "mean": number(summary.mean),
        "std": number(summary.std),
        "low": number(summary.low),
        "high": number(summary.high),
        "values": " ".join(f"{value:.4f}" for value in values),
        "published": "" if published is None else published,
    }

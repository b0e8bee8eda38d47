"""Tables as Markdown (short: what was run and what it says) and CSV (everything)."""

from __future__ import annotations

import math
from collections.abc import Sequence

from cutmix_exp.reporting.evaluations import render_evaluations
from cutmix_exp.reporting.markdown import (
    bullets,
    csv_of,
    interval,
    mean_and_spread,
    number,
    table_of,
)
from cutmix_exp.reporting.record import Record
from cutmix_exp.reporting.statistics import (
    MAX_SEEDS,
    Comparison,
    Difference,
    seeds_needed,
)
from cutmix_exp.reporting.tables import (
    PAIRED,
    PUBLISHED_RULES,
    TOP1,
    TOP5,
    Claim,
    Line,
    PublishedRule,
    Result,
    Row,
    Section,
    Table,
    results,
    sections,
    top1_error,
)

RULE_NAMES: dict[PublishedRule, str] = {
    "last": "last",
    "best": "best",
    "median_last_10": "median of the last 10 epochs",
}


def render(table: Table, records: list[Record]) -> tuple[str, str]:
    """Markdown and CSV of a table."""
    if table.columns:
        return render_evaluations(table, records)
    origin = f"Generated from records; the rows are those of configs/table/{table.name}.yaml."
    parts = [f"# {table.title}\n", f"{origin}\n"]
    rows: list[dict[str, object]] = []
    for section in sections(table, records):
        found = results(section)
        parts += _markdown(section, found)
        rows += [_csv_row(section, result) for result in found]
    if table.caveat:
        parts.append(f"{table.caveat}\n")
    return "\n".join(parts), csv_of(rows)


def _markdown(section: Section, found: list[Result]) -> list[str]:
    parts = [f"## Budget: {section.budget}\n"]
    if all(not result.line.row.overrides for result in found):  # what this code cannot do
        return [_others(section.table), *bullets(_published(section)), ""]
    parts.append(_selections(section, found))
    parts += bullets(_caveats(section, found))
    parts.append("")
    if section.has_records:
        parts += ["### Intervals, differences, verdicts\n", _details(section, found)]
        parts += [*bullets(_reading(section, found)), ""]
    return parts


def _selections(section: Section, found: list[Result]) -> str:
    """The main table: each run's error by every selection."""
    by_median = any(row.claim("median_last_10") for row in section.table.rows)
    head = ["Method", "epochs", "published", "last", "val-selected", "best", "last - best"]
    head += ["median of last 10"] * by_median + ["top-5, best", "seeds", "protocol"]
    rows = []
    for result in found:
        line, n = result.line, len(result.line.records)
        shown = [mean_and_spread(result.top1[s], n) for s in TOP1[: 4 + by_median]]
        if not n:
            shown[0] = line.state
        rows.append(
            [
                line.row.label,
                str(line.config.epochs) if line.config else "",
                _claims(line.row.published),
                *shown,
                mean_and_spread(result.top5["best"], n),
                line.seeds_counted,
                _protocol(result),
            ]
        )
    return table_of(head, rows)


def _protocol(result: Result) -> str:
    line = result.line
    if not line.records:
        return ""
    return f"{line.protocol('precision')}, BN {line.protocol('bn_group_size')}"


def _claims(claims: Sequence[Claim]) -> str:
    texts = []
    for claim in claims:
        if claim.top1_error is not None and claim.selection is not None:
            top5 = "" if claim.top5_error is None else f" / {claim.top5_error:.2f}"
            rule = RULE_NAMES[claim.selection].removesuffix(" epochs")
            texts.append(f"{claim.top1_error:.2f}{top5} ({rule})")
    return ", ".join(texts)


def _others(table: Table) -> str:
    """Published numbers of tasks that this code does not have."""
    names = list(dict.fromkeys(n for r in table.rows for c in r.published for n in c.others))
    found = [{n: v for c in row.published for n, v in c.others.items()} for row in table.rows]
    digits = {n: max(_digits(values[n]) for values in found if n in values) for n in names}
    rows = []
    for row, values in zip(table.rows, found, strict=True):
        shown = (f"{values[n]:.{digits[n]}f}" if n in values else "" for n in names)
        rows.append([row.label, *shown])
    return (
        f"Not run: there is no code for it yet. Published:\n\n{table_of(['Method', *names], rows)}"
    )


def _digits(value: float) -> int:
    """Behind the point, of the shortest text of a number: at least one."""
    return len(f"{value}".partition(".")[2])


def _details(section: Section, found: list[Result]) -> str:
    """The second table: what the seeds allow to say."""
    head = ["Method", "protocol", "last, interval", "last - baseline's", "interval", "p (Holm)"]
    head.append("against published")
    rows = []
    for result in found:
        if not result.line.records:
            continue
        difference, last = result.differences["last"], result.top1["last"]
        rows.append(
            [
                result.line.row.label,
                _protocol(result),
                interval(last),
                _difference(difference),
                interval(difference),
                _p_value(result.p_holm["last"]),
                "; ".join(_verdict(r, c) for r, c in result.comparisons.items()),
            ]
        )
    return table_of(head, rows)


def _difference(difference: Difference) -> str:
    return f"{difference.mean:+.2f} (n={difference.n})" if difference.n else ""


def _p_value(p: float) -> str:
    if math.isnan(p):
        return ""
    return "< 0.001" if p < 0.001 else f"{p:.3f}"


def _verdict(rule: PublishedRule, comparison: Comparison) -> str:
    text = f"{RULE_NAMES[rule]} {comparison.difference:+.2f}: {comparison.verdict}"
    if comparison.verdict == "too few seeds":
        text += f", {_seeds(comparison.seeds_needed)} needed"
    return text


def _seeds(number: int | None) -> str:
    return f"over {MAX_SEEDS}" if number is None else str(number)


def _caveats(section: Section, found: list[Result]) -> list[str]:
    """What the main table's numbers are."""
    table, lines = section.table, section.lines
    records = [r for line in lines for r in line.records]
    configs = [line.config for line in lines if line.config]
    texts = [
        "Errors in %: top-1 and, after the slash or where said, top-5; mean ± sample standard "
        "deviation over seeds. `best` is the best epoch on the test set: the paper's rule, which "
        "flatters, and not all methods equally; `last - best` is by how much.",
    ]
    if configs:
        recipes = sorted({f"batch {c.schedule.batch_size}, lr {c.schedule.lr:g}" for c in configs})
        names = ", ".join(sorted({c.dataset.name for c in configs}))
        texts.append(f"Data set: {names}. Recipe: {'; '.join(recipes)}.")
    if records:
        devices = {f"{r['cost']['device']} x {r['cost']['world_size']}" for r in records}
        texts.append(f"Hardware: {', '.join(sorted(devices))}.")
    texts += _published(section)
    texts += [_reruns(line.row) for line in _first_lines(lines) if line.row.reruns]
    if any(line.state == "not available yet" for line in lines):
        texts.append("Not available yet: a part that the row names is not in this version.")
    shown = {line.row.label for line in lines}
    return texts + [f"{r.label}: {r.note}." for r in table.rows if r.note and r.label in shown]


def _published(section: Section) -> list[str]:
    """Where published numbers are from, and what it would take to confirm them."""
    claims = [c for line in section.lines for c in line.row.published]
    if not claims:
        return []
    sources = "; ".join(dict.fromkeys(_source(c) for c in claims))
    texts = [f"Published: {sources}."]
    if section.budget != "paper":
        texts.append("Published numbers are of the whole recipe: not to be compared with these.")
    elif any(line.row.overrides for line in section.lines):
        table = section.table
        number = seeds_needed(0.0, table.assumed_std, table.margin)
        texts.append(
            f"To confirm a published number within {table.margin:g} points takes {_seeds(number)} "
            f"seeds, if the true mean is equal to it and runs spread by {table.assumed_std:g} points "
            "(assumed)."
        )
    return texts


def _first_lines(lines: Sequence[Line]) -> list[Line]:
    """One line of each row: a row has one for each protocol."""
    return list({line.row.label: line for line in lines}.values())


def _reruns(row: Row) -> str:
    """What others got in the row's setting, by who they are."""
    by_source: dict[str, list[Claim]] = {}
    for claim in row.reruns:
        by_source.setdefault(_source(claim), []).append(claim)
    texts = [f"{_claims(claims)}: {source}" for source, claims in by_source.items()]
    return f"{row.label}, run again by others: {'; '.join(texts)}."


def _source(claim: Claim) -> str:
    return (claim.source or "") + (f" (mean of {claim.runs} runs)" if claim.runs else "")


def _reading(section: Section, found: list[Result]) -> list[str]:
    """How the second table was made."""
    table = section.table
    baselines = list(dict.fromkeys(f"`{r.baseline}`" for r in found if r.baseline))
    texts = [
        "Intervals: 95%, Student's t over seeds; one seed or equal values give none.",
    ]
    if baselines:
        texts.append(
            f"Differences: to {', '.join(baselines)}, paired by seed (n pairs), last epoch; p of the "
            "paired t-test, two-sided, corrected over this table by Holm's method. Negative: better "
            "than the baseline."
        )
    if any(r.comparisons for r in found):
        texts.append(
            "Against published: each number is compared with ours of the same selection by two "
            f"one-sided t-tests at level 0.05: `reproduced` is within {table.margin:g} points, "
            "`differs` is beyond. The published number is taken as a constant, though it is itself "
            "one of few runs: its own spread is not known and would blur the verdict further."
        )
        texts.append(
            "Seeds needed: in all, to settle it with probability 0.8 if mean and spread stay as they "
            f"are; where no spread is seen, {table.assumed_std:g} points are assumed."
        )
    return texts


def _csv_row(section: Section, result: Result) -> dict[str, object]:
    line = result.line
    out: dict[str, object] = {
        "table": section.table.name,
        "budget": section.budget,
        "row": line.row.label,
        "state": "run" if line.records else line.state,
        "epochs": line.config.epochs if line.config else "",
        "precision": line.protocol("precision"),
        "bn_group_size": line.protocol("bn_group_size"),
        "n": len(line.records),
        "seeds": line.seeds,
    }
    for error, selections, summaries in (("top1", TOP1, result.top1), ("top5", TOP5, result.top5)):
        for selection in selections:
            name, summary = f"{error}_error_{selection}", summaries[selection]
            out[f"{name}_mean"] = number(summary.mean)
            out[f"{name}_std"] = number(summary.std)
            out[f"{name}_low"] = number(summary.low)
            out[f"{name}_high"] = number(summary.high)
            if error == "top1":
                out[f"{name}_values"] = _values(result, selection)
    out["baseline"] = result.baseline or ""
    for selection in PAIRED:
        difference, name = result.differences[selection], f"difference_{selection}"
        out[f"{name}_n"] = difference.n
        out[f"{name}_mean"] = number(difference.mean)
        out[f"{name}_low"] = number(difference.low)
        out[f"{name}_high"] = number(difference.high)
        out[f"{name}_p"] = number(difference.p, 6)
        out[f"{name}_p_holm"] = number(result.p_holm[selection], 6)
    out["margin"] = section.table.margin
    out["assumed_std"] = section.table.assumed_std
    for rule in PUBLISHED_RULES:
        out |= _csv_claim(rule, line.row.claim(rule), result.comparisons.get(rule))
    others = [f"{n}={v:g}" for claim in line.row.published for n, v in claim.others.items()]
    out["published_others"] = "; ".join(others)
    out["reruns"] = _reruns(line.row) if line.row.reruns else ""
    return out


def _csv_claim(
    rule: PublishedRule, claim: Claim | None, comparison: Comparison | None
) -> dict[str, object]:
    known = claim or Claim()
    out: dict[str, object] = {
        "top1_error": "" if known.top1_error is None else known.top1_error,
        "top5_error": "" if known.top5_error is None else known.top5_error,
        "runs": known.runs or "",
        "source": known.source or "",
        "difference": number(comparison.difference) if comparison else "",
        "p_within": number(comparison.p_within, 6) if comparison else "",
        "p_beyond": number(comparison.p_beyond, 6) if comparison else "",
        "verdict": comparison.verdict if comparison else "",
        "seeds_needed": _seeds(comparison.seeds_needed) if comparison else "",
    }
    return {f"published_{rule}_{name}": value for name, value in out.items()}


def _values(result: Result, selection: str) -> str:
    """The errors of the single runs, in the order of `seeds`; `-` where a run has none."""
    values = [top1_error(r, selection) for r in result.line.records]
    return " ".join("-" if v is None else f"{v:.4f}" for v in values)

"""Two networks side by side, with tests over the images that both were shown."""

from __future__ import annotations

import numpy as np

from cutmix_exp.reporting.examined import Columns, Examined
from cutmix_exp.reporting.markdown import bullets, table_of
from cutmix_exp.reporting.record import Record
from cutmix_exp.reporting.statistics import mcnemar, paired_bootstrap


def compare(a: Examined, b: Examined) -> str:
    """Markdown: how the two differ as experiments, their numbers, and the paired tests."""
    parts = ["# Two networks side by side\n", *bullets([f"A: {a.name}", f"B: {b.name}"]), ""]
    parts += ["## What differs\n", _differences(a, b)]
    parts += ["## Errors of the training, in %\n", _metrics(_training(a), _training(b))]
    for suite in sorted(set(a.record["evaluations"]) | set(b.record["evaluations"])):
        mine, theirs = (x.record["evaluations"].get(suite) for x in (a, b))
        parts.append(f"## Suite {suite}\n")
        if mine and theirs and not _asked_the_same(mine, theirs):
            parts.append("Not comparable: the suite's fields differ between the two.\n")
            continue
        parts.append(_metrics(*(e["metrics"] if e else {} for e in (mine, theirs))))
    return "\n".join([*parts, *_paired(a, b)])


def _training(of: Examined) -> dict[str, float]:
    return dict(of.record.get("metrics", {}))


def _metrics(a: dict[str, float], b: dict[str, float]) -> str:
    rows = []
    for name in dict.fromkeys([*a, *b]):
        both = name in a and name in b
        shown = [f"{m[name]:.4g}" if name in m else "not run" for m in (a, b)]
        rows.append([name, *shown, f"{b[name] - a[name]:+.4g}" if both else ""])
    return table_of(["number", "A", "B", "B - A"], rows) if rows else "Neither has any.\n"


def _differences(a: Examined, b: Examined) -> str:
    mine, theirs = (dict(_leaves(x.record["config"])) for x in (a, b))
    rows = [
        [f"`{name}`", str(mine.get(name, "-")), str(theirs.get(name, "-"))]
        for name in dict.fromkeys([*mine, *theirs])
        if mine.get(name) != theirs.get(name) and not name.startswith(("budget", "runs_dir"))
    ]
    return (
        table_of(["field", "A", "B"], rows) if rows else "Nothing: they are the same experiment.\n"
    )


def _leaves(tree: object, path: str = "") -> list[tuple[str, object]]:
    if not isinstance(tree, dict):
        return [(path, tree)]
    return [
        leaf for name, held in tree.items() for leaf in _leaves(held, f"{path}.{name}".strip("."))
    ]


def _paired(a: Examined, b: Examined) -> list[str]:
    """McNemar's test and the bootstrap of the difference, for each suite that both were shown."""
    if reason := _other_data(a.record, b.record):
        return [f"No paired tests: {reason}.\n"]
    rows, left_out = [], []
    for suite in [s for s in a.columns if s in b.columns]:
        mine, theirs = a.correct(suite), b.correct(suite)
        if mine is None or theirs is None:
            continue
        entries = [x.record["evaluations"].get(suite) for x in (a, b)]
        if all(entries) and not _asked_the_same(*entries):
            left_out.append(f"`{suite}`: its fields differ between the two.")
            continue
        if not same_images(a.columns[suite], b.columns[suite]):
            left_out.append(f"`{suite}`: the two were not shown the same images.")
            continue
        test, spread = mcnemar(mine, theirs), paired_bootstrap(~theirs, ~mine, seed=0)
        rows.append(
            [
                suite,
                str(len(mine)),
                str(test.only_a),
                str(test.only_b),
                f"{100 * spread.mean:+.2f}",
                f"{100 * spread.low:.2f} to {100 * spread.high:.2f}",
                f"{test.p:.3g}",
            ]
        )
    if not rows and left_out:
        return ["## Image by image\n", *bullets(left_out), ""]
    if not rows:
        return [
            "No paired tests: the predictions for each image are beside the runs, not in records.\n"
        ]
    head = [
        "suite",
        "images",
        "only A right",
        "only B right",
        "error B - A",
        "interval",
        "p (McNemar)",
    ]
    notes = [
        "Over the same images in the same order: errors in %, 95% bootstrap interval of the difference, "
        "exact two-sided McNemar test. They tell these two networks apart, not their methods: that "
        "takes seeds.",
    ]
    return ["## Image by image\n", table_of(head, rows), *bullets([*notes, *left_out]), ""]


def _asked_the_same(a: Record, b: Record) -> bool:
    return bool(a["suite"] == b["suite"] and a["version"] == b["version"])


def _other_data(a: Record, b: Record) -> str:
    """Why two networks were not tested on the same images; empty if they were, as far as records
    tell (those of networks from elsewhere have no fingerprint)."""
    if a["dataset"] != b["dataset"]:
        return f"A was tested on {a['dataset']}, B on {b['dataset']}"
    prints = [r.get("provenance", {}).get("dataset_fingerprint") for r in (a, b)]
    if all(prints) and prints[0] != prints[1]:
        return f"the files of {a['dataset']} were not the same for the two"
    return ""


def same_images(a: Columns, b: Columns) -> bool:
    """Whether two networks were shown the same images, as far as their columns tell."""
    for name in ("label", "index"):
        if name in a and name in b:
            if not np.array_equal(a[name], b[name]):
                return False
        elif (name in a) != (name in b):
            return False
    return {len(c) for c in a.values()} == {len(c) for c in b.values()}

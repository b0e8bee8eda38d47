"""Tables: committed ones match their records byte for byte; cells hold what they say."""

from __future__ import annotations

import csv
import io
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from scipy import stats

from cutmix_exp.composition import CONFIG_DIR, compose
from cutmix_exp.config import Hardware, from_dict, resolve
from cutmix_exp.errors import UserError
from cutmix_exp.reporting.record import (
    history_of,
    metrics_of,
    new_record,
    portable,
    read_record,
)
from cutmix_exp.reporting.render import render
from cutmix_exp.reporting.tables import (
    Claim,
    Row,
    load_records,
    load_table,
    row_config,
    table_names,
    top1_error,
)
from tests.helpers import ROOT, row_configs

RESULTS = ROOT / "results"


@pytest.fixture(scope="module")
def committed() -> list[dict[str, Any]]:
    return load_records(RESULTS / "records")


@pytest.mark.parametrize("name", table_names())
def test_committed_tables_are_what_the_records_give(
    name: str, committed: list[dict[str, Any]]
) -> None:
    markdown, table_csv = render(load_table(name), committed)
    assert (RESULTS / "tables" / f"{name}.md").read_text() == markdown
    assert (RESULTS / "tables" / f"{name}.csv").read_text() == table_csv


def test_there_are_no_other_tables() -> None:
    assert {p.stem for p in (RESULTS / "tables").iterdir()} == set(table_names())


def test_committed_records_keep_their_identity(committed: list[dict[str, Any]]) -> None:
    """A change of the configuration must not rename runs: old configs give their old hashes."""
    for record in committed:
        config = from_dict(record["config"])
        assert "/" not in record["config"]["dataset"]["root"] + record["config"]["runs_dir"]
        if record["status"] == "external":
            continue
        assert (config.run_id, config.cell()) == (record["run_id"], record["cell"])
        assert (RESULTS / "records" / f"{config.run_id}.json").exists()
        assert record["provenance"]["dirty"] is False


def record(overrides: list[str], seed: int, error: float, **changes: Any) -> dict[str, Any]:
    """A complete record with given errors."""
    precision = changes.get("precision", "bf16")
    config = resolve(
        from_dict(
            compose(
                [*overrides, f"seed={seed}", f"precision={precision}", *changes.get("more", [])]
            )
        ),
        Hardware(cpu_bf16=True),
    )
    made = new_record(config)
    made["metrics"] = {
        "test/top1_error_last": error,
        "test/top1_error_best": error - 0.5,
        "test/top5_error_best": 1.0,
    }
    made["cost"] = {"device": "a device", "world_size": 1}
    return {**made, "status": "complete"}


CUTMIX = ["dataset=cifar100", "model=pyramidnet", "aug=cutmix"]
BASELINE = ["dataset=cifar100", "model=pyramidnet", "aug=baseline"]
TABLE5 = load_table("cifar100_pyramidnet200")

Cells = dict[str, str]


def parsed(markdown: str) -> list[list[Cells]]:
    """The tables of a Markdown text: for each its lines, by the names of their columns."""
    tables: list[list[Cells]] = []
    head: list[str] = []
    for line in markdown.splitlines():
        cells = [c.strip() for c in line.split("|")[1:-1]]
        if not cells:
            head = []
        elif not head:
            head = cells
            tables.append([])
        elif cells[0] != "---":
            tables[-1].append(dict(zip(head, cells, strict=True)))
    return tables


def lines_of_row(table: list[Cells], label: str) -> list[Cells]:
    return [line for line in table if line["Method"] == label]


def csv_rows(text: str, label: str) -> list[Cells]:
    return [row for row in csv.DictReader(io.StringIO(text)) if row["row"] == label]


def test_a_cell_holds_the_seeds_of_its_row() -> None:
    records = [record(CUTMIX, seed, error) for seed, error in ((2, 16.0), (0, 14.0), (1, 15.0))]
    markdown, table_csv = render(TABLE5, records)
    table, details = parsed(markdown)
    (cutmix,) = lines_of_row(table, "CutMix")
    assert cutmix == {
        "Method": "CutMix",
        "epochs": "300",
        "published": "14.47 / 2.97 (best), 15.07 (last)",
        "last": "15.00 ± 1.00",
        "val-selected": "",
        "best": "14.50 ± 1.00",
        "last - best": "0.50 ± 0.00",
        "top-5, best": "1.00 ± 0.00",
        "seeds": "0 1 2 (n=3)",
        "protocol": "bf16, BN 64",
    }
    (baseline,) = lines_of_row(table, "Baseline")
    assert baseline["last"] == "not run" and baseline["best"] == baseline["seeds"] == ""
    assert "first author, clovaai/CutMix-PyTorch issue 7 (mean of 3 runs)" in markdown
    assert [line["Method"] for line in details] == ["CutMix"]
    (row,) = csv_rows(table_csv, "CutMix")
    assert (row["n"], row["seeds"]) == ("3", "0 1 2")
    assert row["top1_error_last_values"] == "14.0000 15.0000 16.0000"
    assert (row["top1_error_last_mean"], row["top1_error_last_std"]) == ("15.0000", "1.0000")
    assert row["published_best_top1_error"] == "14.47" and row["published_best_runs"] == "3"


def test_a_published_number_is_compared_with_ours_of_the_same_selection() -> None:
    """Ours: best 14.47 on average, last 14.97; published: best 14.47, last 15.07."""
    records = [record(CUTMIX, seed, 14.97 + d) for seed, d in enumerate((-0.1, 0.0, 0.1))]
    markdown, table_csv = render(TABLE5, records)
    _, details = parsed(markdown)
    assert details[0]["against published"] == "last -0.10: reproduced; best +0.00: reproduced"
    (row,) = csv_rows(table_csv, "CutMix")
    for rule, difference in (("last", -0.1), ("best", 0.0)):
        assert float(row[f"published_{rule}_difference"]) == pytest.approx(difference, abs=1e-4)
        assert row[f"published_{rule}_verdict"] == "reproduced"
    assert "0.5 points" in markdown and "taken as a constant" in markdown


def test_one_seed_gives_no_interval_and_says_how_many_would_do() -> None:
    markdown, _ = render(TABLE5, [record(CUTMIX, 0, 15.07)])
    _, details = parsed(markdown)
    assert details[0]["last, interval"] == details[0]["p (Holm)"] == ""
    assert "last +0.00: too few seeds, 8 needed" in details[0]["against published"]
    assert "0.4 points are assumed" in markdown


def test_differences_are_paired_by_seed_and_corrected() -> None:
    cutout = ["dataset=cifar100", "model=pyramidnet", "aug=cutout"]
    base, ours, other = (16.0, 17.0, 18.0), (14.0, 15.5, 15.0), (16.1, 17.0, 17.9)
    records = [record(BASELINE, s, e) for s, e in enumerate(base)]
    records += [record(CUTMIX, s, e) for s, e in enumerate(ours)]
    records += [record(CUTMIX, 9, 99.0)]  # the baseline has no seed 9
    records += [record(cutout, s, e) for s, e in enumerate(other)]
    markdown, table_csv = render(TABLE5, records)
    _, details = parsed(markdown)
    p = [stats.ttest_rel(ours, base).pvalue, stats.ttest_rel(other, base).pvalue]
    assert p[0] < p[1]
    (cutmix,), (cutout_row,) = (csv_rows(table_csv, name) for name in ("CutMix", "Cutout"))
    assert float(cutmix["difference_last_p"]) == pytest.approx(p[0], abs=1e-6)
    assert float(cutmix["difference_last_p_holm"]) == pytest.approx(2 * p[0], abs=1e-6)
    assert float(cutout_row["difference_last_p_holm"]) == pytest.approx(p[1], abs=1e-6)
    (line,) = lines_of_row(details, "CutMix")
    assert line["last - baseline's"] == "-2.17 (n=3)"
    (line,) = lines_of_row(details, "Baseline")
    assert line["last - baseline's"] == ""


def test_a_row_can_have_another_baseline() -> None:
    light = ["dataset=cifar100", "model=pyramidnet", "model.depth=110", "model.alpha=64"]
    records = [record([*light, "aug=baseline"], 0, 20.0)]
    records += [record(["experiment=resnet110_baseline"], 0, 23.0)]
    records += [record(["experiment=resnet110_cutmix"], 0, 22.0)]
    _, table_csv = render(load_table("cifar100_light"), records)
    (row,) = csv_rows(table_csv, "ResNet-110 + CutMix")
    assert (row["baseline"], row["difference_last_mean"]) == ("ResNet-110", "-1.0000")
    (row,) = csv_rows(table_csv, "ResNet-110")
    assert (row["baseline"], row["difference_last_n"]) == ("", "0")


def test_precision_and_batchnorm_groups_are_never_mixed_in_a_cell() -> None:
    records = [
        record(CUTMIX, 0, 14.0),
        record(CUTMIX, 1, 15.0, precision="fp32"),
        record(CUTMIX, 2, 16.0, more=["trainer.bn_group_size=32"]),
        *(record(BASELINE, seed, 17.0) for seed in (0, 1, 2)),
    ]
    markdown, _ = render(TABLE5, records)
    table, details = parsed(markdown)
    found = [(r["last"], r["protocol"]) for r in lines_of_row(table, "CutMix")]
    assert found == [("16.00", "bf16, BN 32"), ("14.00", "bf16, BN 64"), ("15.00", "fp32, BN 64")]
    differences = [r["last - baseline's"] for r in lines_of_row(details, "CutMix")]
    assert differences == ["", "-3.00 (n=1)", ""]  # only runs of one protocol are paired


def test_a_row_that_sets_the_batchnorm_group_has_its_own_runs() -> None:
    records = [record(CUTMIX, 0, 14.0), record(CUTMIX, 0, 15.0, more=["trainer.bn_group_size=32"])]
    markdown, table_csv = render(load_table("ablation_protocol"), records)
    table, _ = parsed(markdown)
    for label, error, group in (("CutMix", "14.00", 64), ("BatchNorm groups of 32", "15.00", 32)):
        (line,) = lines_of_row(table, label)
        assert (line["last"], line["protocol"]) == (error, f"bf16, BN {group}")
    (row,) = csv_rows(table_csv, "BatchNorm groups of 32")
    assert (row["baseline"], row["difference_last_mean"]) == ("CutMix", "1.0000")


def test_budgets_are_never_mixed_and_only_whole_recipes_are_judged() -> None:
    records = [record(CUTMIX, 0, 14.0), record([*CUTMIX, "budget=short"], 0, 40.0)]
    markdown, table_csv = render(TABLE5, records)
    paper, short = markdown.split("## Budget: ")[1:]
    assert paper.startswith("paper") and short.startswith("short")
    assert lines_of_row(parsed(paper)[0], "CutMix")[0]["last"] == "14.00"
    (line,) = lines_of_row(parsed(short)[0], "CutMix")
    assert (line["last"], line["epochs"]) == ("40.00", "30")
    assert [bool(r["published_best_verdict"]) for r in csv_rows(table_csv, "CutMix")] == [
        True,
        False,
    ]


def test_rows_of_fixed_length_are_shown_once() -> None:
    fixed = ["dataset=cifar10_jpeg", "model=resnet", "model.depth=20", "aug=baseline"]
    fixed += ["schedule.batch_size=128", "schedule.lr=0.1", "schedule.epochs=15"]
    markdown, _ = render(load_table("cifar10_jpeg_resnet20"), [record(fixed, 0, 20.0)])
    assert markdown.count("## Budget") == 1 and markdown.count("20.00") == 1


def test_selections_stand_side_by_side() -> None:
    made = record(CUTMIX, 0, 15.0)
    other = record(CUTMIX, 1, 16.0)
    made["metrics"]["test/top1_error_val_selected"] = 14.8
    table, _ = parsed(render(TABLE5, [made, other])[0])
    (line,) = lines_of_row(table, "CutMix")
    assert [line[c] for c in ("last", "val-selected", "best", "last - best")] == [
        "15.50 ± 0.71",
        "14.80 (n=1)",  # of one of the two
        "15.00 ± 0.71",
        "0.50 ± 0.00",
    ]


def test_the_median_of_the_last_ten_epochs() -> None:
    made = record(CUTMIX, 0, 15.0)
    made["config"]["schedule"]["epochs"] = 12
    made["history"] = {"test/top1_error": [90.0, 80.0, *(float(e) for e in range(10))]}
    assert top1_error(made, "median_last_10") == 4.5
    made["config"]["schedule"]["epochs"] = 13  # the curve is not whole
    assert top1_error(made, "median_last_10") is None
    made["config"]["schedule"]["epochs"] = 3
    made["history"] = {"test/top1_error": [3.0, 2.0, 1.0]}
    assert top1_error(made, "median_last_10") is None
    rules = {c.selection for r in load_table("openmixup_cifar100").rows for c in r.published}
    assert rules == {"median_last_10"}


def test_other_runs_and_unfinished_ones_stay_out(tmp_path: Path) -> None:
    stray = record([*CUTMIX, "aug.mix.alpha=0.3"], 0, 1.0)
    running = {**record(CUTMIX, 1, 2.0), "status": "running"}
    for made in (stray, running):
        (tmp_path / f"{made['run_id']}.json").write_text(json.dumps(made))
    (table,) = parsed(render(TABLE5, load_records(tmp_path))[0])
    assert lines_of_row(table, "CutMix")[0]["last"] == "not run"


def test_numbers_of_others_who_ran_it_again_are_shown_and_compared_with_nothing() -> None:
    markdown, table_csv = render(TABLE5, [record(CUTMIX, seed, 15.0 + seed) for seed in (0, 1)])
    assert (
        "* CutMix, run again by others: 15.91 (last), 14.96 (best): ildoonet, issue 7, before lambda "
        "was corrected (mean of 5 runs); 15.51 / 3.36 (last), 14.49 / 3.01 (best): PuzzleMix's "
        "repository (mean of 3 runs).\n"
    ) in markdown
    assert markdown.count("Baseline, run again by others: 16.50 (last), 16.31 (best)") == 1
    (cutmix,) = csv_rows(table_csv, "CutMix")
    assert "14.49 / 3.01 (best)" in cutmix["reruns"]
    assert cutmix["published_best_top1_error"] == "14.47"
    (shakedrop,) = csv_rows(table_csv, "ShakeDrop")
    assert shakedrop["reruns"] == ""
    with pytest.raises(UserError, match="no source"):
        Row(label="r", reruns=(Claim(top1_error=1.0),))


def test_every_regularizer_is_in_its_table() -> None:
    files = (yaml.safe_load(p.read_text()) for p in (CONFIG_DIR / "aug").glob("*.yaml"))
    atoms = {atom for file in files for atom in file.get("atoms", {})}
    shown = {a for c in row_configs(load_table("regularizers_extended")) for a in c.aug.atoms}
    variants = {a for c in row_configs(load_table("cutmix_variants")) for a in c.aug.atoms}
    localisation = {"adl"}
    assert "between_class_plus" in atoms and "cutmix_one_hot" in variants
    assert atoms - shown - variants == localisation


def test_table_9_is_commands_on_both_data_sets() -> None:
    for name, dataset in (("wsol", "cub"), ("wsol_imagenet", "imagenet")):
        table = load_table(name)
        assert {config.dataset.name for config in row_configs(table)} == {dataset}
        assert {column.suite for column in table.columns} == {"localization"}
        assert "none" not in {column.metric for column in table.columns}
    row = load_table("wsol_imagenet").row("ResNet-50 + CutMix")
    assert row.overrides == ("experiment=wsol_imagenet_resnet50", "aug=cutmix")
    assert row.published[0].others == {"ImageNet": 47.25}


def test_recipes_of_others_are_compared_with_their_own_numbers() -> None:
    table = load_table("imagenet_recipes")
    errors = {row.overrides[0]: row.published[0].top1_error for row in table.rows}
    assert errors == {
        "experiment=torchvision_resnet50": 19.142,
        "experiment=timm_rsb_a1": 19.6,
        "experiment=timm_rsb_a2": 20.2,
        "experiment=timm_rsb_a3": 21.9,
    }
    assert [table.baseline_of(row) for row in table.rows] == [None] * 4


def test_rows_of_a_table_are_different_runs() -> None:
    for name in table_names():
        resolved = [
            resolve(c, Hardware(gpus=1, gpu_bf16=True)) for c in row_configs(load_table(name))
        ]
        cells = {(c.cell(), c.trainer.bn_group_size) for c in resolved}
        assert len(cells) == len(resolved), name


def test_a_row_whose_part_is_missing_leaves_the_others_alone() -> None:
    table = replace(
        TABLE5,
        rows=(
            Row(label="Baseline", overrides=("aug=baseline",)),
            Row(label="Later", overrides=("aug=not_there_yet",), published=(claim(15.0),)),
            Row(label="Elsewhere", published=(claim(14.0),)),
        ),
    )
    markdown, table_csv = render(table, [record(BASELINE, 0, 16.0)])
    lines = parsed(markdown)[0]
    assert [line["last"] for line in lines] == ["16.00", "not available yet", "quoted"]
    assert "Not available yet: a part" in markdown
    assert [csv_rows(table_csv, n)[0]["state"] for n in ("Baseline", "Later")] == [
        "run",
        "not available yet",
    ]
    assert [len(row_configs(table)), table.baseline_of(table.rows[2])] == [1, "Baseline"]


def claim(error: float) -> Claim:
    return Claim(top1_error=error, selection="best", source="somebody")


@pytest.mark.parametrize("name", table_names())
def test_every_row_can_be_run_or_is_quoted(name: str) -> None:
    table = load_table(name)
    for row in table.rows:
        found = row_config(table, row)
        assert not isinstance(found, UserError), f"{row.label}: {found}"


def test_each_published_number_is_written_once() -> None:
    """Rows that share a number name the row that has it."""
    seen: dict[tuple[Any, ...], str] = {}
    for name in table_names():
        text = yaml.safe_load((CONFIG_DIR / "table" / f"{name}.yaml").read_text())
        common = text.get("common", [])
        for row in text["rows"]:
            if row.get("published") and row.get("overrides"):
                of = {n for claim in row["published"] for n in claim.get("others", {})}
                for number in of or {"error"}:
                    key = (number, *sorted([*common, *row["overrides"]]))
                    assert key not in seen, f"{name} and {seen[key]}: {row['label']}"
                    seen[key] = name
    variants = load_table("cutmix_variants").row("CutMix")
    assert [c.top1_error for c in variants.published] == [14.47, 15.07]
    assert variants.published[0].source == "paper Table 5" and variants.published[0].runs == 3


PAPER_ROWS = {
    "imagenet_resnet50": 13,
    "imagenet_deeper": 6,
    "cifar100_pyramidnet200": 15,
    "cifar100_light": 4,
    "cifar10_pyramidnet200": 5,
    "cutmix_variants": 7,
    "alpha_ablation": 7,
    "layer_ablation": 6,
    "transfer": 4,
    "fgsm_imagenet": 4,
    "ood_cifar100": 4,
    "ood_cifar100_sets": 4,
}


def test_every_row_of_the_paper_is_there() -> None:
    assert {n: len(load_table(n).rows) for n in PAPER_ROWS} == PAPER_ROWS
    for name in ("imagenet_resnet50", "cifar100_pyramidnet200", "cutmix_variants"):
        assert all(row.claim("best") for row in load_table(name).rows)
    sums = {"cifar100_pyramidnet200": (233.53, 51.89), "imagenet_resnet50": (286.59, 79.07)}
    for name, (top1, top5) in sums.items():  # of the paper's columns
        claims = [row.published[0] for row in load_table(name).rows]
        assert sum(c.top1_error or 0 for c in claims) == pytest.approx(top1)
        assert sum(c.top5_error or 0 for c in claims) == pytest.approx(top5)
    means, single = load_table("ood_cifar100"), load_table("ood_cifar100_sets")
    for row in means.rows:  # Table 12 is the mean of Table A2's seven sets
        by_set = single.row(row.label).published[0].others
        for number, short in (
            ("TNR at TPR 95", "TNR"),
            ("AUROC", "AUROC"),
            ("detection accuracy", "detection"),
        ):
            values = [v for name, v in by_set.items() if name.endswith(f", {short}")]
            assert len(values) == 7
            mean = row.published[0].others[number]
            assert sum(values) / 7 == pytest.approx(mean, abs=0.06), (row.label, number)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rows": (Row(label="A"), Row(label="A"))}, "same label"),
        ({"rows": (Row(label="A", baseline="B"),)}, "'B' of 'A' is no row"),
    ],
)
def test_slips_in_a_table_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        replace(TABLE5, **changes)
    with pytest.raises(UserError, match="two published numbers"):
        Row(label="A", published=(claim(1.0), claim(2.0)))
    with pytest.raises(UserError, match="both published and published_as"):
        Row(label="A", published=(claim(1.0),), published_as="t/A")
    with pytest.raises(UserError, match="no row 'Z'"):
        TABLE5.row("Z")


@pytest.mark.parametrize("text", ["{}", "[]", "no json", '{"schema_version": 99}'])
def test_what_is_no_record_is_refused(text: str, tmp_path: Path) -> None:
    file = tmp_path / "x.json"
    file.write_text(text)
    with pytest.raises(UserError, match=r"x\.json"):
        read_record(file)


def test_a_portable_record_has_no_places() -> None:
    made = record([*CUTMIX, "dataset.root=/somewhere/data", "runs_dir=/somewhere/runs"], 0, 1.0)
    made["provenance"]["command"] = (
        "train.py aug=cutmix dataset.root=/somewhere/data runs_dir=/somewhere/runs"
    )
    kept = portable(made)
    assert "somewhere" not in json.dumps(kept)
    assert kept["provenance"]["command"] == "train.py aug=cutmix"
    assert "somewhere" in json.dumps(made)


def test_a_portable_record_does_not_say_where_images_are_kept() -> None:
    words = "dataset=cifar10_jpeg dataset.cache_dir=/somewhere/fast"
    made = record([*words.split(), "model=resnet"], 0, 1.0)
    made["provenance"]["command"] = f"train.py {words}"
    kept = portable(made)
    assert "somewhere" not in json.dumps(kept)
    assert kept["provenance"]["command"] == "train.py dataset=cifar10_jpeg"
    assert from_dict(kept["config"]).run_id == made["run_id"]


def test_metrics_by_hand() -> None:
    def line(split: str, epoch: int, top1: float, top5: float) -> dict[str, Any]:
        return {
            "split": split,
            "epoch": epoch,
            "top1_error": top1,
            "top5_error": top5,
            "loss": top1 / 10,
        }

    lines = []
    for epoch, (val, test, top5) in enumerate(
        [(30.0, 31.0, 9.0), (20.0, 25.0, 5.0), (21.0, 24.0, 6.0), (22.0, 26.0, 4.0)]
    ):
        lines += [
            line("train", epoch + 1, 50.0, 10.0),
            line("val", epoch + 1, val, 1.0),
            line("test", epoch + 1, test, top5),
        ]
    assert metrics_of(lines) == {
        "test/top1_error_last": 26.0,
        "test/top1_error_best": 24.0,
        "test/top1_error_val_selected": 25.0,
        "test/top5_error_last": 4.0,
        "test/top5_error_best": 6.0,  # of the epoch that is best in top-1
        "test/top5_error_val_selected": 5.0,
        "test/loss_last": 2.6,
        "test/best_epoch": 3,
        "train/loss_last": 5.0,
        "train/top1_error_last": 50.0,
    }
    assert history_of(lines)["test/top1_error"] == [31.0, 25.0, 24.0, 26.0]

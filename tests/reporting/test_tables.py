"""Tables: committed ones match their records byte for byte; cells hold what they say."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from cutmix_exp.config import Hardware, compose, from_dict, resolve
from cutmix_exp.errors import UserError
from cutmix_exp.reporting.record import (
    history_of,
    metrics_of,
    new_record,
    portable,
    read_record,
)
from cutmix_exp.reporting.tables import (
    load_records,
    load_table,
    mean_and_spread,
    render,
    row_configs,
    table_names,
)
from tests.helpers import ROOT

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
        assert (config.run_id, config.cell()) == (record["run_id"], record["cell"])
        assert (RESULTS / "records" / f"{config.run_id}.json").exists()
        assert record["provenance"]["dirty"] is False
        assert "/" not in record["config"]["dataset"]["root"] + record["config"]["runs_dir"]


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


def row_of(markdown: str, label: str) -> list[list[str]]:
    rows = [
        [c.strip() for c in line.split("|")[1:-1]] for line in markdown.splitlines() if "|" in line
    ]
    return [r for r in rows if r[0] == label]


def test_mean_and_spread_by_hand() -> None:
    assert mean_and_spread([]) == "not run"
    assert mean_and_spread([14.5]) == "14.50 (n=1)"
    assert mean_and_spread([14.0, 15.0, 16.0]) == "15.00 ± 1.00 (n=3)"


def test_a_cell_holds_the_seeds_of_its_row() -> None:
    records = [record(CUTMIX, seed, error) for seed, error in ((2, 16.0), (0, 14.0), (1, 15.0))]
    markdown, table_csv = render(load_table("cifar100_pyramidnet200"), records)
    (cutmix,) = row_of(markdown, "CutMix")
    assert cutmix[3:7] == ["15.00 ± 1.00 (n=3)", "14.50 ± 1.00 (n=3)", "1.00 ± 0.00 (n=3)", "0 1 2"]
    assert cutmix[7:] == ["bf16", "64"]
    (baseline,) = row_of(markdown, "Baseline")
    assert baseline[3:7] == ["not run"] * 3 + [""]
    assert "14.47 / 2.97 (best), 15.07 (last)" in cutmix[2]
    assert "first author, clovaai/CutMix-PyTorch issue 7 (mean of 3 runs)" in markdown
    assert (
        "cifar100_pyramidnet200,paper,CutMix,300,14.47,2.97,3,0 1 2,bf16,64,15.0000,1.0000"
        in table_csv
    )


def test_precision_and_batchnorm_groups_are_never_mixed_in_a_cell() -> None:
    records = [
        record(CUTMIX, 0, 14.0),
        record(CUTMIX, 1, 15.0, precision="fp32"),
        record(CUTMIX, 2, 16.0, more=["trainer.bn_group_size=32"]),
    ]
    markdown, _ = render(load_table("cifar100_pyramidnet200"), records)
    found = [(r[3], r[7], r[8]) for r in row_of(markdown, "CutMix")]
    assert found == [
        ("16.00 (n=1)", "bf16", "32"),
        ("14.00 (n=1)", "bf16", "64"),
        ("15.00 (n=1)", "fp32", "64"),
    ]


def test_budgets_are_never_mixed() -> None:
    records = [record(CUTMIX, 0, 14.0), record([*CUTMIX, "budget=short"], 0, 40.0)]
    markdown, _ = render(load_table("cifar100_pyramidnet200"), records)
    paper, short = markdown.split("## Budget: ")[1:]
    assert paper.startswith("paper") and short.startswith("short")
    assert row_of(paper, "CutMix")[0][3] == "14.00 (n=1)"
    assert row_of(short, "CutMix")[0][3] == "40.00 (n=1)"
    assert row_of(short, "CutMix")[0][1] == "30"


def test_other_runs_and_unfinished_ones_stay_out(tmp_path: Path) -> None:
    stray = record([*CUTMIX, "aug.mix.alpha=0.3"], 0, 1.0)
    running = {**record(CUTMIX, 1, 2.0), "status": "running"}
    for made in (stray, running):
        (tmp_path / f"{made['run_id']}.json").write_text(json.dumps(made))
    markdown, _ = render(load_table("cifar100_pyramidnet200"), load_records(tmp_path))
    assert row_of(markdown, "CutMix")[0][3] == "not run"


def test_rows_of_a_table_are_different_runs() -> None:
    for name in table_names():
        cells = [
            resolve(c, Hardware(gpus=1, gpu_bf16=True)).cell()
            for c in row_configs(load_table(name))
        ]
        assert len(set(cells)) == len(cells), name


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

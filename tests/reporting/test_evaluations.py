"""Tables of evaluations, comparisons and report cards: what stands in them is what was found."""

from __future__ import annotations

import csv
import io
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cutmix_exp.errors import UserError
from cutmix_exp.evaluation.base import load_suite, suite_names
from cutmix_exp.files import write_json
from cutmix_exp.reporting.card import write_card
from cutmix_exp.reporting.compare import compare
from cutmix_exp.reporting.examined import Examined, read_examined
from cutmix_exp.reporting.record import Record, external_record
from cutmix_exp.reporting.render import render
from cutmix_exp.reporting.tables import Column, Row, Table, load_table, table_names
from cutmix_exp.schema import identity_of
from tests.helpers import config_of
from tests.reporting.test_tables import parsed, record

TABLE11 = load_table("fgsm_imagenet")
CUTMIX = ["dataset=imagenet", "model=resnet", "aug=cutmix"]


def entry(suite: str, **metrics: float) -> dict[str, Any]:
    own = load_suite(suite)
    return {
        "checkpoint": "0123456789abcdef",
        "suite": identity_of(own),
        "version": own.version,
        "precision": "bf16",
        "metrics": metrics,
        "curves": {"by_eps": {"eps": [0.0, 8.0], "top1_error": [20.0, 80.0]}},
        "protocol": {"clip": True},
        "skipped": {"a_set": "not at hand\nmore"},
        "cost": {"wall_seconds": 2.0, "device": "a device", "world_size": 1},
    }


def examined_record(overrides: list[str], seed: int, error: float, **metrics: float) -> Record:
    made = record(overrides, seed, error)
    made["cost"] |= {"wall_seconds": 3600.0, "images_per_second": 10.0, "parameters": 5}
    return {**made, "evaluations": {"fgsm": entry("fgsm", **metrics)} if metrics else {}}


def test_published_numbers_stand_beside_ours_or_not_run() -> None:
    records = [
        examined_record(CUTMIX, 0, 21.0, top1_accuracy=30.0, clean_top1_error=21.0),
        examined_record(CUTMIX, 1, 22.0, top1_accuracy=33.0, clean_top1_error=22.0),
        examined_record([*CUTMIX[:2], "aug=mixup"], 0, 22.0),  # trained, not examined
    ]
    markdown, table_csv = render(TABLE11, records)
    (table,) = parsed(markdown)
    by_method = {line["Method"]: line for line in table}
    assert by_method["CutMix"]["FGSM 8/255"] == "31.5 ± 2.1"  # of 30 and 33
    assert by_method["CutMix"]["FGSM 8/255: published"] == "31.0"
    assert by_method["CutMix"]["clean error"] == "21.5 ± 0.7"
    assert by_method["CutMix"]["seeds"] == "0 1 (n=2)"
    assert by_method["Mixup"]["FGSM 8/255"] == "not run"
    assert by_method["Baseline"]["FGSM 8/255: published"] == "8.2"
    rows = list(csv.DictReader(io.StringIO(table_csv)))
    (cell,) = [r for r in rows if r["row"] == "CutMix" and r["column"] == "FGSM 8/255"]
    assert (cell["values"], cell["n"], cell["published"]) == ("30.0000 33.0000", "2", "31.0")


def test_runs_that_no_suite_has_seen_do_not_stand_beside_those_of_their_row() -> None:
    seen = examined_record(CUTMIX, 0, 21.0, top1_accuracy=30.0)
    unseen = record(CUTMIX, 1, 21.0, precision="fp32")
    (table,) = parsed(render(TABLE11, [seen, unseen])[0])
    assert [line["protocol"][:4] for line in table if line["Method"] == "CutMix"] == ["bf16"]
    (table,) = parsed(render(TABLE11, [unseen])[0])
    assert [line["protocol"][:4] for line in table if line["Method"] == "CutMix"] == ["fp32"]


def test_numbers_can_run_down_the_page() -> None:
    table = replace(TABLE11, upright=True)
    found = examined_record(CUTMIX, 0, 21.0, top1_accuracy=30.0, clean_top1_error=21.0)
    lines = {line["Number"]: line for line in parsed(render(table, [found])[0])[0]}
    assert lines["FGSM 8/255"]["CutMix"] == "30.0"
    assert lines["FGSM 8/255"]["CutMix: published"] == "31.0"
    assert lines["FGSM 8/255"]["Baseline"] == "not run"
    assert lines["seeds"]["CutMix"] == "0 (n=1)"


def test_a_cell_has_the_suites_own_settings_and_one_precision() -> None:
    accuracies = (30.0, 33.0, 99.0)
    records = [examined_record(CUTMIX, s, 21.0, top1_accuracy=a) for s, a in enumerate(accuracies)]
    found, own = records[2]["evaluations"]["fgsm"], load_suite("fgsm")
    assert "not shown" not in render(TABLE11, records)[0]

    def cell_and_note() -> tuple[str, str]:
        text = render(TABLE11, records)[0]
        (note,) = [line for line in text.splitlines() if "not shown" in line]
        return {r["Method"]: r for r in parsed(text)[0]}["CutMix"]["FGSM 8/255"], note

    found["suite"] = identity_of(replace(own, limit=2000))
    told = "* In records, but not shown: `fgsm` with limit=2000 (CutMix)."
    assert cell_and_note() == ("31.5 ± 2.1 (n=2)", told)
    found |= {"suite": identity_of(own), "version": own.version + 1}
    assert "`fgsm` with version" in cell_and_note()[1]
    found |= {"version": own.version, "precision": "fp32"}
    assert cell_and_note() == ("31.5 ± 2.1 (n=2)", told.replace("with limit=2000", "in fp32"))
    records[2:] = []  # where none is of the training's precision, the first one's counts
    records[0]["evaluations"]["fgsm"]["precision"] = "fp16"
    assert records[0]["protocol"]["precision"] not in ("fp16", "fp32")
    records[1]["evaluations"]["fgsm"]["precision"] = "fp32"
    assert cell_and_note()[0] == "30.0 (n=1)"


def test_networks_from_elsewhere_stand_below() -> None:
    outside = external_record("external-imagenet-resnet-01234567", config_of(*CUTMIX[:2]))
    outside["evaluations"] = {"fgsm": entry("fgsm", top1_accuracy=12.25)}
    other = {**outside, "dataset": "cifar10", "run_id": "external-other"}
    tables = parsed(render(TABLE11, [outside, other])[0])
    assert tables[-1] == [
        {"Network": outside["run_id"], "FGSM 8/255": "12.2", "clean error": "not run"}
    ]


@pytest.mark.parametrize("name", table_names())
def test_columns_are_of_suites_that_exist(name: str) -> None:
    assert {column.suite for column in load_table(name).columns} <= set(suite_names())


def test_a_published_number_without_a_column_is_an_error() -> None:
    column = Column(label="here", suite="fgsm", metric="x")
    row = replace(TABLE11.rows[0])
    with pytest.raises(UserError, match="FGSM 8/255"):
        Table(name="t", title="t", columns=(column,), rows=(row,))
    assert Table(name="t", title="t", rows=(Row(label="r"),)).columns == ()


A = np.array([1, 1, 1, 1, 1, 0, 0, 0], dtype=bool)
B = np.array([1, 0, 0, 0, 0, 1, 0, 0], dtype=bool)


def examined(overrides: list[str], correct: np.ndarray, folder: Path, **columns: Any) -> Examined:
    found = examined_record(overrides, 0, 20.0, top1_error=100.0 * float((~correct).mean()))
    held = {"correct": correct, "label": np.arange(len(correct)), **columns}
    return Examined(found, {"fgsm": held}, folder)


def test_two_networks_are_compared_image_by_image(tmp_path: Path) -> None:
    a, b = examined(CUTMIX, A, tmp_path), examined([*CUTMIX[:2], "aug=mixup"], B, tmp_path)
    text = compare(a, b)
    fields, training, fgsm, paired = parsed(text)
    assert any(line["field"] == "`aug.mix.alpha`" or "mix" in line["field"] for line in fields)
    assert training[0]["B - A"] == "+0"
    assert fgsm[0] == {"number": "top1_error", "A": "37.5", "B": "75", "B - A": "+37.5"}
    # By hand: A alone is right on four images, B alone on one; of five such pairs the two-sided
    # probability of 4:1 or worse is 2 (C(5,0) + C(5,1)) / 32 = 0.375.
    assert paired[0]["only A right"] == "4" and paired[0]["only B right"] == "1"
    assert paired[0]["p (McNemar)"] == "0.375"
    assert paired[0]["error B - A"] == "+37.50"


def test_other_images_or_other_settings_are_not_compared(tmp_path: Path) -> None:
    a = examined(CUTMIX, A, tmp_path)
    shifted = examined(CUTMIX, B, tmp_path, label=np.arange(len(B)) + 1)
    text = compare(a, shifted)
    assert "* `fgsm`: the two were not shown the same images." in text
    assert "p (McNemar)" not in text and "No paired tests" not in text
    alone = Examined(shifted.record, {}, tmp_path)  # a record without what was kept beside the run
    assert "No paired tests: the predictions for each image are beside" in compare(a, alone)
    b = examined(CUTMIX, B, tmp_path)
    assert "p (McNemar)" in compare(a, b)
    b.record["evaluations"]["fgsm"]["suite"]["eps"] = 4
    text = compare(a, b)
    assert "Not comparable" in text and "p (McNemar)" not in text
    assert "* `fgsm`: its fields differ between the two." in text
    of_other_files = examined(CUTMIX, B, tmp_path)
    a.record["provenance"]["dataset_fingerprint"] = "0123456789abcdef"
    of_other_files.record["provenance"]["dataset_fingerprint"] = "fedcba9876543210"
    text = compare(a, of_other_files)
    assert "No paired tests: the files of imagenet were not the same" in text
    other = examined(["dataset=cifar100", "model=resnet"], B, tmp_path)
    assert "A was tested on imagenet, B on cifar100" in compare(a, other)


def test_a_card_shows_numbers_curves_and_what_is_missing(tmp_path: Path) -> None:
    of = examined(CUTMIX, A, tmp_path / "evaluations")
    of.record["evaluations_left_out"] = {"localization": "no boxes", "fgsm": "long since there"}
    (tmp_path / "evaluations").mkdir()
    (tmp_path / "evaluations" / "fgsm-sheet.png").write_bytes(b"a picture")
    (tmp_path / "evaluations" / "fgsm_other-sheet.png").write_bytes(b"not its own")
    page = write_card(of, tmp_path / "cards")
    text = page.read_text()
    assert page.name == f"{of.name}.md"
    assert "| top1_error | 37.5 |" in text
    assert "Choices:" not in text and "None" not in text and "{" not in text
    choices = {line["choice"]: line["value"] for line in parsed(text)[-1]}
    fields = of.record["evaluations"]["fgsm"]["suite"]
    assert choices["eps"] == f"{fields['eps']}" and "class" not in choices
    assert choices["clip"] == "yes"
    assert "37.50 % of 8 images, 95% bootstrap interval" in text
    assert "not done: a_set: not at hand" in text and "more" not in text
    assert "`localization`: no boxes" in text and "long since" not in text
    shown = sorted(p.name for p in (tmp_path / "cards" / of.name).iterdir())
    assert shown == ["fgsm-curve-by_eps.png", "fgsm-sheet.png"]
    assert all(f"({of.name}/{name})" in text for name in shown)


def test_what_is_read_again_is_what_was_written(tmp_path: Path) -> None:
    of = examined(CUTMIX, A, tmp_path)
    write_json(tmp_path / "runs" / of.name / "record.json", of.record)
    folder = tmp_path / "runs" / of.name / "evaluations"
    folder.mkdir()
    np.savez(folder / "fgsm.npz", correct=A)
    found = read_examined(of.name, tmp_path / "runs", tmp_path / "results")
    correct = found.correct("fgsm")
    assert correct is not None and np.array_equal(correct, A)
    assert found.correct("nothing") is None
    with pytest.raises(UserError, match="no record of nobody"):
        read_examined("nobody", tmp_path / "runs", tmp_path / "results")

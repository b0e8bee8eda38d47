"""A table by one command: what is missing of its runs and suites, in which precision, at what cost."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from cutmix_exp.composition import compose
from cutmix_exp.config import Hardware, from_dict, resolve
from cutmix_exp.evaluation.base import load_suite
from cutmix_exp.files import write_json
from cutmix_exp.reporting.record import new_record
from cutmix_exp.reporting.render import render
from cutmix_exp.reporting.tables import Table, load_table
from cutmix_exp.schema import build, identity_of
from cutmix_exp.sweeps.jobs import Settings
from cutmix_exp.sweeps.sweep import Sweep
from cutmix_exp.sweeps.table import Plan, listing, plan_table
from tests.helpers import ROOT, command, environment, record_of
from tests.test_sweeps import descendants, until

SMALL = {
    "name": "small",
    "title": "Small",
    "common": ["dataset=digits", "model=resnet", "model.depth=8"],
    "budget": "smoke",
    "seeds": 1,
    "columns": [{"label": "FGSM", "suite": "fgsm", "metric": "top1_accuracy"}],
    "rows": [
        {"label": "Baseline", "overrides": ["aug=baseline"]},
        {"label": "CutMix", "overrides": ["aug=cutmix"]},
    ],
}
DRIVER = f"""
import sys
sys.path.insert(0, {str(ROOT / "scripts")!r})
import run_table
from cutmix_exp import cli
from cutmix_exp.reporting.tables import Table
from cutmix_exp.schema import build
run_table.load_table = lambda name: build(Table, {SMALL!r})
cli.main(run_table.command)
"""
"""run_table.py with a table that is in no file."""


def planned(results: Path, table: Table | None = None, *extra: str, **options: Any) -> Plan:
    return plan_table(
        table or build(Table, SMALL),
        Settings(),
        **{"budget": "smoke", "seeds": 1, "on_paper": True, **options},
        extra=extra,
        results=results,
    )


def listed(plan: Plan) -> str:
    return "\n".join(listing(plan, [], 20.0))


def finished(plan: Plan, results: Path, precision: str, **evaluations: Any) -> None:
    """Leave complete records of a plan's runs, as if they had been trained in a precision."""
    for run in plan.runs:
        config = replace(run.config, precision=precision)  # type: ignore[arg-type]
        made = {
            **new_record(config),
            "status": "complete",
            "metrics": {"test/top1_error_last": 9.0},
        }
        made["evaluations"] = evaluations
        write_json(results / "records" / f"{config.run_id}.json", made)


def entry(**metrics: float) -> dict[str, Any]:
    """What a record has of the suite fgsm."""
    suite = load_suite("fgsm")
    known = {
        "suite": identity_of(suite),
        "version": suite.version,
        "skipped": {"iSUN": "not there"},
    }
    return {**known, "metrics": metrics}


@pytest.mark.slow
def test_one_command_trains_and_runs_the_suites_and_repeated_what_is_missing(
    tmp_path: Path,
) -> None:
    driver = tmp_path / "driver.py"
    driver.write_text(DRIVER)
    results, runs = tmp_path / "results", tmp_path / "runs"
    words = [str(driver), "table=small", f"results_dir={results}", f"runs_dir={runs}", "device=cpu"]
    dry = command(*words, "dry_run=true").stdout
    assert dry.count("suite fgsm: missing (seed 0)") == 2
    assert "0 of 2 runs are done, 0 of 2 suites" in dry and not results.exists()

    def with_suite() -> list[str]:
        kept = [json.loads(file.read_text()) for file in (results / "records").glob("*.json")]
        return [record["run_id"] for record in kept if "fgsm" in record["evaluations"]]

    line = [sys.executable, *words]
    started = subprocess.Popen(line, cwd=ROOT, env=environment(), stdout=subprocess.DEVNULL)
    until(lambda: len(with_suite()) == 1, 240)
    for pid in descendants(started.pid):
        os.kill(pid, signal.SIGKILL)
    assert started.wait() == -signal.SIGKILL
    assert len(with_suite()) == 1
    done = command(*words)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "2 runs and 2 suites: 3 complete, 1 to do" in done.stdout
    assert "CutMix, seed 0, suite fgsm: complete in" in done.stdout
    assert "not run" not in done.stdout.partition("## Budget")[2]  # the table has its numbers
    assert len(with_suite()) == 2
    for file in results.rglob("*.json"):
        assert str(tmp_path) not in file.read_text()  # no places of a machine
    again = command(*words)
    assert "4 complete, 0 to do" in again.stdout
    # An evaluation that was kept by the run, and not by its committed record: copied, not repeated.
    file = next((results / "records").glob("*-cutmix-*.json"))
    record = json.loads(file.read_text())
    write_json(file, {**record, "evaluations": {}})
    assert "fgsm: in the record already" in command(*words).stdout
    assert json.loads(file.read_text()) == record
    # Without its network nothing can be found of a run: told among the failures, once.
    write_json(file, {**record, "evaluations": {}})
    (runs / record["run_id"] / "checkpoints" / "last.pt").unlink()
    failed = command(*words)
    assert failed.returncode == 1 and "3 complete before" in failed.stdout
    assert "  CutMix, seed 0, suite fgsm: its network is not in" in failed.stdout
    assert record_of(runs / record["run_id"])["evaluations"]


def test_suites_get_what_concerns_the_machine_and_the_datas_place(tmp_path: Path) -> None:
    extra = ["dataset.root=here", "device=cpu", "trainer.compile=false", "runs_dir=there"]
    plan = planned(tmp_path / "results", None, *extra)
    suite = plan.suites[1]
    assert suite.after is plan.runs[1] and suite.config.run_id == plan.runs[1].config.run_id
    assert suite.words == (
        f"run={suite.config.run_id}",
        "suite=fgsm",
        "runs_dir=there",
        f"results_dir={tmp_path / 'results'}",
        "dataset.root=here",
        "device=cpu",
    )


def test_a_suite_is_done_when_the_record_has_what_the_table_shows(tmp_path: Path) -> None:
    plan = planned(tmp_path)
    precision = plan.runs[0].config.precision
    finished(plan, tmp_path, precision, fgsm=entry(clean_top1_error=3.0))
    assert [job.is_complete() for job in plan.jobs] == [True, True, False, False]
    finished(plan, tmp_path, precision, fgsm={**entry(top1_accuracy=3.0), "version": 0})
    assert not any(job.is_complete() for job in plan.suites)  # of an older program
    finished(plan, tmp_path, precision, fgsm=entry(top1_accuracy=3.0))
    assert all(job.is_complete() for job in plan.jobs)


def test_a_suite_that_does_not_find_what_the_table_shows_says_why(tmp_path: Path) -> None:
    plan = planned(tmp_path, None, f"runs_dir={tmp_path / 'runs'}")
    suite = plan.suites[0]
    assert suite.outcome() is None and suite.told() == ""
    record = {**new_record(suite.config), "status": "complete", "evaluations": {}}
    record["evaluations"]["fgsm"] = entry(clean_top1_error=3.0)
    write_json(suite.config.run_dir / "record.json", record)
    assert suite.outcome() is None
    assert suite.told() == (
        "it has not found top1_accuracy, which the table shows\niSUN: not there"
    )
    again = planned(tmp_path, None, f"runs_dir={tmp_path / 'runs'}")
    assert again.suites[0].words[-1] == "force=true"  # evaluate.py would leave it
    assert "force=true" not in again.suites[1].words


def test_an_evaluation_of_another_training_is_no_result_of_the_committed_one(
    tmp_path: Path,
) -> None:
    plan = planned(tmp_path, None, f"runs_dir={tmp_path / 'runs'}")
    suite = plan.suites[0]
    finished(plan, tmp_path, suite.config.precision)
    (suite.config.run_dir / "checkpoints").mkdir(parents=True)
    (suite.config.run_dir / "checkpoints" / "last.pt").touch()
    own = {
        **new_record(suite.config),
        "status": "complete",
        "metrics": {"test/top1_error_last": 8.0},
    }
    write_json(suite.config.run_dir / "record.json", own)
    assert "is of another training" in suite.lacks()
    own["metrics"] = {"test/top1_error_last": 9.0}
    write_json(suite.config.run_dir / "record.json", own)
    assert suite.lacks() == ""


def test_a_run_done_in_another_precision_is_not_trained_again(tmp_path: Path) -> None:
    plan = planned(tmp_path, seeds=2)
    mine = plan.rows[0].precision
    other = "fp32" if mine == "bf16" else "bf16"
    assert "0 of 4 runs are done" in listed(plan)
    finished(plan, tmp_path, other)
    done = planned(tmp_path, seeds=2)
    said = listed(done)
    assert f"Baseline: done in {other}, missing in {mine} (seeds 0 1)" in said
    assert "4 of 4 runs are done" in said
    assert f"4 are done in {other} and not trained again in {mine}" in said
    assert all(job.is_complete() for job in done.runs)
    # They are looked at in a precision that this machine has.
    assert {job.words[-1] for job in done.suites} == {f"precision={mine}"}
    assert {job.config.run_id for job in done.suites} == {job.config.run_id for job in done.runs}
    asked = planned(tmp_path, None, f"precision={mine}", seeds=2)
    assert "0 of 4 runs are done" in listed(asked) and asked.kept() == ""
    over = planned(tmp_path, None, "force=true", seeds=2)
    assert over.kept() == "" and over.runs[0].config.precision == mine
    finished(plan, tmp_path, mine)
    assert "Baseline: done (seeds 0 1)" in listed(planned(tmp_path, seeds=2))


@pytest.mark.parametrize(
    "words", [["precision=bf16"], ["device=cuda", "devices=8"], ["precision=fp16"]], ids=str
)
def test_a_dry_run_asks_for_no_hardware(
    words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Hardware, "here", classmethod(lambda cls: Hardware()))
    plan = planned(tmp_path, None, *words)
    (run, _) = plan.runs
    there = Hardware(gpus=8, gpu_bf16=True, cpu_bf16=True)
    assert "0 of 2 runs are done" in listed(plan)
    asked = ["device=cuda", *words] if "precision=fp16" in words else words
    as_there = from_dict(compose([*run.words[:-1], *asked]))
    expected = resolve(replace(as_there, device="cuda" if len(asked) > 1 else "cpu"), there)
    assert run.config.run_id == expected.run_id


def test_rows_are_listed_once_with_all_their_seeds(tmp_path: Path) -> None:
    said = listed(planned(tmp_path, seeds=3)).splitlines()
    assert said[0] == "0 of 6 runs are done, 0 of 6 suites on them (their cost is not estimated)"
    assert said[1].startswith("6 to do: about ")
    (line,) = [n for n, text in enumerate(said) if text.startswith("[2/2] CutMix: missing")]
    assert said[line].startswith("[2/2] CutMix: missing (seeds 0 1 2), about ")
    assert said[line].endswith(" each")
    assert said[line + 1 :] == [
        "    suite fgsm: missing (seeds 0 1 2)",
        "    python train.py -m dataset=digits model=resnet model.depth=8 aug=cutmix budget=smoke "
        "seed=0,1,2",
    ]


def test_a_table_without_rows_to_run_says_so(tmp_path: Path) -> None:
    said = listed(planned(tmp_path, load_table("transfer"), budget="paper"))
    assert said.splitlines()[-1] == "no row of the table transfer can be run: 4 quoted, not run"
    assert "0 of 0" not in said


def test_quoted_numbers_have_as_many_digits_as_were_published() -> None:
    markdown, _ = render(load_table("transfer"), [])
    assert "| Method | classification error | SSD mAP |" in markdown
    assert "| Cutout | 22.93 | 76.8 | 75.0 | 63.0 |" in markdown
    assert "| CutMix | 21.40 | 77.6 | 76.7 | 64.2 |" in markdown


def test_what_is_after_a_failure_is_not_begun(tmp_path: Path) -> None:
    plan = planned(tmp_path / "results", None, f"runs_dir={tmp_path}")
    broken = replace(plan.runs[0], words=(*plan.runs[0].words, "nonsense"))
    sweep = Sweep([broken, replace(plan.suites[0], after=broken)], Settings(retries=0))
    assert sweep.run() == 1
    assert "sweep of 1 runs and 1 suites" in sweep.summary()
    assert "1 failed, 1 not done" in sweep.summary()

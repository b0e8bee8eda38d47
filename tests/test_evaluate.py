"""Evaluations of a finished run: from its checkpoint, into its record, and nothing else changed."""

from __future__ import annotations

import hashlib
import json
import os
import pty
import re
import shutil
import subprocess
import sys
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torchvision

from cutmix_exp import evaluate as evaluation
from cutmix_exp import experiment
from cutmix_exp.config import Config
from cutmix_exp.distributed import World
from cutmix_exp.errors import UserError
from cutmix_exp.evaluation.base import Findings, Subject, load_suite
from cutmix_exp.evaluation.classification import Classification
from cutmix_exp.files import write_json
from cutmix_exp.reporting.record import portable
from cutmix_exp.subject import find, open_subject
from tests.helpers import ROOT, TINY, command, config_of, environment, record_of, refused

CLASSIFICATION = load_suite("classification")
ALONE = World(0, 1, torch.device("cpu"))


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Config:
    """A finished run of two epochs, with a validation split, a moving average and ShakeDrop."""
    folder = tmp_path_factory.mktemp("runs")
    config = config_of(
        *TINY,
        "aug=[cutmix,shakedrop]",
        "dataset.val_size=100",
        "schedule.ema_decay=0.9",
        f"runs_dir={folder}",
    )
    experiment.run(config)
    return config


@pytest.fixture
def run(trained: Config, tmp_path: Path) -> Path:
    """A copy of that run, to be changed."""
    shutil.copytree(trained.run_dir, tmp_path / "runs" / trained.run_id)
    return tmp_path / "runs" / trained.run_id


def examine(run: Path, *words: str, results: Path | None = None, **settings: Any) -> dict[str, Any]:
    origin = find(run.name, run.parent, "last", ["device=cpu", *words])
    settings = {"force": False, "demanded": True, "suites": [CLASSIFICATION], **settings}
    return evaluation.evaluate(origin, results=results or run.parent.parent / "results", **settings)


def test_the_evaluation_of_a_checkpoint_is_that_of_the_training_to_the_last_bit(run: Path) -> None:
    before = record_of(run)
    checkpoint = hashlib.sha256((run / "checkpoints" / "last.pt").read_bytes()).hexdigest()
    found = examine(run)["evaluations"]["classification"]["metrics"]
    trained = before["metrics"]
    assert found["top1_error"] == trained["test/top1_error_last"]
    assert found["top5_error"] == trained["test/top5_error_last"]
    assert found["loss"] == trained["test/loss_last"]
    assert trained["test/raw_top1_error_last"] != trained["test/top1_error_last"]  # the average's
    kept = np.load(run / "evaluations" / "classification.npz")
    of_training = np.load(run / "evaluations" / "test.npz")
    assert all(np.array_equal(kept[name], of_training[name]) for name in of_training)

    after = record_of(run)
    assert {**after, "evaluations": {}} == {**before, "evaluations": {}}
    assert hashlib.sha256((run / "checkpoints/last.pt").read_bytes()).hexdigest() == checkpoint


def test_what_the_record_has_is_not_run_again(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    examine(run)
    ran = []

    def counted(self: Classification, subject: Subject) -> Findings:
        ran.append(self.name)
        return Findings({"top1_error": 0.0})

    monkeypatch.setattr(Classification, "run", counted)
    examine(run)
    assert not ran
    examine(run, "precision=fp32")
    another = int(record_of(run)["config"]["precision"] != "fp32")  # where the processor has bf16
    assert len(ran) == another
    examine(run, force=True)
    assert len(ran) == another + 1
    monkeypatch.setattr(Classification, "version", 2)
    examine(run)
    assert len(ran) == another + 2
    file = run / "checkpoints" / "last.pt"
    state = torch.load(file, weights_only=True)
    state["average"]["module.head.fc.bias"][0] += 1
    torch.save(state, file)
    examine(run)
    assert len(ran) == another + 3


def test_the_committed_copy_of_the_record_follows_if_it_is_of_the_same_training(run: Path) -> None:
    results = run.parent.parent / "results"
    committed = results / "records" / f"{run.name}.json"
    write_json(committed, portable(record_of(run)))
    examine(run, results=results)
    assert json.loads(committed.read_text()) == portable(record_of(run))
    assert json.loads(committed.read_text())["evaluations"]

    other = portable(record_of(run))
    other["metrics"]["test/top1_error_last"] += 1
    other["evaluations"] = {}
    write_json(committed, other)
    examine(run, results=results, force=True)
    assert json.loads(committed.read_text()) == other


def test_a_checkpoint_from_elsewhere_gets_a_record_of_its_own(run: Path, tmp_path: Path) -> None:
    file = tmp_path / "some.pt"
    subject = open_subject(find(run.name, run.parent, "last", ["device=cpu"]), ALONE)
    torch.save(
        {"state_dict": {f"module.{n}": t for n, t in subject.network.state_dict().items()}}, file
    )
    words = ["dataset=digits", "model=resnet", "model.depth=8", "device=cpu", "aug=shakedrop"]
    origin = find(str(file), tmp_path / "runs2", "last", words)
    record = evaluation.evaluate(
        origin, [CLASSIFICATION], tmp_path / "results", force=False, demanded=True
    )
    name = record["run_id"]
    assert re.fullmatch(r"external-digits-resnet-[0-9a-f]{8}", name)
    assert record["evaluations"]["classification"]["checkpoint"] == subject.checkpoint
    again = open_subject(find(str(file), tmp_path, "last", words), ALONE).name
    dark = open_subject(
        find(str(file), tmp_path, "last", [*words, "dataset.mean=[0,0,0]"]), ALONE
    ).name
    assert again == name and dark != name  # its numbers are others
    (written,) = (tmp_path / "results" / "records").iterdir()
    assert written.name == f"{name}.json"
    assert str(tmp_path) not in written.read_text()
    assert (tmp_path / "runs2" / name / "evaluations" / "classification.npz").exists()
    # The same tensors as the run's average give the same numbers.
    assert (
        record["evaluations"]["classification"]["metrics"]["top1_error"]
        == (record_of(run)["metrics"]["test/top1_error_last"])
    )


def test_the_best_network_is_that_of_the_validation_split(run: Path) -> None:
    origin = find(run.name, run.parent, "best", ["device=cpu"])
    assert origin.file == run / "checkpoints" / "best.pt"
    found = Classification(name="classification").run(open_subject(origin, ALONE)).metrics
    assert found["top1_error"] == record_of(run)["metrics"]["test/top1_error_val_selected"]


def test_findings_of_other_weights_do_not_replace_those_of_the_last_epoch(run: Path) -> None:
    results = run.parent.parent / "results"
    committed = results / "records" / f"{run.name}.json"
    write_json(committed, portable(record_of(run)))
    last = examine(run, results=results)["evaluations"]["classification"]
    for where, weights, name in (
        (run.name, "best", "classification@best"),
        (str(run / "checkpoints" / "best.pt"), "last", "classification@best"),
        (str(run / "checkpoints" / "previous.pt"), "last", "classification@previous"),
        (str(run / "checkpoints" / "last.pt"), "last", "classification"),
    ):
        origin = find(where, run.parent, weights, ["device=cpu"])
        evaluation.evaluate(origin, [CLASSIFICATION], results, force=True, demanded=True)
        held = json.loads(committed.read_text())["evaluations"]
        assert (run / "evaluations" / f"{name}.npz").exists()
        other = held[name]["checkpoint"] != last["checkpoint"]
        assert other == (name == "classification@previous")  # the last epoch was the best one
        assert held["classification"]["metrics"] == last["metrics"]


def test_a_suite_that_fails_on_the_way_leaves_the_others_and_the_card(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def damaged(self: Classification, subject: Subject) -> Findings:
        raise UserError("svhn/test_32x32.mat is damaged\nreplace it")

    monkeypatch.setattr(Classification, "run", damaged)
    suites = [CLASSIFICATION, load_suite("fgsm", {"limit": 8})]
    record = examine(run, suites=suites, demanded=False, card=True)
    assert list(record["evaluations"]) == ["fgsm"]
    assert record["evaluations_left_out"] == {"classification": "svhn/test_32x32.mat is damaged"}
    page = run.parent.parent / "results" / "cards" / f"{run.name}.md"
    assert "svhn/test_32x32.mat is damaged" in page.read_text()
    with pytest.raises(UserError, match="damaged"):
        examine(run, suites=suites)


def test_a_fine_tuned_run_is_examined_without_the_weights_it_began_with(tmp_path: Path) -> None:
    weights = tmp_path / "resnet18.pth"
    torch.save(torchvision.models.resnet18().state_dict(), weights)
    words = ["dataset=digits", "dataset.image_size=32", "model=resnet_gap"]
    words += ["model.architecture=resnet18", "model.pretrained=true", f"model.weights={weights}"]
    words += ["budget=smoke", "trainer.max_steps=1", "device=cpu", f"runs_dir={tmp_path / 'runs'}"]
    config = config_of(*words)
    experiment.run(config)
    weights.unlink()
    record = examine(config.run_dir)
    found = record["evaluations"]["classification"]["metrics"]["top1_error"]
    assert found == record["metrics"]["test/top1_error_last"]


def test_weights_known_by_their_digest_alone_are_refused_in_training() -> None:
    words = ["dataset=digits", "model=timm", "model.architecture=test_resnet"]
    model = config_of(*words, "model.pretrained=true", f"model.weights_sha256={'0' * 64}").model
    with pytest.raises(UserError, match=r"weights_sha256=000(.|\n)*add model\.weights=FILE"):
        model.prepare()


def test_what_cannot_be_examined_is_told(run: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=rf"no run of this name(.|\n)*{re.escape(run.name)}"):
        find("nope", run.parent, "last", [])
    with pytest.raises(UserError, match="examined as it was trained"):
        find(run.name, run.parent, "last", ["schedule.lr=1"])
    with pytest.raises(UserError, match="weights=first"):
        find(run.name, run.parent, "first", [])
    record = record_of(run)
    write_json(run / "record.json", {**record, "status": "interrupted"})
    with pytest.raises(UserError, match="not complete"):
        find(run.name, run.parent, "last", [])
    record["provenance"]["dataset_fingerprint"] = "0123456789abcdef"
    write_json(run / "record.json", record)
    with pytest.raises(UserError, match=r"not what .* was trained on"):
        examine(run)
    (run / "checkpoints" / "best.pt").unlink()
    with pytest.raises(UserError, match="val_size"):
        find(run.name, run.parent, "best", [])


def test_a_suite_that_lacks_data_is_refused_or_left_out(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Classification, "lacks", lambda *_: "there is no data\nput it there")
    with pytest.raises(UserError, match="put it there"):
        examine(run)
    record = examine(run, demanded=False)
    assert record["evaluations"] == {}
    assert record["evaluations_left_out"] == {"classification": "there is no data"}


def test_the_command(run: Path) -> None:
    words = [f"run={run.name}", f"runs_dir={run.parent}", "device=cpu"]
    results = f"results_dir={run.parent.parent}/results"
    done = command("scripts/evaluate.py", *words, results, "suite=classification")
    assert done.returncode == 0, done.stderr
    assert "top1_error" in done.stdout
    assert record_of(run)["evaluations"]["classification"]
    message = refused(*words, results, "suite=robustnes", script="scripts/evaluate.py")
    assert "classification" in message


@pytest.mark.parametrize("suite", ["classification", "fgsm"])
def test_a_person_who_looks_on_sees_a_bar(run: Path, suite: str) -> None:
    words = [f"run={run.name}", f"runs_dir={run.parent}", "device=cpu", f"suite={suite}"]
    shown, (ours, theirs) = b"", pty.openpty()
    command = [sys.executable, str(ROOT / "scripts/evaluate.py"), *words]
    with subprocess.Popen(command, stdout=theirs, env=environment(TERM="xterm")) as process:
        os.close(theirs)
        with suppress(OSError):  # which tells that the other side has closed
            while piece := os.read(ours, 4096):
                shown += piece
    os.close(ours)
    assert process.returncode == 0
    assert re.search(rb"evaluation.*[1-9]\d*/[1-9]", shown), shown


def test_the_parts_of_a_collection_are_recorded_under_their_own_names(run: Path) -> None:
    suite = load_suite("robustness", {"limit": 8})
    parts = examine(run, suites=[suite])["evaluations"]
    assert list(parts) == ["fgsm", "pgd", "occlusion", "in_between", "corruptions"]
    assert all(entry["protocol"]["limit"] == 8 for entry in parts.values())
    assert parts["fgsm"]["curves"]["fgsm"]["eps"] == [0.0, 1.0, 2.0, 4.0, 8.0, 16.0]
    assert (run / "evaluations" / "corruptions-sheet.png").exists()
    for name in parts:
        assert len(np.load(run / "evaluations" / f"{name}.npz")["index"]) == 8
    assert not suite.in_all


@pytest.mark.slow
def test_several_processes_find_the_same(run: Path) -> None:
    alone = examine(run)["evaluations"]["classification"]["metrics"]
    columns = dict(np.load(run / "evaluations" / "classification.npz"))
    words = [f"run={run.name}", f"runs_dir={run.parent}", "device=cpu", "force=true"]
    words += [f"results_dir={run.parent.parent}/results", "suite=classification"]
    done = command("scripts/evaluate.py", *words, "devices=2")
    assert done.returncode == 0, done.stderr
    entry = record_of(run)["evaluations"]["classification"]
    assert entry["cost"]["world_size"] == 2
    assert entry["metrics"] == alone
    shared = np.load(run / "evaluations" / "classification.npz")
    assert all(np.array_equal(shared[name], columns[name]) for name in columns)


def test_lists_of_suites_are_those_of_the_folder() -> None:
    with pytest.raises(UserError, match="classification"):
        load_suite("nope")
    assert replace(CLASSIFICATION, in_all=False) != CLASSIFICATION

"""The commands of the contract, as users give them: real processes, real files."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from cutmix_exp.config import from_dict
from cutmix_exp.errors import UserError
from cutmix_exp.sweeps import search
from cutmix_exp.sweeps.cluster import RayEngine, SlurmEngine
from cutmix_exp.sweeps.jobs import Settings
from tests.helpers import (
    ROOT,
    TINY,
    command,
    config_of,
    environment,
    metrics_of,
    only_run,
    record_of,
    refused,
    train,
)
from tests.test_sweeps import descendants, until

CONTRACT = [
    "config.yaml",
    "metrics.jsonl",
    "record.json",
    "evaluations",
    "tb",
    "checkpoints/last.pt",
]


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """One small run with a validation split, started in an empty folder: (folder, output)."""
    folder = tmp_path_factory.mktemp("first")
    done = train(*TINY, "aug=cutmix", "dataset.val_size=100", cwd=folder, fresh=True)
    return folder, done.stdout


def test_a_run_leaves_the_files_of_the_contract_and_nothing_else(first: tuple[Path, str]) -> None:
    folder, _ = first
    assert [p.name for p in folder.iterdir()] == ["runs"]  # Hydra wrote nothing
    run = only_run(folder / "runs")
    for name in [*CONTRACT, "checkpoints/best.pt"]:
        assert (run / name).exists(), name
    assert not list(run.rglob("*.tmp"))
    assert [p.name for p in (folder / "runs").iterdir()] == [run.name]


def test_the_record_tells_the_whole_story(first: tuple[Path, str]) -> None:
    run = only_run(first[0] / "runs")
    record = record_of(run)
    assert record["run_id"] == run.name
    assert (record["status"], record["schema_version"], record["seed"]) == ("complete", 1, 0)
    assert (record["dataset"], record["model"], record["aug"]) == ("digits", "resnet", "cutmix")
    assert record["protocol"]["box_law"] == "official"
    assert record["protocol"]["correct_lambda"] is True
    assert record["protocol"]["bn_group_size"] == 64
    metrics, tests = record["metrics"], [n for n in metrics_of(run) if n["split"] == "test"]
    vals = [n for n in metrics_of(run) if n["split"] == "val"]
    assert metrics["test/top1_error_last"] == tests[-1]["top1_error"]
    assert metrics["test/top1_error_best"] == min(t["top1_error"] for t in tests)
    chosen = min(reversed(vals), key=lambda v: v["top1_error"])["epoch"]
    assert metrics["test/top1_error_val_selected"] == tests[chosen - 1]["top1_error"]
    for name in ("wall_seconds", "images_per_second", "peak_memory_bytes", "flops_per_image"):
        assert record["cost"][name] > 0
    assert record["cost"]["world_size"] == 1
    cost, phases = record["cost"], record["cost"]["phase_seconds"]
    assert set(phases) == {"input", "step", "evaluation", "checkpoint"}
    assert all(seconds > 0 for seconds in phases.values())
    assert sum(phases.values()) <= cost["wall_seconds"] + 0.5
    done = cost["images_per_second"] * cost["flops_per_image"] * 3  # forward, twice that backward
    assert cost["achieved_flops"] == pytest.approx(done, rel=1e-3)
    assert len(record["provenance"]["dataset_fingerprint"]) == 16
    assert record["provenance"]["packages"]["torch"] == torch.__version__.split("+")[0]
    assert "aug=cutmix" in record["provenance"]["command"]
    assert from_dict(record["config"]).to_dict() == yaml.safe_load(
        (run / "config.yaml").read_text()
    )


def test_metrics_lines(first: tuple[Path, str]) -> None:
    lines = metrics_of(only_run(first[0] / "runs"))
    assert [(n["step"], n["epoch"], n["split"]) for n in lines] == [
        (step, epoch, split)
        for step, epoch in ((21, 1), (42, 2))
        for split in ("train", "val", "test")
    ]  # 1,337 images in batches of 64
    for line in lines:
        assert 0 <= line["top5_error"] <= line["top1_error"] <= 100
    assert {"lr", "clean_loss", "clean_top1_error"} <= set(lines[0])


def test_every_test_image_is_counted_once(first: tuple[Path, str]) -> None:
    run = only_run(first[0] / "runs")
    held = np.load(run / "evaluations" / "test.npz")
    assert np.bincount(held["label"]).tolist() == [36, 36, 35, 37, 36, 37, 36, 36, 35, 36]
    wrong = (held["predicted"] != held["label"]).sum()
    assert record_of(run)["metrics"]["test/top1_error_last"] == 100 * wrong / 360


def test_tensorboard_shows_the_run(first: tuple[Path, str]) -> None:
    run = only_run(first[0] / "runs")
    board = EventAccumulator(str(run / "tb"))
    board.Reload()
    tags = board.Tags()
    assert {"train/loss", "test/top1_error", "val/top1_error"} <= set(tags["scalars"])
    shown = [(e.step, round(e.value, 3)) for e in board.Scalars("test/top1_error")]
    lines = [n for n in metrics_of(run) if n["split"] == "test"]
    assert shown == [(n["step"], round(n["top1_error"], 3)) for n in lines]
    assert tags["images"] == ["augmented training images"]
    assert "config/text_summary" in tags["tensors"]
    assert "_hparams_/experiment" in board.summary_metadata


def test_checkpoints_hold_tensors_and_plain_containers(first: tuple[Path, str]) -> None:
    run = only_run(first[0] / "runs")
    state = torch.load(run / "checkpoints" / "last.pt", weights_only=True)
    assert (state["step"], state["epoch"]) == (42, 2)
    best = torch.load(run / "checkpoints" / "best.pt", weights_only=True)
    vals = [n for n in metrics_of(run) if n["split"] == "val"]
    assert best["step"] == min(reversed(vals), key=lambda v: v["top1_error"])["step"]
    same = all(torch.equal(best["model"][k], state["model"][k]) for k in state["model"])
    assert same == (best["step"] == 42)


def test_it_prints_what_a_person_wants_to_know(first: tuple[Path, str]) -> None:
    said = first[1]
    assert "1,337 training images, 100 validation images, 360 test images" in said
    assert "parameters" in said and "epoch 2/2" in said and "test error last" in said
    assert "\x1b" not in said  # no bars and colours in a log file


def test_the_same_command_again_trains_nothing(first: tuple[Path, str]) -> None:
    folder, _ = first
    run = only_run(folder / "runs")
    before = {p: p.stat().st_mtime_ns for p in run.rglob("*") if p.is_file() and p.name != ".lock"}
    done = train(*TINY, "aug=cutmix", "dataset.val_size=100", cwd=folder)
    assert "is complete, nothing is trained" in done.stdout
    after = {p: p.stat().st_mtime_ns for p in run.rglob("*") if p.is_file() and p.name != ".lock"}
    assert before == after


@pytest.mark.slow
def test_force_starts_over_and_gives_the_same_bits(first: tuple[Path, str]) -> None:
    folder, _ = first
    run = only_run(folder / "runs")
    before = (
        metrics_of(run),
        torch.load(run / "checkpoints" / "last.pt", weights_only=True)["model"],
    )
    (run / "evaluations" / "old.npz").touch()
    train(*TINY, "aug=cutmix", "dataset.val_size=100", "force=true", cwd=folder)
    assert not (run / "evaluations" / "old.npz").exists()
    after = metrics_of(run), torch.load(run / "checkpoints" / "last.pt", weights_only=True)["model"]
    assert before[0] == after[0]
    assert all(torch.equal(before[1][k], after[1][k]) for k in before[1])


@pytest.mark.slow
def test_the_papers_network_on_synthetic_images(tmp_path: Path) -> None:
    done = train(
        "model=pyramidnet",
        "aug=cutmix",
        "dataset=synthetic",
        "trainer.max_steps=3",
        "schedule.batch_size=8",
        cwd=tmp_path,
        fresh=True,
        OMP_NUM_THREADS="2",
    )
    assert "26,844,952 parameters" in done.stdout
    run = only_run(tmp_path / "runs")
    for name in CONTRACT:
        assert (run / name).exists(), name
    lines = metrics_of(run)
    assert [(n["step"], n["split"]) for n in lines] == [(3, "train"), (3, "test")]
    assert "clean_loss" not in lines[0]  # no probe in runs cut short


@pytest.mark.parametrize("words", [[], ["aug=cutmix"]])
def test_missing_cifar_is_said_within_seconds(words: list[str], tmp_path: Path) -> None:
    # A proxy that refuses every connection stands for "no network", wherever the test runs.
    closed = dict.fromkeys(("http_proxy", "https_proxy", "HTTPS_PROXY"), "http://127.0.0.1:9")
    said = refused(*words, cwd=tmp_path, **closed)
    assert str(tmp_path / "data") in said
    assert "cifar-100-python.tar.gz" in said
    assert "python train.py dataset=digits model=resnet model.depth=20 budget=smoke" in said
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["aug=nothing"], "no aug=nothing"),
        (["dataset=digits", "suite=fgsm"], "an option of scripts/evaluate.py"),
        (["table=demo_digits"], "an option of scripts/run_table.py"),
        (["lr=0.1"], "did you mean 'schedule.lr'"),
        (["model.dept=20"], "did you mean 'model.depth'"),
        (["aug=cutmix", "aug.mix.prob=1.5"], "aug.mix.prob=1.5"),
        (["seed=["], "seed"),
        (["device=cuda"], "no CUDA GPU"),
        (["dataset=cifar10_jpeg"], "cifar-10-images"),
    ],
    ids=str,
)
def test_mistakes_are_told_in_one_message(words: list[str], text: str, tmp_path: Path) -> None:
    assert text in refused(*words, cwd=tmp_path, CUDA_VISIBLE_DEVICES="")
    assert not list(tmp_path.iterdir())  # nothing is half begun


def test_multirun_under_torchrun_is_refused(tmp_path: Path) -> None:
    said = refused("-m", *TINY, "seed=0,1", cwd=tmp_path, RANK="0", WORLD_SIZE="2")
    assert "devices=N" in said


@pytest.mark.slow
def test_profile_leaves_a_trace(tmp_path: Path) -> None:
    train(*TINY, "trainer.max_steps=4", "profile=true", cwd=tmp_path)
    (trace,) = (only_run(tmp_path / "runs") / "profile").iterdir()
    assert "ProfilerStep" in trace.read_text()
    done = train(*TINY, "trainer.max_steps=1", "profile=true", "runs_dir=short", cwd=tmp_path)
    assert "left no trace" in done.stdout


def test_help_lists_the_groups() -> None:
    done = command(str(ROOT / "train.py"), "--help")
    assert done.returncode == 0, done.stderr
    for group in ("aug", "budget", "dataset", "experiment", "model", "schedule"):
        assert f"\n  {group} " in done.stdout
    for group in ("suite", "table", "hydra"):
        assert f"\n  {group} " not in done.stdout
    assert "cutmix_scheduled" in done.stdout and "(default: cifar100)" in done.stdout
    assert "Hydra" not in done.stdout and "configs/train.yaml" in done.stdout
    examples = [
        line.split()[2:] for line in done.stdout.splitlines() if "  python train.py" in line
    ]
    assert len(examples) == 4 and examples.pop() == ["GROUP=OPTION", "...", "--cfg", "job"]
    for words in examples:
        single = [word.partition(",")[0] for word in words if word != "-m"]
        assert config_of(*single).aug.name in ("baseline", "cutmix")


def test_preview_writes_a_picture(tmp_path: Path) -> None:
    out = tmp_path / "sheet.png"
    done = command("scripts/preview.py", "aug=cutmix", "dataset=digits", f"out={out}", "rows=2")
    assert done.returncode == 0, done.stderr
    assert out.read_bytes().startswith(b"\x89PNG") and out.stat().st_size > 5000


def test_scripts_refuse_what_they_do_not_know() -> None:
    assert "there is no table 'nothing'" in refused("table=nothing", script="scripts/run_table.py")
    assert "tables" in refused("table=nothing", script="scripts/make_tables.py")
    other = ["table=demo_digits", "schedule.lr=0.5"]
    assert "another experiment" in refused(*other, script="scripts/run_table.py")
    assert "'rowz'" in refused("rowz=3", script="scripts/preview.py")


@pytest.mark.parametrize(
    ("script", "words", "said"),
    [
        ("evaluate", [], ["run=RUN is required: a run_id, ", "suite=NAME is required: a file of"]),
        ("evaluate", ["suite=fgsm"], ["run=RUN is required: a run_id, a run's directory, a check"]),
        ("run_table", ["budget=smoke"], ["table=NAME is required: a file of configs/table\n"]),
        ("compare", [], ["run=[A,B] is required: two of: a run_id, "]),
    ],
)
def test_scripts_say_what_they_require(script: str, words: list[str], said: list[str]) -> None:
    message = refused(*words, script=f"scripts/{script}.py")
    for text in [*said, f"scripts/{script}.py --help"]:
        assert text in message
    assert message.count("is required") == len(said)
    assert "configuration" not in message


@pytest.mark.slow
def test_run_table_killed_in_the_middle_and_repeated_runs_what_is_missing(tmp_path: Path) -> None:
    words = ["scripts/run_table.py", "table=demo_digits", "budget=smoke"]
    places = [f"results_dir={tmp_path / 'results'}", f"runs_dir={tmp_path / 'runs'}"]
    listed = command(*words, *places, "dry_run=true")
    assert listed.stdout.count("missing") == 2 and "0 of 2" in listed.stdout
    assert not list(tmp_path.iterdir())

    def records() -> dict[Path, int]:
        found = (tmp_path / "results" / "records").glob("*.json")
        return {file: file.stat().st_mtime_ns for file in found}

    line = [sys.executable, *words, *places]
    started = subprocess.Popen(line, cwd=ROOT, env=environment(), stdout=subprocess.DEVNULL)
    until(lambda: len(records()) == 1, 240)
    for pid in descendants(started.pid):
        os.kill(pid, signal.SIGKILL)
    assert started.wait() == -signal.SIGKILL
    kept = records()
    assert len(kept) == 1
    done = command(*words, *places)
    assert done.returncode == 0, done.stderr
    assert "2 runs: 1 complete, 1 to do" in done.stdout
    assert "| CutMix | 2 |" in done.stdout and "(n=1)" in done.stdout
    assert len(records()) == 2 and kept.items() <= records().items()  # not trained again
    assert str(tmp_path) not in "".join(r.read_text() for r in records())  # no places of a machine
    next(iter(kept)).unlink()
    again = command(*words, *places)
    assert "2 runs: 1 complete, 1 to do" in again.stdout
    assert "is complete, nothing is trained" in again.stdout  # its record was lost, the run was not
    assert len(records()) == 2


@pytest.mark.slow
def test_run_table_goes_on_after_a_failure(tmp_path: Path) -> None:
    words = ["table=demo_digits", "budget=smoke", f"runs_dir={tmp_path / 'runs'}"]
    overrides = ["dataset=digits", "model=resnet", "model.depth=20", "budget=smoke"]
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / config_of(*overrides).run_id).touch()  # a file where a folder must be
    places = ["retries=0", f"results_dir={tmp_path / 'results'}"]
    done = command("scripts/run_table.py", *words, *places)
    assert done.returncode == 1
    assert "sweep of 2 runs: 0 complete before, 1 completed now, 1 failed" in done.stdout
    assert "failed:\n  Baseline, seed 0: cannot write into" in done.stdout
    assert "| CutMix | 2 |" in done.stdout and "(n=1)" in done.stdout


@pytest.mark.parametrize(
    ("module", "extra", "start"),
    [
        ("submitit", "cluster", lambda: SlurmEngine(Settings())),
        ("ray", "ray", lambda: RayEngine(Settings())),
        ("optuna", "search", search._optuna),
    ],
)
def test_what_is_not_installed_is_installed_from_the_checkout(
    module: str, extra: str, start: Callable[[], object], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(UserError) as caught:
        start()
    command = f"pip install -c constraints.txt -e '.[{extra}]'"
    assert str(caught.value).endswith(f"not installed: {command}")
    assert command in (ROOT / "docs" / "sweeps.md").read_text()
    assert f"\n{extra} = [" in (ROOT / "pyproject.toml").read_text()


def test_the_makefile_lists_its_targets() -> None:
    done = subprocess.run(["make", "help"], cwd=ROOT, capture_output=True, text=True, check=True)
    for target in ("install", "demo", "test", "lint", "type", "tables"):
        assert f"\n{target} " in f"\n{done.stdout}"

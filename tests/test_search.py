"""The search for hyper-parameters: what it varies, what it refuses, and that a kill loses nothing."""

from __future__ import annotations

import json
import math
from collections import deque
from pathlib import Path
from typing import Any

import pytest

from cutmix_exp.errors import UserError
from cutmix_exp.sweeps.jobs import Ended, Job
from cutmix_exp.sweeps.search import Search, search, value_of
from cutmix_exp.sweeps.space import Choice, Interval, space_of
from tests.helpers import TINY

NO_OPTUNA = "Optuna is not installed (the optional extra `search`)"


class Instant:
    """An engine whose runs are complete at once: their validation error is least at lr = 0.1.

    Attributes:
        dies_at: the start at which the whole process would be killed.
        fails_at: starts whose run fails.
    """

    interval = 0.0

    def __init__(self, dies_at: int = 0, fails_at: tuple[int, ...] = ()) -> None:
        self.running: dict[Job, Any] = {}
        self.rates: list[float] = []
        self.dies_at, self.fails_at = dies_at, fails_at

    def start(self, waiting: deque[Job]) -> dict[Job, str]:
        started = {}
        while waiting:
            job = waiting.popleft()
            self.rates.append(job.config.schedule.lr)
            if len(self.rates) == self.dies_at:
                raise SystemExit("killed")
            self.running[job] = len(self.rates) not in self.fails_at
            if self.running[job]:
                job.config.run_dir.mkdir(parents=True)
                error = abs(math.log10(self.rates[-1]) + 1)
                record = {"schema_version": 1, "status": "complete"}
                record |= {"metrics": {"test/top1_error_last": 50.0}}
                record |= {"history": {"val/top1_error": [error, error + 1], "test/loss": [1, 2]}}
                job.record.write_text(json.dumps(record))
            started[job] = ""
        return started

    def poll(self) -> list[Ended]:
        ended = [Ended(job, 0 if good else 1) for job, good in self.running.items()]
        self.running.clear()
        return ended

    def stop(self, *, now: bool = False) -> str:
        return ""


def words(runs: Path, *more: str) -> list[str]:
    rate = "schedule.lr=tag(log,interval(0.001,1.0))"
    return [*TINY, "dataset.val_size=100", f"runs_dir={runs}", rate, *more]


def test_what_is_searched_is_said_in_hydras_words() -> None:
    fixed, space = space_of(
        ["seed=1", "aug=cutmix,mixup", "aug.mix.alpha=interval(0.1,2)", "model.depth=range(8,27,6)"]
    )
    assert fixed == ["seed=1"]
    assert space == {
        "aug": Choice(("cutmix", "mixup")),
        "aug.mix.alpha": Interval(0.1, 2.0),
        "model.depth": Choice(("8", "14", "20", "26")),
    }
    _, space = space_of(["a=tag(log,interval(0.1,1))", "b=int(interval(1,8))"])
    assert space == {"a": Interval(0.1, 1.0, log=True), "b": Interval(1, 8, whole=True)}


@pytest.mark.parametrize(
    ("word", "text"),
    [
        ("seed=1", "nothing to search"),
        ("a=interval(1.0,0.5)", "ends must rise"),
        ("a=tag(log,interval(0.0,0.5))", "above 0"),
        ("a=interval(", "cannot read"),
    ],
)
def test_what_cannot_be_searched(word: str, text: str) -> None:
    with pytest.raises(UserError, match=text):
        space_of([word])


def test_a_test_metric_is_not_optimised_unless_it_is_asked_for() -> None:
    with pytest.raises(UserError, match="optimise_test=true"):
        Search(metric="test/top1_error")
    assert Search(metric="test/top1_error", optimise_test=True).metric == "test/top1_error"
    with pytest.raises(UserError, match="val/top1_error"):
        Search(metric="top1_error")


def test_the_epoch_whose_value_counts() -> None:
    record = {"history": {"val/loss": [3.0, 1.0, 2.0]}}
    assert value_of(record, "val/loss", "best") == 1.0
    assert value_of(record, "val/loss", "last") == 2.0


def test_a_search_needs_a_validation_split(tmp_path: Path) -> None:
    pytest.importorskip("optuna", reason=NO_OPTUNA)
    without = [w for w in words(tmp_path) if "val_size" not in w]
    with pytest.raises(UserError, match=r"dataset\.val_size=N"):
        search(Search(), without, Instant())


def test_a_search_that_is_killed_goes_on_as_it_would_have(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("optuna", reason=NO_OPTUNA)
    unbroken, killed, rest = Instant(), Instant(dies_at=4), Instant()
    options = Search(trials=6)
    assert search(options, words(tmp_path / "one"), unbroken) == 0
    with pytest.raises(SystemExit):
        search(options, words(tmp_path / "two"), killed)
    assert search(options, words(tmp_path / "two"), rest) == 0
    assert len(set(unbroken.rates)) == 6
    assert killed.rates == unbroken.rates[:4]
    assert rest.rates == unbroken.rates[3:]  # the fourth was at work
    said = capsys.readouterr().out
    best = min(unbroken.rates, key=lambda rate: abs(math.log10(rate) + 1))
    assert f"the best: python train.py {' '.join(TINY)}" in said
    assert f"schedule.lr={best}\n" in said and "6 of 6 trials" in said
    again = Instant()
    assert search(Search(trials=7), words(tmp_path / "two"), again) == 0
    assert len(again.rates) == 1  # more of the same search


def test_a_failed_trial_is_noted_and_the_search_goes_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("optuna", reason=NO_OPTUNA)
    engine = Instant(fails_at=(2, 3))
    options = Search(trials=4, jobs=2, study="mine", retries=1)
    assert search(options, words(tmp_path), engine) == 0
    assert len(engine.rates) == 5  # the second trial was tried twice
    assert "3 of 4 trials, 1 failed" in capsys.readouterr().out
    with pytest.raises(UserError, match="searches something else"):
        search(options, words(tmp_path, "aug=cutmix"), engine)
    assert (tmp_path / ".searches" / "mine.journal").exists()
    broken = Instant(fails_at=tuple(range(1, 20)))
    with pytest.raises(UserError, match="first three trials have failed"):
        search(Search(trials=9, retries=0), words(tmp_path / "broken"), broken)


@pytest.mark.parametrize("depths", ["8,9", "9,8"])
def test_a_proposal_that_is_no_run_counts_as_failed_and_the_search_goes_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], depths: str
) -> None:
    optuna = pytest.importorskip("optuna", reason=NO_OPTUNA)
    engine = Instant()
    options = Search(trials=12, study="mine")
    searched = [w for w in words(tmp_path) if not w.startswith("model.depth")]
    assert search(options, [*searched, f"model.depth={depths}"], engine) == 0
    said = capsys.readouterr().out
    refused = 12 - len(engine.rates)
    assert 0 < refused < 12
    assert f"{12 - refused} of 12 trials, {refused} failed" in said
    assert said.count("model.depth=9 fits no three-stage") == refused
    backend = optuna.storages.journal.JournalFileBackend(str(tmp_path / ".searches/mine.journal"))
    storage = optuna.storages.JournalStorage(backend)
    states = [t.state.name for t in optuna.load_study(study_name="mine", storage=storage).trials]
    assert states.count("FAIL") == refused and "RUNNING" not in states


def test_the_end_says_that_every_trial_has_failed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("optuna", reason=NO_OPTUNA)
    with pytest.raises(UserError, match="every trial has failed"):
        search(Search(trials=2, retries=0), words(tmp_path / "runs"), Instant(fails_at=(1, 2)))
    assert "0 of 2 trials, 2 failed" in capsys.readouterr().out


def test_a_typo_is_told_before_anything_is_proposed(tmp_path: Path) -> None:
    pytest.importorskip("optuna", reason=NO_OPTUNA)
    with pytest.raises(UserError, match=r"no field 'schedule\.lrr'"):
        search(Search(trials=2), words(tmp_path, "schedule.lrr=0.1"), Instant())
    assert not list(tmp_path.iterdir())


def test_two_searches_do_not_share_a_study(tmp_path: Path) -> None:
    import fcntl

    pytest.importorskip("optuna", reason=NO_OPTUNA)
    (tmp_path / ".searches").mkdir()
    with open(tmp_path / ".searches" / "mine.lock", "a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(UserError, match="another process"):
            search(Search(study="mine"), words(tmp_path), Instant())

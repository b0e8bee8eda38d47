"""A search for hyper-parameters: Optuna proposes, sweeps carry out, and a file remembers.

Optuna's plugin for Hydra (hydra-optuna-sweeper 1.3.0) wants Optuna 2, so Optuna's own `ask` and
`tell` are used. A trial is a run like any other: the search that is killed asks for the runs that
were at work first, and they continue from their checkpoints.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import shlex
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import islice, product
from pathlib import Path
from typing import Any, Literal

from cutmix_exp.errors import UserError, installing
from cutmix_exp.reporting.record import Record, read_record
from cutmix_exp.schema import option
from cutmix_exp.sweeps.jobs import Job, Settings, job_of, jobs_of
from cutmix_exp.sweeps.local import Local, visible_gpus
from cutmix_exp.sweeps.space import Choice, Interval, Space, space_of
from cutmix_exp.sweeps.sweep import Engine, Sweep

METRICS = ("loss", "top1_error", "top5_error")
CORNERS = 16
"""Of the space: so many are tried until one is a run, before the search is refused."""


@dataclass(frozen=True, kw_only=True)
class Search(Settings):
    """What is searched for, and how long. All metrics are errors or losses: less is better.

    Attributes:
        trials: in all, those of earlier starts and failed ones included.
        metric: of which the least is searched.
        epoch: whose value counts: the best one's, or the last one's.
        optimise_test: allow a metric of the test set; the test error of what is found is then no
            estimate of anything any more.
        study: the search's name; None: it follows from what is searched.
        sampler_seed: of what Optuna draws.
    """

    trials: int = option(20, ge=1)
    metric: str = "val/top1_error"
    epoch: Literal["best", "last"] = "best"
    optimise_test: bool = False
    study: str | None = None
    sampler_seed: int = option(0, ge=0)

    def __post_init__(self) -> None:
        split, _, name = self.metric.partition("/")
        if split not in ("val", "test") or name not in METRICS:
            raise UserError(
                f"metric={self.metric} cannot be searched by; choose one of "
                f"{', '.join(f'val/{m}' for m in METRICS)} (or of test/, with optimise_test=true)"
            )
        if split == "test" and not self.optimise_test:
            raise UserError(
                f"metric={self.metric}: hyper-parameters chosen on the test set make its error "
                "worthless; use metric=val/... (with dataset.val_size=N), or say optimise_test=true"
            )


def search(options: Search, words: Sequence[str], engine: Engine | None = None) -> int:
    """Carry out a search, or what is left of it, and print what was found.

    Args:
        words: overrides of train.py; those with several values are searched.
        engine: of the sweeps, by default what the options name.

    Returns:
        the exit status: 0, or that of `Interrupted`.

    Raises:
        UserError: Optuna is not installed, nothing to search, no validation split, another
            process carries out this search, every run has failed, ...
    """
    optuna = _optuna()
    fixed, space = space_of(words)
    example = _example(fixed, space, options)
    if options.metric.startswith("val/") and not example.config.dataset.val_size:
        raise UserError(
            f"metric={options.metric} needs held-out training images; set dataset.val_size=N"
        )
    about = json.dumps([sorted(fixed), {k: asdict(v) for k, v in space.items()}, options.metric])
    name = options.study or hashlib.sha256(about.encode()).hexdigest()[:8]
    file = Path(example.config.runs_dir) / ".searches" / f"{name}.journal"
    with _alone(file):
        backend = optuna.storages.journal.JournalFileBackend(str(file))
        study = optuna.create_study(
            storage=optuna.storages.JournalStorage(backend), study_name=name, load_if_exists=True
        )
        if study.user_attrs.setdefault("about", about) != about:
            raise UserError(
                f"study={name} in {file} searches something else: {study.user_attrs['about']}"
            )
        study.set_user_attr("about", about)
        status = _carry_out(optuna, study, options, fixed, space, example, engine)
        print(found(study, fixed, space, options), flush=True)
        if status == 0 and all(t.value is None for t in study.trials):
            raise UserError(
                "every trial has failed, so that nothing is found; mend the cause, then give this "
                "search more trials=N, or start another one: study=NAME"
            )
    return status


def _carry_out(
    optuna: Any,
    study: Any,
    options: Search,
    fixed: list[str],
    space: Space,
    example: Job,
    engine: Engine | None,
) -> int:
    running = optuna.trial.TrialState.RUNNING
    failures = 0  # of runs; a proposal that is no run costs nothing
    while True:
        trials = {t.number: t.params for t in study.get_trials(states=(running,))}  # of a kill
        while len(trials) < at_a_time(options, example) and len(study.trials) < options.trials:
            # By number, so that a search that is killed goes on as it would have.
            seed = options.sampler_seed * 1_000_003 + len(study.trials)
            study.sampler = optuna.samplers.TPESampler(seed=seed)
            trial = study.ask(_distributions(optuna, space))
            trials[trial.number] = trial.params
        if not trials:
            return 0
        words = {number: [*fixed, *_words(space, trials[number])] for number in trials}
        named = ((shlex.join(mine[len(fixed) :]), mine) for mine in words.values())
        jobs, refused = jobs_of(named, options)
        sweep = Sweep(jobs, options, refused=refused, engine=engine, brief=True)
        status = sweep.run()
        if sweep.signals:
            return status
        if sweep.held:
            raise UserError(f"a trial cannot be carried out: {next(iter(sweep.held.values()))}")
        by_words = {job.words: job for job in jobs}
        for number, mine in words.items():
            job = by_words.get(tuple(mine))  # None: this combination is no run
            value = _value(job, options)
            state = None if value is not None else optuna.trial.TrialState.FAIL
            study.tell(number, value, state=state)
            failures += job is not None and value is None
        if failures >= 3 and all(t.value is None for t in study.trials):
            raise UserError("the first three trials have failed; see above, mend the cause first")


def at_a_time(options: Settings, example: Job) -> int:
    """Trials that are proposed and carried out together."""
    if options.jobs is not None:
        return options.jobs
    if options.engine == "local" and example.gpus:
        return Local(None, gpus=visible_gpus()).limit(example)
    return 1


def _value(job: Job | None, options: Search) -> float | None:
    if job is None or not job.is_complete():
        return None
    return value_of(read_record(job.record), options.metric, options.epoch)


def value_of(record: Record, metric: str, epoch: str) -> float:
    """A metric of a complete run: of the epoch where it is least, or of the last one."""
    curve = record["history"][metric]
    return float(min(curve) if epoch == "best" else curve[-1])


def found(study: Any, fixed: list[str], space: Space, options: Search) -> str:
    """The five best trials, and the command of the best."""
    done = sorted((t for t in study.trials if t.value is not None), key=lambda t: t.value)
    failed = len([t for t in study.trials if t.state.name == "FAIL"])
    lines = [f"{len(done)} of {options.trials} trials" + (f", {failed} failed" if failed else "")]
    lines += [
        f"  {options.metric} {t.value:.4g} ({options.epoch}): {shlex.join(_words(space, t.params))}"
        for t in done[:5]
    ]
    if done:
        best = shlex.join([*fixed, *_words(space, done[0].params)])
        lines.append(f"the best: python train.py {best}")
    return "\n".join(lines)


def _example(fixed: list[str], space: Space, options: Search) -> Job:
    """Some run of the space: of its corners, the first one that is a run.

    Raises:
        UserError: none of the first corners is; the first one's cause.
    """
    ends = (d.values if isinstance(d, Choice) else (d.low, d.high) for d in space.values())
    causes = []
    for corner in islice(product(*ends), CORNERS):
        words = [*fixed, *_words(space, dict(zip(space, corner, strict=True)))]
        try:
            return job_of("", words, options)
        except UserError as error:
            causes.append(error)
    raise causes[0]


def _words(space: Space, params: dict[str, Any]) -> list[str]:
    return [f"{name}={params[name]}" for name in space]


def _distributions(optuna: Any, space: Space) -> dict[str, Any]:
    made = optuna.distributions

    def of(part: Choice | Interval) -> Any:
        if isinstance(part, Choice):
            return made.CategoricalDistribution(part.values)
        if part.whole:
            return made.IntDistribution(int(part.low), int(part.high), log=part.log)
        return made.FloatDistribution(part.low, part.high, log=part.log)

    return {name: of(part) for name, part in space.items()}


@contextmanager
def _alone(file: Path) -> Iterator[None]:
    """Hold a search against other processes. Raises UserError if one carries it out."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with open(file.with_suffix(".lock"), "a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise UserError(f"another process carries out the search of {file}") from None
        yield


def _optuna() -> Any:
    try:
        import optuna
    except ImportError:
        raise UserError(
            f"a search needs Optuna, which is not installed: {installing('search')}"
        ) from None
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna

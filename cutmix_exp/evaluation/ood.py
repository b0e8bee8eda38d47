"""Out-of-distribution detection: the paper's Tables 12 and A2.

A detector gives each image a score, the higher the more familiar. In-distribution images are the
positives throughout; all numbers are in percent.
"""

from __future__ import annotations

import io
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from torch import Tensor

from cutmix_exp.errors import UserError
from cutmix_exp.evaluation.base import EvaluationSet, Findings, Subject, Suite
from cutmix_exp.evaluation.detectors import Detector, Score
from cutmix_exp.evaluation.outliers import SETS, Chosen, Listed, Outliers, Setting, Source
from cutmix_exp.schema import option

Images = Literal["all", "odin", "openood"]
METRICS = ("tnr_at_tpr95", "auroc", "detection_accuracy", "aupr_in", "aupr_out")
SEVEN = (
    "tinyimagenet_crop", "tinyimagenet_resize", "lsun_crop", "lsun_resize", "isun", "uniform",
    "gaussian",
)  # fmt: skip
"""The sets of the paper's Table A2, of which Table 12 has the means."""
ODIN_FIRST, ODIN_LAST = 1_000, 10_000
"""The images that ODIN's code looks at."""


def separation(inside: np.ndarray, outside: np.ndarray) -> dict[str, float]:
    """How well scores tell images of the classes from others, in percent.

    * tnr_at_tpr95: the threshold is the highest at which at least 95% of the images inside score at
      least as much; of the others, the share that scores less. (The Mahalanobis authors take the
      threshold whose TPR is nearest to 95%.)
    * auroc: the probability that an image inside scores more than one outside; a tie counts half.
    * detection_accuracy: the largest mean of TPR and TNR over all thresholds, as in the
      Mahalanobis authors' code; at least 50. Equal scores lie on the same side of a threshold.
    * aupr_in, aupr_out: average precision with the images inside (outside) as positives, no
      interpolation. They depend on how many there are of each.

    Args:
        inside, outside: finite scores [n] and [m].
    """
    from sklearn import metrics

    scores = np.concatenate([inside, outside])
    # Ranks keep order and ties, and can be negated without rounding.
    ranks = np.unique(scores, return_inverse=True)[1].astype(np.float64)
    is_in = np.arange(len(scores)) < len(inside)
    fpr, tpr, _ = metrics.roc_curve(is_in, ranks, drop_intermediate=False)
    enough = np.rint(tpr * len(inside)) >= np.ceil(round(0.95 * len(inside), 6))
    found = {
        "tnr_at_tpr95": 1 - fpr[np.argmax(enough)],
        "auroc": metrics.roc_auc_score(is_in, ranks),
        "detection_accuracy": (0.5 * (tpr + 1 - fpr)).max(),
        "aupr_in": metrics.average_precision_score(is_in, ranks),
        "aupr_out": metrics.average_precision_score(~is_in, -ranks),
    }
    return {name: 100.0 * float(value) for name, value in found.items()}


@dataclass(frozen=True, kw_only=True)
class OutOfDistribution(Suite):
    """How well a detector tells the test images from images of other kinds.

    Attributes:
        detector: gives the scores.
        groups: the sets, by group; a group's mean is given under its name if all its sets are at
            hand, else under `<group>_at_hand` (the protocol says of which).
        others: further sets, which are in no mean.
        images: which of each set's images count. `all`; `odin`: without the first 1,000 and up to
            the 10,000th, inside and outside, as ODIN's code does (it tunes on the first); `openood`:
            those of OpenOOD's image lists, the groups' names are then those of its sets.
        benchmark: of OpenOOD's lists; null is the data set's name.
        root: the folder of the sets; null is `ood` in the data set's `dataset.root`, which is
            looked in too.
        cache_dir: where decoded images are kept; null is `.cache` beside them.
        noise_images: of each noise set; null is as many as there are test images.
        seed: of noise and random crops.
        batch_size: images that the network sees at once; null is the usual number.
    """

    detector: Detector
    groups: dict[str, tuple[str, ...]] = option(factory=lambda: {"mean": SEVEN})
    others: tuple[str, ...] = ("svhn", "dtd", "cifar10", "cifar100")
    images: Images = "all"
    benchmark: str | None = None
    root: str | None = option(None, identity=False)
    cache_dir: str | None = option(None, identity=False)
    noise_images: int | None = option(None, ge=1)
    seed: int = option(0, ge=0)
    batch_size: int | None = option(None, ge=1)

    def __post_init__(self) -> None:
        if not self.names:
            raise UserError("groups and others name no set")
        if self.images == "openood":
            return
        unknown = sorted({*self.names} - SETS.keys())
        if unknown:
            raise UserError(f"there is no set {', '.join(unknown)}; sets: {', '.join(SETS)}")

    @property
    def names(self) -> tuple[str, ...]:
        """All sets, each once."""
        return tuple(dict.fromkeys([*(n for g in self.groups.values() for n in g), *self.others]))

    def lacks(self, subject: Subject) -> str:
        if self.images == "odin":
            labels = subject.splits.test.labels
            if len(labels) <= ODIN_FIRST:
                return f"images=odin leaves out the first {ODIN_FIRST:,} of {len(labels):,} test images"
            if bool((labels[1:] >= labels[:-1]).all()):
                return (
                    f"images=odin leaves out the first {ODIN_FIRST:,} test images, but those of "
                    f"{subject.config.dataset.name} are sorted by class; use images=all"
                )
        if self.images == "openood":
            missing = self._inside(subject).missing(self._setting(subject))
            if missing:
                return f"{self._inside(subject).path}: {missing}"
        return self.detector.lacks(subject)

    def run(self, subject: Subject) -> Findings:
        setting = self._setting(subject)
        sources, skipped = self._sources(subject, setting)
        if not sources:
            raise none_left(skipped)
        score = self.detector.prepare(subject)
        inside = self._scores(subject, score, self._test(subject, setting), "the test images")
        scores = {"in": inside}
        metrics: dict[str, float] = {}
        for name, source in list(sources.items()):
            try:
                images = subject.world.together(lambda s=source: s.load(setting))  # type: ignore[misc]
            except UserError as error:  # the same on every rank
                skipped[name] = f"it cannot be loaded: {setting.without_places(str(error))}"
                del sources[name]
                continue
            scores[name] = self._scores(subject, score, self._part(images), name)
            found = separation(inside, scores[name])
            subject.say(f"{name}: {len(scores[name]):,} images, AUROC {found['auroc']:.1f}")
            metrics |= {f"{name}/{what}": value for what, value in found.items()}
        if not sources:
            raise none_left(skipped)
        means = self._means(metrics, tuple(sources), subject)
        return Findings(
            metrics=metrics | means.pop("metrics"),
            protocol={
                "images": self.images,
                "in_images": len(inside),
                "sets": {
                    name: {"images": len(scores[name]), "from": source.said}
                    for name, source in sources.items()
                },
                "means": means["of"],
                "positives": "in-distribution",
                "equal_scores": "on one side of a threshold; half in AUROC",
            },
            per_image={f"score_{name}": values for name, values in scores.items()},
            pictures={"scores": draw_scores(scores, metrics, subject.name)},
            skipped=skipped,
        )

    def _setting(self, subject: Subject) -> Setting:
        beside = Path(subject.config.dataset.root)
        folder = Path(self.root) if self.root is not None else beside / "ood"
        cache = self.cache_dir or getattr(subject.config.dataset, "cache_dir", None)
        return Setting(
            subject=subject,
            places=(folder, beside),
            where=f"{'dataset.root/ood' if self.root is None else 'suite.root'} or dataset.root",
            cache=None if cache is None else Path(cache),
            seed=self.seed,
            noise=self.noise_images or len(subject.splits.test),
        )

    def _outliers(self, subject: Subject, name: str) -> Outliers:
        if self.images != "openood":
            return SETS[name]
        benchmark = self._benchmark(subject)
        return Outliers((Listed(f"OpenOOD's list of {name}", benchmark, name),), (name,))

    def _sources(
        self, subject: Subject, setting: Setting
    ) -> tuple[dict[str, Source], dict[str, str]]:
        """The sources that are at hand by set, and why the other sets are left out."""
        found: dict[str, Source] = {}
        skipped: dict[str, str] = {}
        for name in self.names:
            if self._is_familiar(subject, name):
                skipped[name] = (
                    f"the network was trained on such images: {subject.config.dataset.name}"
                )
                continue
            reasons = []
            for source in self._outliers(subject, name).sources:
                reason = subject.world.broadcast(source.missing(setting))
                if not reason:
                    found[name] = source
                    break
                reasons.append(reason)
            else:
                skipped[name] = "\nor ".join(reasons)
        return found, skipped

    def _is_familiar(self, subject: Subject, name: str) -> bool:
        own = {subject.config.dataset.name, self._benchmark(subject)}
        return bool(own & {*self._outliers(subject, name).familiar})

    def _benchmark(self, subject: Subject) -> str:
        return self.benchmark or subject.config.dataset.name

    def _inside(self, subject: Subject) -> Listed:
        benchmark = self._benchmark(subject)
        return Listed("OpenOOD's list of the test images", benchmark, benchmark)

    def _test(self, subject: Subject, setting: Setting) -> EvaluationSet:
        if self.images == "openood":
            return subject.world.together(lambda: self._inside(subject).load(setting))
        return self._part(subject.test)

    def _part(self, images: EvaluationSet) -> EvaluationSet:
        if self.images != "odin":
            return images
        return Chosen(images, np.arange(min(ODIN_FIRST, len(images)), min(ODIN_LAST, len(images))))

    def _scores(
        self, subject: Subject, score: Score, images: EvaluationSet, name: str
    ) -> np.ndarray:
        """float64 [n], in the set's order."""
        if not len(images):
            raise UserError(f"{name}: no images are left of this set (images={self.images})")

        def judge(shown: Tensor, _labels: Tensor, _index: np.ndarray) -> dict[str, Tensor]:
            unit = shown if shown.is_floating_point() else subject.normalize.unit(shown)
            return {"score": score(unit)}

        found = subject.over(images, judge, self.batch_size)["score"]
        bad = int((~np.isfinite(found)).sum())
        if bad:
            raise UserError(
                f"{name}: the scores of {bad:,} of {len(found):,} images are not finite; the network's "
                "outputs overflow (precision=fp32 may help)"
            )
        return found

    def _means(
        self, metrics: dict[str, float], found: tuple[str, ...], subject: Subject
    ) -> dict[str, Any]:
        """The means of the groups, and of which sets they are."""
        out: dict[str, float] = {}
        of: dict[str, list[str]] = {}
        for group, names in self.groups.items():
            # Of OpenOOD's groups the network's own data set is no part.
            listed = [
                n for n in names if self.images != "openood" or not self._is_familiar(subject, n)
            ]
            there = [name for name in listed if name in found]
            if not there:
                continue
            key = group if there == listed else f"{group}_at_hand"
            of[key] = there
            for what in METRICS:
                out[f"{key}/{what}"] = float(np.mean([metrics[f"{n}/{what}"] for n in there]))
        return {"metrics": out, "of": of}


def none_left(skipped: dict[str, str]) -> UserError:
    """The error of a suite that has left out all its sets."""
    reasons = "\n".join(f"{name}: {why}" for name, why in skipped.items())
    return UserError(f"none of the sets is at hand\n{reasons}")


def draw_scores(scores: dict[str, np.ndarray], metrics: dict[str, float], title: str) -> bytes:
    """A PNG with a histogram for each set, over that of the test images (`in`)."""
    from matplotlib.figure import Figure

    names = [name for name in scores if name != "in"]
    columns = min(4, len(names))
    rows = -(-len(names) // columns)
    figure = Figure(figsize=(3.2 * columns + 0.6, 2.4 * rows + 0.8), layout="constrained")
    pooled = np.concatenate([*scores.values()])
    low, high = np.quantile(pooled, [0.002, 0.998])
    edges = np.linspace(low, high if high > low else low + 1, 51)

    def share(values: np.ndarray) -> np.ndarray:
        """In percent; what lies beyond the edges counts in the outermost bins."""
        return 100.0 * np.histogram(values.clip(edges[0], edges[-1]), edges)[0] / len(values)

    axes = list(figure.subplots(rows, columns, squeeze=False, sharex=True).flat)
    for axis, name in zip(axes, names, strict=False):
        axis.stairs(
            share(scores["in"]), edges, fill=True, color="C0", alpha=0.45, label="test images"
        )
        axis.stairs(share(scores[name]), edges, color="C3", linewidth=1.3, label="outside")
        axis.set_title(f"{name}: AUROC {metrics[f'{name}/auroc']:.1f}", fontsize=9)
        axis.tick_params(labelsize=8)
    for axis in axes[len(names) :]:
        axis.set_axis_off()
    axes[0].legend(fontsize=8)
    figure.suptitle(title, fontsize=10)
    figure.supxlabel("score", fontsize=9)
    figure.supylabel("share of the images (%)", fontsize=9)
    out = io.BytesIO()
    figure.savefig(out, format="png", dpi=110)
    return out.getvalue()

"""Fixed subsets of a test set, for suites that would take too long on all of it."""

from __future__ import annotations

import numpy as np

from cutmix_exp.evaluation.base import EvaluationSet, Subject
from cutmix_exp.seeding import stream


def stratified_subset(labels: np.ndarray, limit: int | None, seed: int = 0) -> np.ndarray:
    """Sorted indices of `limit` of N images, each class in proportion to its images.

    A smaller subset is part of a larger one, and the choice depends on the labels and the seed
    alone.

    Args:
        labels: int [N].
        limit: how many; None, or N and more, is all.
    """
    order = stream(seed, "evaluation/subset").permutation(len(labels))
    place = np.empty(len(labels))
    for label in np.unique(labels):
        members = order[labels[order] == label]
        place[members] = (np.arange(len(members)) + 0.5) / len(members)
    first = order[np.argsort(place[order], kind="stable")]
    return np.sort(first[:limit])


def limited(subject: Subject, limit: int | None) -> tuple[EvaluationSet, np.ndarray]:
    """The subject's test images, or a subset of them, and their indices [n] in the test set."""
    count = len(subject.splits.test)
    if limit is None or limit >= count:
        return subject.test, np.arange(count)
    index = stratified_subset(subject.splits.test.labels.numpy(), limit)
    return subject.at_hand(subject.splits.test.at(index)), index

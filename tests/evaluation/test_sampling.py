"""Subsets: in proportion, nested, the same for all."""

from __future__ import annotations

import numpy as np
import pytest

from cutmix_exp.evaluation.sampling import limited, stratified_subset
from tests.evaluation.subjects import Small, images_of, subject_of

LABELS = np.repeat(np.arange(5), [10, 20, 30, 40, 100])


@pytest.mark.parametrize("limit", [1, 20, 100, 199])
def test_in_proportion(limit: int) -> None:
    index = stratified_subset(LABELS, limit)
    assert len(set(index.tolist())) == limit
    assert index.tolist() == sorted(index)
    counts = np.bincount(LABELS[index], minlength=5)
    assert np.abs(counts - limit * np.bincount(LABELS) / 200).max() <= 1


def test_nested_keyed_and_whole() -> None:
    small, large = stratified_subset(LABELS, 30), stratified_subset(LABELS, 90)
    assert set(small) < set(large)
    assert small.tolist() != stratified_subset(LABELS, 30, seed=1).tolist()
    assert stratified_subset(LABELS, 500).tolist() == list(range(200))
    assert stratified_subset(LABELS, None).tolist() == list(range(200))


def test_the_images_go_with_their_indices() -> None:
    test = images_of(20, 4, 2)
    subject = subject_of(Small(2), test)
    data, index = limited(subject, 6)
    assert len(data) == len(index) == 6
    assert data.labels.tolist() == test.labels[index].tolist()
    (images,) = data.batches([np.arange(6)])
    assert (images == test.images[index]).all()
    assert limited(subject, None)[0] is subject.test

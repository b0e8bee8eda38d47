"""Which images come when: orders are permutations, shares cover a batch exactly once."""

from __future__ import annotations

import numpy as np
import pytest
from timm.data.distributed_sampler import RepeatAugSampler

from cutmix_exp.data.sampling import epoch_order, steps_per_epoch
from cutmix_exp.distributed import share


@pytest.mark.parametrize("size", [1, 2, 23, 1437])
def test_an_epoch_visits_every_image_once(size: int) -> None:
    order = epoch_order(0, 0, size)
    assert order.dtype == np.int64
    assert sorted(order) == list(range(size))


def test_the_order_is_a_function_of_seed_and_epoch() -> None:
    orders = {
        (seed, epoch): tuple(epoch_order(seed, epoch, 50))
        for seed in range(4)
        for epoch in range(4)
    }
    assert len(set(orders.values())) == 16
    assert orders[2, 3] == tuple(epoch_order(2, 3, 50))


def test_every_image_comes_first_in_some_epoch() -> None:
    assert {int(epoch_order(0, epoch, 5)[0]) for epoch in range(100)} == set(range(5))


@pytest.mark.parametrize("world_size", range(1, 6))
@pytest.mark.parametrize("size", range(21))
def test_shares_cover_a_batch_once_and_evenly(size: int, world_size: int) -> None:
    shares = [share(size, rank, world_size) for rank in range(world_size)]
    assert np.concatenate(shares).tolist() == list(range(size))
    counts = [len(s) for s in shares]
    assert max(counts) - min(counts) <= 1


@pytest.mark.parametrize(
    ("size", "batch_size", "steps"),
    [(50_000, 64, 782), (64, 64, 1), (65, 64, 2), (1, 64, 1), (1437, 64, 23), (128, 64, 2)],
)
def test_the_last_partial_batch_counts(size: int, batch_size: int, steps: int) -> None:
    assert steps_per_epoch(size, batch_size) == steps


@pytest.mark.parametrize(("size", "batch_size", "repeats"), [(24, 8, 4), (50, 8, 3), (7, 4, 2)])
def test_repeats_come_together_in_a_batch_in_rounds(
    size: int, batch_size: int, repeats: int
) -> None:
    """A slow loop; and each batch holds what timm's sampler deals to all of its ranks."""
    plain = epoch_order(3, 1, size).tolist()
    order = epoch_order(3, 1, size, repeats=repeats, batch_size=batch_size).tolist()
    assert len(order) == size
    dealt = list(RepeatAugSampler(range(size), 1, 0, shuffle=False, num_repeats=repeats))
    repeated = [(plain[place // repeats], place % repeats) for place in range(size)]
    for first in range(0, size, batch_size):
        batch = repeated[first : first + batch_size]
        by_rounds = [i for turn in range(repeats) for i, number in batch if number == turn]
        assert order[first : first + batch_size] == by_rounds
        theirs = [plain[i] for i in dealt[first : first + batch_size]]
        assert sorted(by_rounds) == sorted(theirs)


def test_a_rank_has_no_image_twice() -> None:
    order = epoch_order(0, 0, 64, repeats=4, batch_size=32)
    for first in (0, 32):
        batch = order[first : first + 32]
        assert len(set(batch.tolist())) == 8
        for rank in range(4):
            assert len(set(batch[share(32, rank, 4)].tolist())) == 8


def test_without_repeats_the_order_is_as_ever() -> None:
    assert np.array_equal(epoch_order(2, 3, 50, repeats=1, batch_size=7), epoch_order(2, 3, 50))

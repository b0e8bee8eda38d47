"""What makes the suite fast and changes nothing that it tests.

One torch thread: the tensors of the tests are too small to be shared by several. And each
composition of the config groups, a pure function of its overrides, is done once: Hydra takes 60 ms
for it, and the tests ask for the same ones again and again. The modules that are imported after
this one, the package's own included, get the function with a memory.
"""

import copy
import functools
from typing import Any

import pytest
import torch

from cutmix_exp import composition

torch.set_num_threads(1)

_composed = functools.cache(lambda overrides: _compose(list(overrides)))
_compose = composition.compose


@functools.wraps(composition.compose)
def compose(overrides: list[str]) -> dict[str, Any]:
    return copy.deepcopy(_composed(tuple(overrides)))  # type: ignore[no-any-return]


composition.compose = compose


def forks(item: pytest.Item) -> bool:
    """Whether a test's file uses tests/forks.py."""
    held = vars(item.module) if isinstance(item, pytest.Function) else {}
    return any(getattr(value, "__module__", "") == "tests.forks" for value in held.values())


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files that fork this process come first: after a backward pass in it, torch refuses one in
    its forks. (`make test` keeps xdist from putting the longest files first.)"""
    items.sort(key=lambda item: not forks(item))

"""What a search varies, in Hydra's own words: choices, ranges and intervals among the overrides."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from cutmix_exp.composition import hydra_messages
from cutmix_exp.errors import UserError


@dataclass(frozen=True)
class Choice:
    """One of some values, as they are written on the command line: `a,b` or `range(1,5)`."""

    values: tuple[str, ...]


@dataclass(frozen=True)
class Interval:
    """A number in between: `interval(0.1,1.0)`, or whole numbers: `int(interval(1,8))`.

    Attributes:
        log: uniform in the logarithm: `tag(log,interval(0.001,1.0))`.
    """

    low: float
    high: float
    log: bool = False
    whole: bool = False


Space = dict[str, Choice | Interval]


def space_of(words: Sequence[str]) -> tuple[list[str], Space]:
    """Part overrides into those that are fixed and what is searched, by its name.

    Raises:
        UserError: a word that cannot be read, an interval that is none, nothing to search.
    """
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.core.override_parser.types import IntervalSweep

    fixed: list[str] = []
    space: Space = {}
    with hydra_messages(list(words)):
        for word, override in zip(
            words, OverridesParser.create().parse_overrides(list(words)), strict=True
        ):
            if not override.is_sweep_override():
                fixed.append(word)
                continue
            name, value = override.get_key_element(), override.value()
            if isinstance(value, IntervalSweep):
                space[name] = _interval(word, value)
            else:
                space[name] = Choice(tuple(override.sweep_string_iterator()))
    if not space:
        raise UserError(
            "there is nothing to search; give values (aug=cutout,cutmix), an interval "
            "('schedule.lr=interval(0.05,0.5)') or one on a logarithmic scale "
            "('schedule.lr=tag(log,interval(0.01,1.0))')"
        )
    return fixed, space


def _interval(word: str, value: Any) -> Interval:
    unknown = set(value.tags) - {"log"}
    low, high, log = value.start, value.end, "log" in value.tags
    if unknown or low is None or high is None or not low < high or (log and low <= 0):
        raise UserError(
            f"{word!r} is no interval to search: its ends must rise (from above 0 on a logarithmic "
            "scale), and the only tag is log"
        )
    return Interval(low, high, log, whole=isinstance(low, int) and isinstance(high, int))

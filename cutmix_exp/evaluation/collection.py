"""Several suites under one name."""

from __future__ import annotations

from dataclasses import dataclass

from cutmix_exp.errors import UserError
from cutmix_exp.evaluation.base import Suite, load_suite, suite_names
from cutmix_exp.schema import option


@dataclass(frozen=True, kw_only=True)
class Collection(Suite):
    """Suites that are run in its place, each recorded under its own name.

    Attributes:
        suites: their names.
        limit: of each, the number of images; None: as their files say.
    """

    suites: tuple[str, ...]
    limit: int | None = option(None, ge=1)

    def __post_init__(self) -> None:
        if not self.suites:
            others = [name for name in suite_names() if name != self.name]
            raise UserError(f"suites=[]: expected some of {', '.join(others)}")

    def parts(self) -> list[Suite]:
        changes = {} if self.limit is None else {"limit": self.limit}
        return [load_suite(name, changes) for name in self.suites]

"""Command lines of the scripts: `name=value` as in train.py, checked by the same schema."""

from __future__ import annotations

import dataclasses
import inspect
import re
import sys
from collections.abc import Callable
from typing import Any, TypeVar

import yaml

import cutmix_exp.startup  # noqa: F401 (of every script)
from cutmix_exp import schema
from cutmix_exp.errors import UserError
from cutmix_exp.launch import errors_told

T = TypeVar("T")


def parse(cls: type[T], arguments: list[str], *, rest: list[str] | None = None) -> T:
    """Build the dataclass of a script's options from `name=value` words; values are YAML.

    Words that are no option go to `rest`, if there is one (overrides of train.py), else they are
    errors. `--help` prints the class's docstring.

    Raises:
        UserError: unknown option, wrong type or value, a required option is missing.
    """
    if {"-h", "--help"} & set(arguments):
        print(cls.__doc__)
        raise SystemExit(0)
    fields: dict[str, Any] = getattr(cls, "__dataclass_fields__", {})
    known = set(fields)
    values = {}
    for word in arguments:
        name, equals, text = word.partition("=")
        if rest is not None and equals and name not in known:
            rest.append(word)
            continue
        if not equals:
            raise UserError(
                f"expected name=value, got {word!r}; options: {', '.join(sorted(known))}"
            )
        try:
            values[name] = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise UserError(f"{word!r} is no valid value: {error}") from None
    unset = dataclasses.MISSING
    missing = [
        name
        for name, field in fields.items()
        if name not in values and field.default is unset and field.default_factory is unset
    ]
    if missing:
        told = [described(cls, name) for name in missing]
        raise UserError("\n".join([*told, f"all options: python {sys.argv[0]} --help"]))
    return schema.build(cls, values)


def described(cls: type, name: str) -> str:
    """A required option as the class's docstring has it: `name=VALUE    what it is`."""
    found = re.search(
        rf"^({name}=\S+) +(.+(?:\n +.+)*)", inspect.cleandoc(cls.__doc__ or ""), re.MULTILINE
    )
    word, meaning = (found[1], f": {' '.join(found[2].split())}") if found else (f"{name}=...", "")
    return f"{word} is required{meaning}"


def main(command: Callable[[list[str]], int]) -> None:
    """Run a script: a user's error is one message and exit status 2."""
    try:
        with errors_told():
            sys.exit(command(sys.argv[1:]))
    except KeyboardInterrupt:
        print("interrupted; the same command goes on with what is missing", file=sys.stderr)
        sys.exit(130)

"""Plain dictionaries to typed, frozen dataclasses and back.

Hydra composes a tree of dictionaries; `build` turns it into a tree of frozen dataclasses and is
the only place that checks names, types and ranges, so that the rest of the package never does.
A class that derives from `Part` is chosen by the key `_target_` of its dictionary (its import
path): that key is the whole registry, so that a new part needs no list to be edited.
"""

from __future__ import annotations

import dataclasses
import difflib
import importlib
import math
import re
import types
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from cutmix_exp.errors import UserError

T = TypeVar("T")
_UNSET: Any = dataclasses.MISSING


class Part:
    """Base of every dataclass that a YAML file names by `_target_`."""


def option(
    default: Any = _UNSET,
    *,
    factory: Any = _UNSET,
    ge: float | None = None,
    gt: float | None = None,
    le: float | None = None,
    lt: float | None = None,
    identity: bool = True,
    neutral: Any = _UNSET,
    place: bool = False,
) -> Any:
    """A dataclass field with a range and a place in the run's identity.

    Args:
        default, factory: as in `dataclasses.field`.
        ge, gt, le, lt: bounds of a number (of each number in a sequence or mapping).
        identity: False keeps the field out of the run's hash: it cannot move a number.
        neutral: for a field that is added after records were committed: while it has this value
            it stays out of the hash, so that those records keep their identity.
        place: a folder of this machine: whether there is one can move a number, which one cannot.
    """
    metadata = {"ge": ge, "gt": gt, "le": le, "lt": lt, "identity": identity, "neutral": neutral}
    metadata["place"] = place
    return dataclasses.field(default=default, default_factory=factory, metadata=metadata)


def build(cls: type[T], data: Any, path: str = "") -> T:
    """Build the dataclass `cls` from a dictionary; `path` names the place in error messages.

    A class may have a static method `check_raw(data)` that sees the dictionary first.

    Raises:
        UserError: unknown or missing field, wrong type, value out of range, unknown `_target_`.
    """
    where = path or "the configuration"
    if not isinstance(data, dict):
        raise UserError(f"{where}: expected a group of fields, got {data!r}")
    data = dict(data)
    target = data.pop("_target_", None)
    if issubclass(cls, Part):
        cls = _import_part(cls, target, where)
    elif target is not None:
        raise UserError(f"{where}: '_target_' is not allowed here, got {target!r}")

    check_raw = getattr(cls, "check_raw", None)
    if check_raw is not None:
        check_raw(data)
    hints = get_type_hints(cls)
    fields = {f.name: f for f in dataclasses.fields(cls) if f.init}  # type: ignore[arg-type]
    values = {}
    for name, value in data.items():
        here = f"{path}.{name}" if path else str(name)
        if name not in fields:
            raise UserError(unknown_field(here, list(fields)))
        values[name] = _convert(hints[name], value, here, fields[name].metadata)
    for name, field in fields.items():
        has_default = field.default is not _UNSET or field.default_factory is not _UNSET
        if name not in values and not has_default:
            raise UserError(f"{where}: the field '{name}' is missing")
    try:
        return cls(**values)
    except UserError as error:
        raise UserError(f"{where}: {error}") from None


def unknown_field(path: str, allowed: list[str]) -> str:
    """The message for a field that does not exist, with the nearest name that does."""
    group, _, name = path.rpartition(".")
    close = difflib.get_close_matches(name, allowed, n=1)
    hint = f"; did you mean '{f'{group}.' if group else ''}{close[0]}'?" if close else ""
    place = f"'{group}'" if group else "the top level"
    return (
        f"there is no field '{path}'{hint}\n"
        f"fields of {place}: {', '.join(sorted(allowed)) or '(none)'}"
    )


def _import_part(base: type, target: Any, where: str) -> Any:
    if not isinstance(target, str) or not re.fullmatch(r"\w+(\.\w+)+", target):
        raise UserError(
            f"{where}: expected '_target_: package.module.Class', got {target!r}; "
            "choose the group's option by name first (python train.py --help lists them)"
        )
    module_name, _, class_name = target.rpartition(".")
    try:
        found = getattr(importlib.import_module(module_name), class_name)
    except (ImportError, AttributeError) as error:
        raise UserError(f"{where}: cannot import '{target}': {error}") from None
    if not (isinstance(found, type) and issubclass(found, base)):
        raise UserError(f"{where}: '{target}' is not a {base.__name__}")
    return found


def _convert(hint: Any, value: Any, path: str, limits: Any) -> Any:
    origin, args = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        if value is None and type(None) in args:
            return None
        (inner,) = [a for a in args if a is not type(None)]
        return _convert(inner, value, path, limits)
    if origin is Literal:
        if value in args and not isinstance(value, bool):
            return value
        raise UserError(
            f"{path}={value!r} is not allowed; choose one of {', '.join(map(str, args))}"
        )
    if origin is tuple:
        if not isinstance(value, (list, tuple)):
            raise UserError(f"{path}={value!r}: expected a list such as [0.5,0.75]")
        return tuple(_convert(args[0], v, f"{path}[{i}]", limits) for i, v in enumerate(value))
    if origin is dict:
        if not isinstance(value, dict):
            raise UserError(f"{path}={value!r}: expected a mapping")
        return {str(k): _convert(args[1], v, f"{path}.{k}", limits) for k, v in value.items()}
    if dataclasses.is_dataclass(hint) or (isinstance(hint, type) and issubclass(hint, Part)):
        return build(hint, value, path)  # type: ignore[arg-type]
    return _scalar(hint, value, path, limits)


def _scalar(hint: type, value: Any, path: str, limits: Any) -> Any:
    names = {bool: "true or false", int: "a whole number", float: "a number", str: "a text"}
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if type(value) is not hint:
        kind = type(value).__name__
        raise UserError(f"{path}={value!r} is a {kind}; expected {names[hint]}")
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        tests = [
            ("ge", ">=", lambda v, b: v >= b),
            ("gt", ">", lambda v, b: v > b),
            ("le", "<=", lambda v, b: v <= b),
            ("lt", "<", lambda v, b: v < b),
        ]
        bounds = [
            (sign, limits[key], holds) for key, sign, holds in tests if limits.get(key) is not None
        ]
        if not math.isfinite(value) or not all(holds(value, b) for _, b, holds in bounds):
            allowed = " and ".join(f"{sign} {b}" for sign, b, _ in bounds) or "a finite number"
            raise UserError(f"{path}={value} is out of range; allowed: {allowed}")
    return value


def to_dict(value: Any) -> Any:
    """The inverse of `build`: plain containers, with `_target_` for every `Part`."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        out: dict[str, Any] = {}
        if isinstance(value, Part):
            out["_target_"] = f"{type(value).__module__}.{type(value).__qualname__}"
        for field in dataclasses.fields(value):
            if field.init:
                out[field.name] = to_dict(getattr(value, field.name))
        return out
    if isinstance(value, dict):
        return {k: to_dict(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [to_dict(v) for v in value]
    return value


def identity_of(value: Any) -> Any:
    """What of a dataclass tree can move a number, in a form that survives moved modules.

    Mappings become lists of pairs: the order of image operations matters.
    """
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        out: dict[str, Any] = {"class": type(value).__name__} if isinstance(value, Part) else {}
        for field in dataclasses.fields(value):
            held = getattr(value, field.name)
            if field.metadata.get("place") and held is not None:
                held = "given"
            neutral = field.metadata.get("neutral", _UNSET)
            if field.metadata.get("identity", True) and (neutral is _UNSET or held != neutral):
                out[field.name] = identity_of(held)
        return out
    if isinstance(value, dict):
        return [[k, identity_of(v)] for k, v in value.items()]
    if isinstance(value, (list, tuple)):
        return [identity_of(v) for v in value]
    return value

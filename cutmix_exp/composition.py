"""Hydra's part of the configuration: the groups of configs/ to one dictionary, and what Hydra
refuses, in words that help here."""

from __future__ import annotations

import difflib
import importlib
import re
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from cutmix_exp.errors import UserError

CONFIG_DIR = Path(__file__).resolve().parent.parent / "configs"

ELSEWHERE = {"suite": "scripts/evaluate.py", "table": "scripts/run_table.py"}
"""Folders of configs/ that are no groups of a run, and the scripts whose options they are."""


HELP = """\
python train.py [GROUP=OPTION ...] [FIELD=VALUE ...]

Trains one run; with -m and several values (seed=0,1,2) a run for each combination. For example:

  python train.py dataset=digits model=resnet model.depth=20 aug=cutmix budget=smoke
  python train.py model=pyramidnet aug=cutmix aug.mix.prob=1.0 seed=1
  python train.py -m dataset=digits model=resnet aug=baseline,cutmix seed=0,1 budget=smoke

Groups and their options:

{groups}

configs/train.yaml explains each field, configs/GROUP/OPTION.yaml those of an option. README.md shows the
fields worth knowing and more commands. Every field with its value, without a training:

  python train.py GROUP=OPTION ... --cfg job
"""


def help_text() -> str:
    """What `train.py --help` prints."""
    lines = []
    for group, default in _defaults().items():
        usual = "that of the data set" if default == "${dataset}" else default or "none"
        text = f"{', '.join(_options(group))} (default: {usual})"
        lines += textwrap.wrap(
            text, 100, initial_indent=f"  {group:<12}", subsequent_indent=" " * 14
        )
    return HELP.format(groups="\n".join(lines))


def _defaults() -> dict[str, str | None]:
    """The groups of a run, those of the defaults list of train.yaml, with what is chosen there."""
    whole = yaml.safe_load((CONFIG_DIR / "train.yaml").read_text())
    entries = [entry for entry in whole["defaults"] if isinstance(entry, dict)]
    chosen = {name: option for entry in entries for name, option in entry.items()}
    return {name: option for name, option in chosen.items() if (CONFIG_DIR / name).is_dir()}


def groups() -> dict[str, list[str]]:
    """The groups of a run with their options."""
    return {name: _options(name) for name in _defaults()}


def _options(group: str) -> list[str]:
    return sorted(file.stem for file in (CONFIG_DIR / group).glob("*.yaml"))


def compose(overrides: list[str]) -> dict[str, Any]:
    """Compose the config groups as `train.py` does, without Hydra's main.

    Raises:
        UserError: unknown group, option or field.
    """
    from omegaconf import OmegaConf

    with hydra_messages(overrides):
        composed = OmegaConf.to_container(_composed(overrides), resolve=True)
    assert isinstance(composed, dict)
    return {str(key): value for key, value in composed.items()}


def _composed(overrides: list[str], **settings: Any) -> Any:
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra

    saved = GlobalHydra.instance().hydra
    GlobalHydra.instance().clear()
    try:
        with initialize_config_dir(str(CONFIG_DIR), version_base="1.3"):
            return hydra_compose("train", overrides, **settings)
    finally:
        GlobalHydra.instance().hydra = saved


class hydra_messages:
    """Turns Hydra's and OmegaConf's errors into `UserError` with a hint that helps here, and
    refuses choices that Hydra would let pass.

    Args:
        overrides: the command line's, to know which options were chosen.
    """

    def __init__(self, overrides: list[str]) -> None:
        self.overrides = overrides

    def __enter__(self) -> None:
        for word in self.overrides:
            _check_choice(word)

    def __exit__(self, kind: Any, error: BaseException | None, traceback: Any) -> None:
        from hydra.errors import HydraException, OverrideParseException
        from omegaconf.errors import OmegaConfBaseException

        if isinstance(error, OverrideParseException):
            reason = str(error).split("\nSee https://hydra")[0]
            raise UserError(f"cannot read {error.override!r} as name=value: {reason}") from None
        if isinstance(error, (HydraException, OmegaConfBaseException)):
            raise UserError(_readable(str(error), self.overrides)) from None


def _check_choice(word: str) -> None:
    name, _, value = word.partition("=")
    group = name.lstrip("+~").partition("@")[0]
    first = group.partition(".")[0]
    if first in ELSEWHERE:
        raise UserError(
            f"{word}: '{first}' is an option of {ELSEWHERE[first]}, not of a run; "
            f"python {ELSEWHERE[first]} --help"
        )
    if not (CONFIG_DIR / group).is_dir():
        return
    if ".." in value:
        raise UserError(f"{word}: options are files below configs/{group}; '..' leads out")
    listed = re.fullmatch(r"\[([^\[\]]*)\]", value)
    if listed and group != "experiment":
        _check_list(word, group, [name.strip(" '\"") for name in listed[1].split(",")])


def _check_list(word: str, group: str, names: list[str]) -> None:
    """Options in brackets: Hydra merges any of them, whether that means something or not."""
    if len(names) < 2:
        return
    if group != "aug":
        raise UserError(f"{word}: one option is chosen, as {group}={names[0]}; only aug composes")
    distinct = list(dict.fromkeys(names))
    others = [name for name in distinct if name != "baseline"]
    if len(distinct) < len(names):
        twice = next(name for name in distinct if names.count(name) > 1)
        problem = f"'{twice}' is named twice, and would act once"
    elif len(others) < len(names):
        problem = "'baseline' is no regularizer at all, and composes with none"
    else:
        return
    kept = others or distinct
    raise UserError(f"{word}: {problem}; write aug={_in_brackets(kept)}")


def _in_brackets(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"[{','.join(names)}]"


def _readable(message: str, overrides: list[str]) -> str:
    if found := re.match(r"Could not override '([^']+)'", message):
        return _unknown_field(found[1], overrides)
    if found := re.search(r"Could not find '([^']+)/([^'/]+)'", message):
        return _unknown_option(found[1], found[2], overrides)
    message = message.split("\nConfig search path")[0]
    return re.sub(r"^In '[^']*': ", "", message)


def _unknown_option(group: str, name: str, overrides: list[str]) -> str:
    options = _options(group)
    close = difflib.get_close_matches(name, options, n=1)
    hint = f"; did you mean {group}={close[0]}?" if close else ""
    if group == "schedule" and not any(word.startswith("schedule=") for word in overrides):
        hint = "; the schedule follows the data set, unless it is named: schedule=NAME"
    return f"there is no {group}={name}{hint}\noptions of '{group}': {', '.join(options)}"


# ------------------------------------------------------------------- fields that do not exist


def _unknown_field(path: str, overrides: list[str]) -> str:
    """The message for a field that the chosen options do not have: where there is one of that
    name, which options have it, and what fields are where it was looked for."""
    known = groups()
    tree, chosen = _chosen(overrides, [*known])
    group, _, inner = path.partition(".")
    if group != "hydra":  # whose many fields are nobody's wish
        del tree["hydra"]
    place, node = _nearest_place(path, tree)
    fields = sorted(name for name in node if name[0] != "_")
    if not place:
        fields = sorted({*fields, *known})
    direct = place == path.rpartition(".")[0]
    if direct and path.rpartition(".")[2] in _fields_of_class(node):
        return (
            f"there is no field '{path}' in the file of {group}={chosen.get(group)}, which leaves it "
            f"at its default; ++{path}=VALUE sets it"
        )

    near = _same_name(path, tree, fields if direct else [])
    elsewhere = _in_other_options(path, known, chosen) if inner else {}
    if elsewhere:
        near = [name for name in near if name.startswith(f"{group}.")]
    elif not near:
        elsewhere = _in_other_options(path, known, chosen, by_leaf=True)
    if not near and not elsewhere:
        near = _similar_name(path, tree)
    lines = [f"there is no field '{path}'"]
    if near:
        lines[0] += f"; did you mean {' or '.join(repr(name) for name in near)}?"
    for name, options in elsewhere.items():
        own = name.partition(".")[0]
        more = f" (or {_some(options[1:])})" if options[1:] else ""
        lines.append(
            f"{own}={chosen.get(own)} is chosen, which has no '{name}'; "
            f"add {own}={options[0]}{more}"
        )
    where = f"'{place}'" if place else "the top level"
    if group in chosen and place:
        where += f" ({group}={chosen[group]})"
    lines.append(f"fields of {where}: {', '.join(fields) or '(none)'}")
    return "\n".join(lines)


def _chosen(overrides: list[str], known: list[str]) -> tuple[dict[str, Any], dict[str, str]]:
    """The tree without what the command line changes in it, and the chosen option of each group."""
    from hydra.errors import HydraException
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    words = dict(word.split("=", 1) for word in overrides if word.partition("=")[0] in known)
    try:
        composed = _composed([f"{k}={v}" for k, v in words.items()], return_hydra_config=True)
    except (HydraException, OmegaConfBaseException):  # several values of a sweep
        words = {}
        composed = _composed([], return_hydra_config=True)
    choices = {k: str(v) for k, v in composed.hydra.runtime.choices.items() if k in known and v}
    tree: Any = OmegaConf.to_container(composed, resolve=False)
    return tree, {**choices, **words}


def _nearest_place(path: str, tree: Any) -> tuple[str, Any]:
    """The innermost group on the way to a field: its path and its node in the tree."""
    place: list[str] = []
    for name in path.split(".")[:-1]:
        if not isinstance(tree.get(name), dict):
            break
        tree = tree[name]
        place.append(name)
    return ".".join(place), tree


def _fields(tree: Any, prefix: str = "") -> Iterator[str]:
    """The paths of all fields below the top level."""
    for name, value in tree.items():
        if isinstance(value, dict):
            yield from _fields(value, f"{prefix}{name}.")
        elif prefix and name[0] != "_":
            yield f"{prefix}{name}"


def _same_name(path: str, tree: Any, siblings: list[str]) -> list[str]:
    """Fields of the tree with the last name of a path, those of its group if there are any; and
    the one beside it whose name is similar."""
    parent, _, leaf = path.rpartition(".")
    same = [p for p in _fields(tree) if p.rpartition(".")[2] == leaf]
    group = f"{path.partition('.')[0]}."
    found = [p for p in same if p.startswith(group)] or same
    close = difflib.get_close_matches(leaf, siblings, n=1)
    found += [f"{parent}.{name}" if parent else name for name in close]
    return [*dict.fromkeys(found)][:3]


def _similar_name(path: str, tree: Any) -> list[str]:
    """Fields of the tree whose last name is similar to a path's, of its group if that is one."""
    group, _, _ = path.partition(".")
    own = tree if group not in tree else {group: tree[group]}
    leaves = {p: p.rpartition(".")[2] for p in _fields(own)}
    close = difflib.get_close_matches(path.rpartition(".")[2], {*leaves.values()}, n=1)
    return [p for p, leaf in leaves.items() if leaf in close][:3]


def _in_other_options(
    path: str, known: dict[str, list[str]], chosen: dict[str, str], *, by_leaf: bool = False
) -> dict[str, list[str]]:
    """Fields of options that were not chosen, with those options: the path itself, or those whose
    last name it has, of its own group if that is one."""
    group, _, _ = path.partition(".")
    leaf = path.rpartition(".")[2]
    found: dict[str, list[str]] = {}
    for own in [group] if group in known else [g for g in known if g != "experiment"]:
        options = [name for name in known[own] if name != chosen.get(own)]
        # First the heads of families, whose names are parts of others'.
        for name in sorted(options, key=lambda n: (-sum(n in other for other in options), n)):
            for field in dict.fromkeys(_fields(_file(own, name), f"{own}.")):
                if field == path or (by_leaf and field.rpartition(".")[2] == leaf):
                    found.setdefault(field, []).append(name)
    return dict(sorted(found.items(), key=lambda item: -len(item[1]))[:2])


def _file(group: str, name: str) -> dict[str, Any]:
    """An option's file, with those of its defaults list merged into it at the first level."""
    held = yaml.safe_load((CONFIG_DIR / group / f"{name}.yaml").read_text()) or {}
    merged: dict[str, Any] = {}
    for other in held.pop("defaults", []):
        if isinstance(other, str) and other in _options(group):
            merged |= _file(group, other)
    return merged | held


def _some(names: list[str], most: int = 4) -> str:
    return ", ".join([*names[:most], *(["..."] if names[most:] else [])])


def _fields_of_class(node: dict[str, Any]) -> dict[str, Any]:
    """The fields of the class that a node names, mentioned in its file or not."""
    module, _, name = str(node.get("_target_", "")).rpartition(".")
    if not module.startswith("cutmix_exp."):
        return {}
    found: dict[str, Any] = getattr(importlib.import_module(module), name).__dataclass_fields__
    return found

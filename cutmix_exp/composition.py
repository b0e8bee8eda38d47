"""Hydra's part of the configuration: the groups of configs/ to one dictionary, and what Hydra
refuses, in words that help here."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from cutmix_exp import schema
from cutmix_exp.errors import UserError

CONFIG_DIR = Path(__file__).resolve().parent.parent / "configs"


def compose(overrides: list[str]) -> dict[str, Any]:
    """Compose the config groups as `train.py` does, without Hydra's main.

    Raises:
        UserError: unknown group, option or field.
    """
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra
    from omegaconf import OmegaConf

    saved = GlobalHydra.instance().hydra
    GlobalHydra.instance().clear()
    try:
        with hydra_messages(overrides), initialize_config_dir(str(CONFIG_DIR), version_base="1.3"):
            composed = OmegaConf.to_container(hydra_compose("train", overrides), resolve=True)
    finally:
        GlobalHydra.instance().hydra = saved
    assert isinstance(composed, dict)
    return {str(key): value for key, value in composed.items()}


class hydra_messages:
    """Turns Hydra's and OmegaConf's errors into `UserError` with a hint that helps here.

    Args:
        overrides: the command line's, to know which options were chosen.
    """

    def __init__(self, overrides: list[str]) -> None:
        self.overrides = overrides

    def __enter__(self) -> None:
        for word in self.overrides:
            group, _, value = word.partition("=")
            if ".." in value and (CONFIG_DIR / group.lstrip("+").partition("@")[0]).is_dir():
                raise UserError(f"{word}: options are files below configs/{group}; '..' leads out")

    def __exit__(self, kind: Any, error: BaseException | None, traceback: Any) -> None:
        from hydra.errors import HydraException, OverrideParseException
        from omegaconf.errors import OmegaConfBaseException

        if isinstance(error, OverrideParseException):
            reason = str(error).split("\nSee https://hydra")[0]
            raise UserError(f"cannot read {error.override!r} as name=value: {reason}") from None
        if isinstance(error, (HydraException, OmegaConfBaseException)):
            raise UserError(_readable(str(error), self.overrides)) from None


def _readable(message: str, overrides: list[str]) -> str:
    found = re.match(r"Could not override '([^']+)'", message)
    if not found:
        message = message.split("\nConfig search path")[0]
        return re.sub(r"^In '[^']*': ", "", message)
    path = found[1]
    allowed = _fields_near(path, overrides)
    if allowed is None:
        group = path.rpartition(".")[0]
        return f"there is no field '{path}': the chosen option of '{group.split('.')[0]}' has no '{group}'"
    return schema.unknown_field(path, allowed)


def _fields_near(path: str, overrides: list[str]) -> list[str] | None:
    """The fields beside `path` in the chosen options; None where there is no such place."""
    choices = [o for o in overrides if (CONFIG_DIR / o.partition("=")[0]).is_dir() and "," not in o]
    try:
        node: Any = compose(choices)
    except UserError:
        return None
    launcher = (
        CONFIG_DIR / "hydra" / "launcher" / "sweep.yaml"
    )  # Hydra composes it for itself alone
    node["hydra"] = {"launcher": yaml.safe_load(launcher.read_text())}
    for name in path.split(".")[:-1]:
        node = node.get(name) if isinstance(node, dict) else None
    return sorted(k for k in node if k[0] != "_") if isinstance(node, dict) else None

"""Checks that every key of a config is one that its constructor takes. Builds nothing and reads no data.

This is apart from build.py because a sweep checks every point before it is queued, and build.py imports torch.
"""

import inspect
import logging
from collections.abc import Mapping
from typing import Any

from hydra.utils import get_object, instantiate

from sftlab.common import secrets
from sftlab.common.renamed import MOVED
from sftlab.config.errors import nearest, unknown_key
from sftlab.config.groups import keys_of_option

logging.getLogger("hydra.utils").setLevel(logging.CRITICAL)  # it logs an error that is raised and shown anyway

COMPONENTS = ("model", "data", "optim", "schedule", "parallel", "tracker", "trainer", "evaluation")
KEYS = (*COMPONENTS, "launcher", "sweeper", "seed", "name", "run_dir", "resume", "resume_despite_changes")
RESERVED = ("_target_", "_partial_", "_convert_", "_recursive_")


def check(config: Mapping[str, Any]) -> None:
    """Raise ValueError for a key or a value that no constructor takes. Builds nothing heavy."""
    for key in config:
        if key not in KEYS:
            raise ValueError(unknown_key(key, KEYS))
    secrets.refuse(config)
    for name in COMPONENTS:
        check_node(name, config[name])
    launcher = config["launcher"] or {}
    check_node("launcher", launcher)
    if "_target_" not in launcher:  # launcher=none takes no keys
        for key in launcher:
            raise ValueError(unknown_key(f"launcher.{key}", keys_of_option("launcher", "slurm")))
    instantiate(
        {name: config[name] for name in COMPONENTS}, _convert_="all"
    )  # runs the constructors' own checks of values


def check_node(path: str, node: Any) -> None:
    """Bind the keys of a node to the signature of its target, then those of the nodes inside it."""
    if not isinstance(node, Mapping):
        return
    if "_target_" in node:
        signature = inspect.signature(target_of(path, node))
        taken = signature.parameters
        for key in node:
            if key not in RESERVED and key not in taken and not any(p.kind is p.VAR_KEYWORD for p in taken.values()):
                raise ValueError(
                    f"{path}.{key}: {node['_target_']} takes no such key; {nearest(key, taken)}".rstrip("; ")
                )
        bind = signature.bind_partial if node.get("_partial_") else signature.bind
        try:
            bind(**{k: v for k, v in node.items() if k not in RESERVED})
        except TypeError as error:
            raise ValueError(f"{path}: {node['_target_']}: {error}") from None
    for key, value in node.items():
        check_node(f"{path}.{key}", value)


def target_of(path: str, node: Mapping[str, Any]) -> Any:
    """Return what `_target_` names. Raises: ValueError if there is no such thing, or if it lies elsewhere now."""
    target = str(node["_target_"])
    if target in MOVED:
        raise ValueError(f"{path}._target_={target}: it has moved to {MOVED[target]}")
    try:
        return get_object(target)
    except (ImportError, ValueError) as error:
        raise ValueError(
            f"{path}._target_={target}: there is no such class or function ({str(error).splitlines()[0]})"
        ) from None

"""Checks that every key of a config is one that its constructor takes, and every value one that it can use.

Builds nothing, reads no data and imports no torch: it takes 0.2 s, before a run is made or a sweep queued. So it is
apart from build.py, and a module that holds a constructor imports torch inside its functions.
"""

import functools
import inspect
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from hydra.utils import get_object
from omegaconf import OmegaConf

from sftlab.common import secrets
from sftlab.common.renamed import MOVED
from sftlab.common.values import a_number, annotations, as_typed, refusal
from sftlab.config.groups import keys_of_option, options
from sftlab.config.unknown import nearest, unknown_key

logging.getLogger("hydra.utils").setLevel(logging.CRITICAL)  # it logs an error that is raised and shown anyway

COMPONENTS = ("model", "peft", "data", "optim", "schedule", "parallel", "tracker", "trainer", "evaluation")
RESERVED = ("_target_", "_partial_", "_convert_", "_recursive_")


@dataclass(frozen=True, kw_only=True)
class RunKeys:
    """The keys at the top of train's config that belong to no component."""

    seed: int
    name: str | float
    run_dir: str
    resume: str
    resume_despite_changes: bool = False


KEYS = (*COMPONENTS, "launcher", "sweeper", *RunKeys.__dataclass_fields__)


def check(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the components, none of them heavy. Raises: ValueError for a key or a value that no constructor takes."""
    for key in config:
        if key not in KEYS:
            raise ValueError(unknown_key(key, KEYS))
    secrets.refuse(config)
    for name in COMPONENTS:
        if config.get(name) is None:
            raise ValueError(missing(name))
        if not isinstance(config[name], Mapping):
            raise ValueError(f"{name}={as_typed(config[name])}: expected its settings, {name}.KEY=VALUE")
    bind("", {key: config[key] for key in RunKeys.__dataclass_fields__ if key in config}, RunKeys)
    for name in COMPONENTS:
        check_node(name, config[name])
    launcher = config.get("launcher") or {}
    check_node("launcher", launcher)
    if "_target_" in launcher:
        instantiate(launcher)
    for key in () if "_target_" in launcher else launcher:  # launcher=none takes no keys
        raise ValueError(unknown_key(f"launcher.{key}", keys_of_option("launcher", "slurm")))
    refuse_together(config)
    # This runs the constructors' own checks of values.
    return dict(instantiate({name: config[name] for name in COMPONENTS}))


def refuse_together(config: Mapping[str, Any]) -> None:
    """Raise ValueError for settings of two components of which each is possible alone."""
    tensor = config["parallel"].get("tensor") or 1
    if tensor > 1 and "rank" in config["peft"]:
        raise ValueError(
            f"parallel.tensor={tensor} splits the layers that an adapter (peft.rank={config['peft']['rank']}) lies "
            "beside, which peft does not follow here. Use parallel.tensor=1: the frozen base is sharded all the same"
        )


def resolved(config: Any) -> dict[str, Any]:
    """Return a composed config as a plain tree. Raises: MissingMandatoryValue."""
    made = OmegaConf.to_container(config, resolve=True, throw_on_missing=True)
    assert isinstance(made, dict)
    return {str(key): value for key, value in made.items()}


def missing(name: str) -> str:
    """Return the message for a part of a run that is not there."""
    offered = options(name)
    if not offered:
        return f"{name} is missing: a run needs it, so leave its settings as they are (~{name} removes them)"
    none = f"; {name}=none goes without" if "none" in offered else ""
    return f"{name} is missing: a run needs an option of it ({name}={'|'.join(offered)}){none}"


def instantiate(node: Any) -> Any:
    """Return a node with everything that names a `_target_` constructed, from the inside out.

    Unlike Hydra's function of this name it resolves no interpolations: it is given resolved configs, and a stored one
    in which `${oc.env:TOKEN}` is left would look that up.
    """
    if isinstance(node, list | tuple):
        return [instantiate(value) for value in node]
    if not isinstance(node, Mapping):
        return node
    made = {key: instantiate(value) for key, value in node.items() if key not in RESERVED}
    if "_target_" not in node:
        return made
    target = target_of("", node)
    return functools.partial(target, **made) if node.get("_partial_") else target(**made)


def check_node(path: str, node: Any) -> None:
    """Bind a node to the signature of its target, keys and values, then the nodes inside it."""
    if isinstance(node, list | tuple):
        for inner in node:
            check_node(path, inner)
    if not isinstance(node, Mapping):
        return
    if "_target_" in node:
        given = {key: value for key, value in node.items() if key not in RESERVED}
        bind(path, given, target_of(path, node), str(node["_target_"]), bool(node.get("_partial_")))
    for key, value in node.items():
        check_node(f"{path}.{key}", value)


def bind(path: str, given: Mapping[str, Any], target: Any, named: str = "", partial: bool = False) -> None:
    """Raise ValueError for keys that a constructor does not take, for values that do not fit, and for what is missing.

    What a partial node leaves open the code gives: its positional parameters. A keyword without default is a setting.
    """
    prefix = f"{path}." if path else ""
    taken = inspect.signature(target).parameters
    for key in given:
        if key not in taken and not any(p.kind is p.VAR_KEYWORD for p in taken.values()):
            raise ValueError(f"{prefix}{key}: {named} takes no such key; {nearest(key, taken)}".rstrip("; "))
    for key, p in taken.items():
        settable = p.kind is p.KEYWORD_ONLY or (p.kind is p.POSITIONAL_OR_KEYWORD and not partial)
        if settable and p.default is p.empty and key not in given:
            raise ValueError(f"{prefix}{key} is missing: give it a value, {prefix}{key}=...")
    kinds = annotations(target)
    for key, value in given.items():
        wanted = refusal(value, kinds.get(key, Any))
        if wanted:
            shown = as_typed(value)
            quoted = f"; a text of digits is typed in quotes, {prefix}{key}=\"'{shown}'\"" if a_number(value) else ""
            raise ValueError(f"{prefix}{key}={shown}: expected {wanted}{quoted if 'a text' in wanted else ''}")


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

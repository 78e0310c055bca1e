"""The answer to a key that nothing takes: what it is called here, whose it is, or the nearest key that exists.

The keys that count are those of the options that were chosen on the command line, found in the constructor that would
have been given the key. Only then other options are looked at, and what other trainers call things.
"""

import difflib
import inspect
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import yaml
from omegaconf import OmegaConf

from sftlab.common.renamed import KEYS
from sftlab.config import foreign
from sftlab.config.groups import CONF, flat, folders, given_folders, is_group, keys_of_option, options

FOREIGN_GROUPS = {"args", "training_args", "sft_config"}  # before the keys of transformers, in scripts
RESERVED = ("_target_", "_partial_", "_convert_", "_recursive_")


def explain_key(key: str, config_name: str, words: Sequence[str] | None = None) -> str:
    """Return the message for a key of the command line that a command's config does not have."""
    given = typed(sys.argv[1:] if words is None else words)
    config = composed(config_name, given)
    known = [*flat(config), *(p.name for folder in folders() for p in folder.iterdir() if p.is_dir())]
    if key in KEYS:
        return unknown_key(key, known)
    groups = {word.partition(".")[0] for word in known} | FOREIGN_GROUPS
    others = {foreign.name_of(k, groups): v for k, v in given.items() if k not in known}
    if foreign.row_of(foreign.name_of(key, groups)):
        told = "".join(f"\n  {line}" for line in foreign.lines(others))
        return f"{key}: another trainer's key; here:{told}\nThe whole table is in docs/migrating.md"
    return unknown_key(key, known, config)


def unknown_key(key: str, known: Iterable[str], config: Any = None) -> str:
    """Return the message for an unknown key: which options of its group have it, or the nearest key that exists."""
    if key in KEYS:
        return f"{key}: it is now called {KEYS[key]}"
    known = list(known)
    group, _, leaf = key.partition(".")
    keys_of = {o: keys_of_option(group, o) for o in options(group)} if leaf else {}
    takers = [o for o, theirs in keys_of.items() if leaf in theirs]
    if takers:
        names = " and ".join(f"{group}={t}" for t in takers)
        return f"{key}: the chosen {group} option has no such key; it belongs to {names}"
    path = key.rpartition(".")[0]
    own = nearest(key.rpartition(".")[2], beside(key, config)).replace("mean ", f"mean {path}.")
    known += sorted({f"{group}.{k}" for theirs in keys_of.values() for k in theirs} - set(known))
    known = [k for k in known if k.rpartition(".")[2] not in RESERVED]
    return f"{key}: no such key; {own or nearest(key, known) or '--cfg job lists all keys'}".rstrip("; ")


def beside(key: str, config: Any) -> list[str]:
    """Return the keys that the constructor takes for which a key was meant, with those that its node has."""
    path, _, _ = key.rpartition(".")
    node = config
    for part in path.split(".") if path else ():
        node = node.get(part) if isinstance(node, Mapping) else None
    if not path or not isinstance(node, Mapping):
        return []
    names = {str(name) for name in node if name not in RESERVED}
    if "_target_" in node:
        names |= set(settings_of(str(node["_target_"]), bool(node.get("_partial_"))))
    return sorted(names)


def settings_of(target: str, partial: bool) -> list[str]:
    """Return the parameters of a constructor that a config may set; none if there is no such constructor."""
    from hydra.utils import get_object

    try:
        taken = inspect.signature(get_object(target)).parameters.values()
    except (ImportError, ValueError, TypeError):
        return []
    named = [p for p in taken if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)]
    return [p.name for p in named if not partial or p.kind is p.KEYWORD_ONLY]


def composed(config_name: str, given: Mapping[str, Any]) -> Any:
    """Return the config that a command composes from the options on its command line, without their values."""
    from hydra import compose, initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra
    from hydra.errors import HydraException

    search = [f"file://{folder.absolute()}" for folder in given_folders()]
    chosen = [f"hydra.searchpath=[{','.join(search)}]"] if search else []
    for key, value in given.items():
        option = str(value).partition(",")[0]
        if is_group(key) and option in options(key):
            chosen.append(f"{key}={option}")
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        try:
            config = compose(config_name, chosen)
        except HydraException:
            config = compose(config_name)
    return OmegaConf.to_container(config, resolve=False)


def typed(words: Sequence[str]) -> dict[str, Any]:
    """Return the overrides of a command line by their keys, with their values as YAML reads them."""
    found: dict[str, Any] = {}
    for argument in words:
        key, equals, value = argument.lstrip("+~").partition("=")
        if equals and not argument.startswith("-"):
            found[key] = value_of(value)
    return found


def value_of(text: str) -> Any:
    """Return what a text on the command line stands for. YAML takes 1e-4 for a text."""
    try:
        return float(text) if not text.lstrip("-").isdigit() else int(text)
    except ValueError:
        pass
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError:
        return text


def nearest(name: str, known: Iterable[str]) -> str:
    """Return `did you mean X? ` for the known name most like `name`, or nothing."""
    known = list(known)
    parent, _, leaf = name.rpartition(".")
    # Beside each other keys differ in their last word alone: the words before it would make any two look alike.
    beside = {k.rpartition(".")[2]: k for k in known if k.rpartition(".")[0] == parent}
    elsewhere = [k for k in known if k not in beside.values()]
    by_leaf = {k.rpartition(".")[2]: k for k in reversed(known)}
    found = (
        [beside[m] for m in difflib.get_close_matches(leaf, beside, 1, 0.6)]
        or difflib.get_close_matches(name, elsewhere, 1, 0.6)
        or [by_leaf[m] for m in difflib.get_close_matches(leaf, by_leaf, 1, 0.7)]
    )
    return f"did you mean {found[0]}? " if found else ""

"""The config groups: where conf/ lies, which options a group has, which keys an option sets."""

import importlib.util
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

from sftlab.common.files import read_yaml

PACKAGE = Path(__file__).parents[1]
# A wheel has conf/ inside the package, a checkout beside it.
CONF = next(p for p in (PACKAGE / "conf", PACKAGE.parent / "conf") if p.is_dir())
BASE = "base"  # in each group: the keys that its options share, with their comments
ENTRY_POINTS = "sftlab.options"


def installed() -> dict[str, Path]:
    """Return the config folders that packages installed beside sftlab offer, by the name of their entry point."""
    found = {}
    for entry in metadata.entry_points(group=ENTRY_POINTS):
        package, _, rest = entry.value.partition(".")
        spec = importlib.util.find_spec(package)
        if spec is not None and spec.submodule_search_locations:
            found[entry.name] = Path(next(iter(spec.submodule_search_locations)), *rest.split("."))
    return found


def folders() -> list[Path]:
    """Return every folder in which options may lie: ours, those of installed packages, that of --config-dir."""
    return [*installed_folders(), *given_folders()]


def installed_folders() -> list[Path]:
    """Return the config folders of this installation: ours, and those of packages installed beside it."""
    return [CONF, *installed().values()]


def given_folders() -> list[Path]:
    """Return the folders that --config-dir names; argparse takes every unambiguous beginning of it too."""
    found = []
    for i, word in enumerate(sys.argv[1:], 1):
        name, equals, value = word.partition("=")
        if name == "-cd" or (name.startswith("--config-d") and "--config-dir".startswith(name)):
            found.append(Path(value if equals else "".join(sys.argv[i + 1 : i + 2])))
        elif word.startswith("-cd") and word[3:]:
            found.append(Path(word[3:]))
    return found


def is_group(name: str) -> bool:
    """Return whether there is a config group of that name."""
    return any((folder / name).is_dir() for folder in folders())


def flat(node: Any, prefix: str = "") -> list[str]:
    """Return the dotted keys of a tree of dicts."""
    if not isinstance(node, dict):
        return []
    return [key for k, v in node.items() for key in (f"{prefix}{k}", *flat(v, f"{prefix}{k}."))]


def options(group: str) -> list[str]:
    """Return the options of a config group."""
    return sorted({p.stem for folder in folders() for p in (folder / group).glob("*.yaml")} - {BASE})


def file_of_option(group: str, option: str) -> Path:
    """Return the YAML of an option."""
    return next(f for folder in folders() if (f := folder / group / f"{option}.yaml").is_file())


def keys_of_option(group: str, option: str) -> set[str]:
    """Return the dotted keys that the YAML of an option sets for its group, with those of the options it builds on."""
    file = file_of_option(group, option)
    body = dict(read_yaml(file) or {})
    bases = [b for b in body.pop("defaults", []) if isinstance(b, str) and b != "_self_"]
    own = body.get(group, {}) if "@package _global_" in file.read_text() else body
    return set(flat(own)).union(*(keys_of_option(group, base) for base in bases))


def offer_option(group: str, name: str, node: dict[str, Any]) -> None:
    """Add an option to a group that no YAML holds, such as the data of a run."""
    from hydra.core.config_store import ConfigStore

    ConfigStore.instance().store(group=group, name=name, node=node)


def hide_bases() -> None:
    """Take `base`, which the options of a group build on, out of what Hydra offers: help, completion, `glob(*)`."""
    from hydra._internal.config_repository import ConfigRepository

    every = ConfigRepository.get_group_options
    if every.__module__ == __name__:  # done already
        return

    def offered(self: ConfigRepository, *args: Any, **kwargs: Any) -> list[str]:
        return [option for option in every(self, *args, **kwargs) if option != BASE]

    ConfigRepository.get_group_options = offered  # type: ignore[method-assign]

"""The config groups: where conf/ lies, which options a group has, which keys an option sets."""

import importlib.util
import sys
from importlib import metadata
from itertools import pairwise
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

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
    given = [Path(b) for a, b in pairwise(sys.argv) if a in ("--config-dir", "-cd")]
    given += [Path(a.partition("=")[2]) for a in sys.argv if a.startswith("--config-dir=")]
    return [CONF, *installed().values(), *given]


def is_group(name: str) -> bool:
    """Return whether there is a config group of that name."""
    return any((folder / name).is_dir() for folder in folders())


def keys(config_name: str) -> list[str]:
    """Return every dotted key of the command's default config, and its groups."""
    from hydra import compose, initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra

    GlobalHydra.instance().clear()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        config = compose(config_name)
    return [
        *flat(OmegaConf.to_container(config, resolve=False)),
        *(p.name for folder in folders() for p in folder.iterdir() if p.is_dir()),
    ]


def flat(node: Any, prefix: str = "") -> list[str]:
    """Return the dotted keys of a tree of dicts."""
    if not isinstance(node, dict):
        return []
    return [key for k, v in node.items() for key in (f"{prefix}{k}", *flat(v, f"{prefix}{k}."))]


def options(group: str) -> list[str]:
    """Return the options of a config group."""
    return sorted({p.stem for folder in folders() for p in (folder / group).glob("*.yaml")} - {BASE})


def keys_of_option(group: str, option: str) -> set[str]:
    """Return the dotted keys that the YAML of an option sets for its group, with those of the options it builds on."""
    file = next(f for folder in folders() if (f := folder / group / f"{option}.yaml").is_file())
    body = OmegaConf.to_container(OmegaConf.load(file), resolve=False)
    assert isinstance(body, dict)
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

    def offered(self: ConfigRepository, *args: Any, **kwargs: Any) -> list[str]:
        return [option for option in every(self, *args, **kwargs) if option != BASE]

    ConfigRepository.get_group_options = offered  # type: ignore[method-assign]

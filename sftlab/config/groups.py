"""The config groups: where conf/ lies, which options a group has, which keys an option sets."""

from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

PACKAGE = Path(__file__).parents[1]


CONF = next(
    p for p in (PACKAGE / "conf", PACKAGE.parent / "conf") if p.is_dir()
)  # a wheel has it inside, a checkout beside


def keys(config_name: str) -> list[str]:
    """Return every dotted key of the command's default config, and its groups."""
    from hydra import compose, initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra

    GlobalHydra.instance().clear()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        config = compose(config_name)
    return [*flat(OmegaConf.to_container(config, resolve=False)), *(p.name for p in CONF.iterdir() if p.is_dir())]


def flat(node: Any, prefix: str = "") -> list[str]:
    """Return the dotted keys of a tree of dicts."""
    if not isinstance(node, dict):
        return []
    return [key for k, v in node.items() for key in (f"{prefix}{k}", *flat(v, f"{prefix}{k}."))]


def options(group: str) -> list[str]:
    """Return the options of a config group."""
    return sorted(p.stem for p in (CONF / group).glob("*.yaml"))


def keys_of_option(group: str, option: str) -> set[str]:
    """Return the keys that one option's YAML sets for its group, those of the options it builds on included."""
    file = CONF / group / f"{option}.yaml"
    body = OmegaConf.to_container(OmegaConf.load(file), resolve=False)
    assert isinstance(body, dict)
    bases = [b for b in body.pop("defaults", []) if isinstance(b, str) and b != "_self_"]
    own = body.get(group, {}) if "@package _global_" in file.read_text() else body
    return set(own).union(*(keys_of_option(group, base) for base in bases))


def offer_option(group: str, name: str, node: dict[str, Any]) -> None:
    """Add an option to a group that no YAML holds, such as the data of a run."""
    from hydra.core.config_store import ConfigStore

    ConfigStore.instance().store(group=group, name=name, node=node)

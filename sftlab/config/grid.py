"""The points of a grid as Hydra's sweeper makes them, and the overrides of one point parsed by Hydra's grammar."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sftlab.common.files import read_yaml
from sftlab.config.groups import CONF, is_group


def planned(sweep_dir: Path) -> list[list[str]]:
    """Return the overrides of every point from the multirun.yaml that Hydra leaves; none where there is none."""
    written = read_yaml(sweep_dir / "multirun.yaml")
    if not written:
        return []
    try:
        task = [str(override) for override in written["hydra"]["overrides"]["task"]]
    except (KeyError, TypeError):
        raise ValueError(f"{sweep_dir / 'multirun.yaml'} is not what Hydra leaves of a sweep") from None
    from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
    from hydra.core.override_parser.overrides_parser import OverridesParser

    parsed = OverridesParser.create().parse_overrides(task)
    return [list(point) for batch in BasicSweeper.split_arguments(parsed, None) for point in batch]


def parsed_overrides(overrides: Sequence[str], config: Mapping[str, Any]) -> list[tuple[str, Any, bool, bool]]:
    """Return (key, value, whether it chooses an option of a group, whether it deletes) of the overrides of a point.

    Values are parsed by Hydra's own grammar; `config` is the config that they composed.
    """
    from hydra.core.override_parser.overrides_parser import OverridesParser

    made = []
    for o in OverridesParser.create().parse_overrides(list(overrides)):
        key, value = o.key_or_group, o.value()
        chosen = "." not in key and isinstance(value, str) and isinstance(config.get(key), Mapping)
        chooses = key == "experiment" or is_group(key) or chosen
        made.append((key, value, chooses, o.is_delete()))
    return made


def compose_point(overrides: Sequence[str], run_dir: Path) -> dict[str, Any]:
    """Return the resolved config of a point of `train` with its own run directory."""
    from hydra import compose, initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra
    from omegaconf import OmegaConf

    GlobalHydra.instance().clear()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        config = compose("train", overrides=[*overrides, f"run_dir='{run_dir}'"])
    made = OmegaConf.to_container(config, resolve=True, throw_on_missing=True)
    assert isinstance(made, dict)
    return {str(k): v for k, v in made.items()}

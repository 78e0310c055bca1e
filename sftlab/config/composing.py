"""A config of `train` composed from overrides, as the command line composes it, with every value checked."""

import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sftlab.config.overrides import GIVEN, add_sources, inside, quote

START_TIME = "SFTLAB_START_TIME"


def start_time() -> str:
    """Return the time now, by which a run's folder is named."""
    return f"{time.strftime('%Y-%m-%d_%H-%M-%S')}-{time.time_ns() // 1000 % 1_000_000:06d}"


def register() -> None:
    """Make known what conf/ interpolates: `inside`, and the free texts that are kept away from Hydra's parser."""
    from omegaconf import OmegaConf

    OmegaConf.register_new_resolver("inside", inside, replace=True)
    OmegaConf.register_new_resolver("given", GIVEN.__getitem__, replace=True)


def compose(*overrides: str, config_dir: str | Path | None = None) -> dict[str, Any]:
    """Return the config of a run: the defaults of `sftlab train` with these overrides, resolved and checked.

    `config_dir` is a folder with options of your own. Every call names a new run directory.
    Raises: ValueError with what the command line would say.
    """
    return composed(overrides, config_dir)


def composed(overrides: Sequence[str], config_dir: str | Path | None = None) -> dict[str, Any]:
    """Return the resolved config that these overrides make of `train`. Raises: ValueError that says what to change."""
    from hydra import compose as compose_by_hydra
    from hydra import initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra

    from sftlab.config.binding import check, resolved
    from sftlab.config.errors import explain
    from sftlab.config.groups import CONF

    register()
    os.environ[START_TIME] = start_time()
    search = [f"hydra.searchpath=[file://{Path(config_dir).absolute()}]"] if config_dir else []
    GlobalHydra.instance().clear()
    try:
        typed = [quote(word, multirun=False) for word in add_sources(list(overrides))]
        with initialize_config_dir(str(CONF), version_base="1.3"):
            config = resolved(compose_by_hydra("train", [*search, *typed]))
        check(config)
    except Exception as error:
        raise ValueError(explain(error, "train", overrides)) from error
    return config

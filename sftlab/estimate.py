"""python -m sftlab.estimate: memory, time, money and disk of a run, before it is paid for. Takes train's overrides."""

import os
from collections.abc import Sequence
from typing import Any

from omegaconf import DictConfig, OmegaConf

from sftlab.config import start


def estimate(cfg: DictConfig) -> None:
    """Show the estimate of one composed config."""
    os.environ.update(HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1")  # nothing is fetched: what is here is read
    from sftlab.estimating.command import show_estimate

    show_estimate(plain(cfg), composed)


def composed(more: Sequence[str]) -> dict[str, Any]:
    """Return the config of this command line with more overrides. Raises: what Hydra raises."""
    from hydra import compose
    from hydra.core.hydra_config import HydraConfig

    return plain(compose("estimate", [*HydraConfig.get().overrides.task, *more]))


def plain(cfg: DictConfig) -> dict[str, Any]:
    """Return a config as plain values."""
    config = OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True)
    assert isinstance(config, dict)
    return {str(key): value for key, value in config.items()}


def main() -> None:
    """Entry point."""
    start.main(estimate, "estimate")


if __name__ == "__main__":
    main()

"""python -m sftlab.train key=value ...: compose a config, run it, return the score."""

import sys
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from sftlab import command


def train(cfg: DictConfig) -> float:
    """Run one composed config in this process; Hydra calls it once a point."""
    from hydra.core.hydra_config import HydraConfig
    from hydra.types import RunMode

    hydra = HydraConfig.get()
    overrides = list(hydra.overrides.task)
    if hydra.mode == RunMode.MULTIRUN:
        command.refuse_point_keys(sys.argv)
        cfg.run_dir = command.point_dir(Path(hydra.runtime.output_dir))
    from sftlab.run import run

    config = OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True)
    assert isinstance(config, dict)
    return run({str(k): v for k, v in config.items()}, overrides)


def main() -> None:
    """Entry point."""
    command.main(train, "train")


if __name__ == "__main__":
    main()

"""python -m sftlab.train key=value ...: compose a config, run it, return the score."""

import os
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
        for key in ("run_dir", "name"):
            if any(o.startswith(f"{key}=") and (key == "run_dir" or "," in o) for o in sys.argv):
                raise ValueError(f"{key}= cannot be set in a sweep: its points lie in hydra.sweep.dir, a folder each")
        cfg.run_dir = str(Path(hydra.runtime.output_dir).relative_to(os.getcwd()))
    from sftlab.run import run

    config = OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True)
    assert isinstance(config, dict)
    return run({str(k): v for k, v in config.items()}, overrides)


def main() -> None:
    """Entry point."""
    command.main(train, "train")


if __name__ == "__main__":
    main()

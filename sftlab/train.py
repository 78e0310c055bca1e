"""python -m sftlab.train key=value ...: compose a config, run it, return the score."""

import sys
from pathlib import Path

from omegaconf import DictConfig

from sftlab.config import start
from sftlab.config.binding import check, resolved
from sftlab.config.overrides import point_dir, refuse_point_keys


def train(cfg: DictConfig) -> float:
    """Run one composed config in this process; Hydra calls it once a point."""
    from hydra.core.hydra_config import HydraConfig
    from hydra.types import RunMode

    hydra = HydraConfig.get()
    overrides = list(hydra.overrides.task)
    if hydra.mode == RunMode.MULTIRUN:
        refuse_point_keys(sys.argv)
        cfg.run_dir = point_dir(Path(hydra.runtime.output_dir))
    config = resolved(cfg)
    check(config)  # before torch is imported: a wrong value is answered at once
    if "_target_" in config["launcher"]:
        from sftlab.launchers.several import run_in_processes

        return run_in_processes(config, overrides)
    from sftlab.training.run import run

    return run(config, overrides)


def main() -> None:
    """Entry point."""
    start.main(train, "train")


if __name__ == "__main__":
    main()

"""What every part is told: where to write, which model and data; and how it runs a command or builds a run."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from sftlab.common.run_directory import Claim
from sftlab.parallel.world import World
from sftlab.training.build import Run, build
from sftlab.training.preempt import StopSignal


@dataclass(frozen=True)
class Bench:
    """The folder of the results, the tokenizer and the peers' environments; overrides that say the model and data."""

    out: Path
    tiny: bool
    tokenizer: str | None = None
    peers: str | None = None

    @property
    def model(self) -> list[str]:
        """The model: of 1.2 billion parameters, untrained; the demo's in a tiny form."""
        if self.tiny:
            return ["model=demo", "model.init=random"]
        typed = ["model=llama3_2_1b", "model.init=random"]
        return [*typed, f"model.tokenizer={self.tokenizer}"] if self.tokenizer else typed

    @property
    def small_model(self) -> list[str]:
        """The same with four layers, where the question is not how fast."""
        return self.model if self.tiny else [*self.model, "model.architecture.num_hidden_layers=4"]

    @property
    def squad(self) -> list[str]:
        """The generated questions."""
        return ["data=squad", f"data.path={self.out}/data/train/squad.jsonl"]

    @property
    def validation(self) -> list[str]:
        """The generated validation questions."""
        return [f"data.val_path={self.out}/data/validation/squad.jsonl"]

    def fresh(self, name: str) -> Path:
        """Return a run directory that does not exist yet."""
        folder = self.out / "runs" / name
        num = sum(1 for p in folder.parent.glob(f"{name}*")) if folder.parent.is_dir() else 0
        return folder if not folder.exists() else folder.with_name(f"{name}_{num}")


def command(module: str, *typed: str) -> list[str]:
    """Return a command of sftlab as people type it."""
    return [sys.executable, "-m", f"sftlab.{module}", *typed]


def run_command(module: str, *typed: str) -> None:
    """Run a command of sftlab in this process."""
    with patch.object(sys, "argv", [f"sftlab-{module}", *typed]):
        import_module(f"sftlab.{module}").main()


@contextmanager
def built(here: World, folder: Path, *typed: str) -> Iterator[Run]:
    """Yield the run that train would build from these overrides."""
    from hydra import compose, initialize_config_dir
    from omegaconf import OmegaConf

    from sftlab.config.groups import CONF
    from sftlab.config.overrides import inside, quote

    OmegaConf.register_new_resolver("inside", inside, replace=True)
    overrides = [quote(text, multirun=False) for text in (*typed, f"run_dir={folder}", "tracker=none")]
    with initialize_config_dir(str(CONF.absolute()), version_base="1.3"):
        config: Any = OmegaConf.to_container(compose("train", overrides), resolve=True)
    folder.mkdir(parents=True)
    made = build(config, here, folder, Claim(), StopSignal(here, ""))
    try:
        yield made
    finally:
        made.trainer.checkpoints.close()
        made.trainer.console.close()
        made.trainer.metrics.close()


def synchronise() -> None:
    """Wait for the device, if there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()

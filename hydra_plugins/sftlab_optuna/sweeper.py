"""The Hydra side of `sweeper=optuna`: hands the command line to the search in sftlab.sweeps.search.

Hydra accepts sweepers from this namespace only, and imports this file for every command, so nothing heavy is imported
at its top.
"""

from dataclasses import dataclass
from typing import Any

from hydra.core.config_store import ConfigStore
from hydra.plugins.sweeper import Sweeper


@dataclass
class SftlabOptunaConf:
    """Hydra's config node for this sweeper, whose options are in the `sweeper` group."""

    _target_: str = "hydra_plugins.sftlab_optuna.sweeper.OptunaSweeper"


ConfigStore.instance().store(group="hydra/sweeper", name="sftlab_optuna", node=SftlabOptunaConf, provider="sftlab")


class OptunaSweeper(Sweeper):
    """Searches instead of trying every combination."""

    def setup(self, *, hydra_context: Any, task_function: Any, config: Any) -> None:
        """Remember the sweep's config and what composes its points."""
        self.config = config
        self.loader = hydra_context.config_loader

    def sweep(self, arguments: list[str]) -> float:
        """Run the search and return the best score."""
        from hydra_plugins.sftlab_optuna._search import search

        assert self.config is not None
        return search(self.config, self.loader, arguments)

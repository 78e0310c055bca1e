"""The Hydra side of the launchers: compose every point, check it, and hand all of them to sftlab.launchers.

Hydra accepts launchers from this namespace only. No `from __future__ import annotations` here: Hydra's plugin scan runs
this file outside of sys.modules, where a dataclass would not find its own module.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from hydra.core.config_store import ConfigStore
from hydra.core.utils import JobReturn
from hydra.plugins.launcher import Launcher


@dataclass
class SftlabLauncherConf:
    """Hydra's config node for this launcher, whose options are in the `launcher` group."""

    _target_: str = "hydra_plugins.sftlab_launcher.launcher.SftlabLauncher"


ConfigStore.instance().store(group="hydra/launcher", name="sftlab", node=SftlabLauncherConf, provider="sftlab")


class SftlabLauncher(Launcher):
    """Submits points to `launcher._target_`."""

    def setup(self, *, hydra_context: Any, task_function: Any, config: Any) -> None:
        """Remember the sweep, and make Hydra compose points with the faster Composer, in its own validation too."""
        from hydra_plugins.sftlab_launcher._compose import Composer

        self.config = config
        self.compose = Composer(hydra_context.config_loader)
        hydra_context.config_loader.load_sweep_config = self.compose

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        """Launch the points, and wait for them if `launcher.wait`; reading a failed point's return value raises."""
        from hydra_plugins.sftlab_launcher._compose import launch

        return launch(self.config, self.compose, job_overrides, initial_job_idx)

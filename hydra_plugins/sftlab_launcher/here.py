"""Hydra's own launcher, which runs the points of a sweep in this process one by one, once all of them are checked."""

from collections.abc import Sequence
from dataclasses import dataclass

from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.core_plugins.basic_launcher import BasicLauncher
from hydra.core.config_store import ConfigStore
from hydra.core.utils import JobReturn


@dataclass
class HereConf:
    """Hydra's config node for this launcher; it has no options."""

    _target_: str = "hydra_plugins.sftlab_launcher.here.Here"


ConfigStore.instance().store(group="hydra/launcher", name="sftlab_here", node=HereConf, provider="sftlab")


class Here(BasicLauncher):
    """Runs no point of a sweep that has a wrong one."""

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        """Check every point of `train`, then run them."""
        assert self.config is not None and self.hydra_context is not None
        loader = self.hydra_context.config_loader
        if self.config.hydra.job.config_name == "train" and isinstance(loader, ConfigLoaderImpl):
            from hydra_plugins.sftlab_launcher._compose import Composer, checked_points

            checked_points(self.config, Composer(loader), job_overrides, initial_job_idx)
        return super().launch(job_overrides, initial_job_idx)

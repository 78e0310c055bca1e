"""The Hydra side of options from other packages: it appends their config folders to sftlab's own.

A package names its folder in an entry point: [project.entry-points."sftlab.options"] mine = "my_package.conf"
"""

from hydra.core.config_search_path import ConfigSearchPath
from hydra.plugins.search_path_plugin import SearchPathPlugin

from sftlab.config.groups import installed


class SftlabOptions(SearchPathPlugin):
    """Adds the folder of every installed package that offers options."""

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        """Append the folders; sftlab's own options come first, so that none can be replaced by accident."""
        for name, folder in installed().items():
            search_path.append(provider=f"sftlab.options:{name}", path=f"file://{folder}")

"""What a launcher is: it starts the points of a sweep, says which of them are alive, and stops them. Knows no Hydra.

A point is a run directory with the config that will run. `launcher._target_` may name a class of anyone's package: the
grid and the search use nothing but the methods below.
"""

import importlib
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from sftlab.common.files import make_folder


class LaunchError(ValueError):
    """A submission that was refused; nothing of it is queued."""


@dataclass(frozen=True)
class Points:
    """The points that a launcher is given.

    `run_dirs` are their directories by number, `code` the copy of the code that they run, `cwd` the working directory
    against which paths in their configs are meant. Logs of ranks go to `sweep_dir/.submitit` (see `job_folder`).
    """

    sweep_dir: Path
    name: str
    cwd: str
    code: Path
    run_dirs: Mapping[int, Path]

    @property
    def imports(self) -> list[str]:
        """The folders that points import from: the copy of the code, and the working directory if the user is in it.

        A record that somebody else wrote may name any folder as `cwd`, and Python runs a sitecustomize.py at its start.
        """
        here = Path.cwd()
        return [str(self.code), *([str(here)] if self.cwd and Path(self.cwd).absolute() == here else [])]

    def job_folder(self) -> Path:
        """Return `.submitit` in the sweep, which only its owner may read and write. Jobs and process ids lie in it.

        Raises: LaunchError if it is a link or somebody else's.
        """
        folder = make_folder(self.sweep_dir, ".submitit")
        if folder.stat().st_uid != os.getuid():
            raise LaunchError(f"{folder} belongs to another user: jobs in it could be replaced")
        folder.chmod(0o700)
        return folder

    def only(self, nums: "list[int]") -> "Points":
        """Return some of the points."""
        return replace(self, run_dirs={num: self.run_dirs[num] for num in nums})


class Launcher(Protocol):
    """What `launcher._target_` constructs. `job_id` is None for a point that has no job, only processes here."""

    dry_run: bool
    wait: bool  # whether the command waits until the points have ended
    late_s: float  # a shared file system may show the last files of a point so much later than its end

    @property
    def at_once(self) -> int | None:
        """How many points may be started at the same time; None where a queue decides."""

    def start(self, points: Points) -> dict[int, str | None]:
        """Start all these points without waiting for them; return the job id of each."""

    def alive(self, run_dir: Path, job_id: str | None) -> bool:
        """Return whether a point waits or runs; also one that another process started."""

    def stop(self, run_dir: Path, job_id: str | None) -> None:
        """Ask a point to save and end."""

    def interrupted(self) -> str:
        """Do what Ctrl-C on the command means to points that run; return in words what was done."""

    def script(self, points: Points) -> str:
        """Return what `start` would run, as text."""


def make_launcher(options: Mapping[str, Any]) -> Launcher:
    """Return the launcher that options describe: `_target_` and its constructor's arguments."""
    module, _, name = str(options["_target_"]).rpartition(".")
    arguments = {key: value for key, value in options.items() if key != "_target_"}
    made: Launcher = getattr(importlib.import_module(module), name)(**arguments)
    return made

"""Launchers: from composed points of a sweep to processes, on SLURM or on this machine. Knows no Hydra.

A sweep's directory is the only interface: `sweep.json` lists the points and how they were launched, `<num>/` is a
point's run directory with the config that will run, `code/` the code that will run it, `.submitit/` every rank's log.
"""

import importlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from sftlab.launchers.snapshot import snapshot
from sftlab.sweeps.record import Sweep


class LaunchError(ValueError):
    """A submission that was refused; nothing of it is queued."""


class Launcher(Protocol):
    """What `launcher._target_` names: options as attributes, and these."""

    dry_run: bool

    def submit(self, sweep: Sweep, nums: Sequence[int], code: Path) -> dict[int, str | None]:
        """Start the points of these numbers with that code; return their job ids, None for one that ran here."""

    def script(self, sweep: Sweep, nums: Sequence[int], code: Path) -> str:
        """Return what `submit` would run, as text."""


def launcher(options: Mapping[str, Any]) -> Launcher:
    """Return the launcher that options describe: `_target_` and its constructor's arguments."""
    module, _, name = str(options["_target_"]).rpartition(".")
    arguments = {key: value for key, value in options.items() if key != "_target_"}
    made: Launcher = getattr(importlib.import_module(module), name)(**arguments)
    return made


def submit(
    points: Sequence[Mapping[str, Any]], options: Mapping[str, Any], sweep_dir: Path
) -> Sequence[Mapping[str, Any]]:
    """Launch points that lie in `sweep_dir`, again or for the first time; return them as sweep.json now has them.

    The code that runs is a copy of this one, made now: a retry after a mended bug runs the mended code. A point's
    directory is kept, so that one with a checkpoint goes on from it.
    """
    sweep = Sweep.read(sweep_dir)
    nums = [int(point["num"]) for point in points]
    code = snapshot(sweep_dir, [sweep.config(num) for num in nums], Path(sweep.cwd))
    job_ids = launcher(options).submit(sweep, nums, code)
    sweep = Sweep.read(sweep_dir).launched(options, job_ids)
    sweep.write()
    return [point for point in sweep.points if point["num"] in job_ids]

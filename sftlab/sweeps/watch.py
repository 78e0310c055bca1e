"""A look at a sweep as it is now, and the one loop that looks until its points have ended.

Looking is all that happens here: the jobs know nothing of it, so Ctrl-C, a lost connection or a killed terminal change
nothing in them.
"""

import time
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.live import Live

from sftlab.common import squeue
from sftlab.sweeps import tables
from sftlab.sweeps.points import UNFINISHED
from sftlab.sweeps.record import Sweep

METRIC = "val/loss"
POLL_S = 2.0
LATE_S = 10.0


def look(sweep_dir: Path, nums: Sequence[int] | None = None, planned: Sequence[Sequence[str]] = ()) -> Sweep:
    """Return a sweep, or some of its points, as they are now.

    `planned` are the overrides of the points where no sweep.json lists them.
    Raises: NoSlurm if points are jobs and SLURM does not answer.
    """
    sweep = Sweep.read(sweep_dir)
    wanted = [e for e in sweep.entries if nums is None or e["num"] in nums]
    ids = [e["job_id"] for e in wanted if e.get("job_id") and e["job_id"].split("_")[0].isdecimal()]
    found = sweep.observed(squeue.states(ids), () if sweep.entries else planned)
    return found if nums is None else found.only(nums)


def watch(
    sweep_dir: Path,
    console: Console,
    metric: str = METRIC,
    nums: Sequence[int] | None = None,
    planned: Sequence[Sequence[str]] = (),
    fail_fast: bool = False,
) -> Sweep:
    """Return the sweep once its points have ended. Show the table meanwhile, or print changes without a terminal.

    With `fail_fast` the jobs of the others are cancelled once a point has failed.
    """
    silent: dict[int, int] = {}
    with Shown(console, metric) as shown:
        while True:
            try:
                found = look(sweep_dir, nums, planned)
            except squeue.NoSlurm as error:  # a controller that restarts is away for minutes; the jobs carry on
                shown.live.update(str(error), refresh=True)
                time.sleep(5 * POLL_S)
                continue
            shown.show(found)
            if fail_fast and any(p.state in UNFINISHED and p.state != "stopped" for p in found.points):
                squeue.cancel([p.job_id for p in found.points if p.job_id and not p.ended])
                fail_fast = False
            silent = {p.num: silent.get(p.num, 0) + 1 for p in found.points if p.state == "silent"}
            if all(
                silent.get(p.num, squeue.FORGOTTEN_POLLS) >= squeue.FORGOTTEN_POLLS and p.ended for p in found.points
            ):
                break
            time.sleep(POLL_S)
    # SLURM calls a job COMPLETED, but a shared file system may show its summary a little later.
    deadline_s = time.monotonic() + LATE_S
    while any(p.state == "failed" and not p.error for p in found.points) and time.monotonic() < deadline_s:
        time.sleep(0.5)
        found = look(sweep_dir, nums, planned)
    return found


class Shown:
    """The points of a sweep on a console: a live table on a terminal, elsewhere a line for each change of a state."""

    def __init__(self, console: Console, metric: str = METRIC) -> None:
        self.console = console
        self.metric = metric
        self.live = Live(console=console, auto_refresh=False, transient=True)
        self.states: dict[int, str] = {}
        self.looked_s = -POLL_S

    def __enter__(self) -> "Shown":
        self.live.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.live.stop()

    def show(self, found: Sweep) -> None:
        """Show the sweep as it is now."""
        if self.console.is_terminal:
            self.live.update(tables.status(found, self.metric), refresh=True)
            return
        for p in found.points:
            if self.states.get(p.num) != p.state:
                self.states[p.num] = p.state
                self.console.print(f"point {p.num}  {p.state}")

    def look(self, sweep_dir: Path, nums: Sequence[int]) -> None:
        """Look at the sweep, unless the last look was less than POLL_S seconds ago."""
        if time.monotonic() - self.looked_s >= POLL_S:
            self.show(look(sweep_dir, nums))
            self.looked_s = time.monotonic()


def failures(found: Sweep) -> str:
    """Return what to show of the points that did not finish: how many, which, why, where to look, what to type."""
    failed = sum(p.state != "finished" for p in found.points)
    return "\n".join([f"{failed} of {len(found.points)} points did not finish", *tables.failures(found)])


def come_back(sweep_dir: Path) -> str:
    """Return the command that shows a sweep again."""
    return f"python -m sftlab.sweep dir={sweep_dir}"

"""Waiting for a sweep: its table on the terminal until every point has ended, and what to say of those that failed.

Watching is all that happens here: the jobs know nothing of it, so Ctrl-C, a lost connection or a killed terminal change
nothing in them.
"""

import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from pathlib import Path

from rich.console import Console
from rich.live import Live

from sftlab.launchers import squeue
from sftlab.sweeps import points, tables

METRIC = "val/loss"
POLL_S = 2.0
LATE_S = 10.0
FORGOTTEN_POLLS = 5  # so many times out of SLURM's sight in a row, and it will not remember


def look(sweep_dir: Path, nums: Collection[int]) -> points.Sweep:
    """Return some points of a sweep as they are now. Raises: NoSlurm if they are jobs and SLURM does not answer."""
    record = points.read_record(sweep_dir)
    entries = [p for p in record["points"] if p["num"] in nums]
    states = squeue.states(p["job_id"] for p in entries if p["job_id"])
    found = points.read(sweep_dir, {**record, "points": entries}, states)
    return replace(found, points=[p for p in found.points if p.num in nums])


def wait(sweep_dir: Path, nums: Collection[int], console: Console) -> points.Sweep:
    """Return once all these points have ended, showing them meanwhile: a table on a terminal, a line a change else."""
    shown: dict[int, str] = {}
    silent: dict[int, int] = {}
    with Live(console=console, auto_refresh=False, transient=True) as live:
        while True:
            try:
                found = look(sweep_dir, nums)
            except squeue.NoSlurm as error:  # a controller that restarts is away for minutes; the jobs go on
                live.update(str(error), refresh=True)
                time.sleep(5 * POLL_S)
                continue
            if console.is_terminal:
                live.update(tables.status(found, METRIC), refresh=True)
            else:
                say_changes(found.points, shown, console.print)
            silent = {p.num: silent.get(p.num, 0) + 1 for p in found.points if p.state == "silent"}
            if all(silent.get(p.num, FORGOTTEN_POLLS) >= FORGOTTEN_POLLS and tables.ended(p) for p in found.points):
                break
            time.sleep(POLL_S)
    # a job that SLURM calls COMPLETED has left a summary: a shared file system may show it a little later
    deadline_s = time.monotonic() + LATE_S
    while any(p.state == "failed" and not p.error for p in found.points) and time.monotonic() < deadline_s:
        time.sleep(0.5)
        found = look(sweep_dir, nums)
    console.print(tables.status(found, METRIC))
    return found


def say_changes(found: Sequence[points.Point], shown: dict[int, str], say: Callable[[str], None]) -> None:
    """Say every point's state that is not the one said last."""
    for p in found:
        if shown.get(p.num) != p.state:
            shown[p.num] = p.state
            say(f"point {p.num}  {p.state}")


def failures(found: points.Sweep) -> str:
    """Return what to show of the points that did not finish: how many, which, why, where to look, what to type."""
    failed = sum(p.state != "finished" for p in found.points)
    return "\n".join([f"{failed} of {len(found.points)} points did not finish", *tables.failures(found)])


def come_back(sweep_dir: Path) -> str:
    """Return the command that shows a sweep again."""
    return f"python -m sftlab.sweep dir={sweep_dir}"

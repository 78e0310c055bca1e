"""After a sweep was launched: cancel its jobs, or run the points again that did not finish."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from sftlab.common import owner, squeue
from sftlab.common.files import refuse_links, remove
from sftlab.common.run_directory import CONFIG, read_config, reserve
from sftlab.common.words import plain
from sftlab.config.errors import complain, explain
from sftlab.config.grid import compose_point
from sftlab.config.trust import Untrusted, refuse_code, refuse_launcher
from sftlab.sweeps.death import cause
from sftlab.sweeps.launch import launch
from sftlab.sweeps.points import UNFINISHED, Point
from sftlab.sweeps.record import FILE, Sweep


def cancel(found: Sweep, console: Console) -> None:
    """Cancel every job of the sweep that waits or runs. A record that somebody else wrote may name any job of yours."""
    folder = found.folder.resolve() / ".submitit"  # itself no link: it could lead to the jobs of another sweep
    # only what SLURM gives out: scancel would take an id such as `--user=ada` for an option
    ids = [p.job_id for p in found.points if p.job_id and re.fullmatch(r"\d+(_\d+)?", p.job_id) and not p.ended]
    others = {job: asked.script for job, asked in squeue.states(ids).items() if is_other(asked.script, folder)}
    for job, script in others.items():
        console.print(f"job {job} is not of this sweep, so it is left alone: it runs {plain(script)}", markup=False)
    ids = [job for job in ids if job not in others]
    squeue.cancel(ids)
    here = [p for p in found.points if not p.job_id and not p.ended]
    console.print(f"{len(ids)} jobs cancelled")
    if here:
        console.print(f"{len(here)} points run in a process without a job: end that with Ctrl-C where it was started")


def is_other(script: str, folder: Path) -> bool:
    """Return whether a job runs a script that lies elsewhere, as far as SLURM says what it runs."""
    return bool(script) and not Path(script).parent.resolve().is_relative_to(folder)


def retry(found: Sweep, console: Console, which: str = "failed", trust: bool = False) -> list[int]:
    """Run the points again that did not finish, by the launcher they had; return their numbers.

    `which` is failed (all of them, each from its newest checkpoint), stopped (only those that did not end by an error
    of their own: stopped, out of time, preempted, a lost node) or fresh (all of them from step 0; what they had is kept
    beside the sweep's points, in <num>.before).

    Raises: ValueError for a search, which has learned from its failed trials; Untrusted if a point or the launcher
    names code of its own and `trust` is not set. Nothing is started then.
    """
    if found.is_search:
        raise ValueError(
            f"{found.folder} is a search, which has learned from its failed trials. To continue it, repeat its command "
            f"with hydra.sweep.dir={found.folder}, with a greater sweeper.num_trials for more"
        )
    unfinished = []
    for p in (p for p in found.points if p.state in UNFINISHED and (which != "stopped" or was_stopped(p))):
        alive = owner.living(p.folder)
        if alive is None:
            unfinished.append(p)
        else:
            console.print(f"point {p.num} is not started again: {alive} still runs it", markup=False)
    console.print(f"{len(unfinished)} of {len(found.points)} points did not finish" + (": again" if unfinished else ""))
    configs = {p.num: config_of(p, trust) for p in unfinished}
    if which == "fresh":
        for p in unfinished:
            begin_again(p, configs[p.num])
    if unfinished and "_target_" in found.launcher:
        refuse_launcher(found.launcher, str(found.folder / FILE), trust)
        launch(found, [p.num for p in unfinished], found.launcher)
    elif unfinished:
        run_here(unfinished, configs, console)
    return [p.num for p in unfinished]


def was_stopped(p: Point) -> bool:
    """Return whether a point ended for a reason that is not its own."""
    return cause(p.state, p.error) in ("stopped", "timeout", "preempted", "node")


def begin_again(p: Point, config: Mapping[str, Any]) -> None:
    """Put the directory of a point aside, and write a new one with the same config."""
    if p.folder.exists():
        aside = p.folder.with_name(f"{p.folder.name}.before")
        remove(aside)
        p.folder.rename(aside)
    reserve(p.folder, config, p.overrides)


def config_of(point: Point, trust: bool) -> dict[str, Any]:
    """Return the config of a point: as it was written, else composed from its overrides. Raises: Untrusted."""
    refuse_links(point.folder.parent, point.folder.name)
    source = point.folder / CONFIG
    if source.is_file():
        config = read_config(point.folder)
    else:
        looked_up = [override for override in point.overrides if re.search(r"\$\\*\{", override)]
        if looked_up and not trust:
            raise Untrusted(
                f"point {point.num} has no {CONFIG}, and its override {looked_up[0]} would be looked up on this "
                "machine. trust=true allows it"
            )
        config = compose_point(point.overrides, point.folder)
    refuse_code({k: v for k, v in config.items() if k not in ("launcher", "sweeper")}, str(source), trust)
    return config


def run_here(unfinished: Sequence[Point], configs: Mapping[int, dict[str, Any]], console: Console) -> None:
    """Run points in this process, one after another; one that fails does not keep the others from running."""
    from sftlab.training.run import run

    for p in unfinished:
        console.print(f"point {p.num}: {' '.join(p.overrides)}", markup=False)
        try:
            run({**configs[p.num], "run_dir": str(p.folder)}, p.overrides)
        except Exception as error:
            complain(f"point {p.num}: {explain(error, 'train')}")

"""After a sweep was launched: cancel its jobs, or run the points again that did not finish."""

from collections.abc import Sequence

from rich.console import Console

from sftlab.common.files import read_yaml
from sftlab.common.run_directory import CONFIG
from sftlab.config.errors import complain, explain
from sftlab.config.grid import compose_point
from sftlab.launchers import squeue
from sftlab.sweeps.launch import launch
from sftlab.sweeps.points import UNFINISHED, Point
from sftlab.sweeps.record import Sweep


def cancel(found: Sweep, console: Console) -> None:
    """Cancel every job that waits or runs."""
    ids = [p.job_id for p in found.points if p.job_id and not p.ended]
    squeue.cancel(ids)
    here = [p for p in found.points if not p.job_id and not p.ended]
    console.print(f"{len(ids)} jobs cancelled")
    if here:
        console.print(f"{len(here)} points run in a process without a job: end that with Ctrl-C where it was started")


def retry(found: Sweep, console: Console) -> list[int]:
    """Run the points again that did not finish, by the launcher they had; return their numbers.

    Raises: ValueError for a search, which has learned from its failed trials.
    """
    if found.is_search:
        raise ValueError(
            f"{found.folder} is a search, which has learned from its failed trials. To continue it, repeat its command "
            f"with hydra.sweep.dir={found.folder}, with a greater sweeper.num_trials for more"
        )
    unfinished = [p for p in found.points if p.state in UNFINISHED]
    console.print(f"{len(unfinished)} of {len(found.points)} points did not finish" + (": again" if unfinished else ""))
    if unfinished and "_target_" in found.launcher:
        launch(found, [p.num for p in unfinished], found.launcher)
    elif unfinished:
        run_here(unfinished, console)
    return [p.num for p in unfinished]


def run_here(unfinished: Sequence[Point], console: Console) -> None:
    """Run points in this process, one after another; one that fails does not keep the others from running."""
    from sftlab.training.run import run

    for p in unfinished:
        console.print(f"point {p.num}: {' '.join(p.overrides)}", markup=False)
        config = read_yaml(p.folder / CONFIG) or compose_point(p.overrides, p.folder)
        try:
            run(config, p.overrides)
        except Exception as error:
            complain(f"point {p.num}: {explain(error, 'train')}")

"""Starting points of a sweep: copy the code, call the launcher that was chosen, record what it started."""

import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sftlab.common import run_directory
from sftlab.launchers.launcher import Launcher, make_launcher
from sftlab.launchers.snapshot import snapshot
from sftlab.sweeps.record import Sweep

POLL_S = 0.05


def launch(
    sweep: Sweep, nums: Sequence[int], options: Mapping[str, Any], show: Callable[[], None] = lambda: None
) -> Sweep:
    """Start points whose directories are written, again or for the first time; return the sweep with their jobs.

    If the launcher runs a few points at a time, this returns when all have ended, and calls `show` meanwhile. A point
    that fails does not keep the others from running, unless the options have `fail_fast`: then no more are started, and
    those that run save and stop. The code that runs is a copy of this one, made now: a retry after a mended bug runs
    the mended code. The directory of a point is kept, so that one with a checkpoint resumes from it.
    """
    code = snapshot(sweep.folder, [sweep.config(num) for num in nums], Path(sweep.cwd))
    launcher = make_launcher(options)
    waiting, running = list(nums), list[int]()
    with interrupted_in_good_order(launcher):
        while waiting or running:
            free = len(waiting) if launcher.at_once is None else launcher.at_once - len(running)
            begun, waiting = waiting[:free], waiting[free:]
            if begun:
                sweep = sweep.with_jobs(options, launcher.start(sweep.to_run(begun, code)))
                sweep.write()
            if launcher.at_once is None:
                break
            running += begun
            time.sleep(POLL_S)
            living = [num for num in running if launcher.alive(sweep.run_dir(num), sweep.job_id(num))]
            if options.get("fail_fast") and any(failed(sweep.run_dir(num)) for num in set(running) - set(living)):
                waiting = []
                for num in living:
                    launcher.stop(sweep.run_dir(num), sweep.job_id(num))
            running = living
            show()
    return sweep


def failed(run_dir: Path) -> bool:
    """Return whether a point has ended with an error of its own."""
    return run_directory.read_summary(run_dir).get("status") == "failed"


@contextmanager
def interrupted_in_good_order(launcher: Launcher) -> Iterator[None]:
    """Let the launcher end what it started if this process is interrupted.

    By default SIGTERM and SIGHUP would end this process at once, and leave the points behind, training.
    """
    numbers = [n for n in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(n) != signal.SIG_IGN]  # SIGHUP: nohup
    before = {number: signal.signal(number, lambda got, _: sys.exit(128 + got)) for number in numbers}
    try:
        yield
    except BaseException:
        launcher.interrupted()
        raise
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)

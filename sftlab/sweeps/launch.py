"""Starting points of a sweep: copy the code, call the launcher that was chosen, record what it started."""

import signal
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sftlab.launchers.launcher import Launcher, make_launcher
from sftlab.launchers.snapshot import snapshot
from sftlab.sweeps.record import Sweep

POLL_S = 0.05


def launch(sweep: Sweep, nums: Sequence[int], options: Mapping[str, Any]) -> Sweep:
    """Start points whose directories are written, again or for the first time; return the sweep with their jobs.

    If the launcher runs a few points at a time, this returns when all have ended. A point that fails does not keep the
    others from running. The code that runs is a copy of this one, made now: a retry after a mended bug runs the mended
    code. The directory of a point is kept, so that one with a checkpoint resumes from it.
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
            running = [num for num in running if launcher.alive(sweep.run_dir(num), sweep.job_id(num))]
    return sweep


@contextmanager
def interrupted_in_good_order(launcher: Launcher) -> Iterator[None]:
    """Let the launcher end what it started if this process is interrupted.

    By default SIGTERM would end this process at once, and leave the points behind, training.
    """
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        yield
    except BaseException:
        launcher.interrupted()
        raise
    finally:
        signal.signal(signal.SIGTERM, before)

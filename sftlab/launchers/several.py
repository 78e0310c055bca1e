"""One run in several processes on this machine, one per device, without torchrun: `launcher=local` without a sweep.

The run lies where a run belongs, in `run_dir`; the output of its other ranks is in `ranks/` there.
"""

import signal
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sftlab.common import run_directory
from sftlab.launchers.launcher import make_launcher
from sftlab.launchers.local import Local, Processes

POLL_S = 0.05
LOGS = "ranks"


def run_in_processes(config: Mapping[str, Any], overrides: Sequence[str]) -> float:
    """Return the score of a run whose ranks are processes here. Exits as they do: 1 if a rank failed.

    Raises: RunDirError if the directory is taken.
    """
    launcher = make_launcher(config["launcher"])
    assert isinstance(launcher, Local)
    run_dir = Path(config["run_dir"])
    run_directory.reserve(run_dir, {**config, "launcher": {}}, overrides)
    code = str(Path(run_directory.__file__).parents[2])
    started = launcher.ranks(run_dir, run_dir / LOGS, "run", [code, str(Path.cwd())], str(Path.cwd()))
    interrupted = wait(started)
    if started.first_failed is not None:
        rank, code_of_rank = started.first_failed
        summary = run_directory.read_summary(run_dir)
        if summary.get("status") == "stopped" or interrupted:
            sys.exit(130 if interrupted else code_of_rank)
        if rank:
            error = run_dir / LOGS / f"run_{rank}_log.err"
            raise ValueError(f"rank {rank} failed: {summary.get('error', 'it ended without a word')}; see {error}")
        sys.exit(code_of_rank if code_of_rank > 0 else 128 - code_of_rank)  # rank 0 has said why, on this terminal
    return float(run_directory.read_summary(run_dir).get("score", float("nan")))


def wait(started: Processes) -> bool:
    """Wait until all ranks have ended; return whether Ctrl-C or a signal ended them. They save first; twice kills."""
    before = {n: signal.signal(n, lambda got, _: sys.exit(128 + got)) for n in (signal.SIGTERM, signal.SIGHUP)}
    interrupted = False
    try:
        while True:
            try:
                while not started.ended():
                    time.sleep(POLL_S)
                return interrupted
            except (KeyboardInterrupt, SystemExit):
                number = signal.SIGKILL if interrupted else signal.SIGTERM
                for process in started.running:
                    if process.poll() is None:
                        process.send_signal(number)
                interrupted = True
    finally:
        for n, handler in before.items():
            signal.signal(n, handler)

"""The Python interface to sweeps: run one, or read one, and get its points ranked."""

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sftlab.config.composing import start_time
from sftlab.config.grid import planned
from sftlab.sweeps.ranking import ranked
from sftlab.sweeps.record import FILE
from sftlab.sweeps.watch import METRIC, look


def sweep(
    *overrides: str, dir: str | Path | None = None, metric: str = METRIC, score: str = "last"
) -> list[dict[str, Any]]:
    """Return the points of a sweep, best first: num, state, run_dir, score and what differs between the points.

    With overrides (`"optim.lr=1e-4,3e-4"`, `"seed=0,1"`) the sweep is run first, its points one after the other on this
    machine unless a launcher is named; what they print is printed. Without, `dir` is read as it is now.
    Raises: ValueError if nothing could be started, or if `dir` is no sweep's.
    """
    folder = Path(dir or Path("sweeps", "notebook", start_time()))
    if overrides:
        start(folder, overrides)
    listed = [] if (folder / FILE).is_file() else planned(folder)
    found = look(folder, planned=listed)
    return [
        {
            "num": point.num,
            "state": point.state,
            "run_dir": str(point.folder),
            metric: point.value(metric, score) if point.state == "finished" else None,
            **{name: point.settings[name] for name in found.swept if name in point.settings},
        }
        for group in ranked(found, metric, score)
        for point in group.points
    ]


def start(folder: Path, overrides: Sequence[str]) -> None:
    """Run a sweep as the command line does, in a process of its own: a notebook's kernel cannot run it."""
    command = [sys.executable, "-m", "sftlab.train", "-m", f"hydra.sweep.dir={folder}", *overrides]
    said = ""
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            print(line, end="", flush=True)
            said = (said + line)[-2000:]
    if process.returncode and not folder.is_dir():
        raise ValueError(f"the sweep did not start: {said.strip()}")

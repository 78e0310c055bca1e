"""Trials of a search as processes: started without waiting, watched, stopped, and found again by another driver.

On this machine by the local launcher's own processes, or on SLURM; one that is stopped gets SIGTERM, saves and ends.
"""

import json
import os
import signal
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from sftlab import launchers
from sftlab.launchers import squeue
from sftlab.launchers.local import Local, Processes
from sftlab.sweeps.record import Sweep

PATIENCE_S = 120.0  # from asking a trial to stop to ending it
POLL_S = 2.0
FORGOTTEN_POLLS = 5  # so many times UNKNOWN in a row, and SLURM will not remember


class Trials(Protocol):
    """What a search asks of where its trials run."""

    late_s: float  # how much later than its end a trial's last files may show

    def start(self, num: int) -> None:
        """Start the point `num`, whose directory is written."""

    def alive(self, num: int) -> bool:
        """Return whether it waits or runs; also one that an earlier driver started."""

    def stop(self, num: int) -> None:
        """Ask it to save and end."""

    def interrupted(self) -> str:
        """Do what Ctrl-C on the driver means to trials that run; return it in words."""


class LocalTrials:
    """Processes on this machine. They outlive a killed driver; their ids lie beside their logs."""

    late_s = 0.0

    def __init__(self, sweep_dir: Path, local: Local, code: Path) -> None:
        self.sweep_dir = sweep_dir
        self.local = local
        self.code = code
        self.mine: dict[int, tuple[int, Processes]] = {}
        self.asked_s: dict[int, float] = {}

    def start(self, num: int) -> None:
        """Start the point's processes in the lowest free slot."""
        taken = {slot for slot, _ in self.mine.values()}
        slot = next(i for i in range(len(taken) + 1) if i not in taken)
        started = self.local.start(Sweep.read(self.sweep_dir), num, slot, self.code)
        self.mine[num] = (slot, started)
        ids = [[process.pid, birth(process.pid)] for process in started.running]
        self._file(num).write_text(json.dumps({"host": os.uname().nodename, "processes": ids}))

    def alive(self, num: int) -> bool:
        """Return whether any of its processes is there; ends one that was asked to and does not."""
        asked_s = self.asked_s.get(num)
        if asked_s is not None and time.monotonic() - asked_s > PATIENCE_S:
            self._signal(num, signal.SIGKILL)
        if num in self.mine:
            if self.mine[num][1].ended():
                del self.mine[num]
                return False
            return True
        return bool(self._ids(num))

    def stop(self, num: int) -> None:
        """Send SIGTERM to its processes."""
        self.asked_s[num] = time.monotonic()
        self._signal(num, signal.SIGTERM)

    def interrupted(self) -> str:
        """Let the trials save and end: the terminal that ran them is given back."""
        for num in self.mine:
            self.stop(num)
        deadline_s = time.monotonic() + PATIENCE_S
        while any(self.alive(num) for num in list(self.mine)) and time.monotonic() < deadline_s:
            time.sleep(0.1)
        return "the trials that ran have saved and stopped"

    def _signal(self, num: int, number: signal.Signals) -> None:
        for pid in self._ids(num):
            os.kill(pid, number)

    def _ids(self, num: int) -> list[int]:
        """Return the ids of its processes that are still those that were started."""
        try:
            noted = json.loads(self._file(num).read_text())
        except (OSError, ValueError):
            return []
        if noted["host"] != os.uname().nodename:
            return []
        return [pid for pid, born in noted["processes"] if born and birth(pid) == born]

    def _file(self, num: int) -> Path:
        return self.sweep_dir / ".submitit" / f"local_{num}" / "processes.json"


def birth(pid: int) -> str:
    """Return when a process began, in the kernel's ticks; nothing for one that is gone or a zombie. Linux only."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return ""
    return "" if fields[0] == "Z" else fields[19]


class SlurmTrials:
    """A job for each trial. They go on whatever happens to the driver; their ids lie in sweep.json."""

    late_s = 10.0

    def __init__(self, sweep_dir: Path, options: Mapping[str, Any]) -> None:
        self.sweep_dir = sweep_dir
        self.options = options
        self.states: dict[str, squeue.Job] = {}
        self.asked_s = -POLL_S
        self.unknown: dict[str, int] = {}

    def start(self, num: int) -> None:
        """Queue the point."""
        launchers.submit([{"num": num}], self.options, self.sweep_dir)
        self.asked_s = -POLL_S

    def alive(self, num: int) -> bool:
        """Return whether its job waits or runs; True while SLURM does not answer."""
        ids = {p["num"]: p["job_id"] for p in Sweep.read(self.sweep_dir).points}
        job_id = ids.get(num)
        if job_id is None:
            return False
        if time.monotonic() - self.asked_s >= POLL_S:
            self.asked_s = time.monotonic()
            try:
                self.states = squeue.states(i for i in ids.values() if i)
            except squeue.NoSlurm:  # a controller that restarts is away for minutes; the jobs go on
                return True
            for known, job in self.states.items():
                self.unknown[known] = self.unknown.get(known, 0) + 1 if job.state == squeue.UNKNOWN else 0
        job = self.states.get(job_id, squeue.Job("PENDING"))
        return not job.ended and self.unknown.get(job_id, 0) < FORGOTTEN_POLLS

    def stop(self, num: int) -> None:
        """Cancel its job: SLURM sends SIGTERM first."""
        squeue.cancel(p["job_id"] for p in Sweep.read(self.sweep_dir).points if p["num"] == num and p["job_id"])

    def interrupted(self) -> str:
        """Leave the jobs alone."""
        return "the jobs go on"

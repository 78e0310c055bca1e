"""Processes: which one is which on this machine, and children that end with their parent however it dies.

A killed parent cannot end its children, so each child looks after itself: a forked worker asks the kernel for SIGKILL
(Linux) or watches its parent from a thread (elsewhere), and a rank watches its parent and saves before it ends.
"""

import ctypes
import os
import platform
import signal
import subprocess
import sys
import threading
import time
from functools import cache
from pathlib import Path

WATCH_S = 1.0  # seconds between two looks at the parent
SAVE_S = 120.0  # seconds in which a rank without a parent may save: longer than a step and a checkpoint
PR_SET_PDEATHSIG = 1


def birth(pid: int) -> str:
    """Return when a process began; nothing for one that is gone or a zombie. With the pid it names one process."""
    if sys.platform == "linux":
        try:
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        except OSError:
            return ""
        return "" if fields[0] == "Z" else fields[19]
    done = subprocess.run(["ps", "-o", "stat=,lstart=", "-p", str(pid)], capture_output=True, text=True, check=False)
    state, _, began = done.stdout.strip().partition(" ")
    return "" if state.startswith("Z") else began.strip()


@cache
def machine() -> str:
    """Return what names the place in which a pid means one process: this boot of this machine, and the pid namespace.

    A host name is not enough: containers and laptops share names like localhost.
    """
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return platform.node()


def end_with_parent(number: signal.Signals = signal.SIGKILL, parent: int | None = None) -> None:
    """Send this process a signal when its parent, `parent` if it is still that one, ends."""
    parent = os.getppid() if parent is None else parent
    if sys.platform == "linux" and number == signal.SIGKILL:
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, int(number))
        if os.getppid() != parent:  # it ended before the kernel knew
            os.kill(os.getpid(), number)
        return
    threading.Thread(target=_watch, args=(parent, number), name="parent", daemon=True).start()


def _watch(parent: int, number: signal.Signals) -> None:
    """Send the signal once the parent is another; SIGKILL if that does not end this process."""
    while os.getppid() == parent:
        time.sleep(WATCH_S)
    os.kill(os.getpid(), number)
    time.sleep(SAVE_S)
    os.kill(os.getpid(), signal.SIGKILL)


class _Forks:
    """Makes every process that this one forks end with it, from the first call of `tie` on."""

    def __init__(self) -> None:
        self.parent = 0  # the process that forks; 0 until `tie`

    def tie(self) -> None:
        if not self.parent:
            os.register_at_fork(after_in_child=self._in_child)
        self.parent = os.getpid()

    def _in_child(self) -> None:
        parent, self.parent = self.parent, os.getpid()
        end_with_parent(signal.SIGKILL, parent)


_forks = _Forks()


def tie_forks() -> None:
    """From now on, make every process that this one forks end with it. Programs that it starts are not touched."""
    _forks.tie()

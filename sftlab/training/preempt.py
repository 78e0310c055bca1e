"""Stop on a signal: note it at any moment, agree on it over all ranks at a step boundary, obey it after the save.

Submitit's own handler saves and requeues inside the signal, in the middle of a step and on rank 0 only, where a
collective save deadlocks (https://github.com/facebookresearch/fairchem, train_runner.py). Here that handler is kept and
called after everything is saved. The trainer decides when. Submitit installs its handler before ours.
"""

import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType, TracebackType
from typing import Any, NoReturn

from sftlab.parallel.world import World

STOPPED = os.EX_TEMPFAIL  # 75: saved but not finished, so worth another try
# In rising order: if ranks got different signals, the greatest counts.
# SIGHUP comes from a terminal or a pipe that was closed (common/hangup.py).
CAUSES = (signal.SIGINT, signal.SIGHUP, signal.SIGTERM, signal.SIGUSR2)
SAME_CTRL_C_S = 1.0  # torchrun passes on a Ctrl-C that the terminal may have given to every process already
REQUEUE_WAIT_S = 60.0


class StopSignal:
    """Whether this run was told to stop. `with` installs it on the main thread and restores the handlers after.

    `go_on` is the command that resumes the run, shown to people. Only steps are worth waiting for: a Ctrl-C outside of
    `steps` raises KeyboardInterrupt at once, because nothing would be lost.
    """

    def __init__(self, world: World, go_on: str) -> None:
        self.world = world
        self.go_on = go_on
        self.noted = 0  # by this rank: 1 + the index in CAUSES, 0 for none; written by the handler
        self.agreed_on = 0  # by all ranks, the same
        self.interrupted_s = 0.0
        self.stepping = False
        self.previous: dict[signal.Signals, Any] = {}

    def __enter__(self) -> "StopSignal":
        nohup = signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
        noticed = [cause for cause in CAUSES if not (nohup and cause == signal.SIGHUP)]
        self.previous = {cause: signal.signal(cause, self._note) for cause in noticed}
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        for cause, handler in self.previous.items():
            signal.signal(cause, handler if handler is not None else signal.SIG_DFL)

    def _note(self, number: int, frame: FrameType | None) -> None:
        now_s = time.monotonic()
        if number == signal.SIGINT and not self.stepping:
            if now_s - self.interrupted_s > SAME_CTRL_C_S:
                self.interrupted_s = now_s
                raise KeyboardInterrupt
            return
        if number == signal.SIGINT:
            if self.interrupted_s and now_s - self.interrupted_s > SAME_CTRL_C_S:
                signal.signal(signal.SIGINT, signal.SIG_DFL)
                signal.raise_signal(signal.SIGINT)
            if not self.interrupted_s:
                self.interrupted_s = now_s
                if self.world.is_main:  # print itself may be what was interrupted
                    with suppress(OSError):  # a terminal that is gone
                        os.write(2, b"\nstopping once this step is saved; Ctrl-C again ends at once, without saving\n")
        self.noted = max(self.noted, 1 + CAUSES.index(signal.Signals(number)))

    @contextmanager
    def steps(self) -> Iterator[None]:
        """Let a Ctrl-C wait for the end of a step inside this context."""
        self.stepping = True
        try:
            yield
        finally:
            self.stepping = False

    def agreed(self) -> bool:
        """Return on every rank whether any was told to stop: one small all-reduce on the host, at a step boundary.

        What is agreed never overwrites what is noted: a signal that comes during the all-reduce counts the next time.
        """
        self.agreed_on = self.world.max(self.noted)
        return self.agreed_on > 0

    def interrupted(self) -> bool:
        """Return on every rank whether a Ctrl-C told any to stop, and nothing else did. Collective."""
        return self.agreed() and CAUSES[self.agreed_on - 1] == signal.SIGINT

    def leave(self, say: Callable[[str], None]) -> NoReturn:
        """End this process after everything is saved. Collective; called when `agreed` returns True.

        After SIGUSR2 under Submitit rank 0 calls Submitit's handler, which rewrites the job's pickle, requeues and
        exits, or raises if the job may not run again. The other ranks wait, because a rank that ends first can end the
        job before it is requeued. After Ctrl-C the exit code is 0, else STOPPED.
        """
        cause = CAUSES[self.agreed_on - 1]
        requeue = self.previous.get(signal.SIGUSR2)
        requeues = cause == signal.SIGUSR2 and callable(requeue)
        how = "the job is requeued" if requeues else f"resume with\n  {self.go_on}"
        say(f"stopped by {cause.name}; {how}")
        self.noted = 0  # before the barrier: the requeue ends the other ranks with SIGTERM, which must not get lost
        self.world.barrier()
        if callable(requeue) and requeues and self.world.is_main:
            requeue(signal.SIGUSR2, None)
        elif requeues:
            deadline_s = time.monotonic() + REQUEUE_WAIT_S
            while not self.noted and time.monotonic() < deadline_s:
                time.sleep(0.1)
        sys.exit(0 if cause == signal.SIGINT else STOPPED)


def _deafen() -> None:
    """Make a forked child ignore the signals of its parent's run: SLURM signals every process of a step.

    SIGTERM still ends it: multiprocessing ends its workers that way, and one that ignored it ran for 55 s more.
    """
    for cause in CAUSES:
        if isinstance(getattr(signal.getsignal(cause), "__self__", None), StopSignal):
            signal.signal(cause, signal.SIG_DFL if cause == signal.SIGTERM else signal.SIG_IGN)


os.register_at_fork(after_in_child=_deafen)

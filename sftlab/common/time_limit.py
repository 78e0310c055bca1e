"""A limit of time and memory on Python code that somebody else wrote, such as a chat template; it works in any thread.

A signal would reach the main thread only, and the server renders templates in others.
"""

import ctypes
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

LOOK_S = 0.25
MOST_BYTES = 1 << 30  # by which this process may grow while such code runs for longer than two looks


class _Expired(BaseException):
    """Raised in a thread whose time is over; no handler of ordinary errors catches it."""


class _Watch:
    """One thread that looks at the deadlines of all others."""

    def __init__(self) -> None:
        self.reset()
        os.register_at_fork(after_in_child=self.reset)

    def reset(self) -> None:
        self.lock = threading.Lock()
        self.deadlines_s: dict[int, float] = {}
        self.began_bytes: dict[int, int] = {}  # memory at the first look at a thread
        self.started = False

    def set(self, thread: int, deadline_s: float) -> None:
        with self.lock:
            self.deadlines_s[thread] = deadline_s
            self.began_bytes.pop(thread, None)
            if not self.started:
                threading.Thread(target=self._look, name="time limit", daemon=True).start()
                self.started = True

    def clear(self, thread: int) -> None:
        with self.lock:
            self.deadlines_s.pop(thread, None)

    def _look(self) -> None:
        while True:
            time.sleep(LOOK_S)
            with self.lock:
                now_s, now_bytes = time.monotonic(), resident_bytes() if self.deadlines_s else 0
                for thread, deadline_s in list(self.deadlines_s.items()):
                    grown = now_bytes - self.began_bytes.setdefault(thread, now_bytes)
                    if deadline_s >= now_s and grown <= MOST_BYTES:
                        continue
                    del self.deadlines_s[thread]
                    ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread), ctypes.py_object(_Expired))


def resident_bytes() -> int:
    """Return the memory of this process that is in use; 0 where the system does not say."""
    try:
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return 0


_watch = _Watch()


@contextmanager
def time_limit(limit_s: float, what: str) -> Iterator[None]:
    """Raise TimeoutError in a block that runs for `limit_s` or fills memory. Blocks of one thread do not nest."""
    deadline_s = time.monotonic() + limit_s
    _watch.set(threading.get_ident(), deadline_s)
    try:
        try:
            yield
        finally:
            _watch.clear(threading.get_ident())
    except _Expired:
        if time.monotonic() < deadline_s:
            raise TimeoutError(f"{what} took more than {MOST_BYTES >> 20:,} MiB of memory") from None
        raise TimeoutError(f"{what} took longer than {limit_s:g} s") from None

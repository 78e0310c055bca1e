"""The terminal that goes away: a closed pipe (`| head`) or a closed window is told to the run as SIGHUP, once.

Python would raise BrokenPipeError in the middle of whatever printed last, a training step or a save.
"""

import errno
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from typing import Any, TextIO

GONE = (errno.EPIPE, errno.EIO)


class Outlet:
    """A stream that swallows what is written after its reader has gone, and sends this process SIGHUP when it goes."""

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)

    def write(self, text: str) -> int:
        """Write text; return its length."""
        try:
            self.stream.write(text)
        except OSError as error:
            self._gone(error)
        return len(text)

    def flush(self) -> None:
        """Send what is buffered."""
        try:
            self.stream.flush()
        except OSError as error:
            self._gone(error)

    def _gone(self, error: OSError) -> None:
        if error.errno not in GONE:
            raise error
        silence(self.stream)
        signal.raise_signal(signal.SIGHUP)  # ignored under nohup: the run then carries on in silence


def silence(stream: TextIO) -> None:
    """Let a stream write to nowhere, what it holds in its buffer included."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, stream.fileno())
    finally:
        os.close(nowhere)
    with suppress(OSError):
        stream.flush()


@contextmanager
def hangups() -> Iterator[None]:
    """Watch both streams of this process for as long as the block runs."""
    out: Any = Outlet(sys.stdout)
    error: Any = Outlet(sys.stderr)
    with redirect_stdout(out), redirect_stderr(error):
        try:
            yield
        finally:
            out.flush()  # here and not at the exit of Python, which would complain
            error.flush()

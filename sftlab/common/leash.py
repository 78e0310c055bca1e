"""A program on a leash: it ends, with all that it started, when the process that started it ends, however that ends.

Between the two stands a small process that does nothing but watch: the kernel closes a dead process's end of a pipe on
every system. The program gets a process group of its own, which is ended as a whole.
"""

import os
import signal
import subprocess
import sys
import weakref
from collections.abc import Mapping, Sequence

GRACE_S = 15.0  # seconds between SIGTERM and SIGKILL


def start(command: Sequence[str], env: Mapping[str, str]) -> "subprocess.Popen[bytes]":
    """Start a program on a leash; return the leash. It passes on SIGTERM, and its exit code is the program's."""
    watched, kept = os.pipe()  # nobody writes; our end is closed by our end
    try:
        leash = subprocess.Popen(
            [sys.executable, "-SE", __file__, str(watched), *command], env=dict(env), pass_fds=[watched]
        )
        weakref.finalize(leash, os.close, kept)
        return leash
    finally:
        os.close(watched)


def main(watched: int, command: list[str]) -> int:
    """Run a program until it ends, or until the pipe closes or SIGTERM comes; return its code."""
    import select

    wake, waken = os.pipe()
    os.set_blocking(waken, False)
    signal.set_wakeup_fd(waken)
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGCHLD):
        signal.signal(number, lambda *_: None)
    program = subprocess.Popen(command, start_new_session=True, preexec_fn=_end_with_leash)
    asked = False
    while program.poll() is None:
        ready, _, _ = select.select([wake, watched], [], [], None)
        told = wake in ready and any(n in (signal.SIGTERM, signal.SIGINT) for n in os.read(wake, 64))
        if not asked and (told or watched in ready):
            asked = True
            end(program)
    end(program)  # what it may have left behind
    code = program.returncode
    return 128 - code if code < 0 else code


def _end_with_leash() -> None:
    """Ask the kernel for SIGTERM should the leash itself be killed (Linux)."""
    if sys.platform == "linux":
        import ctypes

        ctypes.CDLL(None).prctl(1, int(signal.SIGTERM))


def end(program: "subprocess.Popen[bytes]") -> None:
    """End a program's whole group: SIGTERM, then SIGKILL."""
    for number, limit_s in ((signal.SIGTERM, GRACE_S), (signal.SIGKILL, GRACE_S)):
        try:
            os.killpg(program.pid, number)
            program.wait(limit_s)
        except ProcessLookupError:
            return
        except subprocess.TimeoutExpired:
            continue


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), sys.argv[2:]))

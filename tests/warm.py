"""Commands as processes of their own that need not import torch first: forks of one process that has done it.

A test that starts a command for what the command does, and not for how it starts, saves five seconds with each. What
is read while modules are imported (HF_HOME, HF_ENDPOINT) is what the first process was given. A fork is a process like
any other: it has its own arguments, folder, environment and streams, and can be killed.
"""

import gc
import json
import os
import select
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

MODULES = (
    "torch",
    "datasets",
    "sftlab.training.run",
    "sftlab.inference.loaded_model",
    "transformers.models.llama.modeling_llama",
)
SHIM = """#!{python} -SE
import json, os, signal, socket, sys
request = {{"arguments": sys.argv[1:], "cwd": os.getcwd(), "env": dict(os.environ)}}
with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as line:
    line.connect({address!r})
    socket.send_fds(line, [json.dumps(request).encode()], [0, 1, 2])
    child = int(line.recv(64))
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR2):
        signal.signal(number, lambda number, _: os.kill(child, number))
    code = int(line.recv(64))
if code < 0:  # end as the fork did, for a caller that wants to know by which signal
    signal.signal(-code, signal.SIG_DFL) if -code != signal.SIGKILL else None
    os.kill(os.getpid(), -code)
sys.exit(code)
"""


class Process:
    """A command at work, as subprocess.Popen shows one."""

    def __init__(self, address: str, request: Mapping[str, Any], streams: Sequence[int]) -> None:
        self.line = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.line.connect(address)
        socket.send_fds(self.line, [json.dumps(request).encode()], list(streams))
        self.pid = int(self.line.recv(64))
        self.returncode: int | None = None

    def poll(self) -> int | None:
        """Return the exit code, None while it runs."""
        if self.returncode is None and select.select([self.line], [], [], 0)[0]:
            self.wait()
        return self.returncode

    def wait(self, limit_s: float | None = None) -> int:
        """Return the exit code, the signal's number below zero for a process that was killed."""
        if self.returncode is None:
            self.line.settimeout(limit_s)
            self.returncode = int(self.line.recv(64))
            self.line.close()
        return self.returncode


class Warm:
    """A process that has imported everything; `python` is a program that runs what it is given as forks of it."""

    def __init__(self, folder: Path) -> None:
        self.address, self.python = str(folder / "warm"), folder / "python"
        self.python.write_text(SHIM.format(python=sys.executable, address=self.address))
        self.python.chmod(0o755)

    def start(self, *arguments: str, cwd: Path, env: Mapping[str, str], output: Path) -> Process:
        """Start `python ARGUMENTS...`, which appends what it prints to a file."""
        request = {"arguments": arguments, "cwd": str(cwd), "env": dict(env)}
        with output.open("ab") as out, open(os.devnull, "rb") as nothing:
            return Process(self.address, request, [nothing.fileno(), out.fileno(), out.fileno()])


@contextmanager
def warm(folder: Path, env: Mapping[str, str], *modules: str) -> Iterator[Warm]:
    """Hold such a process, with this environment, for commands that end before it does."""
    made = Warm(folder)
    started = subprocess.Popen(
        [sys.executable, "-m", "tests.warm", made.address, *MODULES, *modules],
        cwd=Path(__file__).parent.parent,
        env=dict(env),
        stdout=subprocess.PIPE,
        start_new_session=True,
    )
    assert started.stdout is not None
    try:
        assert started.stdout.readline() == b"ready\n"
        yield made
    finally:
        os.killpg(started.pid, signal.SIGKILL)  # a command that is still at work too
        started.wait()
        started.stdout.close()


def main(address: str, *modules: str) -> None:
    """Import, then fork for every request."""
    for module in modules:
        import_module(module)
    gc.freeze()  # the collector of a fork would copy every page
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as server:
        server.bind(address)
        server.listen()
        signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # so that nobody needs to wait for those below
        print("ready", flush=True)
        parent = os.getppid()
        while os.getppid() == parent:  # tests that are killed do not leave it behind
            if not select.select([server], [], [], 1)[0]:
                continue
            line, _ = server.accept()
            if os.fork() == 0:
                server.close()
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                watch(line)
            line.close()


def watch(line: socket.socket) -> None:
    """Run one request in a fork, say its process id and then its exit code."""
    message, streams, _, _ = socket.recv_fds(line, 1 << 20, 3)
    request = json.loads(message)
    child = os.fork()
    if child == 0:
        line.close()
        run(request["arguments"], request["cwd"], request["env"], streams)
    for stream in streams:
        os.close(stream)
    line.send(str(child).encode())
    end = os.pidfd_open(child)
    if line in select.select([line, end], [], [])[0]:  # whoever asked is gone, killed perhaps
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    line.send(str(os.waitstatus_to_exitcode(status)).encode())
    os._exit(0)


def run(arguments: list[str], cwd: str, env: dict[str, str], streams: list[int]) -> None:
    """Be `python ARGUMENTS...`: -m MODULE or -c CODE."""
    import runpy
    import traceback

    for number, stream in enumerate(streams):
        os.dup2(stream, number)
        os.close(stream)
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(env)
    kind, what, *rest = [a for a in arguments if a != "-u"]  # torchrun's, for output without a buffer
    given = [p for p in env.get("PYTHONPATH", "").split(os.pathsep) if p]
    sys.path[:1] = [*([] if env.get("PYTHONSAFEPATH") else [cwd]), *given]
    code: Any = 0
    try:
        if kind == "-m":
            sys.argv = [what, *rest]
            runpy.run_module(what, run_name="__main__", alter_sys=True)
        else:
            assert kind == "-c"
            sys.argv = ["-c", *rest]
            exec(compile(what, "<string>", "exec"), {"__name__": "__main__"})
    except SystemExit as left:
        code = left.code
    except BaseException:
        traceback.print_exc()
        code = 1
    import atexit

    atexit._run_exitfuncs()
    if code is not None and not isinstance(code, int):
        print(code, file=sys.stderr)
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code or 0)


if __name__ == "__main__":
    main(*sys.argv[1:])

"""A pool of worker processes that outlives a test: what runs on several ranks need not import torch each time.

Starting four processes costs 15 s on two cores, nearly all of it imports. A call that fails ends the pool, because its
processes may still be inside a collective; the next call starts a new one.
"""

import atexit
import gc
import multiprocessing as mp
import os
import sys
import tempfile
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

FRESH = "SFTLAB_TEST_FRESH_RANKS"  # set to 1: every call gets new processes, as a coverage map needs
TIMEOUT_S = 300.0
_workers: list[tuple[Any, Connection]] = []


class RankFailed(Exception):
    """A rank raised or died; the message is its traceback."""


def on_ranks(function: Callable[..., Any], ranks: int, *arguments: Any) -> list[Any]:
    """Return what `function(rank, *arguments)` returns on each of `ranks` processes, in rank order.

    The function must be importable (at module level of a test). What the processes print is printed here when they are
    done. Raises: RankFailed with the traceback of the first rank that raised or died.
    """
    with tempfile.TemporaryDirectory() as folder:
        _start(ranks)
        try:
            for rank, (_, pipe) in enumerate(_workers[:ranks]):
                pipe.send((function, rank, arguments, dict(os.environ), os.path.join(folder, str(rank))))
            return _answers(ranks)
        except BaseException:
            stop()
            raise
        finally:
            for rank in range(ranks):
                for stream, name in ((sys.stdout, "out"), (sys.stderr, "err")):
                    printed = Path(folder, f"{rank}.{name}")
                    stream.write(printed.read_text(errors="replace") if printed.exists() else "")
            if os.environ.get(FRESH) == "1":
                stop()


def stop() -> None:
    """End every process of the pool."""
    for process, pipe in _workers:
        process.kill()
        process.join()
        pipe.close()
    _workers.clear()


atexit.register(stop)


def _start(ranks: int) -> None:
    if not all(process.is_alive() for process, _ in _workers):  # a test that ends processes took idle ones along
        stop()
    context = mp.get_context("spawn")
    while len(_workers) < ranks:
        ours, theirs = context.Pipe()
        process = context.Process(target=_serve, args=(theirs,))
        process.start()
        theirs.close()
        _workers.append((process, ours))


def _answers(ranks: int) -> list[Any]:
    pipes = {pipe: rank for rank, (_, pipe) in enumerate(_workers[:ranks])}
    found: dict[int, Any] = {}
    while pipes:
        ready = wait(list(pipes), TIMEOUT_S)
        if not ready:
            raise RankFailed(f"ranks {sorted(pipes.values())} have not answered in {TIMEOUT_S:.0f} s")
        for pipe in ready:
            rank = pipes.pop(pipe)  # type: ignore[arg-type]
            try:
                passed, found[rank] = pipe.recv()  # type: ignore[union-attr]
            except EOFError:
                raise RankFailed(f"rank {rank} died") from None
            if not passed:
                raise RankFailed(f"rank {rank}:\n{found[rank]}")
    return [found[rank] for rank in range(ranks)]


def _serve(pipe: Connection) -> None:
    """Run the functions that come through the pipe, each with the caller's environment and its own output."""
    import torch

    torch.set_num_threads(1)
    while True:
        try:
            function, rank, arguments, environment, output = pipe.recv()
        except EOFError:  # the tests are over
            return
        os.environ.clear()
        os.environ.update(environment)
        _print_into(output)
        try:
            answer = (True, function(rank, *arguments))
        except BaseException:
            answer = (False, traceback.format_exc())
        torch.use_deterministic_algorithms(False)
        clear_caches()
        sys.stdout.flush()
        sys.stderr.flush()
        pipe.send(answer)


def clear_caches() -> None:
    """Forget what DTensor has learned: its results name the process groups of a mesh that no longer exist."""
    from torch.distributed.tensor import debug

    debug._clear_sharding_prop_cache()
    gc.collect()


def _print_into(output: str) -> None:
    for number, name in ((1, "out"), (2, "err")):
        file = os.open(f"{output}.{name}", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(file, number)
        os.close(file)

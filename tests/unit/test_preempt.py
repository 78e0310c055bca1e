"""Stopping on a signal: who is told, who agrees, how the process ends."""

import os
import signal
import subprocess
import sys
import time
from typing import Any

import pytest

from sftlab.training.preempt import STOPPED, StopSignal
from tests.support import REPO, run_distributed


def quiet(text: str) -> None:
    pass


@pytest.mark.parametrize("cause", [signal.SIGUSR2, signal.SIGTERM, signal.SIGINT])
def test_a_signal_is_noted_and_the_handler_before_comes_back(one: Any, cause: signal.Signals) -> None:
    before = signal.getsignal(cause)
    with StopSignal(one, "again") as stop:
        assert not stop.agreed()
        signal.raise_signal(cause)
        assert stop.agreed()
    assert signal.getsignal(cause) == before


@pytest.mark.parametrize("cause", [signal.SIGUSR2, signal.SIGTERM, signal.SIGINT])
def test_the_process_leaves_with_a_code_and_says_how_to_go_on(one: Any, cause: signal.Signals) -> None:
    said: list[str] = []
    with StopSignal(one, "python -m sftlab.train run_dir=there") as stop, pytest.raises(SystemExit) as left:
        signal.raise_signal(cause)
        assert stop.agreed()
        stop.leave(said.append)
    assert left.value.code == (0 if cause == signal.SIGINT else STOPPED)
    assert cause.name in said[0] and "run_dir=there" in said[0]


def test_submitits_handler_is_called_once_everything_is_saved(one: Any) -> None:
    called: list[int] = []
    before = signal.signal(signal.SIGUSR2, lambda number, frame: called.append(number))
    try:
        with StopSignal(one, "again") as stop, pytest.raises(SystemExit):
            signal.raise_signal(signal.SIGUSR2)
            assert not called, "not at the signal, in the middle of a step"
            assert stop.agreed()
            stop.leave(quiet)
    finally:
        signal.signal(signal.SIGUSR2, before)
    assert called == [signal.SIGUSR2]


def test_scancel_is_no_reason_to_requeue(one: Any) -> None:
    called: list[int] = []
    before = signal.signal(signal.SIGUSR2, lambda number, frame: called.append(number))
    try:
        with StopSignal(one, "again") as stop, pytest.raises(SystemExit) as left:
            signal.raise_signal(signal.SIGTERM)
            assert stop.agreed()
            stop.leave(quiet)
    finally:
        signal.signal(signal.SIGUSR2, before)
    assert not called and left.value.code == STOPPED


def _one_rank_is_told(world: Any) -> tuple[bool, bool, Any]:
    with StopSignal(world, "again") as stop:
        early = stop.agreed()
        if world.rank == 1:
            signal.raise_signal(signal.SIGTERM)
        late = stop.agreed()
        try:
            stop.leave(quiet)
        except SystemExit as left:
            return early, late, left.code


def test_gauntlet_29_the_flag_is_agreed_at_a_step_boundary() -> None:
    assert run_distributed(_one_rank_is_told, 2) == [(False, True, STOPPED)] * 2


def test_gauntlet_29_forked_workers_ignore_the_signals(one: Any) -> None:
    with StopSignal(one, "again") as stop:
        child = os.fork()
        if child == 0:
            time.sleep(0.5)
            os._exit(7 if stop.noted == 0 else 8)
        time.sleep(0.1)
        os.kill(child, signal.SIGUSR2)
        os.kill(child, signal.SIGINT)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
        assert stop.noted == 0
        child = os.fork()
        if child == 0:
            time.sleep(20)
            os._exit(9)
        time.sleep(0.1)
        os.kill(child, signal.SIGTERM)  # how multiprocessing ends its workers
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGTERM


def test_a_second_ctrl_c_ends_at_once_and_one_passed_on_twice_does_not() -> None:
    code = (
        "import time, sftlab.training.preempt as p\n"
        "from sftlab.parallel.world import world\n"
        "with world() as here, p.StopSignal(here, 'again'):\n"
        "    print('ready', flush=True)\n"
        "    time.sleep(30)\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(REPO)}
    run = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment
    )
    assert run.stdout is not None and run.stdout.readline() == b"ready\n"
    for pause_s in (0.2, 1.2):
        run.send_signal(signal.SIGINT)
        time.sleep(pause_s)
        assert run.poll() is None
    run.send_signal(signal.SIGINT)
    _, errors = run.communicate(timeout=5)
    assert run.returncode == -signal.SIGINT
    assert b"stopping after this step" in errors

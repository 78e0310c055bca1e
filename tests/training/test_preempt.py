"""Stopping on a signal: who is told, who agrees, how the process ends."""

import dataclasses
import os
import signal
import sys
from collections.abc import Callable
from typing import Any

import pytest

from sftlab.training.preempt import STOPPED, StopSignal
from tests.support import run_distributed


def quiet(text: str) -> None:
    pass


@pytest.mark.parametrize("cause", [signal.SIGUSR2, signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_a_signal_is_noted_and_the_handler_before_comes_back(one: Any, cause: signal.Signals) -> None:
    before = signal.getsignal(cause)
    with StopSignal(one, "again") as stop, stop.steps():
        assert not stop.agreed()
        signal.raise_signal(cause)
        assert stop.agreed()
    assert signal.getsignal(cause) == before


def test_a_signal_that_comes_while_ranks_agree_counts_at_the_next_step(one: Any) -> None:
    """In a run of short steps most of the time is spent in that all-reduce; its result was written over the signal."""

    class Busy:
        """A world whose all-reduce a signal interrupts the first time."""

        calls = 0

        def max(self, value: int) -> int:
            self.calls += 1
            if self.calls == 1:
                signal.raise_signal(signal.SIGTERM)
            return value

        def __getattr__(self, name: str) -> Any:
            return getattr(one, name)

    said: list[str] = []
    with StopSignal(Busy(), "again") as stop, stop.steps(), pytest.raises(SystemExit) as left:  # type: ignore[arg-type]
        assert not stop.agreed()
        assert stop.agreed()
        stop.leave(said.append)
    assert left.value.code == STOPPED and said[0].startswith("stopped by SIGTERM")


@pytest.mark.parametrize("cause", [signal.SIGUSR2, signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_the_process_leaves_with_a_code_and_says_how_to_go_on(one: Any, cause: signal.Signals) -> None:
    said: list[str] = []
    with (
        StopSignal(one, "python -m sftlab.train run_dir=there") as stop,
        stop.steps(),
        pytest.raises(SystemExit) as left,
    ):
        signal.raise_signal(cause)
        assert stop.agreed()
        stop.leave(said.append)
    assert left.value.code == (0 if cause == signal.SIGINT else STOPPED)
    assert cause.name in said[0] and "run_dir=there" in said[0]


def test_submitits_handler_is_called_once_everything_is_saved(one: Any) -> None:
    called: list[int] = []
    before = signal.signal(signal.SIGUSR2, lambda number, frame: called.append(number))
    try:
        with StopSignal(one, "again") as stop, stop.steps(), pytest.raises(SystemExit):
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
        with StopSignal(one, "again") as stop, stop.steps(), pytest.raises(SystemExit) as left:
            signal.raise_signal(signal.SIGTERM)
            assert stop.agreed()
            stop.leave(quiet)
    finally:
        signal.signal(signal.SIGUSR2, before)
    assert not called and left.value.code == STOPPED


@pytest.mark.parametrize(
    ("told", "cause", "code"),
    [
        ((signal.SIGTERM, signal.SIGUSR2), signal.SIGUSR2, STOPPED),
        ((signal.SIGUSR2, signal.SIGTERM), signal.SIGUSR2, STOPPED),
        ((signal.SIGINT, signal.SIGTERM), signal.SIGTERM, STOPPED),
        ((signal.SIGTERM, signal.SIGINT), signal.SIGTERM, STOPPED),
        ((signal.SIGUSR2, signal.SIGINT), signal.SIGUSR2, STOPPED),
    ],
)
def test_of_several_causes_the_one_that_saves_most_counts_in_whatever_order(
    one: Any, told: tuple[signal.Signals, ...], cause: signal.Signals, code: int
) -> None:
    """SLURM may send SIGTERM beside SIGUSR2: a job that took SIGTERM for its cause would not be requeued."""
    requeued: list[int] = []
    said: list[str] = []
    before = signal.signal(signal.SIGUSR2, lambda number, frame: requeued.append(number))
    try:
        with StopSignal(one, "again") as stop, stop.steps(), pytest.raises(SystemExit) as left:
            for number in told:
                signal.raise_signal(number)
            assert stop.agreed()
            stop.leave(said.append)
    finally:
        signal.signal(signal.SIGUSR2, before)
    assert requeued == ([signal.SIGUSR2] if cause == signal.SIGUSR2 else [])
    how = "the job is requeued" if requeued else "resume with\n  again"
    assert said == [f"stopped by {cause.name}; {how}"] and left.value.code == code


def _ranks_are_told_different_things(world: Any) -> dict[str, Any]:
    """One world of three, stopped twice: by SIGTERM on the last rank, then by SIGUSR2 there and SIGTERM on rank 0."""
    found: dict[str, Any] = {}
    with StopSignal(world, "again") as stop:
        found["early"] = stop.agreed()
        if world.rank == 2:
            signal.raise_signal(signal.SIGTERM)
        found["late"] = stop.agreed()
        try:
            stop.leave(quiet)
        except SystemExit as left:
            found["code"] = left.code

    pids = world.gather(os.getpid())

    def requeue(number: int, frame: Any) -> None:
        """Do as Submitit does: requeue the job, upon which SLURM ends its processes, and leave."""
        found["requeued"] = number
        for pid in pids[1:]:
            os.kill(pid, signal.SIGTERM)
        sys.exit(3)

    before = signal.signal(signal.SIGUSR2, requeue)
    try:
        with StopSignal(world, "again") as stop:
            if world.rank != 1:
                signal.raise_signal(signal.SIGUSR2 if world.rank == 2 else signal.SIGTERM)
            stop.agreed()
            said: list[str] = []
            try:
                stop.leave(said.append)
            except SystemExit as left:
                found["second"] = (left.code, said[0], stop.noted)
    finally:
        signal.signal(signal.SIGUSR2, before)
    return found


def test_gauntlet_29_ranks_agree_at_a_step_boundary_on_the_greatest_cause_of_any() -> None:
    found = run_distributed(_ranks_are_told_different_things, 3)
    for rank, seen in enumerate(found):
        assert (seen["early"], seen["late"], seen["code"]) == (False, True, STOPPED)
        code, said, noted = seen["second"]
        assert said == "stopped by SIGUSR2; the job is requeued"
        assert seen.get("requeued") == (signal.SIGUSR2 if rank == 0 else None), "rank 0 alone requeues"
        assert code == (3 if rank == 0 else STOPPED)
        assert noted == (0 if rank == 0 else 3), "the others waited until SLURM told them to end"


def in_a_child(act: Callable[[], int]) -> int:
    """Return how a forked process ended that calls `act`: its exit code, or minus a signal."""
    child = os.fork()
    if child == 0:
        code = 99
        try:
            code = act()
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def test_gauntlet_29_forked_workers_ignore_the_signals_but_sigterm(one: Any) -> None:
    """The child says by one pipe that it is there, and is told by another to go on: nothing waits for a clock."""
    with StopSignal(one, "again") as stop, stop.steps():
        for causes, expected in (((signal.SIGUSR2, signal.SIGINT), 7), ((signal.SIGTERM,), -signal.SIGTERM)):
            (told, tell), (heard, say) = os.pipe(), os.pipe()
            child = os.fork()
            if child == 0:
                os.close(tell)
                os.write(say, b"1")
                os.read(told, 1)
                os._exit(7 if stop.noted == 0 else 8)
            os.read(heard, 1)
            for cause in causes:
                os.kill(child, cause)
            for end in (told, tell, heard, say):
                os.close(end)
            assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == expected
            assert stop.noted == 0


def test_a_forked_child_keeps_the_handlers_that_are_not_ours() -> None:
    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        assert in_a_child(lambda: int(signal.getsignal(signal.SIGTERM) == signal.SIG_IGN)) == 1
        assert in_a_child(lambda: int(signal.getsignal(signal.SIGINT) == signal.default_int_handler)) == 1
    finally:
        signal.signal(signal.SIGTERM, before)


@pytest.mark.parametrize(("rank", "told"), [(0, 1), (1, 0)])
def test_a_second_ctrl_c_ends_at_once_and_one_passed_on_twice_does_not(one: Any, rank: int, told: int) -> None:
    """The seconds between two are moved into the past by hand: a terminal's and torchrun's come within one."""
    read, write = os.pipe()

    def stopped_thrice() -> int:
        os.dup2(write, 2)
        with StopSignal(dataclasses.replace(one, rank=rank), "again") as stop, stop.steps():
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)
            if stop.noted != 1:
                return 1
            stop.interrupted_s -= 0.9
            signal.raise_signal(signal.SIGINT)
            os.write(2, b"alive")
            stop.interrupted_s -= 0.2
            signal.raise_signal(signal.SIGINT)
        return 2

    assert in_a_child(stopped_thrice) == -signal.SIGINT
    os.close(write)
    with os.fdopen(read, "rb") as file:
        said = file.read()
    assert said.count(b"stopping once this step is saved; Ctrl-C again ends at once, without saving") == told
    assert said.endswith(b"alive")


def test_a_ctrl_c_after_another_cause_changes_nothing_and_is_told_all_the_same(one: Any) -> None:
    with StopSignal(one, "again") as stop, stop.steps():
        signal.raise_signal(signal.SIGUSR2)
        signal.raise_signal(signal.SIGINT)
        assert stop.noted == 4 and stop.interrupted_s > 0


def test_a_ctrl_c_outside_of_the_steps_ends_at_once_and_counts_once_if_torchrun_repeats_it(one: Any) -> None:
    with StopSignal(one, "again") as stop:
        for _ in range(2):
            with pytest.raises(KeyboardInterrupt):
                signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)
            stop.interrupted_s -= 1.1
            with stop.steps():
                pass
        assert not stop.noted

"""A tracker that fails, hangs or is slow costs its run nothing but a line."""

import threading
import time
from collections.abc import Callable, Mapping, Sequence

import pytest

from sftlab.common import tracker
from sftlab.common.tracker import Answer, Background, Tracker


class Noted(Tracker):
    """A tracker that notes its calls and the thread they came in; `trouble` may raise or wait."""

    def __init__(self, trouble: Callable[[str], None] = lambda what: None) -> None:
        self.calls: list[tuple[object, ...]] = []
        self.trouble = trouble

    def note(self, what: str, *given: object) -> None:
        self.trouble(what)
        self.calls.append((what, *given))

    def write_numbers(self, step: int, time_s: float, values: Mapping[str, float]) -> None:
        self.note("numbers", step, time_s, values)

    def write_answers(self, step: int, answers: Sequence[Answer]) -> None:
        self.note("answers", step, answers)

    def cut(self, step: int) -> None:
        self.note("cut", step)

    def close(self, status: str) -> None:
        self.note("close", status)


def used(inner: Callable[[], Tracker]) -> list[str]:
    said: list[str] = []
    made = Background("mine", inner, said.append)
    made.cut(0)
    for step in range(8):
        made.write_numbers(step, float(step), {"a": 1.0})
    made.write_answers(7, [])
    made.close("stopped")
    return said


def test_calls_arrive_in_order_in_another_thread_and_closing_waits_for_them() -> None:
    threads = set()
    inner = Noted(lambda what: threads.add(threading.current_thread().name) or time.sleep(0.005))
    assert used(lambda: inner) == []
    numbers = [("numbers", step, float(step), {"a": 1.0}) for step in range(8)]
    assert inner.calls == [("cut", 0), *numbers, ("answers", 7, []), ("close", "stopped")]
    assert threads == {"tracker mine"}


def test_one_that_cannot_begin_is_given_up_with_a_line() -> None:
    def fails() -> Tracker:
        raise OSError("no such\nserver")

    assert used(fails) == ["tracker mine is given up, the run goes on without it: OSError: no such server"]


def test_one_that_fails_at_times_is_tried_again_and_said_once_each_time() -> None:
    failing = iter([True, True, False, False, True])

    def trouble(what: str) -> None:
        if what == "numbers" and next(failing, False):
            raise ValueError("busy")

    inner = Noted(trouble)
    assert used(lambda: inner) == ["tracker mine failed, the run goes on: ValueError: busy"] * 2
    assert [c[1] for c in inner.calls if c[0] == "numbers"] == [2, 3, 5, 6, 7]


def test_one_that_fails_five_times_in_a_row_is_given_up() -> None:
    tried = []

    def trouble(what: str) -> None:
        tried.append(what)
        if what != "cut":
            raise ValueError("gone")

    said = used(lambda: Noted(trouble))
    assert said[-1] == "tracker mine is given up, the run goes on without it: ValueError: gone" and len(said) == 2
    assert tried == ["cut", *["numbers"] * 5]


def test_one_that_hangs_does_not_keep_the_run_from_ending(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracker, "CLOSE_S", 0.2)
    let_go = threading.Event()
    began_s = time.monotonic()
    said = used(lambda: Noted(lambda what: let_go.wait(20)))
    assert time.monotonic() - began_s < 5 and "has not sent everything" in said[0]
    let_go.set()


def test_one_that_falls_behind_without_end_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracker, "MOST_WAITING", 3)
    let_go = threading.Event()

    def slow() -> Tracker:
        let_go.wait(20)
        return Noted()

    said: list[str] = []
    made = Background("mine", slow, said.append)
    for step in range(9):
        made.write_numbers(step, 0.0, {})
    assert said == ["tracker mine is given up, the run goes on without it: RuntimeError: it is 3 calls behind"]
    let_go.set()

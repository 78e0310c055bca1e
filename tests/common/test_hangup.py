"""A terminal or a pipe that goes away: SIGHUP once, no error in the middle of whatever printed last."""

import io
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

import pytest

from sftlab.common.hangup import Outlet, hangups
from tests.runs import compose


@pytest.fixture
def told() -> Iterator[list[int]]:
    """The signals that this process was sent."""
    seen: list[int] = []
    before = signal.signal(signal.SIGHUP, lambda number, _: seen.append(number))
    yield seen
    signal.signal(signal.SIGHUP, before)


@pytest.fixture
def broken() -> Iterator[TextIO]:
    """A stream into a pipe that nobody reads."""
    reading, writing = os.pipe()
    os.close(reading)
    with open(writing, "w") as stream:
        yield stream


def test_a_reader_that_has_gone_is_told_once_and_nothing_is_raised(broken: TextIO, told: list[int]) -> None:
    outlet = Outlet(broken)
    for _ in range(3):
        assert outlet.write("a" * 100_000) == 100_000
        outlet.flush()
    assert told == [signal.SIGHUP]


def test_other_errors_of_a_stream_are_raised(told: list[int]) -> None:
    class Full(io.StringIO):
        def write(self, text: str) -> int:
            raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space left"):
        Outlet(Full()).write("a")
    assert not told


def test_a_run_whose_reader_goes_saves_and_stops_as_with_a_closed_terminal(
    tmp_path: Path,
    model_folder: Path,
    squad_files: tuple[Path, Path],
    broken: TextIO,
    told: list[int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """`python -m sftlab.train | head`: before, a BrokenPipeError in a training step, nothing saved, exit code 1."""
    from sftlab.training.run import run

    run_dir = tmp_path / "run"
    config = compose(run_dir, model_folder, squad_files, "trainer.max_steps=50", "evaluation.num_answers=0")
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as left:
        patch.setattr(sys, "stdout", broken)
        run(config, [])
    assert left.value.code == os.EX_TEMPFAIL and not told, "the run's own handler was told"
    (saved,) = (run_dir / "checkpoints").glob("step_*")
    assert int(saved.name.removeprefix("step_")) < 50
    assert "stopped by SIGHUP; resume with" in (run_dir / "train.log").read_text()


def test_under_nohup_a_run_carries_on_in_silence(one: Any, broken: TextIO, monkeypatch: pytest.MonkeyPatch) -> None:
    from sftlab.training.preempt import StopSignal

    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        monkeypatch.setattr(sys, "stdout", broken)
        with StopSignal(one, "again") as stop, hangups():
            print("a" * 100_000)
            assert not stop.agreed()
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)

"""A progress bar is drawn for a person at a terminal and for nobody else."""

import io
from types import SimpleNamespace

import pytest

from sftlab.common.progress import bar


class Screen(io.StringIO):
    def isatty(self) -> bool:
        return True


def drawn(monkeypatch: pytest.MonkeyPatch, screen: io.StringIO, shown: bool = True, took_s: float = 2.5) -> str:
    now_s = iter([100.0, 100.0 + took_s / 2, *[100.0 + took_s] * 99])
    monkeypatch.setattr("sftlab.common.progress.time", SimpleNamespace(monotonic=lambda: next(now_s)))
    for name, value in (("TERM", "xterm"), ("COLUMNS", "100"), ("FORCE_COLOR", "1")):
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("sys.stderr", screen)
    with bar("answers", total=8, done=4, shown=shown) as advance:
        advance(1)
        advance(2)
    return screen.getvalue()


def test_a_bar_shows_its_name_and_how_much_is_done(monkeypatch: pytest.MonkeyPatch) -> None:
    found = drawn(monkeypatch, Screen())
    assert "answers" in found and "88%" in found, "7 of 8: four were done before"
    assert "7/8  1.2/s" in found


def test_what_is_soon_done_needs_no_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    assert drawn(monkeypatch, Screen(), took_s=1.9) == ""


@pytest.mark.parametrize(("screen", "shown"), [(io.StringIO(), True), (Screen(), False)])
def test_no_bar_without_a_terminal_or_where_it_is_turned_off(
    monkeypatch: pytest.MonkeyPatch, screen: io.StringIO, shown: bool
) -> None:
    assert drawn(monkeypatch, screen, shown) == ""

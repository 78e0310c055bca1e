"""A catalogue of wrong inputs, each with its whole message: none is a traceback, and nothing is made of any.

The commands run in this process, as a person types them, in an empty folder.
"""

import re
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path

import pytest
import yaml

from sftlab.__main__ import COMMANDS

CATALOGUE: dict[str, str] = yaml.safe_load(Path(__file__).with_name("wrong_inputs.yaml").read_text())


@pytest.fixture
def said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Callable[[str], str]:
    """Type a command in an empty folder, see that it exits with 1 and leaves nothing there; return its message."""
    monkeypatch.chdir(tmp_path)

    def run(typed: str) -> str:
        command, *words = typed.split()
        monkeypatch.setattr(sys, "argv", [f"sftlab-{command}", *words])
        with pytest.raises(SystemExit) as stop:
            import_module(f"sftlab.{command}").main()
        out, error = capfd.readouterr()
        assert (stop.value.code, out) == (1, "") and list(tmp_path.iterdir()) == []
        return error.removeprefix("error: ").rstrip("\n").replace(str(tmp_path), "HERE")

    return run


def test_the_catalogue_is_long_and_teaches() -> None:
    assert len(CATALOGUE) >= 120
    assert {typed.split()[0] for typed in CATALOGUE} <= set(COMMANDS)
    for typed, message in CATALOGUE.items():
        assert "Traceback" not in message and "Error executing" not in message and message, typed
        assert re.search(
            r"expected|did you mean|has no effect|give|name |there (is|are)|belongs to|set |move|in quotes|must|"
            r"missing|one thing|options are|another trainer|called|cannot be set|no longer|no such key|needs|not found|"
            r"typed KEY=VALUE|becomes one by",
            message,
        ), typed


@pytest.mark.parametrize("typed", CATALOGUE)
def test_a_wrong_input_is_answered_in_full(typed: str, said: Callable[[str], str]) -> None:
    assert said(typed) == CATALOGUE[typed]

"""A run of the demo for everything that comes after training, made once, and commands run in this process."""

import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path

import pytest

from tests.support import command

Typed = Callable[..., str]


@pytest.fixture(scope="session")
def demo_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of the demo: 100 steps, enough to answer in the right form."""
    folder = tmp_path_factory.mktemp("demo") / "run, [of] 'today'=1"
    done = command("train", f"run_dir={folder}", "trainer.max_steps=100", "evaluation.num_answers=8", "tracker=none")
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture
def typed(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Typed:
    """Run a command in this process (importing torch takes seconds) and return what it printed."""

    def run(module: str, *arguments: str) -> str:
        monkeypatch.setattr(sys, "argv", [f"sftlab-{module}", *arguments])
        import_module(f"sftlab.{module}").main()
        return capfd.readouterr().out

    return run


@pytest.fixture
def refused(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Typed:
    """Run a command in this process, see that it exits with 1 and one error without a traceback; return the error."""

    def run(module: str, *arguments: str) -> str:
        monkeypatch.setattr(sys, "argv", [f"sftlab-{module}", *arguments])
        with pytest.raises(SystemExit) as stop:
            import_module(f"sftlab.{module}").main()
        out, error = capfd.readouterr()
        assert (stop.value.code, out) == (1, "")
        assert error.startswith("error: ") and "Traceback" not in error and "Error executing" not in error
        return error

    return run

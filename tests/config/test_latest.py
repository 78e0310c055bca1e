"""run=latest: the newest run that has what the command needs, said; dead runs are out of the way."""

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from sftlab.config.latest import NEEDED, newest, settle
from tests.commands import Typed


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """Make a run in runs/, started a second after the last, with these files."""
    monkeypatch.chdir(tmp_path)
    made: list[Path] = []

    def make(name: str, *files: str, **summary: str) -> Path:
        folder = Path("runs", name, f"t{len(made)}")
        for file in ("config.yaml", *files):
            (folder / file).parent.mkdir(parents=True, exist_ok=True)
            (folder / file).write_text("{}")
        if summary:
            (folder / "summary.json").write_text(json.dumps(summary))
        os.utime(folder / "config.yaml", (1e9 + len(made), 1e9 + len(made)))
        made.append(folder)
        return folder

    return make


MODEL, CHECKPOINT = "model/config.json", "checkpoints/step_00000004/checkpoint.json"


def test_the_newest_that_has_what_is_needed(run: Callable[..., Path], capfd: pytest.CaptureFixture[str]) -> None:
    old, squad = run("demo", MODEL), run("squad", MODEL, CHECKPOINT)
    saved, _ = run("demo", CHECKPOINT), run("demo", status="failed")
    for command in ("evaluate", "generate", "serve", "publish"):
        assert settle(["run=latest", "x=1"], command) == [f"run={squad}", "x=1"]
        assert settle(["run=latest:demo"], command) == [f"run={old}"]
    assert capfd.readouterr().err.splitlines()[0] == f"run=latest: {squad}"
    assert settle(["run=latest"], "export") == [f"run={saved}"]
    assert settle(["run=latest", "resume=latest"], "train") == ["run=latest", "resume=latest"]
    assert settle(["run=latest/model", "run=here"], "generate") == ["run=latest/model", "run=here"]


def test_what_there_is_instead_is_said(run: Callable[..., Path]) -> None:
    with pytest.raises(ValueError, match=r"^run=latest: there is no such run in .*/runs$"):
        newest(None, MODEL)
    run("demo", status="failed", error="OutOfMemory: too\nlarge")
    run("demo", CHECKPOINT)
    with pytest.raises(ValueError, match=r"^run=latest:sqad: there is no such run in .*; there are run=latest:demo$"):
        newest("sqad", MODEL)
    with pytest.raises(ValueError) as said:
        newest(None, MODEL)
    assert str(said.value).splitlines() == [
        "run=latest: none of 2 runs has a finished model; the newest are",
        "  runs/demo/t1: not ended",
        "  runs/demo/t0: failed: OutOfMemory: too large",
    ]
    assert NEEDED.keys() == {"evaluate", "generate", "serve", "publish", "export"}


def test_a_command_takes_it(rye_run: Path, typed: Typed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("runs/rye").mkdir(parents=True)
    Path("runs/rye/now").symlink_to(rye_run)
    assert typed("generate", "run=latest:rye", "prompt=Answer:", "max_new_tokens=9").strip() == "rye bread"
    said = typed("evaluate", "run=latest", "limit=2", "answers=false", "output_dir=scores")
    assert "loss" in said and Path("scores").is_dir()

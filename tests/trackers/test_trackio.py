"""Trackio's local database, read back by Trackio."""

import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest

from sftlab.trackers.trackio import trackio
from tests.trackers.trial import about, stopped_and_resumed


def record_and_print(folder: Path) -> None:
    """Record a run in the local database and print what Trackio finds there."""
    stopped_and_resumed(partial(trackio, project="teas", tags=["green"], offline=False), folder / "run")
    from trackio.sqlite_storage import SQLiteStorage

    (name,) = SQLiteStorage.get_runs("teas")
    logs, config = SQLiteStorage.get_logs("teas", name), SQLiteStorage.get_run_config("teas", name)
    print("found", json.dumps({"name": name, "logs": logs, "config": config}))


def test_a_run_in_the_local_database_and_its_resume(tmp_path: Path) -> None:
    """In a process of its own: TRACKIO_DIR is read when trackio is imported."""
    env = {**os.environ, "TRACKIO_DIR": str(tmp_path / "database"), "HF_HUB_OFFLINE": "1"}
    name = record_and_print.__name__
    script = f"import sys, pathlib; from {__name__} import {name}; {name}(pathlib.Path(sys.argv[1]))"
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True, timeout=120, env=env, check=False
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(next(line for line in done.stdout.splitlines() if line.startswith("found "))[6:])
    assert found["name"] == "sft/today/3" and found["config"]["optim"] == {"lr": 0.5}
    assert found["config"]["tags"] == ["green", "tiny-model"] and found["config"]["_Group"] == "sft/today"
    losses = [(row["step"], row["train/loss"]) for row in found["logs"] if "train/loss" in row]
    assert losses == [(step, 4.0 / (step + 1)) for step in range(1, 6)], "each step once"
    assert sorted(row["step"] for row in found["logs"] if "val/loss" in row) == [0, 5]
    assert next(row["val/answers"]["_value"] for row in found["logs"] if "val/answers" in row)[0]["answer"] == "tea"


def test_a_run_is_in_the_space_unless_it_is_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spaces: list[str | None] = []

    def init(*, space_id: str | None, name: str, **_: object) -> SimpleNamespace:
        spaces.append(space_id)
        return SimpleNamespace(name=name)

    monkeypatch.setitem(sys.modules, "trackio", SimpleNamespace(init=init))
    monkeypatch.setitem(sys.modules, "trackio.sqlite_storage", SimpleNamespace(SQLiteStorage=None))
    trackio(about(tmp_path / "online", []), space_id="us/teas", offline=False).cut(0)
    trackio(about(tmp_path / "offline", []), space_id="us/teas", offline=True).cut(0)
    assert spaces == ["us/teas", None]

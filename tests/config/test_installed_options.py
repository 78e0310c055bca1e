"""Options of a package that is installed beside sftlab: found, shown, composed, bound, and run like sftlab's own."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from sftlab.config import groups
from tests.support import REPO, command, read_jsonl

CODE = """
def sawtooth(step: int, total_steps: int, *, teeth: int = 1, floor: float = 0.0) -> float:
    length = total_steps / teeth
    return max(floor, 1 - ((step - 1) % length) / length)
"""
OPTION = """# Falls and starts again.
_target_: tooth_lab.schedules.sawtooth
_partial_: true
teeth: 1
floor: 0.25 # fraction of optim.lr below which it never falls
"""
# Runs `train` once for each list of arguments, in one process: [what it printed, what it complained about, its code].
PROBE = """
import contextlib, io, json, runpy, sys
for arguments in json.loads(sys.argv.pop()):
    sys.argv[1:] = arguments
    out, error, code = io.StringIO(), io.StringIO(), 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(error):
        try:
            runpy.run_module("sftlab.train", run_name="__main__", alter_sys=True)
        except SystemExit as stop:
            code = stop.code or 0
    print(json.dumps([out.getvalue(), error.getvalue(), code]))
"""


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of installed packages that holds one with a schedule, as pip would leave it there."""
    folder = tmp_path_factory.mktemp("site")
    (folder / "tooth_lab" / "conf" / "schedule").mkdir(parents=True)
    (folder / "tooth_lab" / "__init__.py").touch()
    (folder / "tooth_lab" / "schedules.py").write_text(CODE)
    (folder / "tooth_lab" / "conf" / "schedule" / "sawtooth.yaml").write_text(OPTION)
    info = folder / "tooth_lab-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: tooth-lab\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[sftlab.options]\nteeth = tooth_lab.conf\n")
    return folder


def typed(site: Path, cwd: Path, *lines: list[str]) -> list[tuple[str, str, int]]:
    done = subprocess.run(
        [sys.executable, "-c", PROBE, json.dumps(lines)],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": f"{REPO}{os.pathsep}{site}"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return [tuple(json.loads(line)) for line in done.stdout.splitlines()]


def test_an_installed_option_is_shown_composed_and_bound(site: Path, tmp_path: Path) -> None:
    chosen = "schedule=sawtooth"
    shown, composed, mistyped, added, unchosen, near = typed(
        site,
        tmp_path,
        ["--help"],
        [chosen, "schedule.teeth=3", "--cfg", "job"],
        [chosen, "schedule.teth=3"],
        [chosen, "+schedule.flor=3"],
        ["schedule.teeth=3"],
        ["schedule=sawtoth"],
    )
    assert "schedule: constant, cosine, linear, sawtooth, wsd" in shown[0]
    schedule: dict[str, Any] = yaml.safe_load(composed[0])["schedule"]
    assert schedule == {"_target_": "tooth_lab.schedules.sawtooth", "_partial_": True, "teeth": 3, "floor": 0.25}
    assert mistyped == ("", "error: schedule.teth: no such key; did you mean schedule.teeth?\n", 1)
    taken = "error: schedule.flor: tooth_lab.schedules.sawtooth takes no such key; did you mean floor?\n"
    assert added == ("", taken, 1)
    whose = "error: schedule.teeth: the chosen schedule option has no such key; it belongs to schedule=sawtooth\n"
    assert unchosen == ("", whose, 1)
    assert near[1].startswith("error: schedule=sawtoth: no such option; did you mean sawtooth?") and near[2] == 1
    assert list(tmp_path.iterdir()) == []


def test_an_installed_option_runs(site: Path, tmp_path: Path) -> None:
    typed = ("schedule=sawtooth", "schedule.floor=0.75", "optim.lr=0.008", "trainer.max_steps=2", "tracker=none")
    path = f"{REPO}{os.pathsep}{site}"
    done = command("train", *typed, "run_dir=out", "evaluation.num_answers=0", cwd=tmp_path, cold=True, PYTHONPATH=path)
    assert done.returncode == 0, done.stderr
    lines = read_jsonl(tmp_path / "out" / "metrics.jsonl")
    rates = {line["step"]: line["train/lr"] for line in lines if "train/lr" in line}
    assert rates == pytest.approx({1: 0.008, 2: 0.006})  # the second half of one tooth is held at the floor


def test_an_entry_point_without_its_package_is_left_out(
    site: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.syspath_prepend(str(site))
    assert groups.installed() == {"teeth": site / "tooth_lab" / "conf"}
    info = tmp_path / "gone-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: gone\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[sftlab.options]\ngone = gone_lab.conf\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert groups.installed() == {"teeth": site / "tooth_lab" / "conf"}

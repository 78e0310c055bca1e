"""The script for a GPU, in its tiny form on a CPU: every part, and what becomes of one that fails or does not end."""

import json
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from experiments.gpu import checks, parts, run
from experiments.gpu.bench import Bench
from experiments.gpu.parts import PARTS, Part
from tests.support import REPO

IN_PROCESS = [name for name in PARTS if name != "peers"]  # tests/experiments/test_peers.py runs its command


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    made = Bench(tmp_path_factory.mktemp("gpu"), tiny=True)
    parts.make_data(made)
    return made


@pytest.mark.parametrize("name", IN_PROCESS)
def test_every_part_runs_on_a_cpu_and_has_a_line_for_the_table(
    name: str, bench: Bench, capfd: pytest.CaptureFixture[str]
) -> None:
    part = PARTS[name]
    values = part.run(bench)
    assert values == json.loads(json.dumps(values))
    said = part.said(values)
    assert said and "nan" not in said and "\n" not in said
    assert parts.missed(part, values, tiny=True) == []
    assert set(part.must) <= set(values)  # on a GPU they would be looked for


def test_layouts_that_differ_are_noticed(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    real = checks.first_gradient

    def spoiled(trainer: Any) -> tuple[float, list[torch.Tensor]]:
        loss, gradient = real(trainer)
        factor = 1.001 if trainer.loader.row_layout.layout == "tree" else 1.0
        return loss, [g * factor for g in gradient]

    monkeypatch.setattr(checks, "first_gradient", spoiled)
    values = checks.equality(bench)
    assert values["float32"]["gradient_apart"] == pytest.approx(1e-3, rel=0.1)
    assert parts.missed(PARTS["equality"], values, tiny=True) == ["not the same"]


def test_a_leak_between_documents_is_noticed(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without reach a row is one document."""
    from sftlab.models.scorer import Scorer

    real = Scorer.hidden

    def hidden(self: Scorer, batch: Any) -> torch.Tensor:
        whole = torch.full_like(batch.reach, batch.reach.shape[1])
        return real(self, checks.replace(batch, reach=whole))

    monkeypatch.setattr("sftlab.training.build.probe", lambda *_: None)  # it would refuse such a model at once
    monkeypatch.setattr(Scorer, "hidden", hidden)
    values = checks.isolation(bench)
    assert values["packed"]["outside"] > 0 and not values["same"]


def test_a_resume_that_is_not_bit_equal_is_noticed(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    real = checks.run_command

    def with_other_arithmetic(*typed: str) -> None:
        later = any(t.startswith("resume=") for t in typed)
        real(*typed, *(["optim.eps=1e-7", "resume_despite_changes=true"] if later else []))

    monkeypatch.setattr(checks, "run_command", with_other_arithmetic)
    values = checks.resume(bench)
    assert not values["same"] and 5 in values["steps_apart"] and "steps apart" in checks.said_resume(values)


def test_a_speed_that_was_asked_for_is_looked_for_on_a_gpu_only() -> None:
    part = PARTS["squad"]
    slow = {"examples_per_s": 945.0, "longest_over_median": 58.0, "graphs_after_warm_up": 0}
    assert parts.missed(part, slow, tiny=True) == []
    assert parts.missed(part, slow, tiny=False) == [
        "examples_per_s 945, asked for 1450",
        "longest_over_median 58, asked for 2",
    ]
    assert parts.missed(PARTS["peers"], {"times_trl": None}, tiny=False) == ["no times_trl"]


def broken(bench: Bench) -> dict[str, Any]:
    raise RuntimeError("the last line of the log")


def endless(bench: Bench) -> dict[str, Any]:
    subprocess.run([sys.executable, "-c", "import time; print('begun', flush=True); time.sleep(600)"])
    return {}


PRETEND: dict[str, Any] = {
    "broken": broken,
    "endless": endless,
    "wrong": lambda bench: {"same": False},
    "fine": lambda bench: {"same": True, "out": str(bench.out)},
}


@pytest.fixture
def pretend(monkeypatch: pytest.MonkeyPatch) -> None:
    """Parts that do little, one of which would never end, on a machine that is looked at in this process."""

    def said(values: Mapping[str, Any]) -> str:
        return f"same: {values['same']}"

    limits = {"endless": 5.0}
    made = {name: Part(name, name, limits.get(name, 60.0), act, said, {}) for name, act in PRETEND.items()}
    monkeypatch.setattr(run, "PARTS", made)
    machine = {"hardware": {"device": "a lathe"}, "versions": {"torch": "3"}, "commit": "c0ffee", "cuda": False}
    monkeypatch.setattr(parts, "prepare", lambda bench: machine)


def test_a_part_that_fails_or_does_not_end_is_recorded_and_the_next_one_starts(
    pretend: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run.main(["--tiny", "--out", str(tmp_path), "--parts", "broken,endless,wrong,fine"]) == 1
    found = json.loads((tmp_path / "results.json").read_text())
    assert {name: part["outcome"] for name, part in found["parts"].items()} == {
        "broken": "failed with exit code 1",
        "endless": "no end in 5 s",
        "wrong": "missed: not the same",
        "fine": "done",
    }
    assert found["parts"]["broken"]["log"][-1] == "RuntimeError: the last line of the log"
    assert found["parts"]["endless"]["log"] == ["begun"]
    assert found["parts"]["fine"]["values"]["out"] == str(tmp_path) and found["commit"] == "c0ffee"
    table = (tmp_path / "results.md").read_text()
    assert table.startswith("a lathe, torch 3, commit c0ffee") and "| fine | done | 0 | same: True |" in table
    assert "| broken | failed with exit code 1 | 0 | RuntimeError: the last line of the log |" in table
    assert "1 of 4 parts done as they must be" in table and "not so: broken, endless, wrong" in table
    assert table.strip() in capsys.readouterr().out


def test_a_part_that_is_ended_takes_its_own_processes_with_it(
    pretend: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A process that stayed would hold the device while the next part is measured."""
    note = tmp_path / "pid"

    def act() -> None:
        process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
        note.write_text(str(process.pid))
        process.wait()

    assert run.child(act, tmp_path / "log", 2.0) == "no end in 2 s"
    time.sleep(0.2)
    stat = Path(f"/proc/{note.read_text()}/stat")
    assert not stat.exists() or stat.read_text().split()[2] == "Z"


def test_what_there_is_no_time_for_is_said(pretend: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    limits = []

    def child(act: Any, log: Path, limit_s: float) -> str:
        log.write_text("")
        if log.stem == "machine":
            act()
        else:
            limits.append(limit_s)
            clock[0] += 60
        return "done" if log.stem == "machine" else "no end in 60 s"

    monkeypatch.setattr(run, "child", child)
    given = run.arguments(["--tiny", "--out", str(tmp_path), "--budget", "115"])
    given.parts = "wrong,fine,broken"
    found = run.run(given)["parts"]
    assert limits == [60, 55] and found["broken"]["outcome"] == "not started: 0 s left"


def test_wrong_calls_are_refused(pretend: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        run.main(["--parts", "fine,fnie"])
    assert "--parts fnie: expected some of broken,endless,wrong,fine" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="there is no CUDA device here; --tiny runs every part on a CPU"):
        run.main(["--out", str(tmp_path), "--parts", "fine"])
    assert not (tmp_path / "results.json").exists()


def test_the_shell_script_runs_a_part_from_anywhere(tmp_path: Path) -> None:
    done = shell(tmp_path, "--tiny", "--out", "out", "--parts", "isolation", PYTHON=sys.executable)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "1 of 1 parts done as they must be" in done.stdout
    assert json.loads((tmp_path / "out" / "results.json").read_text())["parts"]["isolation"]["outcome"] == "done"


def test_the_shell_script_uses_what_the_kit_has(tmp_path: Path) -> None:
    python = tmp_path / "python"
    python.write_text('#!/bin/sh\nexport PYTHONPATH; echo "$PYTHONPATH ran $*"\n')
    python.chmod(0o755)
    for folder in ("kit/wheels", "kit/tokenizer", "kit/peers/trl", "kit/peers/automodel"):
        (tmp_path / folder).mkdir(parents=True)
    for wheel in ("kit/wheels/hydra.whl", "kit/peers/trl/trl.whl"):
        (tmp_path / wheel).touch()
    done = shell(tmp_path, "--tiny", PYTHON=str(python), KIT="kit", KIT_INSTALLED=str(tmp_path / "installed"))
    lines = done.stdout.splitlines()
    site, wheels = f"--target {tmp_path}/installed/site", f"{tmp_path}/kit/wheels/hydra.whl"
    assert "pip install" in lines[0] and "--no-index" in lines[0] and site in lines[0] and wheels in lines[0]
    assert sum(f"--target {tmp_path}/installed/peers/{peer}" in " ".join(lines) for peer in ("trl", "automodel")) == 2
    assert lines[-1].endswith(f"ran -m experiments.gpu.run --tokenizer {tmp_path}/kit/tokenizer --tiny")
    (tmp_path / "installed" / "peers").mkdir(parents=True)
    (tmp_path / "installed" / "site").mkdir()
    again = shell(tmp_path, "--tiny", PYTHON=str(python), KIT="kit", KIT_INSTALLED=str(tmp_path / "installed"))
    (line,) = again.stdout.splitlines()  # nothing is installed twice
    assert f"--peers {tmp_path}/installed/peers --tiny" in line and f"{tmp_path}/installed/site ran" in line
    refused = shell(tmp_path, KIT="nowhere")
    assert refused.returncode == 1 and "KIT=nowhere: there is no such folder" in refused.stderr


def shell(cwd: Path, *typed: str, **environment: str) -> Any:
    """Run the script in a folder, with nothing of this process's environment."""
    script = str(REPO / "experiments" / "gpu" / "run.sh")
    environment = {"PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1", **environment}
    return subprocess.run([script, *typed], cwd=cwd, env=environment, capture_output=True, text=True)

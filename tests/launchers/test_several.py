"""launcher=local without a sweep: one run in several processes, where a run belongs, equal to that of one process."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from sftlab.config.start import is_sweep, one_local_run
from tests.runs import compose, run_here
from tests.support import REPO, command, read_jsonl

Files = tuple[Path, Path]


@pytest.mark.parametrize(
    ("words", "one"),
    [
        (["launcher=local"], True),
        (["launcher=local", "launcher.processes_per_node=2", "run_dir=out", "optim.betas=[0.9,0.95]"], True),
        (["launcher=local", "data.path=a b,c.jsonl"], False),
        (["launcher=local", "optim.lr=1e-4,1e-3"], False),
        (["launcher=local", "seed=range(0,3)"], False),
        (["launcher=local", "-m"], False),
        (["launcher=local", "sweeper=optuna", "optim.lr=interval(1,2)"], False),
        (["launcher=local", "launcher.dry_run=true"], False),
        (["launcher=local", "hydra.sweep.dir=x"], False),
        (["launcher=local", "optim.lr=[1"], False),
        (["launcher=slurm"], False),
        (["seed=1"], False),
    ],
)
def test_one_run_is_asked_for_where_nothing_is_swept(words: list[str], one: bool) -> None:
    assert one_local_run(words) == one
    assert is_sweep([*words, "hydra.mode=RUN"]) is False


def typed(folder: Path, model: Path, data: Files, *words: str) -> list[str]:
    """Return a command for a run of two processes on a tiny model."""
    return [
        *("launcher=local", "launcher.processes_per_node=2", "model=hf", f"model.name_or_path={model}", "data=squad"),
        *(f"data.path={data[0]}", f"data.val_path={data[1]}", "trainer.batch_size=6", "evaluation.num_answers=2"),
        *("evaluation.max_new_tokens=3", "tracker=none", f"run_dir={folder}", *words),
    ]


def test_the_run_of_two_processes_is_that_of_one(tmp_path: Path, model_folder: Path, squad_files: Files) -> None:
    """The same losses, in run_dir, with nothing beside it; the same command again has nothing left to do."""
    words = typed(tmp_path / "out", model_folder, squad_files, "trainer.max_steps=2", "optim.lr=0.003")
    done = command("train", *words, cwd=tmp_path, cold=True)
    assert done.returncode == 0, done.stderr
    assert "2 x cpu" in done.stdout and "finished" in done.stdout and [p.name for p in tmp_path.iterdir()] == ["out"]
    same = ("trainer.max_steps=2", "trainer.batch_size=6", "optim.lr=0.003")
    assert run_here(compose(tmp_path / "one", model_folder, squad_files, *same)).startswith("score ")
    lines = {name: read_jsonl(tmp_path / name / "metrics.jsonl") for name in ("out", "one")}
    both = [{line["step"]: line["train/loss"] for line in lines[n] if "train/loss" in line} for n in lines]
    assert both[0].keys() == both[1].keys() == {1, 2} and both[0] == pytest.approx(both[1], rel=1e-4)
    assert {p.name for p in (tmp_path / "out" / "ranks").iterdir()} >= {"run_1_log.out", "run_1_log.err"}
    again = command("train", *words, cwd=tmp_path, cold=True)
    assert again.returncode == 0, again.stderr
    assert read_jsonl(tmp_path / "out" / "metrics.jsonl") == lines["out"]


def test_ctrl_c_saves_and_the_same_command_resumes(tmp_path: Path, model_folder: Path, squad_files: Files) -> None:
    words = typed(tmp_path / "out", model_folder, squad_files, "trainer.max_steps=400", "evaluation.num_answers=0")
    env = {**os.environ, "PYTHONPATH": str(REPO), "OMP_NUM_THREADS": "1"}
    run = [sys.executable, "-m", "sftlab.train", *words]
    process = subprocess.Popen(run, cwd=tmp_path, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    metrics = tmp_path / "out" / "metrics.jsonl"
    deadline_s = time.monotonic() + 300
    while not (metrics.exists() and metrics.read_text().count("train/loss") > 2) and time.monotonic() < deadline_s:
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    said = process.communicate(timeout=300)[0]
    assert process.returncode == 130, said
    assert json.loads((tmp_path / "out" / "summary.json").read_text())["status"] == "stopped"
    assert any((tmp_path / "out" / "checkpoints").glob("step_*/checkpoint.json"))


def test_a_rank_that_fails_ends_the_others(tmp_path: Path, model_folder: Path, squad_files: Files) -> None:
    words = typed(tmp_path / "out", tmp_path / "nothing", squad_files, "trainer.max_steps=2")
    done = command("train", *words, cwd=tmp_path, cold=True)
    assert done.returncode == 1 and "no such folder" in done.stderr
    assert json.loads((tmp_path / "out" / "summary.json").read_text())["status"] == "failed"

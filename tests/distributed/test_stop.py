"""A run that is told to stop saves at a step boundary and ends; one whose save fails ends too, and loses nothing."""

import json
import subprocess
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from tests.runs import Trouble, compose, measured, run_all


def test_gauntlet_29_a_signal_on_one_rank_stops_all_at_a_step_boundary(
    tmp_path: Path, model_folder: Path, squad_files: tuple[Path, Path]
) -> None:
    settings = ("trainer.max_steps=5", "trainer.log_every=2", "evaluation.num_answers=0")
    straight = compose(tmp_path / "straight", model_folder, squad_files, *settings)
    stopped = compose(tmp_path / "stopped", model_folder, squad_files, *settings)
    ends = run_all([straight, (stopped, Trouble(stop_at=3)), stopped], ranks=2)
    assert ends[1] == ["exit 75", "exit 75"] and ends[2] == ends[0]
    log = (tmp_path / "stopped/train.log").read_text()
    assert "step 3: saved" in log and "stopped by SIGTERM" in log and f"run_dir={tmp_path / 'stopped'}" in log
    assert "step_00000003, step 3" in log
    assert measured(tmp_path / "stopped") == measured(tmp_path / "straight")


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 3 MiB; a checkpoint of the tiny model takes 0.8 MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", folder], capture_output=True, text=True)
    if mounted.returncode:
        pytest.skip(f"no tmpfs can be mounted here: {mounted.stderr.strip()}")
    yield folder
    subprocess.run(["umount", folder], check=True)


@pytest.mark.parametrize("looks_free", [False, True], ids=["seen before", "met while writing"])
def test_gauntlet_29_a_full_disk_blocks_neither_the_run_nor_the_requeue(
    tmp_path: Path, small_disk: Path, model_folder: Path, squad_files: tuple[Path, Path], looks_free: bool
) -> None:
    settings = ("trainer.max_steps=8", "trainer.save_every=2", "evaluation.num_answers=0", "trainer.keep_checkpoints=1")
    run_dir = small_disk / "run"
    config = compose(run_dir, model_folder, squad_files, *settings)
    full = Trouble(fill_at=3, fill=small_disk / "other", looks_free=looks_free)
    stopping = {**config, "trainer": {**config["trainer"], "on_failed_save": "stop"}}
    ends = run_all([(config, replace(full, stop_at=5)), (stopping, full), config])
    assert ends[0] == ["exit 75"], "step 4 was not saved, the run went on; neither was step 5, and it left all the same"
    log = (run_dir / "train.log").read_text()
    assert "step 4: the checkpoint could not be written" in log and "step_00000002 is intact" in log
    assert "step 5: the checkpoint could not be written" in log
    said = "".join(line for line in log.splitlines() if "checkpoint could not be written" in line)
    assert ("No space left" in said) == looks_free and ("MiB left" in said) != looks_free
    assert "SaveFailed: the checkpoint of step 4" in ends[1][0]
    assert log.count("resumed from") == 2 and log.count("step_00000002, step 2") == 2
    assert ends[2][0].startswith("score")
    assert {step for step, _ in measured(run_dir, "train/loss")} == set(range(1, 9))
    assert sorted(p.name for p in (run_dir / "checkpoints").iterdir()) == ["latest", "step_00000008"]
    assert json.loads((run_dir / "summary.json").read_text())["status"] == "finished"

"""What `trainer.profile` leaves of a run's steps 5 to 8, read back."""

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from sftlab.training.profile import Profile
from tests.reports.test_run_report import embedded
from tests.runs import compose, run_here


def trace(run: Path) -> list[dict[str, Any]]:
    with gzip.open(run / "profile/trace.json.gz", "rt") as file:
        found: list[dict[str, Any]] = json.load(file)["traceEvents"]
    return found


def test_a_run_s_profile_is_of_four_steps_and_linked_in_its_report(
    tmp_path: Path, model_folder: Path, squad_files: Any
) -> None:
    settings = ("trainer.max_steps=9", "trainer.profile=true", "evaluation.num_answers=0", "trainer.batch_size=4")
    assert run_here(compose(tmp_path / "run", model_folder, squad_files, *settings)).startswith("score ")
    updates = [e for e in trace(tmp_path / "run") if str(e.get("name", "")).startswith("Optimizer.step#")]
    assert len(updates) == 4
    page = embedded(tmp_path / "run/report.html")
    assert page["links"] == ["profile/table.txt", "profile/trace.json.gz"]
    assert "Self CPU" in page["profile"] and "aten::" in (tmp_path / "run/profile/table.txt").read_text()
    assert "profiled 4 steps" in (tmp_path / "run/train.log").read_text()


@pytest.mark.parametrize(("steps", "profiled"), [(12, 4), (8, 4), (6, 2), (4, 0)])
def test_the_steps_pass_through_unchanged(tmp_path: Path, steps: int, profiled: int) -> None:
    said: list[str] = []
    seen = []
    for number in Profile(tmp_path, torch.device("cpu"), said.append).watched(iter(range(1, steps + 1))):
        torch.ones(number, number)
        seen.append(number)
    assert seen == list(range(1, steps + 1))
    assert said == ([f"profiled {profiled} steps: {tmp_path / 'profile'}"] if profiled else [])
    assert not profiled or sum(e.get("name") == "aten::ones" for e in trace(tmp_path)) == profiled

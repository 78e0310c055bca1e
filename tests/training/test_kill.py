"""A run killed -9 at random moments, the middle of a save among them: the experiment's code, with 3 kills."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from experiments.kill_test.run import Run, compare, kill_test
from tests.support import warmed
from tests.warm import Process

# What `python -m sftlab.train` does, with the cache of tokenised examples that is this run's own.
START = """
import os, runpy, datasets
datasets.config.HF_DATASETS_CACHE = os.environ["HF_DATASETS_CACHE"]
runpy.run_module("sftlab.train", run_name="__main__", alter_sys=True)
"""


def test_a_run_killed_three_times_equals_one_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The processes that are killed are real; they only need not import torch first."""

    def start(run: Run) -> Process:
        return warmed().start("-c", START, *run.arguments, cwd=tmp_path, env=run.env, output=run.output)

    monkeypatch.setattr(Run, "start", start)
    outcome = kill_test(tmp_path, kills=3, steps=30, ranks=1, seed=0)
    assert outcome.wrong == []
    assert len(outcome.kills) == 3 and any(hit.in_save for hit in outcome.kills)
    assert outcome.num_values > 30 * 5


LINES = [
    {"step": 0, "val/loss": 2.0},
    {"step": 1, "train/loss": 1.5, "perf/mfu": 0.1},
    {"step": 2, "train/loss": 1.25, "perf/mfu": 0.2},
]


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        (LINES, []),
        ([*LINES[:2], {**LINES[2], "perf/mfu": 0.3}], []),
        (LINES[:2], ["step 2: train/loss is missing"]),
        ([*LINES, LINES[2]], ["step 2: train/loss is there twice"]),
        ([*LINES, {"step": 3, "train/loss": 1.0}], ["step 3: train/loss is there, and not in the other run"]),
        (
            [*LINES[:2], {"step": 2, "train/loss": 1.2500000000000002}],
            ["step 2: train/loss is 1.2500000000000002, expected 1.25"],
        ),
    ],
)
def test_the_comparison_sees_every_difference(tmp_path: Path, lines: list[dict[str, Any]], said: list[str]) -> None:
    sides = []
    for name, content in (("straight", LINES), ("killed", lines)):
        folder = tmp_path / name
        (folder / "model").mkdir(parents=True)
        (folder / "model" / "model.safetensors").write_bytes(b"weights")
        (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in content))
        sides.append(SimpleNamespace(dir=folder, metrics=folder / "metrics.jsonl"))
    assert compare(*sides) == said
    (sides[1].dir / "model" / "model.safetensors").write_bytes(b"weighty")
    assert compare(*sides) == [*said, "model/model.safetensors differs"]

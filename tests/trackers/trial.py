"""A run that is stopped after step 3 of 5, which resumes at its checkpoint of step 2: told to a tracker as runs do."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from sftlab.common.tracker import About, Tracker

CONFIG: dict[str, Any] = {"model": {"name_or_path": "org/tiny-model"}, "optim": {"lr": 0.5}, "seed": 0}
ANSWER = {"id": "a", "prompt": "What?", "answer": "tea", "references": ["tea", "chai"]}
NAMES = {"train/loss", "val/loss", "time_s"}


def about(run_dir: Path, said: list[str]) -> About:
    run_dir.mkdir(parents=True, exist_ok=True)
    return About(run_dir, "sft/today/3", "sft/today", CONFIG, {"optim.lr": "0.5"}, 5, said.append)


def loss(step: int) -> float:
    return 4.0 / (step + 1)


def attempt(make: Callable[[About], Tracker], run_dir: Path, first: int, last: int, status: str) -> list[str]:
    """Tell a tracker of an attempt that begins after step `first`; return what it said."""
    said: list[str] = []
    tracker = make(about(run_dir, said))
    tracker.cut(first)
    if first == 0:
        tracker.write_numbers(0, 0.0, {"val/loss": loss(0)})
        tracker.write_answers(0, [ANSWER])
    for step in range(first + 1, last + 1):
        tracker.write_numbers(step, step * 2.0, {"train/loss": loss(step)})
    if status == "finished":
        tracker.write_numbers(last, last * 2.0, {"val/loss": loss(last)})
        tracker.write_answers(last, [ANSWER])
    tracker.close(status)
    return said


def stopped_and_resumed(make: Callable[[About], Tracker], run_dir: Path) -> list[str]:
    """Tell it of both attempts; return what it said."""
    return attempt(make, run_dir, 0, 3, "stopped") + attempt(make, run_dir, 2, 5, "finished")

"""What is written of a run's numbers, what is cut off at a resume, and what counts as the best."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from sftlab.common.metrics import Metrics, lower_is_better
from sftlab.common.tracker import Tracker
from tests.support import read_jsonl


@dataclass
class Answer:
    id: str
    answer: str


class Heard(Tracker):
    """A tracker that remembers what it was told."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []

    def write_numbers(self, step: int, time_s: float, values: Any) -> None:
        self.calls.append(("write", step, time_s, dict(values)))

    def write_answers(self, step: int, answers: Any) -> None:
        self.calls.append(("answers", step, list(answers)))

    def cut(self, step: int) -> None:
        self.calls.append(("cut", step))

    def close(self, status: str) -> None:
        self.calls.append(("close", status))


def test_a_line_holds_the_step_the_time_and_every_number_in_full(tmp_path: Path) -> None:
    path, tracker = tmp_path / "metrics.jsonl", Heard()
    metrics = Metrics(path, [tracker])
    third = 1 / 3
    metrics.write_numbers(4, 12.5, {"train/loss": third, "train/lr": 1e-300})
    assert read_jsonl(path) == [{"step": 4, "time_s": 12.5, "train/loss": third, "train/lr": 1e-300}], "at once"
    assert metrics.last == {"step": 4, "time_s": 12.5, "train/loss": third, "train/lr": 1e-300}
    metrics.write_answers(4, [Answer("a", "b")])
    metrics.write_answers(4, [])
    metrics.close("stopped")
    assert tracker.calls == [
        ("write", 4, 12.5, {"train/loss": third, "train/lr": 1e-300}),
        ("answers", 4, [{"id": "a", "answer": "b"}]),
        ("answers", 4, []),
        ("close", "stopped"),
    ]


def test_the_last_value_and_the_best_of_each_number(tmp_path: Path) -> None:
    metrics = Metrics(None)
    values = {"train/loss": [2.0, 0.5, 1.0], "val/f1": [0.1, 0.7, 0.3], "val/perplexity": [9.0, 3.0, 4.0]}
    for i in range(3):
        metrics.write_numbers(i, float(i), {name: found[i] for name, found in values.items()})
    metrics.write_numbers(
        3, 9.0, {"train/loss": math.nan, "val/f1": math.inf, "val/perplexity": -math.inf, "plain": 1.0}
    )
    assert metrics.best == {"train/loss": 0.5, "val/f1": 0.7, "val/perplexity": 3.0}
    assert metrics.last["step"] == 3 and math.isnan(metrics.last["train/loss"]) and metrics.last["val/f1"] == math.inf


@pytest.mark.parametrize(
    ("name", "lower"),
    [
        ("train/loss", True),
        ("val/loss", True),
        ("val/trivia/loss", True),
        ("val/perplexity", True),
        ("train/grad_norm", True),
        ("mem/peak_gib", True),
        ("val/token_accuracy", False),
        ("val/f1", False),
        ("val/exact_match", False),
        ("perf/tokens_per_s", False),
        ("perf/mfu", False),
        ("val/loss/f1", False),
    ],
)
def test_which_numbers_are_better_lower(name: str, lower: bool) -> None:
    assert lower_is_better(name) is lower


def five_steps(path: Path, trackers: Any = ()) -> Metrics:
    metrics = Metrics(path, trackers)
    for step in range(5):
        metrics.write_numbers(step, step * 2.0, {"val/loss": 5.0 - step, "val/f1": step / 10})
        metrics.write_answers(step, [Answer(f"q{step}", "tea"), Answer("z", "für")])
    return metrics


def test_a_resume_from_a_step_keeps_that_step_and_none_after_it(tmp_path: Path) -> None:
    path, tracker = tmp_path / "metrics.jsonl", Heard()
    five_steps(path).close()
    before = read_jsonl(path)
    with path.open("a") as file:
        file.write('{"step": 2, "time_s": 1.0, "tr')
    metrics = Metrics(path, [tracker])
    metrics.cut(3)
    assert read_jsonl(path) == before[:4]
    assert [line["step"] for line in read_jsonl(tmp_path / "samples.jsonl")] == [0, 0, 1, 1, 2, 2, 3, 3]
    assert metrics.last == {"step": 3, "time_s": 6.0, "val/loss": 2.0, "val/f1": 0.3}
    assert metrics.best == {"val/loss": 2.0, "val/f1": 0.3}, "of steps that are left only"
    metrics.write_numbers(4, 8.5, {"val/loss": 3.0})
    metrics.close()
    assert read_jsonl(path) == [*before[:4], {"step": 4, "time_s": 8.5, "val/loss": 3.0}]
    assert tracker.calls[0] == ("cut", 3)
    assert {p.name for p in tmp_path.iterdir()} == {"metrics.jsonl", "samples.jsonl"}


def test_a_kill_while_lines_are_cut_loses_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def killed(self: Path, target: Path) -> None:
        raise KeyboardInterrupt

    metrics = five_steps(tmp_path / "metrics.jsonl")
    before = read_jsonl(tmp_path / "metrics.jsonl"), read_jsonl(tmp_path / "samples.jsonl")
    monkeypatch.setattr(Path, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        metrics.cut(2)
    assert (read_jsonl(tmp_path / "metrics.jsonl"), read_jsonl(tmp_path / "samples.jsonl")) == before


def test_what_a_run_knew_is_forgotten_when_it_is_cut(tmp_path: Path) -> None:
    metrics = five_steps(tmp_path / "metrics.jsonl")
    metrics.cut(1)
    assert metrics.last["step"] == 1 and metrics.best == {"val/loss": 4.0, "val/f1": 0.1}
    metrics.cut(0)
    assert metrics.last == metrics.best == {}
    assert (tmp_path / "metrics.jsonl").read_text() == (tmp_path / "samples.jsonl").read_text() == ""
    metrics.close()


def test_other_ranks_write_nothing_and_remember_all_the_same(tmp_path: Path) -> None:
    metrics = Metrics(None)
    metrics.write_numbers(1, 1.0, {"val/loss": 2.0})
    metrics.write_answers(1, [Answer("a", "b")])
    metrics.cut(0)
    metrics.close()
    assert metrics.last["val/loss"] == 2.0 and metrics.best == {"val/loss": 2.0}


def test_samples_are_written_beside_the_numbers_each_with_its_step(tmp_path: Path) -> None:
    metrics = Metrics(tmp_path / "metrics.jsonl")
    metrics.write_answers(3, [])
    assert not (tmp_path / "samples.jsonl").exists()
    metrics.write_answers(3, [Answer("a", "x"), Answer("b", "y")])
    metrics.write_answers(6, [Answer("a", "z")])
    metrics.close()
    assert read_jsonl(tmp_path / "samples.jsonl") == [
        {"step": 3, "id": "a", "answer": "x"},
        {"step": 3, "id": "b", "answer": "y"},
        {"step": 6, "id": "a", "answer": "z"},
    ]

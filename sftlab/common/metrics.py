"""Metrics: what a run measured, one JSON object per line, with the last and the best value of each.

`metrics.jsonl` is written by rank 0 and flushed as it is written; trackers get the same numbers. Losses are in nats per
target, times in wall seconds since the first step began.
"""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

from sftlab.common.files import open_plain, read_jsonl, spared_by_a_full_disk, write_jsonl
from sftlab.common.secrets import strike_values
from sftlab.common.tracker import Tracker

T = TypeVar("T")

SAMPLES = "samples.jsonl"  # generated answers, beside metrics.jsonl


class Metrics:
    """The numbers of a run, on rank 0; on other ranks `path` is None and nothing is written."""

    def __init__(self, path: Path | None, trackers: Sequence[Tracker] = ()) -> None:
        self.trackers = trackers
        self.path = path
        self.last: dict[str, float] = {}
        self.best: dict[str, float] = {}
        self._file = open_plain(path, "a") if path else None

    def cut(self, step: int) -> None:
        """Delete what was written after `step`, and a torn last line; remember the rest.

        Every run begins with this. A run that resumes at step k knows what it knew then; one that begins knows nothing.
        """
        if self.path is None or self._file is None:
            return
        self._file.close()
        cut_lines(self.path.with_name(SAMPLES), step)
        kept = cut_lines(self.path, step)
        self._file = open_plain(self.path, "a")
        self.last, self.best = {}, {}
        for line in kept:
            self._remember(line)
        for tracker in self.trackers:
            tracker.cut(step)

    def at_start(self, sample: Callable[..., T]) -> tuple[dict[str, float], list[T]]:
        """Return what was scored before the first step, and the answers, each made with `sample`.

        Numbers written by the evaluation of step 0 are those that begin with val/.
        """
        if self.path is None:
            return {}, []
        first = next((line for line in read_jsonl(self.path) if line["step"] == 0), {})
        lines = [line for line in read_jsonl(self.path.with_name(SAMPLES)) if line.pop("step") == 0]
        made = [sample(**{**line, "references": tuple(line["references"])}) for line in lines]
        return {name: value for name, value in first.items() if name.startswith("val/")}, made

    def write_numbers(self, step: int, time_s: float, values: Mapping[str, float]) -> None:
        """Write one line, in full precision, once."""
        line = {"step": step, "time_s": time_s, **values}
        self._remember(line)
        if self._file is None:
            return
        with spared_by_a_full_disk():
            self._file.write(json.dumps(line) + "\n")
            self._file.flush()
        for tracker in self.trackers:
            tracker.write_numbers(step, time_s, values)

    def write_answers(self, step: int, answers: Sequence[Any]) -> None:
        """Write the answers of an evaluation (dataclasses; there may be none) to samples.jsonl, one JSON object a line.

        Trackers get them without secrets.
        """
        if self._file is None or self.path is None:
            return
        lines = [asdict(a) for a in answers]
        if lines:
            with open_plain(self.path.with_name(SAMPLES), "a") as file:
                file.writelines(json.dumps({"step": step, **line}) + "\n" for line in lines)
        struck = strike_values(lines) if self.trackers else []
        for tracker in self.trackers:
            tracker.write_answers(step, struck)

    def close(self, status: str = "finished") -> None:
        """Close the file and the trackers. `status` is finished, stopped or failed."""
        if self._file is not None:
            with spared_by_a_full_disk():
                self._file.close()
        for tracker in self.trackers:
            tracker.close(status)

    def _remember(self, values: Mapping[str, Any]) -> None:
        for name, value in values.items():
            self.last[name] = value
            if "/" in name and math.isfinite(value):
                choose = min if lower_is_better(name) else max
                self.best[name] = choose(self.best.get(name, value), value)


def cut_lines(path: Path, step: int) -> list[dict[str, Any]]:
    """Keep the lines of steps up to `step` in a file (none for step 0), and return them."""
    kept = [line for line in read_jsonl(path) if step and line["step"] <= step]
    if path.exists():
        write_jsonl(path, kept)
    return kept


def lower_is_better(name: str) -> bool:
    """Return whether smaller values of a metric are better ones."""
    return name.startswith("time/") or name.endswith(("loss", "perplexity", "grad_norm", "peak_gib"))

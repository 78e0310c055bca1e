"""Metrics: what a run measured, one JSON object per line, with the last and the best value of each.

`metrics.jsonl` is written by rank 0 and flushed as it is written; trackers get the same numbers. Losses are in nats per
target, times in wall seconds since the first step began.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from sftlab.common.files import read_jsonl, write_jsonl
from sftlab.common.trackers import Tracker

SAMPLES = "samples.jsonl"  # generated answers, beside metrics.jsonl


class Metrics:
    """The numbers of a run, on rank 0; on other ranks `path` is None and nothing is written."""

    def __init__(self, path: Path | None, trackers: Sequence[Tracker] = ()) -> None:
        self.trackers = trackers
        self.path = path
        self.last: dict[str, float] = {}
        self.best: dict[str, float] = {}
        self._file = path.open("a", encoding="utf-8") if path else None

    def cut(self, step: int) -> None:
        """Delete what was written after `step`, and a torn last line; remember the rest.

        Every run begins with this. A run that resumes at step k knows what it knew then; one that begins knows nothing.
        """
        if self.path is None or self._file is None:
            return
        self._file.close()
        cut_lines(self.path.with_name(SAMPLES), step)
        kept = cut_lines(self.path, step)
        self._file = self.path.open("a", encoding="utf-8")
        self.last, self.best = {}, {}
        for line in kept:
            self._remember(line)
        for tracker in self.trackers:
            tracker.cut(step)

    def write_numbers(self, step: int, time_s: float, values: Mapping[str, float]) -> None:
        """Write one line, in full precision, once."""
        line = {"step": step, "time_s": time_s, **values}
        self._remember(line)
        if self._file is None:
            return
        self._file.write(json.dumps(line) + "\n")
        self._file.flush()
        for tracker in self.trackers:
            tracker.write_numbers(step, values)

    def samples(self, step: int, samples: Sequence[Any]) -> None:
        """Write generated answers (dataclasses) to samples.jsonl beside the numbers, one JSON object per line."""
        if self._file is None or not samples:
            return
        with Path(self._file.name).with_name(SAMPLES).open("a", encoding="utf-8") as file:
            file.writelines(json.dumps({"step": step, **asdict(s)}) + "\n" for s in samples)

    def write_text(self, step: int, name: str, text: str) -> None:
        """Hand a text to the trackers."""
        for tracker in self.trackers:
            tracker.write_text(step, name, text)

    def close(self) -> None:
        """Close the file and the trackers."""
        if self._file is not None:
            self._file.close()
        for tracker in self.trackers:
            tracker.close()

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
    return name.endswith(("loss", "perplexity", "grad_norm", "peak_gib"))

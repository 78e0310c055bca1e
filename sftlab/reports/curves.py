"""Curves of a run: every metric over the steps, thinned while they come in, so that any length of run fits a page.

A curve keeps at most MOST points. When there are more, neighbours are joined: a point is then the mean of the steps
that it stands for, with their least and greatest value. Adding a value costs the same at step 10 and at step 100,000.
"""

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sftlab.common.files import each_of_jsonl

MOST = 1000  # points, about as many as a screen has columns

Bucket = list[float]  # the first step, the last, number of values, their sum, the least, the greatest


@dataclass
class Curve:
    """One metric. `per_point` values are joined in a point, which doubles when there are MOST points."""

    buckets: list[Bucket] = field(default_factory=list)
    per_point: int = 1

    def add(self, step: int, value: float) -> None:
        """Add a value that is finite."""
        if self.buckets and self.buckets[-1][2] < self.per_point:
            self.buckets[-1] = joined(self.buckets[-1], [step, step, 1, value, value, value])
            return
        if len(self.buckets) == MOST:
            self.buckets = [joined(*self.buckets[i : i + 2]) for i in range(0, MOST, 2)]
            self.per_point *= 2
        self.buckets.append([step, step, 1, value, value, value])

    @classmethod
    def of(cls, steps: Sequence[int], values: Sequence[float]) -> "Curve":
        """Return the curve to which these values would have been added one by one, 10 times faster."""
        per_point = 1
        while -(-len(values) // per_point) > MOST:
            per_point *= 2
        made = cls(per_point=per_point)
        for i in range(0, len(values), per_point):
            part, last = values[i : i + per_point], min(i + per_point, len(values)) - 1
            made.buckets.append([steps[i], steps[last], len(part), sum(part), min(part), max(part)])
        return made

    def points(self) -> list[tuple[float, ...]]:
        """Return (step, mean) of each point; of joined values (middle step, mean, least, greatest)."""
        if self.per_point == 1:
            return [(int(b[0]), rounded(b[3])) for b in self.buckets]
        return [
            (rounded((b[0] + b[1]) / 2, 9), rounded(b[3] / b[2]), rounded(b[4]), rounded(b[5])) for b in self.buckets
        ]


class Curves:
    """All metrics of a run by name."""

    def __init__(self, lines: Iterable[Mapping[str, Any]] = ()) -> None:
        self.by_name: dict[str, Curve] = {}
        self.first: dict[str, float] = {}
        self.last: dict[str, float] = {}
        self.totals: dict[str, float] = {}  # of `time/`, which are seconds per step since the line before
        self.timed_steps = self.timed_until = 0
        self._read(lines)

    @classmethod
    def read(cls, run_dir: Path) -> "Curves":
        """Return the curves in a run's metrics.jsonl."""
        return cls(each_of_jsonl(run_dir / "metrics.jsonl"))

    def add(self, step: int, time_s: float, values: Mapping[str, float]) -> None:
        """Add the numbers of a step; those that are not finite are left out."""
        finite = {name: value for name, value in values.items() if math.isfinite(value)}
        self._note(step, time_s, finite)
        for name, value in finite.items():
            self.by_name.setdefault(name, Curve()).add(step, value)

    def _read(self, lines: Iterable[Mapping[str, Any]]) -> None:
        """Add many lines. Nothing but numbers is kept of them, or Python's garbage collector would visit it all."""
        steps: defaultdict[str, list[int]] = defaultdict(list)
        values: defaultdict[str, list[float]] = defaultdict(list)
        for line in lines:
            step = line.get("step")
            if is_number(step):
                for name, value in line.items():
                    if is_number(value):
                        steps[name].append(step)  # type: ignore[arg-type]
                        values[name].append(value)
        timed = sorted({step for name in steps if name.startswith("time/") for step in steps[name]})
        since = dict(zip(timed, map(int.__sub__, timed, [0, *timed]), strict=False))
        self.timed_until = self.timed_steps = timed[-1] if timed else 0
        for name, column in values.items():
            self.last[name] = column[-1]
            if name in ("step", "time_s"):
                continue
            self.by_name[name] = Curve.of(steps[name], column)
            if steps[name][0] == 0:
                self.first[name] = column[0]
            if name.startswith("time/"):
                self.totals[name] = sum(value * since[step] for step, value in zip(steps[name], column, strict=True))

    def _note(self, step: int, time_s: float, values: Mapping[str, float]) -> None:
        """Keep the first and the last of each number, and the sums of seconds; all are finite."""
        timed = [name for name in values if name.startswith("time/")]
        if timed:
            steps = step - self.timed_until
            self.timed_until, self.timed_steps = step, self.timed_steps + steps
            for name in timed:
                self.totals[name] = self.totals.get(name, 0.0) + values[name] * steps
        self.last.update(values)
        self.last["step"] = step
        if math.isfinite(time_s):
            self.last["time_s"] = time_s
        if step == 0:
            self.first.update(values)


def joined(a: Bucket, b: Bucket | None = None) -> Bucket:
    """Return two neighbouring buckets as one."""
    return a if b is None else [a[0], b[1], a[2] + b[2], a[3] + b[3], min(a[4], b[4]), max(a[5], b[5])]


def rounded(value: float, digits: int = 6) -> float:
    """Return a number in so many significant digits."""
    return float(f"{value:.{digits}g}")


def is_number(value: Any) -> bool:
    """Return whether a value of a file is a finite number."""
    return type(value) in (int, float) and value - value == 0

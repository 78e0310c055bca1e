"""The record of a sweep, `sweep.json`: its points, how they were launched and from where."""

import json
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml

from sftlab.common import run_directory

FILE = "sweep.json"


@dataclass(frozen=True)
class Sweep:
    """A sweep's directory and what its sweep.json says. A point is {num, overrides, job_id, run_dir}."""

    dir: Path
    cwd: str  # the jobs' working directory, against which paths in their configs are meant
    command: list[str]
    launcher: dict[str, Any]
    task: str = "sftlab.train"
    name: str = "sft"
    created: str = field(default_factory=lambda: time.strftime("%Y-%m-%dT%H:%M:%S%z"))
    swept: list[str] = field(default_factory=list)
    points: list[dict[str, Any]] = field(default_factory=list)

    @classmethod
    def read(cls, folder: Path) -> "Sweep":
        """Return the record in a sweep's directory. Raises: ValueError if it is none."""
        try:
            record = json.loads((folder / FILE).read_text())
        except FileNotFoundError:
            raise ValueError(f"{folder} is no sweep's directory: it has no {FILE}") from None
        return cls(dir=folder, **record)

    def write(self) -> None:
        """Write the record whole: a reader sees the old one or the new one."""
        record = {key: value for key, value in vars(self).items() if key != "dir"}
        partial = self.dir / f".{FILE}.{os.getpid()}"
        partial.write_text(json.dumps(record, indent=1))
        partial.replace(self.dir / FILE)

    def run_dir(self, num: int) -> Path:
        """Return the directory of a point."""
        return self.dir / str(next(point["run_dir"] for point in self.points if point["num"] == num))

    def config(self, num: int) -> dict[str, Any]:
        """Return a point's config, as it was written at submission."""
        config: dict[str, Any] = yaml.load((self.run_dir(num) / run_directory.CONFIG).read_text(), run_directory.LOADER)
        return config

    def with_points(self, points: Sequence[tuple[int, Sequence[str], Mapping[str, Any]]]) -> "Sweep":
        """Write the directories of new points (number, overrides, config), and return the record with them.

        Raises: RunDirError if a directory holds a run of another config.
        """
        new = []
        for num, overrides, config in points:
            run_directory.reserve(self.dir / str(num), config, overrides)
            new.append({"num": num, "overrides": list(overrides), "job_id": None, "run_dir": str(num)})
        nums = {point["num"] for point in new}
        points_now = sorted([p for p in self.points if p["num"] not in nums] + new, key=lambda p: p["num"])
        return replace(self, points=points_now, swept=differing([p["overrides"] for p in points_now]))

    def launched(self, options: Mapping[str, Any], job_ids: Mapping[int, str | None]) -> "Sweep":
        """Return the record after a submission."""
        points = [p | {"job_id": job_ids.get(p["num"], p["job_id"])} for p in self.points]
        return replace(self, launcher=dict(options), points=points)


def differing(overrides: Sequence[Sequence[str]]) -> list[str]:
    """Return the names of the overrides in which points differ, in the order in which they were given."""
    named = [dict(o.lstrip("+~").partition("=")[::2] for o in point) for point in overrides]
    names = dict.fromkeys(name for point in named for name in point)
    return [name for name in names if len({point.get(name) for point in named}) > 1]


def read_json(file: Path) -> dict[str, Any]:
    """Return a JSON object; an empty one where the file is missing or not whole."""
    try:
        found: dict[str, Any] = json.loads(file.read_text())
    except (OSError, ValueError):
        return {}
    return found

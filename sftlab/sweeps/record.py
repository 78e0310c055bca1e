"""The one record of a sweep: `sweep.json`, read and written here, and its points as their directories tell.

A sweep's directory is the only interface between what launches a sweep and what looks at it: `sweep.json` lists the
points and how they were launched, `<num>/` is the run directory of a point with the config that will run, `code/` the
code that will run it, `.submitit/` the log of every rank. A sweep that ran in one process has no `sweep.json`.
"""

import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from sftlab.common import run_directory
from sftlab.common.files import read_json, write_json
from sftlab.common.renamed import in_todays_names
from sftlab.common.secrets import strike_values
from sftlab.common.squeue import Job
from sftlab.launchers.launcher import Points
from sftlab.sweeps.points import Point, numbered, read_point

FILE = "sweep.json"
COMPARISON = "sftlab.compare"  # the task of runs that were not launched together
STORED = ("cwd", "command", "launcher", "task", "name", "created")


@dataclass(frozen=True)
class Sweep:
    """A sweep: its directory, what sweep.json says, and its points as they were when it was read.

    `cwd` is the working directory against which paths in the configs of points are meant. An entry is what is stored
    of a point: {num, overrides, job_id, run_dir}, and `pruned` where the search stopped it.
    """

    folder: Path
    cwd: str = ""
    command: Sequence[str] = ()
    launcher: Mapping[str, Any] = field(default_factory=dict)
    task: str = "sftlab.train"
    name: str = "sft"
    created: str = field(default_factory=lambda: time.strftime("%Y-%m-%dT%H:%M:%S%z"))
    entries: Sequence[Mapping[str, Any]] = ()
    points: Sequence[Point] = ()

    @classmethod
    def read(cls, folder: Path) -> "Sweep":
        """Return the sweep in a directory, without a look at its points.

        Raises: ValueError if it holds no sweep, or if its record is none: it may be somebody else's.
        """
        if not folder.is_dir():
            raise ValueError(f"dir={folder}: no such folder; expected a sweep's, as sweeps/<name>/<time>")
        record = in_todays_names(read_json(folder / FILE))
        if record:
            refuse_shape(record, folder / FILE)
            return cls(
                folder, **{key: record[key] for key in STORED if key in record}, entries=record.get("points", ())
            )
        if not (folder / "multirun.yaml").is_file() and not numbered(folder):
            raise ValueError(f"dir={folder} is no sweep's folder: it has neither {FILE} nor points 0, 1, ...")
        return cls(folder, created="")

    @property
    def is_search(self) -> bool:
        """Whether Optuna proposed the points."""
        return (self.folder / "optuna.jsonl").exists()

    @property
    def is_launched(self) -> bool:
        """Whether the points were launched as a sweep; else they are runs that somebody compares."""
        return self.task != COMPARISON

    def write(self) -> None:
        """Write sweep.json whole: a reader sees the old one or the new one."""
        record = {key: getattr(self, key) for key in STORED} | {"points": list(self.entries)}
        write_json(self.folder / FILE, strike_values(record), indent=1)

    def with_points(self, points: Sequence[tuple[int, Sequence[str], Mapping[str, Any]]]) -> "Sweep":
        """Write the directories of new points (number, overrides, config), and return the sweep with them.

        Raises: RunDirError if a directory holds a run of another config.
        """
        new = []
        for num, overrides, config in points:
            run_directory.reserve(self.folder / str(num), config, overrides)
            new.append({"num": num, "overrides": list(overrides), "job_id": None, "run_dir": str(num)})
        nums = {entry["num"] for entry in new}
        return replace(
            self, entries=sorted([*(e for e in self.entries if e["num"] not in nums), *new], key=lambda e: e["num"])
        )

    def with_jobs(self, options: Mapping[str, Any], job_ids: Mapping[int, str | None]) -> "Sweep":
        """Return the sweep after points were started with these options of a launcher."""
        entries = [{**e, "job_id": job_ids.get(e["num"], e["job_id"])} for e in self.entries]
        return replace(self, launcher=dict(options), entries=entries)

    def with_pruned(self, num: int) -> "Sweep":
        """Return the sweep after the search stopped a point."""
        return replace(self, entries=[{**e, "pruned": True} if e["num"] == num else e for e in self.entries])

    def job_id(self, num: int) -> str | None:
        """Return the job of a point, None where it has none."""
        return next((e["job_id"] for e in self.entries if e["num"] == num), None)

    def run_dir(self, num: int) -> Path:
        """Return the directory of a point."""
        return self.folder / str(next((e["run_dir"] for e in self.entries if e["num"] == num), num))

    def config(self, num: int) -> dict[str, Any]:
        """Return the config of a point, as it was written at submission."""
        return run_directory.read_config(self.run_dir(num))

    def to_run(self, nums: Sequence[int], code: Path) -> Points:
        """Return these points as a launcher takes them."""
        return Points(self.folder, self.name, self.cwd, code, {num: self.run_dir(num) for num in nums})

    def observed(self, jobs: Mapping[str, Job], planned: Sequence[Sequence[str]] = ()) -> "Sweep":
        """Return the sweep with its points as they are now.

        `jobs` is SLURM's word by job id; `planned` are the overrides of each point where there is no sweep.json.
        """
        known: dict[int, Mapping[str, Any]] = {n: {"overrides": o} for n, o in enumerate(planned)}
        known |= {n: known.get(n, {}) for n in numbered(self.folder)}
        known |= {int(e["num"]): e for e in self.entries}
        return replace(self, points=[read_point(self.folder, num, known[num], jobs) for num in sorted(known)])

    def only(self, nums: Sequence[int]) -> "Sweep":
        """Return the sweep with some of its points."""
        return replace(self, points=[p for p in self.points if p.num in nums])

    @cached_property
    def swept(self) -> list[str]:
        """The names of the overrides in which points differ, in the order in which they were given."""
        settings = [p.settings for p in self.points if p.overrides or p.state != "missing"]
        names = dict.fromkeys(name for s in settings for name in s)
        return [n for n in names if len({s.get(n) for s in settings}) > 1]

    def chosen(self, point: Point) -> dict[str, str]:
        """Return a point's values of what was swept."""
        return {name: point.settings.get(name, "") for name in self.swept}


def refuse_shape(record: Mapping[str, Any], file: Path) -> None:
    """Raise ValueError if a record is none that we wrote: a point lies in the sweep's own folder, a job has an id."""

    def wrong(what: str) -> ValueError:
        return ValueError(f"{file}: {what}; this is not the record of a sweep")

    for key in ("cwd", "task", "name", "created"):
        if not isinstance(record.get(key, ""), str) or not record.get(key, "").isprintable():
            raise wrong(f"{key}={record[key]!r}")
    if not isinstance(record.get("launcher", {}), Mapping):
        raise wrong(f"launcher={record['launcher']!r}")
    if not isinstance(record.get("command", []), list) or not isinstance(record.get("points", []), list):
        raise wrong("command and points are no lists")
    for entry in record.get("points", []):
        if not isinstance(entry, Mapping) or type(entry.get("num")) is not int or entry["num"] < 0:
            raise wrong(f"points has {entry!r}")
        if not re.fullmatch(r"[\w-][\w.-]*", str(entry.get("run_dir"))):
            raise wrong(f"point {entry['num']} has run_dir={entry.get('run_dir')!r}, which is no folder in the sweep")
        job = str(entry.get("job_id"))
        if (
            isinstance(entry.get("job_id"), Mapping) or not job.isprintable() or re.search(r"^[-.]|[/\\*?\[\]]", job)
        ):  # logs are found by it, and SLURM gets it
            raise wrong(f"point {entry['num']} has job_id={entry.get('job_id')!r}")
        if not all(isinstance(override, str) for override in entry.get("overrides", [])):
            raise wrong(f"point {entry['num']} has overrides that are no texts")

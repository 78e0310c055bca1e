"""The points of a sweep, read from their directories: overrides, state, step, last and best metrics, what failed.

Any launcher may have made the directory, and it may still grow. A point that has ended is read from summary.json, the
others from the tail of metrics.jsonl, so 200 points take well under a second. The caller asks SLURM about the jobs.
"""

import json
import math
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sftlab.common.files import open_plain, read_json, read_jsonl, read_yaml, refuse_links
from sftlab.common.metrics import lower_is_better
from sftlab.common.owner import Owner, read_owner
from sftlab.common.squeue import ENDED, UNKNOWN, Job
from sftlab.sweeps.death import Death, death

TAIL_BYTES = 1 << 18
SILENT_S = 300.0  # a point without a job that has written nothing for so long is taken for dead
UNFINISHED = ("failed", "stopped", "silent", "missing", *(state.lower() for state in ENDED))


@dataclass(frozen=True)
class Point:
    """One point. `state` is finished, pruned, running, one of UNFINISHED, or another state of its SLURM job."""

    num: int
    overrides: tuple[str, ...]
    folder: Path
    job_id: str | None = None
    state: str = "missing"
    step: int | None = None
    max_steps: int | None = None
    left_s: float | None = None
    last: Mapping[str, float] = field(default_factory=dict)
    best: Mapping[str, float] = field(default_factory=dict)
    error: str = ""
    ended_early: str = ""  # why a finished point ended before its last step
    log: Path | None = None  # the file that says why the point ended, where one does

    @property
    def settings(self) -> dict[str, str]:
        """Return the overrides as {key: text}, without the + and ~ of Hydra's grammar."""
        return dict(split(o) for o in self.overrides)

    @property
    def ended(self) -> bool:
        """Whether the point will not change by itself any more."""
        return self.state in ("finished", "pruned", *UNFINISHED)

    def value(self, metric: str, score: str = "last") -> float | None:
        """Return the last or the best value of a metric, None before there is a finite one."""
        found = (self.best if score == "best" else self.last).get(metric)
        return found if found is not None and math.isfinite(found) else None


def split(override: str) -> tuple[str, str]:
    """Return an override's key and value."""
    key, _, value = override.partition("=")
    return key.lstrip("+~"), value


def numbered(folder: Path) -> list[int]:
    """Return the numbers of the points that have a folder."""
    return sorted(int(p.name) for p in folder.iterdir() if p.name.isdecimal() and p.is_dir())


def read_point(folder: Path, num: int, entry: Mapping[str, Any], jobs: Mapping[str, Job]) -> Point:
    """Return one point from its directory and its entry in sweep.json."""
    run_dir = refuse_links(folder, str(entry.get("run_dir", num)))
    summary = read_json(run_dir / "summary.json")
    if summary.get("status") == "finished" and "last" in summary:
        last, best = (numbers(summary.get(key)) for key in ("last", "best"))
        last |= {k: v for k, v in numbers(summary.get("model")).items() if k != "step"}  # the model that it left
    else:
        last, best = tail_of_metrics(run_dir / "metrics.jsonl")
    overrides = entry.get("overrides")
    if overrides is None:
        found = read_yaml(run_dir / "overrides.yaml")
        overrides = [o for o in found if isinstance(o, str)] if isinstance(found, list) else []
    step = whole(last.get("step"))
    max_steps = whole(numbers(summary).get("steps")) or steps_to_go(run_dir / "train.log")
    job = jobs.get(entry.get("job_id") or "")
    owner = read_owner(run_dir)
    lives = owner is not None and owner.lives(run_dir, lambda ids: {i: jobs.get(i, Job(UNKNOWN)) for i in ids})
    state = state_of(summary, job, run_dir, bool(entry.get("pruned")), owner, lives)
    left_s = None
    if state == "running" and step and max_steps and "time_s" in last:
        left_s = (max_steps - step) * last["time_s"] / step
    why = Death("")
    if state in UNFINISHED and state != "stopped":
        gone = owner if owner is not None and not owner.ended and not lives else None
        why = death(summary, job, gone, run_dir, rank_logs(folder, entry.get("job_id"), num))
    job_id = entry.get("job_id")
    early = str(summary.get("ended") or "") if state == "finished" else ""
    return Point(
        num, tuple(overrides), run_dir, job_id, state, step, max_steps, left_s, last, best, why.reason, early, why.log
    )


def state_of(
    summary: Mapping[str, Any],
    job: Job | None,
    run_dir: Path,
    pruned: bool,
    owner: Owner | None = None,
    lives: bool = False,
) -> str:
    """Return the state of a point in one word.

    It is the state of its job while that is alive, then that of its summary, then what is known of its process, and
    for a run of an earlier version what the times of its files suggest.
    A job that FAILED although the summary says finished has failed: another rank raised after rank 0 was done.
    """
    status = summary.get("status", "")
    if pruned:
        return "pruned"
    if job and job.state == "RUNNING":
        return "running"
    if job and not job.ended and job.state != UNKNOWN and status != "finished":
        return job.state.lower()
    if job and job.ended and job.state != "COMPLETED" and status in ("", "finished"):
        return job.state.lower()
    if status:
        return str(status)
    if lives:
        return "running"
    if job:
        return "failed" if job.ended else "silent"
    if owner is not None and not owner.ended:
        return "failed"
    written = [f.stat().st_mtime for f in map(run_dir.joinpath, ("metrics.jsonl", "train.log")) if f.exists()]
    if not written:
        return "missing"
    return "running" if time.time() - max(written) < SILENT_S else "silent"


def tail_of_metrics(file: Path) -> tuple[dict[str, float], dict[str, float]]:
    """Return the last value of every metric in the tail of a metrics.jsonl, and the best value of validation metrics.

    Only the last training step is parsed: parsing all took 0.7 s for 200 points of 400 steps.
    """
    last: dict[str, float] = {}
    best: dict[str, float] = {}
    lines = tail(file).split("\n")[:-1]
    for text in [line for line in lines[:-2] if '"val/' in line] + lines[-2:]:
        try:
            line = json.loads(text)
        except (ValueError, RecursionError):  # the tail begins inside this line
            continue
        line = numbers(line)
        last |= line
        for name, value in line.items():
            if name.startswith("val/") and math.isfinite(value):
                choose = min if lower_is_better(name) else max
                best[name] = choose(best.get(name, value), value)
    return last, best


def numbers(node: Any) -> dict[str, float]:
    """Return the entries of a record that are numbers: a file in somebody's folder may hold anything."""
    found = node.items() if isinstance(node, Mapping) else ()
    counts = {str(k): v for k, v in found if isinstance(v, int | float) and not isinstance(v, bool)}
    return {k: v for k, v in counts.items() if isinstance(v, float) or abs(v) < 1 << 63}


def whole(value: float | None) -> int | None:
    """Return a count, None where there is none that is finite."""
    return None if value is None or not math.isfinite(value) else int(value)


def steps_to_go(log: Path) -> int | None:
    """Return the number of steps of a run, from the lines of its log that begin with `step 3/60`."""
    found = re.findall(r"step \d+/(\d+)", tail(log, 4096))
    return int(found[-1]) if found else None


def tail(file: Path, most: int = TAIL_BYTES) -> str:
    """Return the end of a text file; nothing if it is not there."""
    try:
        with open_plain(file, "rb") as f:
            f.seek(max(0, f.seek(0, 2) - most))
            return str(f.read().decode(errors="replace"))
    except OSError:
        return ""


def series(folder: Path, metric: str) -> list[tuple[int, float]]:
    """Return every (step, value) of a metric in a metrics.jsonl; of a step that was written twice, the later value."""
    lines = [numbers(line) for line in read_jsonl(folder / "metrics.jsonl")]
    found = {step: line[metric] for line in lines if metric in line and (step := whole(line.get("step"))) is not None}
    return sorted((step, value) for step, value in found.items() if math.isfinite(value))


def samples(folder: Path, newest: bool = True) -> list[dict[str, Any]]:
    """Return the generated answers of a run's last (or first) evaluation; none where none were recorded."""
    found: dict[tuple[int, str], dict[str, Any]] = {}
    for line in read_jsonl(folder / "samples.jsonl"):
        if isinstance(line.get("step"), int) and all(isinstance(line.get(key), str) for key in ("id", "answer")):
            found[line["step"], line["id"]] = line
    wanted = (max if newest else min)((step for step, _ in found), default=0)
    return [line for (step, _), line in found.items() if step == wanted]


def rank_logs(sweep_dir: Path, job_id: str | None, num: int) -> list[Path]:
    """Return the files with the standard error of each rank of a point, wherever its launcher put them."""
    logs = list[Path]()
    if (sweep_dir / ".submitit").is_symlink():  # it leads to logs of somebody else
        return logs
    for stem in (job_id, f"local_{num}"):
        logs += sorted((sweep_dir / ".submitit").glob(f"{stem}/*_log.err")) if stem else []
        logs += sorted((sweep_dir / ".submitit").glob(f"*/{stem}_*_log.err")) if stem else []
    return list(dict.fromkeys(logs))


def tracebacks(sweep_dir: Path, point: Point) -> list[tuple[str, str]]:
    """Return (log file, its last traceback) for train.log and the logs of the ranks that hold one."""
    logs = [point.folder / "train.log", *rank_logs(sweep_dir, point.job_id, point.num)]
    found = {}
    for log in logs:
        text = tail(log)
        at = text.rfind("Traceback (most recent call last)")
        if at >= 0:
            found[str(log.relative_to(sweep_dir))] = text[at:].strip()
    return list(found.items())

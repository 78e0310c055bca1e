"""Waiting for a sweep: a live table of its points, and how each of them ended.

Watching is all that happens here: the jobs know nothing of it, so Ctrl-C, a lost connection or a killed terminal change
nothing in them.
"""

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.table import Table

from sftlab import jobs
from sftlab.launcher.record import Sweep, read_json

POLL_S = 2.0
FORGOTTEN_POLLS = 5  # so many times UNKNOWN in a row, and SLURM will not remember
LAST_LINE_BYTES = 65536


@dataclass(frozen=True)
class Point:
    """What is known of a point: SLURM's state, or in its absence what the run directory says."""

    num: int
    overrides: list[str]
    state: str
    ended: bool
    status: str  # of summary.json: finished, failed, stopped, or nothing yet
    step: int | None
    loss: float | None
    best: float | None
    left_s: int | None
    score: float | None
    error: str | None
    job_id: str | None

    @property
    def passed(self) -> bool:
        """True if it finished and SLURM does not say that some rank of it failed."""
        return self.status == "finished" and self.state in ("COMPLETED", jobs.UNKNOWN, "")


def look(sweep: Sweep, nums: Sequence[int] | None = None) -> list[Point]:
    """Return the points of a sweep as they are now. Raises: NoSlurm if there are jobs and SLURM does not answer."""
    points = [p for p in sweep.points if nums is None or p["num"] in nums]
    known = jobs.states(p["job_id"] for p in points if p["job_id"])
    return [_point(sweep, p, known.get(p["job_id"]) if p["job_id"] else None) for p in points]


def _point(sweep: Sweep, point: dict[str, Any], job: jobs.Job | None) -> Point:
    folder = sweep.dir / point["run_dir"]
    summary = read_json(folder / "summary.json")
    last = last_metrics(folder / "metrics.jsonl")
    best = summary.get("best", {}).get("val/loss", last.get("val/loss"))
    return Point(
        num=point["num"],
        overrides=[o for o in point["overrides"] if o.split("=")[0].lstrip("+") in sweep.swept],
        state=job.state if job else "",
        ended=job.ended if job else "status" in summary,
        status=summary.get("status", ""),
        step=last.get("step"),
        loss=last.get("train/loss"),
        best=best,
        left_s=job.left_s if job and job.state == "RUNNING" else None,
        score=summary.get("score"),
        error=summary.get("error"),
        job_id=point["job_id"],
    )


def wait(sweep: Sweep, nums: Sequence[int], console: Console) -> list[Point]:
    """Return once all these points have ended, showing them meanwhile: a table on a terminal, a line a change else."""
    shown: dict[int, str] = {}
    unknown: dict[int, int] = {}
    with Live(console=console, auto_refresh=False, transient=True) as live:
        while True:
            try:
                points = look(sweep, nums)
            except jobs.NoSlurm as error:  # a controller that restarts is away for minutes; the jobs go on
                live.update(str(error), refresh=True)
                time.sleep(5 * POLL_S)
                continue
            for p in points:
                unknown[p.num] = unknown.get(p.num, 0) + 1 if p.state == jobs.UNKNOWN else 0
            if console.is_terminal:
                live.update(table(points), refresh=True)
            else:
                changes(points, shown, console.print)
            if all(p.ended or unknown[p.num] >= FORGOTTEN_POLLS for p in points):
                break
            time.sleep(POLL_S)
    # a shared file system may show the last rank's summary a little late
    deadline_s = time.monotonic() + 10
    while any(p.state == "COMPLETED" and not p.status for p in points) and time.monotonic() < deadline_s:
        time.sleep(0.5)
        points = look(sweep, nums)
    console.print(table(points))
    return points


def changes(points: Sequence[Point], shown: dict[int, str], say: Callable[[str], None]) -> None:
    """Say every point's state that is not the one said last."""
    for p in points:
        if shown.get(p.num) != p.state:
            shown[p.num] = p.state
            say(f"point {p.num}  {p.state}  {' '.join(p.overrides)}")


def table(points: Sequence[Point]) -> Table:
    """Return the points as a table."""
    made = Table(box=None, padding=(0, 2, 0, 0))
    for name in ("point", "overrides", "state", "step", "loss", "best", "left"):
        made.add_column(name, justify="left" if name in ("overrides", "state") else "right", overflow="fold")
    for p in points:
        number = [f"{value:.4f}" if value is not None else "" for value in (p.loss, p.best)]
        left = "" if p.left_s is None else f"{p.left_s // 3600}:{p.left_s // 60 % 60:02}:{p.left_s % 60:02}"
        made.add_row(str(p.num), " ".join(p.overrides), word(p), "" if p.step is None else str(p.step), *number, left)
    return made


def word(point: Point) -> str:
    """Return a point's state in one word, where SLURM has one or not."""
    if point.passed:
        return "finished"
    return point.state if point.state not in ("", jobs.UNKNOWN) else point.status or "lost"


def failures(sweep: Sweep, points: Sequence[Point]) -> str:
    """Return what to show of the points that did not finish: why, the log that tells more, what to type."""
    failed = [p for p in points if not p.passed]
    lines = [f"{len(failed)} of {len(points)} points did not finish"]
    for p in failed:
        logs = sorted((sweep.dir / ".submitit" / (p.job_id or f"local_{p.num}")).glob("*_log.err"))
        with_traceback = [log for log in logs if "Traceback" in log.read_text(errors="replace")]
        why = p.error or {"TIMEOUT": "its time limit came without a warning that it could act on"}.get(p.state, "")
        lines.append(f"  point {p.num}  {word(p)}  {' '.join(p.overrides)}  {' '.join(why.split())[:300]}".rstrip())
        lines += [f"    {log}" for log in (with_traceback or logs[:1])]
    lines.append(f"run them again with\n  {come_back(sweep)} retry=failed")
    return "\n".join(lines)


def come_back(sweep: Sweep) -> str:
    """Return the command that shows a sweep again."""
    return f"python -m sftlab.sweep dir={sweep.dir}"


def last_metrics(file: Path) -> dict[str, Any]:
    """Return the newest value of every metric in the last part of a metrics.jsonl; of val/loss the best."""
    found: dict[str, Any] = {}
    try:
        with file.open("rb") as f:
            size = f.seek(0, 2)
            f.seek(max(0, size - LAST_LINE_BYTES))
            lines = f.read().decode(errors="replace").split("\n")[0 if size <= LAST_LINE_BYTES else 1 : -1]
    except OSError:
        return found
    for line in lines:
        values = json.loads(line)
        if "val/loss" in values:
            values["val/loss"] = min(values["val/loss"], found.get("val/loss", values["val/loss"]))
        found |= values
    return found

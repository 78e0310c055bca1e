"""What a point cost: when it ran, and its device-hours."""

from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from sftlab.common.files import read_json
from sftlab.sweeps.points import Point


@dataclass(frozen=True)
class Cost:
    """Seconds since 1970 at which the last attempt of a point began and ended; hours of all its devices; on GPUs?"""

    began_s: float | None
    ended_s: float | None
    hours: float | None
    gpu: bool


def cost(p: Point) -> Cost:
    """Return what a point cost. Hours are those of training over all attempts, or of the last one if it was longer."""
    began_s = moment(read_json(p.folder / "environment.json").get("started"))
    ended_s = max(
        (written for name in ("summary.json", "metrics.jsonl") if (written := changed(p.folder / name))), default=None
    )
    known = read_json(p.folder / "facts.json")
    ranks = known.get("ranks")
    spent_s = p.value("time_s") or 0.0
    if began_s is not None and ended_s is not None:
        spent_s = max(spent_s, ended_s - began_s)
    hours = spent_s / 3600 * (ranks if isinstance(ranks, int) else 1)
    return Cost(began_s, ended_s, hours if spent_s else None, known.get("device") == "cuda")


def moment(text: object) -> float | None:
    """Return a time such as 2026-01-31T12:00:00+0100 in seconds since 1970, None if it is none."""
    try:
        return datetime.strptime(str(text), "%Y-%m-%dT%H:%M:%S%z").timestamp()
    except ValueError:
        return None


def changed(file: Path) -> float | None:
    """Return when a file was written last, None where it is not there."""
    try:
        return file.lstat().st_mtime
    except OSError:
        return None

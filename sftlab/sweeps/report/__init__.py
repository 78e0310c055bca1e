"""report.html of a sweep: one file that needs no network. It holds its figures as JSON and a script that draws them.

`data` returns all that the page shows. report.js draws it, style.css says how it looks, page.html has the sections.
"""

import json
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from sftlab.common.files import read_json, write_whole
from sftlab.common.metrics import lower_is_better
from sftlab.sweeps import ranking
from sftlab.sweeps.points import UNFINISHED, Point, samples, series, tracebacks
from sftlab.sweeps.ranking import Group
from sftlab.sweeps.record import Sweep

MOST_CURVE_POINTS = 300  # of one curve, more than a screen shows; longer curves keep every n-th step and the last
MOST_SAMPLES = 12
HERE = Path(__file__).parent


def write_page(sweep: Sweep, groups: Sequence[Group], metric: str, score: str = "last") -> Path:
    """Write report.html into the sweep's folder; return its path."""
    file = sweep.folder / "report.html"
    write_whole(file, page(data(sweep, groups, metric, score)))
    return file


def page(found: dict[str, Any]) -> str:
    """Return the page with its style, its script and its data in it."""
    text = (HERE / "page.html").read_text(encoding="utf-8")
    # only "<" could end a script element early, and JSON may write it as an escape
    figures = json.dumps(found, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")
    parts = {
        "STYLE": (HERE / "style.css").read_text(encoding="utf-8"),
        "CHARTS": (HERE / "charts.js").read_text(encoding="utf-8"),
        "SCRIPT": (HERE / "report.js").read_text(encoding="utf-8"),
        "DATA": figures,
    }
    for name, part in parts.items():
        text = text.replace(f"/*{name}*/", part, 1)
    return text


def data(sweep: Sweep, groups: Sequence[Group], metric: str, score: str) -> dict[str, Any]:
    """Return every figure of the report. Scores are in full precision, curves in six significant digits."""
    winner = groups[0].best if groups else None
    best = sweep.folder / "best.yaml"
    return {
        "folder": str(sweep.folder),
        "name": sweep.folder.name if sweep.folder.parent.name == "sweeps" else sweep.folder.parent.name,
        "created": sweep.created,
        "written": time.strftime("%Y-%m-%d %H:%M"),
        "command": command(sweep),
        "commit": commit(sweep),
        "metric": metric,
        "score": score,
        "lower": lower_is_better(metric),
        "search": sweep.is_search,
        "params": [name for name in sweep.swept],
        "seeds": list(ranking.SEEDS),
        "points": [point(sweep, p, groups, metric, score) for p in sweep.points],
        "groups": [group(g) for g in groups],
        "verdict": ranking.verdict(groups),
        "importance": asdict(ranking.importance(groups)),
        "winner": winner.num if winner else None,
        "samples": answers(winner) if winner else [],
        "best_yaml": best.read_text(encoding="utf-8") if winner and best.exists() else "",
    }


def point(sweep: Sweep, p: Point, groups: Sequence[Group], metric: str, score: str) -> dict[str, Any]:
    """Return what the page shows of a point."""
    return {
        "num": p.num,
        "settings": sweep.chosen(p),
        "group": next(i for i, g in enumerate(groups) if p in g.points),
        "state": p.state,
        "step": p.step,
        "max_steps": p.max_steps,
        "time_s": p.last.get("time_s"),
        "score": p.value(metric, score),
        "last": {k: v for k in p.last if k.startswith(("val/", "train/loss")) and (v := p.value(k)) is not None},
        "curves": {name: curve(p.folder, name) for name in dict.fromkeys((metric, "val/loss", "train/loss"))},
        "error": p.error,
        "tracebacks": tracebacks(sweep.folder, p) if p.state in UNFINISHED else [],
    }


def group(g: Group) -> dict[str, Any]:
    """Return what the page shows of a group."""
    return {
        "settings": g.settings,
        "points": [p.num for p in g.points],
        "scored": [p.num for p, _ in g.scored],
        "mean": g.mean,
        "deviation": g.deviation,
        "best": g.best.num if g.best else None,
    }


def curve(folder: Path, metric: str) -> list[tuple[int, float]]:
    """Return at most MOST_CURVE_POINTS of a metric's (step, value), all of them measured."""
    found = series(folder, metric)
    every = -(-len(found) // MOST_CURVE_POINTS)
    kept = [pair for i, pair in enumerate(found) if i % max(every, 1) == 0 or i == len(found) - 1]
    return [(step, float(f"{value:.6g}")) for step, value in kept]


def answers(winner: Point) -> list[dict[str, Any]]:
    """Return some answers of the winner's last evaluation, spread evenly, beside those before training."""
    last, first = samples(winner.folder), {s["id"]: s["answer"] for s in samples(winner.folder, newest=False)}
    spread = last[:: max(1, len(last) // MOST_SAMPLES)][:MOST_SAMPLES]
    return [{**s, "before": first.get(s["id"])} for s in spread]


def commit(sweep: Sweep) -> str:
    """Return the commits that the points ran, with a + where files differed from it."""
    found = {}
    for p in sweep.points:
        seen = read_json(p.folder / "environment.json")
        if seen.get("git_commit"):
            found[seen["git_commit"][:10] + ("+" if seen.get("git_diff") else "")] = True
    return ", ".join(found)


def command(sweep: Sweep) -> str:
    """Return the command that made the sweep."""
    argv: Any = sweep.command
    if not argv and sweep.points:
        argv = read_json(sweep.points[0].folder / "environment.json").get("command")
    if not argv:
        return ""
    names = [str(a) for a in argv]
    start = next((i for i, a in enumerate(names) if a.endswith(("train.py", "sftlab.train", "sftlab-train"))), None)
    return " ".join(["python -m sftlab.train", *names[start + 1 :]]) if start is not None else " ".join(names)

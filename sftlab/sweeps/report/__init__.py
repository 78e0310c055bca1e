"""report.html of a sweep: one file that needs no network. It holds its figures as JSON and a script that draws them.

`data` returns all that the page shows. sweep.js draws it, sweep.html has the sections; what all pages share is in
sftlab/reports/.
"""

import os
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any
from urllib.parse import quote

from sftlab.common.files import read_json, read_text, write_whole
from sftlab.common.metrics import lower_is_better
from sftlab.reports import command as commands
from sftlab.reports import page as pages
from sftlab.sweeps import advice, costs, death, ranking
from sftlab.sweeps.points import UNFINISHED, Point, samples, series, tracebacks
from sftlab.sweeps.ranking import Group
from sftlab.sweeps.record import Sweep

MOST_CURVE_POINTS = 300  # of one curve, more than a screen shows; longer curves keep every n-th step and the last
MOST_SAMPLES = 12
HERE = Path(__file__).parent


def write_page(
    sweep: Sweep, groups: Sequence[Group], metric: str, score: str = "last", file: Path | None = None
) -> Path:
    """Write the page into the sweep's folder as report.html, or as `file`; return its path."""
    file = file or sweep.folder / "report.html"
    write_whole(file, page(data(sweep, groups, metric, score, file.parent)))
    return file


def page(found: dict[str, Any]) -> str:
    """Return the page with its data in it."""
    return pages.page(HERE / "sweep.html", (HERE / "sweep.js", HERE / "trials.js", HERE / "start.js"), found)


def data(sweep: Sweep, groups: Sequence[Group], metric: str, score: str, where: Path | None = None) -> dict[str, Any]:
    """Return every figure of the report. Scores are in full precision, curves in six significant digits.

    `where` is the folder of the page, from which it links to the points' own reports.
    """
    where = where or sweep.folder
    points = [point(sweep, p, groups, metric, score, where) for p in sweep.points]
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
        "kind": "sweep" if sweep.is_launched else "comparison",
        "gpus": any(p["gpu"] for p in points),
        "shown_curve": shown_curve(points, metric),
        "advice": [asdict(a) for a in advice.advice(sweep, groups, metric)],
        "points": points,
        "groups": [group(g) for g in groups],
        "verdict": ranking.verdict(groups),
        "importance": asdict(ranking.importance(groups)),
        "winner": winner.num if winner else None,
        "samples": answers(winner) if winner else [],
        "best_yaml": read_text(best) if winner and best.exists() else "",
    }


def shown_curve(points: Sequence[dict[str, Any]], metric: str) -> str:
    """Return the metric whose curves are shown first: the training loss if the metric has at most two points."""
    measured = max((len(p["curves"][metric]) for p in points), default=0)
    trained = max((len(p["curves"]["train/loss"]) for p in points), default=0)
    return "train/loss" if measured <= 2 < trained else metric


def point(sweep: Sweep, p: Point, groups: Sequence[Group], metric: str, score: str, where: Path) -> dict[str, Any]:
    """Return what the page shows of a point."""
    cost = costs.cost(p)
    own = p.folder / "report.html"
    return {
        "num": p.num,
        "label": str(p.num) if sweep.is_launched else str(p.folder),
        "report": quote(os.path.relpath(own, where)) if own.is_file() else "",
        "cause": death.cause(p.state, p.error) if p.state in UNFINISHED else "",
        "hours": cost.hours,
        "gpu": cost.gpu,
        "began_s": cost.began_s,
        "ended_s": cost.ended_s,
        "memory": p.value("mem/peak_gib"),
        "settings": sweep.chosen(p),
        "group": next(i for i, g in enumerate(groups) if p in g.points),
        "state": p.state,
        "step": p.step,
        "max_steps": p.max_steps,
        "time_s": p.value("time_s"),
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
    seen = (commands.commit(read_json(p.folder / "environment.json")) for p in sweep.points)
    return ", ".join(dict.fromkeys(found for found in seen if found))


def command(sweep: Sweep) -> str:
    """Return the command that made the sweep."""
    argv: Any = sweep.command
    if not argv and sweep.points:
        argv = read_json(sweep.points[0].folder / "environment.json").get("command")
    return commands.command(argv)

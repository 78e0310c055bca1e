"""What `sftlab.sweep` shows on a terminal: the points' status, the ranking, what mattered, what failed."""

from collections.abc import Iterable, Sequence

from rich.table import Table
from rich.text import Text

from sftlab.common.words import duration
from sftlab.sweeps.points import UNFINISHED
from sftlab.sweeps.ranking import Group, Importance
from sftlab.sweeps.record import Sweep

COLOURS = {"finished": "green", "running": "cyan", "pending": "yellow", "pruned": "dim"}
SHOWN_LINES = 3


def status(sweep: Sweep, metric: str) -> Table:
    """Return the table of all points: overrides, state, step, loss, best score, time left."""
    states = [p.state for p in sweep.points]
    counts = ", ".join(f"{states.count(s)} {s}" for s in dict.fromkeys(sorted(states)))
    made = Table(title=f"{sweep.folder}: {counts}", title_justify="left", box=None, padding=(0, 2, 0, 0))
    made.add_column("point", justify="right")
    for name in short(sweep.swept) or ["overrides"]:
        made.add_column(name, overflow="fold")
    shown = list(dict.fromkeys(("train/loss", metric)))  # once, if the loss is the metric
    for name in ("state", "step", *shown, f"best {metric}", "left"):
        made.add_column(name, justify="left" if name == "state" else "right")
    for p in sweep.points:
        step = "" if p.step is None else f"{p.step}/{p.max_steps}" if p.max_steps else str(p.step)
        chosen = list(sweep.chosen(p).values()) if sweep.swept else [" ".join(p.overrides)]
        made.add_row(
            str(p.num),
            *(Text(value) for value in chosen),
            Text(p.state, COLOURS.get(p.state, "red")),
            step,
            *(figure(v) for v in (*(p.last.get(name) for name in shown), p.best.get(metric))),
            "" if p.left_s is None else duration(p.left_s),
        )
    return made


def ranking(sweep: Sweep, groups: Sequence[Group], metric: str, score: str) -> Table:
    """Return the table of settings, best first, over their seeds."""
    made = Table(title=f"ranked by {score} {metric}", title_justify="left", box=None, padding=(0, 2, 0, 0))
    made.add_column("rank", justify="right")
    for name in short(groups[0].settings):
        made.add_column(name, overflow="fold")
    for name in ("mean", "deviation", "seeds", "points"):
        made.add_column(name, justify="left" if name == "points" else "right")
    for rank, g in enumerate(groups, 1):
        made.add_row(
            str(rank) if g.mean is not None else "-",
            *(Text(value) for value in g.settings.values()),
            figure(g.mean),
            figure(g.deviation),
            str(len(g.scored)) if g.complete else Text(f"{len(g.scored)} of {len(g.points)}", "red"),
            " ".join(str(p.num) for p in g.points),
        )
    return made


def importance(found: Importance, sweep: Sweep) -> list[str]:
    """Return the lines on what mattered."""
    if not found.shares:
        return []
    lines = [f"\nshare of the variance of {found.num_scores} scores between a setting's values (by chance alone)"]
    width = max(len(s.name) for s in found.shares)
    lines += [f"  {s.name:<{width}}  {s.share:6.1%}  ({s.chance:.1%})" for s in found.shares]
    if found.noise is not None:
        lines.append(f"  {'seeds':<{width}}  {found.noise:6.1%}  (between runs that differ in nothing else)")
    return lines


def early(sweep: Sweep) -> list[str]:
    """Return the lines on finished points that ended before their last step: where, and why."""
    return [f"point {p.num} ended after step {p.max_steps}: {p.ended}" for p in sweep.points if p.ended_early]


def failures(sweep: Sweep) -> list[str]:
    """Return the lines on points that did not finish: why, and where the log is."""
    lines = []
    for p in sweep.points:
        if p.state in UNFINISHED:
            why = p.error or {"missing": "it has no folder", "silent": "it wrote nothing for 5 min"}.get(p.state, "")
            chosen = " ".join(f"{name}={value}" for name, value in sweep.chosen(p).items())
            lines.append(f"point {p.num}  {p.state}  {chosen or ' '.join(p.overrides)}")
            lines += [f"    {' '.join(why.split())[:400]}"] if why else []
            log = p.log or (p.folder / "train.log" if (p.folder / "train.log").exists() else None)
            lines += [f"    {log}"] if log else []
    if lines:
        again = f"run them again with\n  python -m sftlab.sweep dir={sweep.folder} retry=failed"
        if sweep.is_search:
            again = f"continue the search with its own command and\n  hydra.sweep.dir={sweep.folder}"
        lines = ["", *lines, again]
    return lines


def short(names: Iterable[str]) -> list[str]:
    """Return the last word of each dotted name, or the whole name where two end in the same word."""
    leaves = [name.rpartition(".")[2] for name in names]
    return [leaf if leaves.count(leaf) == 1 else name for name, leaf in zip(names, leaves, strict=True)]


def figure(value: float | None) -> str:
    """Return a number in five significant digits; nothing for None."""
    return "" if value is None else f"{value:.5g}"

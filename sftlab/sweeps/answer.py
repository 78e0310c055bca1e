"""The answer of a sweep: ranking, what mattered and what is missing on the console; report.html and best.yaml."""

from rich.console import Console

from sftlab.common.files import read_yaml
from sftlab.common.run_directory import CONFIG
from sftlab.config.grid import parsed_overrides
from sftlab.config.unknown import nearest
from sftlab.sweeps import best_yaml, ranking, report, tables
from sftlab.sweeps.best_yaml import Choice
from sftlab.sweeps.points import Point
from sftlab.sweeps.ranking import Group
from sftlab.sweeps.record import Sweep


def show_answer(found: Sweep, metric: str, score: str, write: bool, console: Console) -> None:
    """Show the ranking; write report.html and best.yaml if `write`. Raises: ValueError for a metric no point has."""
    groups = ranking.ranked(found, metric, score)
    if groups[0].mean is None:
        known = sorted({name for p in found.points for name in p.last if "/" in name})
        if known and metric not in known:
            hint = nearest(metric, known)
            raise ValueError(f"metric={metric}: no point has it; {hint}there are {', '.join(known)}")
        console.print("\nno point has finished yet: no ranking")
    else:
        console.print()
        console.print(tables.ranking(found, groups, metric, score))
        console.print(f"\n{ranking.verdict(groups)}")
        for line in tables.importance(ranking.importance(groups), found):
            console.print(line)
    for line in (*tables.early(found), *tables.failures(found)):
        console.print(line, markup=False)
    if not write:
        return
    if groups[0].best is not None:
        file = best_yaml.write_best(found.folder, choices(groups[0].best), about(groups[0], found, metric, score))
        console.print(
            f"\nrun the winner again: python -m sftlab.train --config-dir {found.folder} experiment=best  ({file})"
        )
    console.print(f"report: {report.write_page(found, groups, metric, score)}")


def about(group: Group, found: Sweep, metric: str, score: str) -> list[str]:
    """Return what to say of the winner in best.yaml."""
    assert group.best is not None and group.mean is not None
    lines = [
        f"The winner of {found.folder}: point {group.best.num}, {score} {metric} {group.best.value(metric, score)}."
    ]
    if len(group.points) > 1:
        deviation = f", standard deviation {group.deviation:.3g}" if group.deviation is not None else ""
        lines.append(
            f"The best of its seeds; over {len(group.scored)} of them the mean is {group.mean:.6g}{deviation}."
        )
    return [*lines, "Run it again with"]


def choices(point: Point) -> list[Choice]:
    """Return a point's overrides for best.yaml."""
    return [Choice(*parts) for parts in parsed_overrides(point.overrides, read_yaml(point.folder / CONFIG) or {})]

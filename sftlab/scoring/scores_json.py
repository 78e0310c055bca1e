"""The results of an evaluation: scores.json, and the same numbers as a table."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from sftlab.common.files import write_json
from sftlab.common.secrets import strike_values
from sftlab.common.terminal import Terminal
from sftlab.scoring.bootstrap import differences, scores_of

Line = Mapping[str, Any]


def compare_scores(
    lines: Sequence[Line],
    base: Sequence[Line] | None,
    groups: Sequence[int] | None = None,
    scores: Mapping[str, float] | None = None,
    base_scores: Mapping[str, float] | None = None,
) -> dict[str, Any]:
    """Return the scores of a model and, if `base` is given, those of its base and the differences with intervals.

    Scores are computed from the lines unless they are given: the harness computes its own. Without `groups` every line
    is a group of its own.
    """
    report: dict[str, Any] = {"examples": len(lines), "scores": dict(scores or scores_of(lines))}
    if base is not None:
        report["baseline"] = dict(base_scores or scores_of(base))
        report["difference"] = differences(lines, base, groups if groups is not None else range(len(lines)))
    return report


def write_report(path: Path, report: Mapping[str, Any]) -> None:
    """Write scores.json in one step, with secrets struck out of the texts in it."""
    write_json(path, strike_values(report))


def show_scores(title: str, report: Mapping[str, Any]) -> None:
    """Print the scores as a table; a difference is followed by its 95 % interval."""
    table = Table(title=title, title_justify="left", box=None, padding=(0, 2, 0, 0))
    table.add_column("score", style="bold")
    compared = "baseline" in report
    for heading in ("base", "this model", "difference", "95 % interval") if compared else ("value",):
        table.add_column(heading, justify="right")
    for name, value in report["scores"].items():
        if not compared:
            table.add_row(name, f"{value:.4f}")
            continue
        base, gap = report["baseline"].get(name), report["difference"].get(name)
        table.add_row(
            name,
            f"{base:.4f}" if base is not None else "",
            f"{value:.4f}",
            f"{gap['value']:+.4f}" if gap else "",
            f"{gap['low']:+.4f} to {gap['high']:+.4f}" if gap else "",
        )
    Terminal(soft_wrap=True).print(table)

"""Any runs as the points of a comparison: what differs in their configs are its hyperparameters."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from sftlab.common.run_directory import CONFIG, read_config
from sftlab.common.terminal import Terminal
from sftlab.config.defaults import flat, shown
from sftlab.sweeps import ranking, report, tables
from sftlab.sweeps.points import read_point
from sftlab.sweeps.record import COMPARISON, Sweep

LEFT_OUT = ("run_dir", "resume", "resume_despite_changes", "launcher", "sweeper", "tracker")


def show_comparison(runs: Sequence[Path], metric: str, score: str, output: Path) -> None:
    """Show the runs ranked by a metric, and write the page."""
    found = comparison(runs)
    groups = ranking.ranked(found, metric, score)
    console = Terminal(soft_wrap=True)
    console.print(tables.status(found, metric))
    if groups[0].mean is not None:
        console.print()
        console.print(tables.ranking(found, groups, metric, score))
        console.print(f"\n{ranking.verdict(groups)}")
    console.print(f"report: {report.write_page(found, groups, metric, score, output)}")


def comparison(runs: Sequence[Path]) -> Sweep:
    """Return the runs as the points of a sweep that nobody launched. Raises: ValueError for a folder without a run."""
    if len(runs) < 2:
        raise ValueError("name two runs or more: python -m sftlab.compare runs/NAME/TIME runs/NAME/TIME")
    for run in runs:
        if not (run / CONFIG).is_file():
            hint = "; python -m sftlab.sweep dir=... shows a sweep" if (run / "multirun.yaml").is_file() else ""
            raise ValueError(f"{run} is no run's directory: it has no {CONFIG}{hint}")
    configs = [settings(read_config(run)) for run in runs]
    names = dict.fromkeys(name for config in configs for name in config)
    differing = [name for name in names if len({config.get(name) for config in configs}) > 1]
    points = []
    for num, (run, config) in enumerate(zip(runs, configs, strict=True)):
        chosen = [f"{name}={config.get(name, '')}" for name in differing] or [f"run={run}"]
        entry = {"run_dir": run.absolute().name, "overrides": chosen}
        points.append(replace(read_point(run.absolute().parent, num, entry, {}), folder=run))
    return Sweep(Path("comparison"), task=COMPARISON, name="comparison", points=points)


def settings(config: Mapping[str, Any]) -> dict[str, str]:
    """Return what a run computed, as text by dotted key."""
    return {key: shown(value) for key, value in flat(config) if key.split(".")[0] not in LEFT_OUT}

"""python -m sftlab.sweep dir=DIR: status of a sweep's points, their ranking, report.html and best.yaml; retry, cancel.

Reads the sweep's directory and asks SLURM where its points are jobs, so it works while the sweep runs, after its driver
has died, and from any machine that sees the folder. Imports no torch: the status of 200 points takes under a second.
"""

import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig
from rich.console import Console
from rich.live import Live

from sftlab.config import errors, groups, start

if TYPE_CHECKING:
    from sftlab.sweeps.best_yaml import Choice
    from sftlab.sweeps.points import Point, Sweep
    from sftlab.sweeps.ranking import Group

POLL_S = 2.0


def sweep(cfg: DictConfig) -> None:
    """Show a sweep, or act on it."""
    if cfg.retry not in (None, "failed"):
        raise ValueError(f"retry={cfg.retry}: expected failed, or nothing")
    if cfg.score not in ("last", "best"):
        raise ValueError(f"score={cfg.score}: expected last or best")
    from sftlab.sweeps import tables

    console = Console(highlight=False, soft_wrap=True, width=None if sys.stdout.isatty() else 200)
    folder = Path(cfg.dir)
    found = look(folder)
    if cfg.cancel:
        cancel(found, console)
        found = look(folder)
    again = retry(found, console) if cfg.retry else []
    waits = cfg.watch or (again and found.record.get("launcher", {}).get("wait"))
    found = watch(folder, cfg.metric, console) if waits else look(folder) if again else found
    console.print(tables.status(found, cfg.metric))
    answer(found, cfg.metric, cfg.score, cfg.report, console)
    if any(p.num in again and tables.ended(p) and p.state != "finished" for p in found.points):
        sys.exit(1)


def look(folder: Path) -> "Sweep":
    """Return a sweep as it is now. Raises: NoSlurm if its points are jobs and SLURM does not answer."""
    from sftlab.launchers import squeue
    from sftlab.sweeps import points

    record = points.read_record(folder)
    ids = [p["job_id"] for p in record.get("points", ()) if p.get("job_id")]
    states = squeue.states(i for i in ids if i.split("_")[0].isdecimal())
    return points.read(folder, record, states, () if record else planned(folder))


def planned(folder: Path) -> list[list[str]]:
    """Return every point's overrides from the multirun.yaml that Hydra's sweeper leaves; none where there is none."""
    from sftlab.sweeps.points import read_yaml

    written = read_yaml(folder / "multirun.yaml")
    if not written:
        return []
    from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
    from hydra.core.override_parser.overrides_parser import OverridesParser

    parsed = OverridesParser.create().parse_overrides(written["hydra"]["overrides"]["task"])
    return [list(point) for batch in BasicSweeper.split_arguments(parsed, None) for point in batch]


def watch(folder: Path, metric: str, console: Console) -> "Sweep":
    """Return once no point waits or runs, showing the table meanwhile. Ctrl-C ends the watching only."""
    from sftlab.sweeps import tables

    found = look(folder)
    try:
        with Live(console=console, auto_refresh=False, transient=True) as live:
            while not all(tables.ended(p) for p in found.points):
                live.update(tables.status(found, metric), refresh=True)
                time.sleep(POLL_S)
                found = look(folder)
    except KeyboardInterrupt:
        console.print(f"what runs goes on; come back with\n  python -m sftlab.sweep dir={folder} watch=true")
    return found


def answer(found: "Sweep", metric: str, score: str, report: bool, console: Console) -> None:
    """Show the ranking, what mattered and what is missing; write report.html and best.yaml."""
    from sftlab.sweeps import best_yaml, ranking, tables

    groups = ranking.ranked(found, metric, score)
    if groups[0].mean is None:
        known = sorted({name for p in found.points for name in p.last if "/" in name})
        if known and metric not in known:
            hint = errors.nearest(metric, known)
            raise ValueError(f"metric={metric}: no point has it; {hint}there are {', '.join(known)}")
        console.print("\nno point has finished yet: no ranking")
    else:
        console.print()
        console.print(tables.ranking(found, groups, metric, score))
        console.print(f"\n{ranking.verdict(groups)}")
        for line in tables.importance(ranking.importance(groups), found):
            console.print(line)
    for line in tables.failures(found):
        console.print(line, markup=False)
    if not report:
        return
    from sftlab.sweeps import report as page

    if groups[0].best is not None:
        file = best_yaml.write(found.folder, choices(groups[0].best), about(groups[0], found, metric, score))
        console.print(
            f"\nthe winner again: python -m sftlab.train --config-dir {found.folder} experiment=best  ({file})"
        )
    console.print(f"report: {page.write(found, groups, metric, score)}")


def about(group: "Group", found: "Sweep", metric: str, score: str) -> list[str]:
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


def choices(point: "Point") -> "list[Choice]":
    """Return a point's overrides, their values parsed by Hydra's own grammar."""
    from hydra.core.override_parser.overrides_parser import OverridesParser

    from sftlab.sweeps.best_yaml import Choice
    from sftlab.sweeps.points import read_yaml

    config = read_yaml(point.folder / "config.yaml") or {}
    made = []
    for o in OverridesParser.create().parse_overrides(list(point.overrides)):
        key, value = o.key_or_group, o.value()
        chosen = "." not in key and isinstance(value, str) and isinstance(config.get(key), dict)
        is_group = key == "experiment" or (groups.CONF / key).is_dir() or chosen
        made.append(Choice(key, value, is_group, o.is_delete()))
    return made


def cancel(found: "Sweep", console: Console) -> None:
    """Cancel every job that waits or runs."""
    from sftlab.launchers import squeue
    from sftlab.sweeps import tables

    ids = [p.job_id for p in found.points if p.job_id and not tables.ended(p)]
    squeue.cancel(ids)
    here = [p for p in found.points if not p.job_id and not tables.ended(p)]
    console.print(f"{len(ids)} jobs cancelled")
    if here:
        console.print(f"{len(here)} points run in a process without a job: end that with Ctrl-C where it was started")


def retry(found: "Sweep", console: Console) -> list[int]:
    """Run the points again that did not finish, by the launcher they had; return their numbers."""
    from sftlab.sweeps.points import UNFINISHED

    if found.is_search:
        raise ValueError(
            f"{found.folder} is a search, whose failed trials it has learned from; to go on with it repeat its command "
            f"with hydra.sweep.dir={found.folder}, with a greater sweeper.n_trials for more"
        )
    again = [p for p in found.points if p.state in UNFINISHED]
    console.print(f"{len(again)} of {len(found.points)} points did not finish" + (": again" if again else ""))
    if again and found.record.get("launcher", {}).get("_target_"):
        from sftlab import launchers

        entries = {int(p["num"]): p for p in found.record["points"]}
        launchers.submit([entries[p.num] for p in again], found.record["launcher"], found.folder)
    elif again:
        run_here(again, console)
    return [p.num for p in again]


def run_here(again: "Sequence[Point]", console: Console) -> None:
    """Run points in this process, one after another; one that fails does not keep the others from running."""
    from sftlab.sweeps.points import read_yaml
    from sftlab.training.run import run

    for p in again:
        console.print(f"point {p.num}: {' '.join(p.overrides)}", markup=False)
        config: dict[str, Any] = read_yaml(p.folder / "config.yaml") or compose(p)
        try:
            run(config, p.overrides)
        except Exception as error:
            errors.complain(f"point {p.num}: {errors.explain(error, 'train')}")


def compose(point: "Point") -> dict[str, Any]:
    """Return the config of a point that left none."""
    from hydra import compose, initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra
    from omegaconf import OmegaConf

    GlobalHydra.instance().clear()
    with initialize_config_dir(str(groups.CONF), version_base="1.3"):
        config = compose("train", overrides=[*point.overrides, f"run_dir='{point.folder}'"])
    made = OmegaConf.to_container(config, resolve=True, throw_on_missing=True)
    assert isinstance(made, dict)
    return {str(k): v for k, v in made.items()}


def main() -> None:
    """Entry point."""
    start.main(sweep, "sweep")


if __name__ == "__main__":
    main()

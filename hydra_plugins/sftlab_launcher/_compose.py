"""From a sweep's overrides to the resolved, checked config of every point, at submission.

Not scanned by Hydra (the underscore), so that commands which launch nothing do not import it.
"""

import copy
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.utils import JobReturn, JobStatus, filter_overrides
from hydra.errors import InstantiationException
from omegaconf import DictConfig, OmegaConf

from sftlab.common.files import read_json
from sftlab.common.terminal import Terminal
from sftlab.config.binding import check
from sftlab.config.errors import explain
from sftlab.config.overrides import point_dir, refuse_point_keys
from sftlab.launchers.launcher import make_launcher
from sftlab.sweeps import tables
from sftlab.sweeps.answer import show_answer
from sftlab.sweeps.launch import launch as start_points
from sftlab.sweeps.points import Point
from sftlab.sweeps.record import FILE, Sweep
from sftlab.sweeps.watch import METRIC, Shown, come_back, failures, look, watch


class Composer:
    """Hydra's `load_sweep_config`, 14 times faster: points that choose the same options share a composed base.

    Hydra reads and merges all YAMLs for every point, 58 ms each, and again when it validates the sweep. Here values are
    applied to a copy of the base by the same function that Hydra (1.3) uses, 4 ms each.
    """

    def __init__(self, loader: ConfigLoaderImpl) -> None:
        self.load = loader.load_sweep_config
        self.repository = loader.repository
        self.bases: dict[tuple[str, ...], DictConfig] = {}
        self.composed: dict[tuple[str, ...], DictConfig] = {}

    def __call__(self, master_config: DictConfig, sweep_overrides: list[str]) -> DictConfig:
        """Return the config of one point. Raises: what Hydra raises."""
        key = tuple(sweep_overrides)
        if key not in self.composed:
            parsed = OverridesParser.create().parse_overrides(sweep_overrides)
            choices = [o for o in parsed if self.repository.group_exists(o.key_or_group) or o.package is not None]
            base_key = tuple(str(o.input_line) for o in choices)
            if base_key not in self.bases:
                self.bases[base_key] = self.load(master_config, list(base_key))
            config = copy.deepcopy(self.bases[base_key])
            ConfigLoaderImpl._apply_overrides_to_config([o for o in parsed if o not in choices], config)
            config.hydra.overrides.task = list(filter_overrides(sweep_overrides))
            self.composed[key] = config
        return self.composed[key]


def launch(
    config: DictConfig, compose: Composer, job_overrides: Sequence[Sequence[str]], first: int
) -> list[JobReturn]:
    """Compose, check and launch a batch of points; wait if `launcher.wait`. Return what Hydra's sweeper takes."""
    sweep_dir = Path(config.hydra.sweep.dir)
    points = checked_points(config, compose, job_overrides, first)
    nums, options = [num for num, _, _ in points], points[0][2]["launcher"]
    for _, _, other in points:
        if other["launcher"] != options:
            raise ValueError("launcher.* cannot be swept: the points of a sweep are one array of equal jobs")
    exists = (sweep_dir / FILE).exists()
    name = points[0][2]["name"]
    sweep = Sweep.read(sweep_dir) if exists else Sweep(sweep_dir, str(Path.cwd()), sys.orig_argv, options, name=name)
    if options["dry_run"]:
        dry_run(sweep, points, options)
        return [JobReturn(overrides=o, status=JobStatus.COMPLETED) for _, o, _ in points]
    sweep = sweep.with_points(points)
    sweep.write()
    console = Terminal(soft_wrap=True)
    try:
        if options.get("parallel_points", 1) > 1:  # with one at a time, the terminal is that point's
            with Shown(console) as shown:
                sweep = start_points(sweep, nums, options, lambda: shown.look(sweep_dir, nums))
        else:
            sweep = start_points(sweep, nums, options)
    except KeyboardInterrupt as stopped:
        paused(sweep.folder, console)
        stopped.args = ("said",)  # no second word of it at the end of the command
        raise
    return outcomes(sweep, nums, queued=[job for num in nums if (job := sweep.job_id(num))])


def paused(folder: Path, console: Terminal) -> None:
    """Print the state of every point after a Ctrl-C, and the command that resumes the sweep."""
    found = look(folder)
    again = f"python -m sftlab.sweep dir={shlex.quote(str(folder))} retry=failed"
    if found.is_search:
        again = f"the same command with hydra.sweep.dir={shlex.quote(str(folder))}"
    console.print(tables.status(found, METRIC))
    console.print(f"paused; every point that ran has saved; go on with\n  {again}", markup=False)


def checked_points(
    config: DictConfig, compose: Composer, job_overrides: Sequence[Sequence[str]], first: int
) -> list[tuple[int, list[str], dict[str, Any]]]:
    """Return the points of a batch. If one is wrong nothing is left of the sweep, and nothing runs."""
    sweep_dir = Path(config.hydra.sweep.dir)
    try:
        return [point(config, compose, sweep_dir, num, overrides) for num, overrides in enumerate(job_overrides, first)]
    except BaseException:
        if first == 0 and not (sweep_dir / FILE).exists():
            unmake(sweep_dir)
        raise


def point(
    config: DictConfig, compose: Composer, sweep_dir: Path, num: int, overrides: Sequence[str]
) -> tuple[int, list[str], dict[str, Any]]:
    """Return a point: number, overrides, resolved config. Raises: ValueError naming the point if parts do not bind."""
    composed = compose(config, list(overrides))
    task_overrides = list(composed.hydra.overrides.task)
    refuse_point_keys([*sys.argv, *task_overrides])
    kept = OmegaConf.masked_copy(composed, [str(key) for key in composed if key != "hydra"])
    kept.run_dir = point_dir(sweep_dir / str(num))
    resolved = OmegaConf.to_container(kept, resolve=True, throw_on_missing=True)
    assert isinstance(resolved, dict)
    made = {str(key): value for key, value in resolved.items()}
    try:
        check(made)
    except (ValueError, InstantiationException) as error:
        raise ValueError(f"point {num} ({' '.join(task_overrides)}): {explain(error, 'train')}") from None
    return num, task_overrides, made


def dry_run(sweep: Sweep, points: Sequence[tuple[int, list[str], dict[str, Any]]], options: dict[str, Any]) -> None:
    """Show the script and the points; remove what Hydra's sweeper wrote for this."""
    print(make_launcher(options).script(sweep.to_run([num for num, _, _ in points], sweep.folder.absolute() / "code")))
    for num, overrides, _ in points:
        print(f"# point {num}: {' '.join(overrides)}")
    unmake(sweep.folder)


def unmake(folder: Path) -> None:
    """Remove what Hydra's sweeper wrote before it called the launcher; then the folder, if nothing else is in it."""
    (folder / "multirun.yaml").unlink(missing_ok=True)
    made = [folder, *(folder.parents[:2] if folder.parts[0] == "sweeps" else ())]
    for path in made:  # sweeps/<name>/<time>
        if not path.is_dir() or any(path.iterdir()):
            break
        path.rmdir()


def outcomes(sweep: Sweep, nums: Sequence[int], queued: Sequence[str]) -> list[JobReturn]:
    """Return how the points ended. The value is None for points that were queued and not waited for."""
    console = Terminal(soft_wrap=True)
    again = come_back(sweep.folder)
    if queued:
        ids = " ".join(sorted({job.split("_")[0] for job in queued}, key=int))
        console.print(f"{len(nums)} point{'s' * (len(nums) > 1)} queued as job {ids}; the sweep is {sweep.folder}")
    if queued and not sweep.launcher["wait"]:
        console.print(f"see it with\n  {again}")
        entries = [e for e in sweep.entries if e["num"] in nums]
        return [JobReturn(overrides=e["overrides"], status=JobStatus.COMPLETED) for e in entries]
    try:
        found = (
            watch(sweep.folder, console, nums=nums, fail_fast=bool(sweep.launcher.get("fail_fast")))
            if queued
            else look(sweep.folder, nums)
        )
    except KeyboardInterrupt:
        console.print(
            f"\nthe jobs carry on; come back with\n  {again} watch=true\nend them with\n  {again} cancel=true"
        )
        sys.exit(130)
    if len(nums) > 1:
        console.print(tables.status(found, METRIC))
        whole = look(sweep.folder)
        known = {name for p in whole.points for name in p.last}
        if any(p.state == "finished" for p in whole.points):
            show_answer(whole, METRIC if METRIC in known else "train/loss", "last", True, console)
        console.print(f"see it again, or ranked by another metric:\n  {again}")
    failed = None if all(p.state == "finished" for p in found.points) else PointsFailed(failures(found))
    return [outcome(p, failed) for p in found.points]


class PointsFailed(ValueError):
    """Some points of a sweep did not finish; the message tells which, why and where to look."""


def outcome(point: Point, failed: PointsFailed | None) -> JobReturn:
    """Return one point's result for Hydra; reading its value raises if the point failed."""
    passed = point.state == "finished"
    made = JobReturn(overrides=point.overrides, working_dir=str(point.folder))
    made.status = JobStatus.COMPLETED if passed else JobStatus.FAILED
    made.return_value = read_json(point.folder / "summary.json").get("score") if passed else failed
    return made

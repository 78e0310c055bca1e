"""From a command line to a search: its space, how a trial becomes a point's directory, which launcher runs it.

Not scanned by Hydra (the underscore), so that commands which search nothing do not import it.
"""

import sys
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import ChoiceSweep, IntervalSweep, Override, RangeSweep
from omegaconf import DictConfig, OmegaConf

from hydra_plugins.sftlab_launcher._compose import Composer, point
from sftlab.config.binding import bind
from sftlab.launchers.launcher import make_launcher
from sftlab.launchers.snapshot import snapshot
from sftlab.sweeps.record import FILE, Sweep

# The launcher of a search that names none: one process per trial on this machine.
HERE = {
    "_target_": "sftlab.launchers.local.Local",
    "processes_per_node": 1,
    "parallel_points": 1,
    "dry_run": False,
}


def search(config: DictConfig, loader: Any, arguments: Sequence[str]) -> float:
    """Run a search, or continue the one in the sweep's directory; return the best score."""
    try:
        import optuna  # noqa: F401
    except ImportError:
        raise ValueError("sweeper=optuna needs Optuna: pip install 'sftlab[optuna]'") from None
    from sftlab.sweeps.search import Search, Settings

    launcher_node = OmegaConf.to_container(config.launcher, resolve=True)
    assert isinstance(launcher_node, dict)
    bind("sweeper", dict(config.sweeper), partial(Settings, eval_every=0, max_steps=None), "sweeper=optuna")
    settings = Settings(**config.sweeper, eval_every=config.trainer.eval_every, max_steps=config.trainer.max_steps)
    options = {str(key): value for key, value in launcher_node.items()} or dict(HERE)
    if "parallel_points" in options:  # a launcher that divides this machine must know how many trials share it
        options["parallel_points"] = settings.parallel_trials
    launcher = make_launcher(options)
    if launcher.dry_run:
        raise ValueError("launcher.dry_run=true: a search chooses its points while it runs, so none can be shown")
    fixed, space = split(arguments)
    folder = Path(config.hydra.sweep.dir)
    compose = Composer(loader)

    def make_point(num: int, chosen: Sequence[str]) -> tuple[int, list[str], dict[str, Any]]:
        """Compose and check the config of a trial."""
        return point(config, compose, folder, num, [*fixed, *chosen])

    middle = {name: ends(s)[0] for name, s in space.items()}
    first = make_point(0, [f"{name}={value}" for name, value in middle.items()])
    for name, values in space.items():  # whatever may be proposed is checked before anything runs
        for value in ends(values)[1:]:
            make_point(0, [f"{key}={one}" for key, one in (middle | {name: value}).items()])
    folder.mkdir(parents=True, exist_ok=True)
    exists = (folder / FILE).exists()
    sweep = Sweep.read(folder) if exists else Sweep(folder, str(Path.cwd()), sys.orig_argv, name=config.name)
    sweep = replace(sweep, launcher=options)
    sweep.write()
    code = snapshot(folder, [first[2]], Path.cwd())
    return Search(sweep, space, settings, launcher, code, make_point).run()


def split(arguments: Sequence[str]) -> tuple[list[str], dict[str, Any]]:
    """Return the overrides that all trials share, and the space: a distribution for each swept override."""
    fixed: list[str] = []
    space: dict[str, Any] = {}
    for argument, parsed in zip(arguments, OverridesParser.create().parse_overrides(list(arguments)), strict=True):
        if parsed.is_sweep_override():
            space[parsed.get_key_element()] = distribution(parsed)
        else:
            fixed.append(argument)
    if not space:
        raise ValueError(
            "sweeper=optuna has nothing to search: give a range, as in 'optim.lr=tag(log,interval(1e-5,1e-3))', "
            "trainer.batch_size=16,32 or 'schedule.warmup_steps=range(0,100,10)'"
        )
    return fixed, space


def distribution(override: Override) -> Any:
    """Return Optuna's distribution for one swept override. Choices are strings in Hydra's override syntax."""
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    value = override.value()
    if isinstance(value, IntervalSweep):
        assert value.start is not None and value.end is not None
        log = "log" in value.tags
        if isinstance(value.start, int) and isinstance(value.end, int):
            return IntDistribution(value.start, value.end, log=log)
        return FloatDistribution(value.start, value.end, log=log)
    if isinstance(value, RangeSweep) and isinstance(value.start, int) and isinstance(value.step, int):
        values = list(value.range())
        return IntDistribution(int(min(values)), int(max(values)), step=abs(value.step))
    if isinstance(value, ChoiceSweep | RangeSweep):
        return CategoricalDistribution(list(override.sweep_string_iterator()))
    raise ValueError(f"{override.input_line}: sweeper=optuna takes interval(), range(), choice() or values with commas")


def ends(given: Any) -> Sequence[Any]:
    """Return every choice of a distribution, or its lowest and its highest value."""
    return given.choices if hasattr(given, "choices") else (given.low, given.high)

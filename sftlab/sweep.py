"""python -m sftlab.sweep dir=DIR: status of a sweep's points, their ranking, report.html and best.yaml; retry, cancel.

Reads the sweep's directory and asks SLURM where its points are jobs, so it works while the sweep runs, after its driver
has died, and from any machine that sees the folder. Imports no torch: the status of 200 points takes under a second.
"""

import sys
from pathlib import Path
from types import ModuleType
from typing import Any

from omegaconf import DictConfig

from sftlab.config import start


def sweep(cfg: DictConfig) -> None:
    """Show a sweep, or act on it; exit with 1 if points that were run again did not finish."""
    if cfg.retry not in (None, "failed", "stopped", "fresh"):
        raise ValueError(f"retry={cfg.retry}: expected failed, stopped or fresh, or nothing")
    if cfg.score not in ("last", "best"):
        raise ValueError(f"score={cfg.score}: expected last or best")
    from sftlab.common.terminal import Terminal
    from sftlab.config.grid import planned
    from sftlab.sweeps import again, answer, tables
    from sftlab.sweeps.record import FILE
    from sftlab.sweeps.watch import come_back, look, watch

    console = Terminal(soft_wrap=True, width=None if sys.stdout.isatty() else 200)
    folder = Path(cfg.dir)
    listed = [] if (folder / FILE).is_file() else planned(folder)  # sweep.json lists the points itself
    found = look(folder, planned=listed)
    if cfg.cancel:
        again.cancel(found, console)
    retried = again.retry(found, console, cfg.retry, cfg.trust) if cfg.retry else []
    try:
        if cfg.watch or (retried and found.launcher.get("wait")):
            found = watch(folder, console, cfg.metric, planned=listed)
        elif cfg.cancel or retried:
            found = look(folder, planned=listed)
    except KeyboardInterrupt:
        console.print(f"running points carry on; come back with\n  {come_back(folder)} watch=true")
        found = look(folder, planned=listed)
    console.print(tables.status(found, cfg.metric))
    answer.show_answer(found, cfg.metric, cfg.score, cfg.report, console)
    if any(p.num in retried and p.ended and p.state != "finished" for p in found.points):
        sys.exit(1)


class Callable(ModuleType):
    """This module, which is also the function `sftlab.sweep` of the Python interface."""

    def __call__(self, *overrides: str, **settings: Any) -> list[dict[str, Any]]:
        """Run a sweep, or read one, and return its points ranked (sweeps/results.py)."""
        from sftlab.sweeps import results

        return results.sweep(*overrides, **settings)


sys.modules[__name__].__class__ = Callable


def main() -> None:
    """Entry point."""
    start.main(sweep, "sweep")


if __name__ == "__main__":
    main()

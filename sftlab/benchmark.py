"""python -m sftlab.benchmark: how fast a run trains on this machine. Takes the overrides of train."""

import os
import sys
import time

from omegaconf import DictConfig

from sftlab.benchmarking.cases import overrides
from sftlab.config import start
from sftlab.config.binding import check, resolved

BEGAN_S = time.perf_counter()
os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler's own lines on standard error
OWN = (
    *("case", "layouts", "scale", "warm_up", "windows", "steps_per_window"),
    *("output", "profile", "compare", "tolerance"),
)


def benchmark(cfg: DictConfig) -> None:
    """Measure one composed config."""
    config = resolved(cfg)
    own = {key: config.pop(key) for key in OWN}
    check(config)
    from sftlab.benchmarking.benchmark import benchmark as measure

    measure(config, own, sys.argv[1:], BEGAN_S)


def main() -> None:
    """Entry point."""
    sys.argv[1:] = overrides(sys.argv[1:])
    start.main(benchmark, "benchmark")


if __name__ == "__main__":
    main()

"""python -m sftlab.compare RUN RUN ...: runs beside each other, as a table and on the page that a sweep has."""

import re
import sys
from pathlib import Path

from omegaconf import DictConfig

from sftlab.config import start


def compare(cfg: DictConfig) -> None:
    """Show the runs and write the page."""
    if cfg.score not in ("last", "best"):
        raise ValueError(f"score={cfg.score}: expected last or best")
    from sftlab.sweeps.compare import show_comparison

    show_comparison([Path(str(run)) for run in cfg.runs], cfg.metric, cfg.score, Path(cfg.output))


def main() -> None:
    """Entry point. The words without a key are the runs."""
    runs = [word for word in sys.argv[1:] if "=" not in word and not word.startswith("-")]
    if runs:
        quoted = ["'" + re.sub(r"(\\*)'", lambda m: m[1] * 2 + r"\'", run) + "'" for run in runs]
        rest = [word for word in sys.argv[1:] if word not in runs]
        sys.argv = [sys.argv[0], f"runs=[{','.join(quoted)}]", *rest]
    start.main(compare, "compare")


if __name__ == "__main__":
    main()

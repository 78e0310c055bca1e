"""Every parallelism beside one process: ten steps, and every checkpoint resumed by every other.

    OMP_NUM_THREADS=1 python experiments/parallel/run.py [--folder FOLDER]

Worlds of 1, 2 and 4 gloo processes train a small Llama for ten steps as each parallelism, and save at step 4. Then each
resumes the checkpoint of each, and trains steps 5 to 10. Losses and gradient norms are compared with one process's.
It exits with 1 if a loss is off by more than 1e-5, or a norm by more than 1e-5 of itself.
"""

import argparse
import sys
import tempfile
from pathlib import Path
from typing import Any

REPO = Path(__file__).parents[2]
sys.path.insert(0, str(REPO))

from tests.distributed.test_parallel import NAMES, ON, SAVED, STEPS, everything  # noqa: E402
from tests.support import run_distributed  # noqa: E402

MOST = 1e-5
Steps = list[tuple[float, float]]


def off(found: list[Steps], expected: Steps) -> tuple[float, float]:
    """Return the largest differences over ranks and steps: of losses, and of norms relative to them."""
    pairs = [(ours, theirs) for steps in found for ours, theirs in zip(steps, expected, strict=True)]
    return max(abs(a[0] - b[0]) for a, b in pairs), max(abs(a[1] / b[1] - 1) for a, b in pairs)


def main() -> int:
    """Print both tables; return 1 if anything is off."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help="a new folder for the checkpoints (default: a temporary one)")
    folder = parser.parse_args().folder or Path(tempfile.mkdtemp(prefix="parallel-"))
    found: dict[str, list[Any]] = {}
    for others in ([], NAMES):
        for ranks in ON:
            for rank in run_distributed(everything, ranks, folder, others):
                for name, seen in rank.items():
                    found.setdefault(name, []).append(seen["steps"])
    expected = found["one"][0]
    worst = 0.0
    print(f"| ten steps | largest loss difference | largest norm difference |\n|{' --- |' * 3}")
    for name in NAMES:
        loss, norm = off(found[name], expected)
        worst = max(worst, loss, norm)
        print(f"| {name} | {loss:.1e} | {norm:.1e} |")
    print(f"\nSteps {SAVED + 1} to {STEPS}, resumed: largest difference of a loss or norm\n")
    print(f"| resumed by, down; written by, across | {' | '.join(NAMES)} |\n|{' --- |' * (1 + len(NAMES))}")
    for name in NAMES:
        cells = [max(off(found[f"{name} of {other}"], expected[SAVED:])) for other in NAMES]
        worst = max(worst, *cells)
        print(f"| {name} | {' | '.join(f'{cell:.1e}' for cell in cells)} |")
    print(f"\nlargest of all: {worst:.1e}; wanted: at most {MOST:.0e}")
    return int(worst > MOST)


if __name__ == "__main__":
    sys.exit(main())

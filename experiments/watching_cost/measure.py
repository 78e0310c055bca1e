"""What it costs a step that a run is watched: metrics, console, TensorBoard, report.html.

    PYTHONPATH=. python experiments/watching_cost/measure.py [--rounds 4] [--steps 200] [OVERRIDE ...]

Trains the same steps with all of it and with none of it, in turns, each in a process of its own. What is compared is
the processor time of every thread but the one that trains, and what that one spends in metrics and console: its own
time for the same arithmetic differs by 5 % from one run to the next.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from experiments.gpu.bench import built
from sftlab.common.metrics import Metrics
from sftlab.parallel.world import world
from sftlab.reports.run_report import RunReport
from sftlab.trackers.tensorboard import tensorboard
from sftlab.training.build import Background, about_run

WARM_UP = 40  # steps that are not counted: TensorBoard is imported in them, beside the training
LOGGED = ("trainer.log_every=1", "trainer.eval_every=0", "trainer.save_every=0")


def one(watched: bool, steps: int, overrides: list[str]) -> tuple[float, float]:
    """Return the wall time per step of one run, and the processor time per step of all but training, in seconds."""
    marks: list[tuple[float, float]] = []
    spent = [0.0]  # by the training thread, on metrics and console

    def counted(rows: Iterator[Any]) -> Iterator[Any]:
        for row in rows:
            marks.append((time.perf_counter(), time.process_time() - time.thread_time() + spent[0]))
            yield row

    def timed(act: Callable[..., Any]) -> Callable[..., None]:
        def wrapped(*given: Any) -> None:
            began_s = time.thread_time()
            act(*given)
            spent[0] += time.thread_time() - began_s

        return wrapped

    with tempfile.TemporaryDirectory() as folder, world() as here:
        typed = [*overrides, *LOGGED, f"trainer.max_steps={steps}", "evaluation.num_answers=0", "data.val_path=null"]
        with built(here, Path(folder) / "run", *typed) as made:
            trainer, run_dir = made.trainer, Path(folder) / "run"
            trainer.metrics.close()
            trainer.metrics, show = Metrics(None), lambda *_: None
            if watched:
                about = about_run({"name": "cost"}, run_dir, steps, print)
                trackers = [Background("report", lambda: RunReport(about), print)]
                trackers += [Background("tensorboard", lambda: tensorboard(about), print)]
                trainer.metrics, show = Metrics(run_dir / "metrics.jsonl", trackers), trainer.console.step
            trainer.metrics.write_numbers = timed(trainer.metrics.write_numbers)  # type: ignore[method-assign]
            trainer.console.step = timed(show)  # type: ignore[method-assign]
            trainer.around = counted
            trainer.fit()
    num = len(marks) - 1 - WARM_UP
    wall_s, other_s = ((last - first) / num for first, last in zip(marks[WARM_UP], marks[-1], strict=True))
    return wall_s, other_s


def main() -> None:
    """Entry point."""
    made = argparse.ArgumentParser(description=__doc__)
    made.add_argument("--rounds", type=int, default=4)
    made.add_argument("--steps", type=int, default=200)
    made.add_argument("--one", choices=("with", "without"), help="one run, in this process")
    made.add_argument("overrides", nargs="*", default=["model=demo", "data=demo"])
    given = made.parse_args()
    if given.one:
        print(json.dumps(one(given.one == "with", given.steps, given.overrides)))
        return
    found: dict[str, list[tuple[float, float]]] = {"with": [], "without": []}
    for round_ in range(given.rounds):
        for kind in sorted(found, reverse=bool(round_ % 2)):
            typed = [sys.executable, __file__, "--one", kind, "--steps", str(given.steps), *given.overrides]
            done = subprocess.run(typed, capture_output=True, text=True, check=True)
            wall_s, other_s = json.loads(done.stdout.strip().splitlines()[-1])
            found[kind].append((wall_s, other_s))
            print(f"{kind:<8} a step {1000 * wall_s:.1f} ms, {1000 * other_s:.2f} ms beside training", flush=True)
    step_s = statistics.median(wall_s for wall_s, _ in found["without"])
    costs_s = [a - b for (_, a), (_, b) in zip(found["with"], found["without"], strict=True)]
    cost_s, spread = statistics.median(costs_s), f"{1000 * min(costs_s):.2f} to {1000 * max(costs_s):.2f}"
    print(
        f"watching costs {1000 * cost_s:.2f} ms ({spread}) of a step of {1000 * step_s:.1f} ms: {cost_s / step_s:.2%}"
    )


if __name__ == "__main__":
    main()

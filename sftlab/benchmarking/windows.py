"""Windows of steps: how fast a built run trains, without disturbing it.

The device is synchronised between windows only, so a step that runs ahead of the host is measured as it would train.
"""

import math
import statistics
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch

from sftlab.data.loader import Step
from sftlab.training.arriving import Arriving
from sftlab.training.throughput import FlopCount
from sftlab.training.trainer import Trainer

COUNTS = {  # what is counted, by the name of its rate
    "examples_per_s": "num_examples",
    "tokens_per_s": "num_tokens",
    "example_tokens_per_s": "num_effective_tokens",
    "supervised_per_s": "num_targets",
}


def synchronise(device: torch.device) -> None:
    """Wait until the device has done all its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@dataclass
class Window:
    """A stretch of steps: its wall seconds, those spent waiting for the loader, each step's seconds, what was done."""

    wall_s: float = 0.0
    wait_s: float = 0.0
    step_s: list[float] = field(default_factory=list)
    steps: list[Step] = field(default_factory=list)

    def rate(self, count: str) -> float:
        """Return a sum over the steps per second."""
        return float(sum(getattr(step, count) for step in self.steps)) / self.wall_s


class Steps:
    """The steps of a run, one after another from the first, launched and read as `Trainer.fit` does.

    Raises: ArithmeticError for a loss that is not finite: such a step leaves its update out.
    """

    def __init__(self, trainer: Trainer) -> None:
        self.trainer = trainer
        self.device = trainer.world.device
        self.coming: Iterator[Step] = trainer.loader.steps(1, trainer.ending.last_step)
        self.done = 0
        self.launched: deque[Arriving] = deque()  # steps whose numbers nobody has read yet
        self.losses: list[float] = []

    def next(self) -> Step:
        """Return the next step's data, once it is laid out."""
        return next(self.coming)

    def train(self, data: Step) -> None:
        """Launch one step, and read the loss of those that are due."""
        self.done += 1
        self.launched.append(self.trainer.train_step(self.done, data))
        while len(self.launched) > self.trainer.lag:
            self.losses.append(self.launched.popleft().read()["train/loss"])
            if not math.isfinite(self.losses[-1]):
                raise ArithmeticError(f"step {len(self.losses)} has the loss {self.losses[-1]}: nothing to measure")

    def window(self, num: int) -> Window:
        """Train `num` steps and return how long they took."""
        window = Window()
        synchronise(self.device)
        marks = [self.mark()]
        began_s = time.perf_counter()
        for _ in range(num):
            waiting_s = time.perf_counter()
            data = self.next()
            window.wait_s += time.perf_counter() - waiting_s
            self.train(data)
            marks.append(self.mark())
            window.steps.append(data)
        synchronise(self.device)
        window.wall_s = time.perf_counter() - began_s
        window.step_s = [self.between(a, b) for a, b in pairwise(marks)]
        return window

    def mark(self) -> Any:
        """Return the present: on CUDA an event in the device's queue, which stalls nobody."""
        if self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record()
        return event

    def between(self, a: Any, b: Any) -> float:
        """Return the seconds between two marks."""
        return float(a.elapsed_time(b)) / 1e3 if self.device.type == "cuda" else b - a


def rates(windows: list[Window], flops: FlopCount) -> dict[str, Any]:
    """Return the median rate over the windows and its spread, the steps' times, and what a step holds."""
    steps = [step for window in windows for step in window.steps]
    step_s = [s for window in windows for s in window.step_s]
    by_rate = {name: [w.rate(count) for w in windows] for name, count in COUNTS.items()}
    examples = by_rate["examples_per_s"]
    return {
        **{name: statistics.median(found) for name, found in by_rate.items()},
        "examples_per_s_windows": examples,
        "spread": (max(examples) - min(examples)) / statistics.median(examples),
        "step_s_median": statistics.median(step_s),
        "step_s_max": max(step_s),
        "flops_per_s": statistics.median(sum(map(flops.of, w.steps)) / w.wall_s for w in windows),
        "examples_per_step": statistics.mean(s.num_examples for s in steps),
        "tokens_per_example": sum(s.num_effective_tokens for s in steps) / sum(s.num_examples for s in steps),
        "shared_tokens_per_example": sum(s.num_nodes for s in steps) / sum(s.num_examples for s in steps),
        "padding": 1 - sum(s.num_nodes for s in steps) / sum(s.num_tokens for s in steps),
        "microbatches_per_step": statistics.mean(len(s.microbatches) for s in steps),
        "data_share": sum(w.wait_s for w in windows) / sum(w.wall_s for w in windows),
    }

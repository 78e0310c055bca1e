"""Where the time of a step goes: data, forward, backward, optimiser, what lies between steps, evaluation.

Hooks on the scorer and the optimiser mark where a part ends, so the trainer knows nothing of it. On CUDA a mark is an
event, which costs the host 2 microseconds and waits for nothing; the times between events are read when the device has
passed them. Backward includes the gradient norm and clipping, `between` reading numbers, saving and logging.
"""

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch
from torch.optim import Optimizer

Item = TypeVar("Item")


class Laps:
    """Seconds of each part of the steps since the last reading."""

    def __init__(self, scorer: torch.nn.Module, optimizer: Optimizer, device: torch.device) -> None:
        self.device = device
        self.part = "between"
        self.marks: list[tuple[str, float | torch.cuda.Event]] = []  # the part that a mark ends
        self.began = self.now()
        scorer.register_forward_pre_hook(lambda *_: self.training("forward"), prepend=True)
        scorer.register_forward_hook(lambda *_: self.training("backward"))
        optimizer.register_step_pre_hook(lambda *_: self.enter("optimizer"))
        optimizer.register_step_post_hook(lambda *_: self.enter("between"))

    def now(self) -> float | torch.cuda.Event:
        """Return a mark of this moment on the device."""
        if self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record()
        return event

    def enter(self, part: str) -> None:
        """End the part that runs, and begin another."""
        self.marks.append((self.part, self.now()))
        self.part = part

    def training(self, part: str) -> None:
        """Enter a part of a step; a forward of an evaluation is none."""
        if torch.is_grad_enabled() and self.part != "evaluation":
            self.enter(part)

    @contextmanager
    def inside(self, part: str) -> Iterator[None]:
        """Count the time spent inside as one part, whatever runs there."""
        outer = self.part
        self.enter(part)
        yield
        self.enter(outer)

    def waited_for(self, items: Iterator[Item]) -> Iterator[Item]:
        """Yield the items, and count the time that they are waited for as `data`. Counting begins with the first."""
        self.marks.clear()
        self.began = self.now()
        for _ in iter(int, 1):
            with self.inside("data"):
                item = next(items, None)
            if item is None:
                return
            yield item

    def take(self, steps: int) -> dict[str, float]:
        """Return the seconds per step of each part since the last reading, as far as the device has come."""
        spent: defaultdict[str, float] = defaultdict(float)
        done = 0
        for part, mark in self.marks:
            if isinstance(mark, float):
                spent[part] += mark - self.began  # type: ignore[operator]
            elif mark.query():  # type: ignore[no-untyped-call]
                spent[part] += self.began.elapsed_time(mark) / 1000  # type: ignore[union-attr]
            else:
                break
            self.began, done = mark, done + 1
        del self.marks[:done]
        return {f"time/{part}_s": seconds / max(1, steps) for part, seconds in spent.items() if seconds > 0}

"""Where a step's time goes: measured on steps of their own, because each part is waited for.

A step's forwards are timed by hooks on the scorer, its backwards by their calls. What is left is the optimiser's part:
clipping, the update, and what the trainer does besides. Collectives are read from a profile. They overlap with the
other parts, so their share is not added to the others.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from sftlab.benchmarking.windows import Steps, synchronise

SHOWN_ROWS = 40  # of a profile


class Stopwatch:
    """Seconds by the name of a part; the device is waited for at both ends of each."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.seconds: dict[str, float] = {}
        self.began_s = 0.0

    def start(self) -> None:
        """Begin a part."""
        synchronise(self.device)
        self.began_s = time.perf_counter()

    def stop(self, part: str) -> None:
        """End a part that was begun."""
        synchronise(self.device)
        self.seconds[part] = self.seconds.get(part, 0.0) + time.perf_counter() - self.began_s


@contextmanager
def watched(scorer: torch.nn.Module, watch: Stopwatch) -> Iterator[None]:
    """Time every forward of the scorer and every backward within."""
    real = torch.Tensor.backward

    def backward(*arguments: Any, **keywords: Any) -> None:
        watch.start()
        real(*arguments, **keywords)  # type: ignore[no-untyped-call]
        watch.stop("backward")

    hooks = [
        scorer.register_forward_pre_hook(lambda *_: watch.start(), prepend=True),
        scorer.register_forward_hook(lambda *_: watch.stop("forward")),
    ]
    torch.Tensor.backward = backward  # type: ignore[method-assign]
    try:
        yield
    finally:
        torch.Tensor.backward = real  # type: ignore[method-assign]
        for hook in hooks:
            hook.remove()


def part_shares(steps: Steps, num: int, data_share: float) -> dict[str, float]:
    """Return the fractions of a step, which sum to 1; `data_share` is that of waiting for data, measured before."""
    watch = Stopwatch(steps.device)
    total_s = 0.0
    with watched(steps.trainer.scorer, watch):
        for _ in range(num):
            data = steps.next()
            synchronise(steps.device)
            began_s = time.perf_counter()
            steps.train(data)
            synchronise(steps.device)
            total_s += time.perf_counter() - began_s
    seconds = {"forward": watch.seconds["forward"], "backward": watch.seconds["backward"]}
    seconds["optimiser"] = max(0.0, total_s - sum(seconds.values()))
    shares = {part: (1 - data_share) * s / sum(seconds.values()) for part, s in seconds.items()}
    return {"data": data_share, **shares}


def profiled(steps: Steps) -> tuple[float, str]:
    """Train one step under the profiler; return the collectives' share of its time, and its longest kernels."""
    cuda = steps.device.type == "cuda"
    data = steps.next()
    synchronise(steps.device)
    began_s = time.perf_counter()
    with profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]) as found:
        steps.train(data)
        synchronise(steps.device)
    elapsed_s = time.perf_counter() - began_s
    events = found.key_averages()
    collectives = [e for e in events if is_collective(e.key, cuda)]
    spent_us = sum(e.self_device_time_total if cuda else e.cpu_time_total for e in collectives)
    by = "self_device_time_total" if cuda else "self_cpu_time_total"
    return min(1.0, spent_us / 1e6 / elapsed_s), events.table(sort_by=by, row_limit=SHOWN_ROWS)


def is_collective(name: str, cuda: bool) -> bool:
    """Return whether an event of a profile is a collective at work: a kernel of nccl, or gloo's own thread."""
    return ("nccl" in name and "Kernel" in name) if cuda else name.startswith("gloo:")

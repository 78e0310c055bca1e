"""Schedules: a factor on the learning rate, each a pure function of the step.

A function has no state to checkpoint and cannot advance twice. Step 1 is the first update, `total_steps` the last.
Every schedule warms up linearly: step w of `warmup_steps` has factor w / warmup_steps. A decay begins at 1 on the step
after that, and would reach `final_ratio` on the step after the last: no update is made at a factor of 0.
"""

import math
from typing import Annotated

from sftlab.common.values import Bounds, Share

Steps = Annotated[
    int,
    Bounds(least=0, note="it counts optimiser steps. A share of them (warmup_ratio elsewhere) times trainer.max_steps"),
]


def constant(step: int, total_steps: int, *, warmup_steps: Steps = 0) -> float:
    """Return 1 after the warm-up."""
    return _warmup(step, warmup_steps)


def linear(step: int, total_steps: int, *, warmup_steps: Steps = 0, final_ratio: Share = 0.0) -> float:
    """Return a straight line from 1 after the warm-up to `final_ratio` at the end."""
    done = _progress(step, warmup_steps, total_steps)
    return _warmup(step, warmup_steps) * (1 + (final_ratio - 1) * done)


def cosine(step: int, total_steps: int, *, warmup_steps: Steps = 0, final_ratio: Share = 0.0) -> float:
    """Return half a cosine from 1 after the warm-up to `final_ratio` at the end."""
    done = _progress(step, warmup_steps, total_steps)
    return _warmup(step, warmup_steps) * (final_ratio + (1 - final_ratio) * 0.5 * (1 + math.cos(math.pi * done)))


def wsd(
    step: int, total_steps: int, *, warmup_steps: Steps = 0, final_ratio: Share = 0.0, decay_ratio: Share = 0.2
) -> float:
    """Return warm-up, stable, decay: 1 until the last `decay_ratio` of the steps, then a line to `final_ratio`.

    Source: Hu et al. 2024, "MiniCPM", https://arxiv.org/abs/2404.06395.
    """
    start = max(warmup_steps, total_steps - round(decay_ratio * total_steps))
    done = _progress(step, start, total_steps)
    return _warmup(step, warmup_steps) * (1 + (final_ratio - 1) * done)


def _warmup(step: int, warmup_steps: int) -> float:
    return min(1.0, step / warmup_steps) if warmup_steps else 1.0


def _progress(step: int, start: int, end: int) -> float:
    """Return how far `step` is from `start` to `end`, from 0 to 1."""
    return min(1.0, max(0.0, (step - 1 - start) / max(1, end - start)))

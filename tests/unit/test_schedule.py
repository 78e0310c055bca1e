"""Schedules are pure functions of the step, with a warm-up in steps, and never leave [0, 1]."""

import math
from collections.abc import Callable

import pytest

from sftlab.training.schedule import constant, cosine, linear, wsd

SCHEDULES = [constant, linear, cosine, wsd]
Schedule = Callable[..., float]


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_step_has_one_factor_in_whatever_order_it_is_asked(schedule: Schedule) -> None:
    forward = [schedule(s, 50, warmup_steps=5) for s in range(1, 51)]
    backward = [schedule(s, 50, warmup_steps=5) for s in range(50, 0, -1)]
    assert forward == backward[::-1]
    assert all(0 < f <= 1 for f in forward)  # no update is made at a factor of 0


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_warm_up_is_linear_and_in_steps(schedule: Schedule) -> None:
    assert [schedule(s, 100, warmup_steps=4) for s in range(1, 6)] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert schedule(1, 100) == 1.0
    with pytest.raises(ValueError, match=r"schedule\.warmup_steps=-1"):
        schedule(1, 100, warmup_steps=-1)


def test_the_shapes() -> None:
    assert [constant(s, 10) for s in (1, 5, 10, 11)] == [1, 1, 1, 1]
    assert [linear(s, 4) for s in range(1, 6)] == [1, 0.75, 0.5, 0.25, 0]
    assert linear(5, 4, final_ratio=0.1) == pytest.approx(0.1)
    assert [cosine(s, 4) for s in range(1, 6)] == pytest.approx(
        [0.5 * (1 + math.cos(math.pi * i / 4)) for i in range(5)]
    )
    assert cosine(5, 4, final_ratio=0.1) == pytest.approx(0.1)
    assert [wsd(s, 10, decay_ratio=0.2) for s in range(1, 11)] == [1.0] * 9 + [0.5]
    assert wsd(11, 10, decay_ratio=0.2, final_ratio=0.1) == pytest.approx(0.1)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_warm_up_as_long_as_the_run_or_longer(schedule: Schedule) -> None:
    assert [schedule(s, 3, warmup_steps=3) for s in (1, 2, 3)] == pytest.approx([1 / 3, 2 / 3, 1])
    assert [schedule(s, 3, warmup_steps=30) for s in (1, 2, 3)] == pytest.approx([1 / 30, 2 / 30, 3 / 30])
    assert schedule(1, 1) == 1.0

"""Schedules are pure functions of the step, with a warm-up in steps, and never leave [0, 1]."""

import math
from collections.abc import Callable

import pytest

from sftlab.config.binding import check_node
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
    target = f"sftlab.training.schedule.{schedule.__name__}"
    with pytest.raises(ValueError, match=r"schedule\.warmup_steps=-1: expected a whole number of at least 0"):
        check_node("schedule", {"_target_": target, "_partial_": True, "warmup_steps": -1})


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


def test_values_along_each_schedule_by_hand() -> None:
    """12 steps, 2 of them warm-up, a floor of 0.1: steps 3 to 12 have done 0 to 9 tenths of the way."""
    given = {"warmup_steps": 2, "final_ratio": 0.1}
    assert [constant(s, 12, warmup_steps=2) for s in (1, 2, 3, 12)] == [0.5, 1, 1, 1]
    assert [linear(s, 12, **given) for s in (1, 2, 3, 8, 12, 13, 99)] == pytest.approx(
        [0.5, 1, 1, 0.55, 0.19, 0.1, 0.1]
    )
    assert [cosine(s, 12, **given) for s in (1, 2, 3, 5, 8, 12, 13, 99)] == pytest.approx(
        [0.5, 1, 1, 0.1 + 0.45 * 1.8090170, 0.55, 0.1 + 0.45 * 0.0489435, 0.1, 0.1], rel=1e-6
    )
    # 20 steps, the last quarter of which is the decay: steps 16 to 20 have done 0 to 4 fifths of the way.
    decay = {"warmup_steps": 2, "final_ratio": 0.2, "decay_ratio": 0.25}
    assert [wsd(s, 20, **decay) for s in (1, 2, 3, 15, 16, 17, 20, 21)] == pytest.approx(
        [0.5, 1, 1, 1, 1, 0.84, 0.36, 0.2]
    )


def test_the_decay_of_wsd_is_a_fifth_rounded_and_comes_after_the_warm_up() -> None:
    assert [wsd(s, 10) for s in (8, 9, 10, 11)] == [1, 1, 0.5, 0]
    assert [wsd(s, 11, decay_ratio=0.25) for s in (9, 10, 11)] == pytest.approx([1, 2 / 3, 1 / 3])  # 2.75 steps are 3
    # Half of 8 steps would begin after the 4th, in the middle of a warm-up of 6.
    assert [wsd(s, 8, warmup_steps=6, decay_ratio=0.5) for s in (5, 6, 7, 8, 9)] == pytest.approx([5 / 6, 1, 1, 0.5, 0])

"""Curves of any length, thinned as they come: against sums worked out from all values."""

import math
from itertools import pairwise

import pytest

from sftlab.reports.curves import MOST, Curve, Curves


def test_a_short_curve_is_what_was_measured() -> None:
    made = Curves([{"step": s, "time_s": s / 2, "val/loss": 3.0 - s} for s in range(3)])
    assert made.by_name["val/loss"].points() == [(0, 3.0), (1, 2.0), (2, 1.0)]
    assert made.first == {"val/loss": 3.0} and made.last == {"step": 2, "time_s": 1.0, "val/loss": 1.0}


@pytest.mark.parametrize("steps", [MOST + 1, 2 * MOST, 2 * MOST + 1, 10_007])
def test_a_long_curve_keeps_the_mean_and_the_extremes_of_all_steps(steps: int) -> None:
    values = [math.sin(s / 40) + (s % 7) for s in range(steps)]
    made = Curve()
    for step, value in enumerate(values):
        made.add(step, value)
    assert Curve.of(range(steps), values).points() == made.points()
    assert MOST / 2 <= len(made.buckets) <= MOST
    assert sum(b[2] for b in made.buckets) == steps and made.buckets[0][0] == 0 and made.buckets[-1][1] == steps - 1
    assert sum(b[3] for b in made.buckets) == pytest.approx(sum(values))
    assert all(b[1] + 1 == c[0] for b, c in pairwise(made.buckets)), "every step once, in order"
    for first, last, _, _, low, high in made.buckets:
        part = values[int(first) : int(last) + 1]
        assert (low, high) == (min(part), max(part))
    step, mean, low, high = made.points()[3]
    first, last = made.buckets[3][:2]
    assert step == (first + last) / 2
    assert mean == pytest.approx(sum(values[int(first) : int(last) + 1]) / (last - first + 1), rel=1e-5)


def test_what_is_no_finite_number_is_left_out() -> None:
    lines = [{"step": 1, "train/loss": float("nan"), "x": "text", "y": True}, {"step": "two", "train/loss": 1.0}]
    made = Curves([*lines, {"step": 3, "train/loss": 2.0}])
    assert made.by_name.keys() == {"train/loss"} and made.by_name["train/loss"].points() == [(3, 2.0)]


def test_seconds_of_parts_add_up_over_steps_that_were_not_logged() -> None:
    made = Curves([{"step": 10, "time/forward_s": 0.5}, {"step": 20, "time/forward_s": 1.0, "time/evaluation_s": 2.0}])
    assert made.totals == {"time/forward_s": 15.0, "time/evaluation_s": 20.0} and made.timed_steps == 20

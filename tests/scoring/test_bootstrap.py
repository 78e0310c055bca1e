"""Scores from lines, and the interval of a difference: by hand, by theory, and as often right as it says."""

import math
from typing import Any

import numpy as np
import pytest

from sftlab.scoring.bootstrap import differences, scores_of


def line(value: float, **more: Any) -> dict[str, Any]:
    return {"scores": {"f1": value}, "nll": 10 * value, "targets": 5, "correct": 2, **more}


def test_intervals_of_equal_models_and_of_a_constant_gap_are_points() -> None:
    rng = np.random.default_rng(0)
    values = rng.random(200)
    ours = [line(v) for v in values]
    for gap in differences(ours, ours, range(200)).values():
        assert gap == {"value": 0, "low": 0, "high": 0}
    found = differences([line(v + 0.25) for v in values], ours, range(200))
    assert found["f1"] == pytest.approx({"value": 0.25, "low": 0.25, "high": 0.25})
    assert found["loss"] == pytest.approx({"value": 0.5, "low": 0.5, "high": 0.5})
    assert list(found) == ["loss", "token_accuracy", "f1"]


def test_intervals_cover_the_truth_as_often_as_they_say() -> None:
    """Questions of one passage share their luck: over groups 95 % of the intervals hold, over questions far fewer."""
    rng = np.random.default_rng(0)
    covered = {"groups": 0, "questions": 0}
    rounds, groups = 100, np.repeat(np.arange(60), 5)
    for _ in range(rounds):
        luck = np.repeat(rng.normal(size=60), 5)
        ours, theirs = [{"scores": {"f1": v}} for v in luck + rng.normal(size=300)], [{"scores": {"f1": 0.0}}] * 300
        for name, of in (("groups", groups), ("questions", np.arange(300))):
            gap = differences(ours, theirs, of.tolist())["f1"]
            covered[name] += gap["low"] <= 0 <= gap["high"]
    assert 0.91 < covered["groups"] / rounds < 0.99
    assert covered["questions"] / rounds < 0.8


def test_scores_of_nothing_supervised_are_nan_not_zero() -> None:
    found = scores_of([{"nll": 0.0, "targets": 0, "correct": 0}])
    assert math.isnan(found["loss"]) and math.isnan(found["token_accuracy"])


def test_scores_are_sums_over_targets_and_means_over_answers() -> None:
    """One line of 2 targets and one of 8: a mean of the lines' own means would be 1.75 nats and 0.625."""
    lines = [
        {"nll": 6.0, "targets": 2, "correct": 2, "scores": {"f1": 0.2}},
        {"nll": 4.0, "targets": 8, "correct": 2, "scores": {"f1": 0.7}},
        {"nll": 2.0, "targets": 2, "correct": 0},
    ]
    assert scores_of(lines) == pytest.approx(
        {"loss": 1.0, "perplexity": math.e, "token_accuracy": 4 / 12, "f1": 0.45}, rel=1e-12
    )
    assert scores_of([{"nll": 5000.0, "targets": 1, "correct": 0}])["perplexity"] == math.exp(700)
    assert scores_of([{"nll": 690.0, "targets": 1, "correct": 0}])["perplexity"] == math.exp(690)
    assert scores_of([{"scores": {"f1": 0.5}}]) == {"f1": 0.5}


def test_an_interval_over_two_passages_worked_out_by_hand() -> None:
    """Three questions on one passage and one on another are drawn as AA, AB, BA or BB, each a quarter of the time.

    The differences in f1 are 0.25, 0.25, 0 and 1: AA gives 1/6, AB 1.5/4 and BB 1; in nats for each target they are
    -8/12 for AA and -2/4 for BB. So the middle 95 % of the draws reach from one end to the other.
    """
    base = [{"nll": 10.0, "targets": 4, "correct": 0, "scores": {"f1": 0.0}} for _ in range(4)]
    ours = [
        {"nll": 10.0 - gap, "targets": 4, "correct": 1, "scores": {"f1": f1}}
        for gap, f1 in ((2.0, 0.25), (3.0, 0.25), (3.0, 0.0), (2.0, 1.0))
    ]
    found = differences(ours, base, [80, 80, 80, 3])
    assert found["f1"] == pytest.approx({"value": 0.375, "low": 1 / 6, "high": 1.0})
    assert found["loss"] == pytest.approx({"value": -10 / 16, "low": -8 / 12, "high": -2 / 4})
    assert found["token_accuracy"] == pytest.approx({"value": 0.25, "low": 0.25, "high": 0.25})
    turned = differences(base, ours, [80, 80, 80, 3])["f1"]
    assert turned == pytest.approx({"value": -0.375, "low": -1.0, "high": -1 / 6})


def test_an_interval_is_two_standard_errors_to_each_side() -> None:
    """Half of 400 answers are better by 1: a standard error of 0.5 / 20, and 95 % of a normal lie within 1.96 of it."""
    ours = [{"scores": {"f1": float(i % 2)}} for i in range(400)]
    gap = differences(ours, [{"scores": {"f1": 0.0}}] * 400, range(400))["f1"]
    assert gap["value"] == 0.5
    assert gap["low"] == pytest.approx(0.5 - 1.96 * 0.025, abs=0.003)
    assert gap["high"] == pytest.approx(0.5 + 1.96 * 0.025, abs=0.003)


def test_a_difference_is_of_the_scores_that_both_have_in_this_model_s_order() -> None:
    ours = [{"scores": {"f1": 0.5, "own": 1.0, "exact_match": 1.0}}] * 3
    theirs = [{"scores": {"exact_match": 0.0, "f1": 0.25, "other": 1.0}}] * 3
    assert list(differences(ours, theirs, range(3))) == ["f1", "exact_match"]


def test_a_passage_without_a_score_is_not_drawn_as_nothing() -> None:
    """Only one of two passages has answers: a draw without it says nothing, instead of not-a-number for everything."""
    ours = [{"scores": {"f1": 1.0}}, {"nll": 1.0, "targets": 1, "correct": 1}]
    theirs = [{"scores": {"f1": 0.25}}, {"nll": 1.0, "targets": 1, "correct": 1}]
    assert differences(ours, theirs, [0, 1])["f1"] == {"value": 0.75, "low": 0.75, "high": 0.75}

"""Ranking, verdict and importance, each against numbers worked out by hand."""

import math
from pathlib import Path

import pytest

from sftlab.sweeps import points, ranking
from sftlab.sweeps.points import Point
from sftlab.sweeps.ranking import Group
from tests.asymmetric import unequal_sweep


@pytest.fixture(scope="module")
def unequal(tmp_path_factory: pytest.TempPathFactory) -> points.Sweep:
    return points.read(unequal_sweep(tmp_path_factory.mktemp("sweep")), {})


def rates(groups: list[Group]) -> list[str]:
    return [g.settings["optim.lr"] for g in groups]


@pytest.mark.parametrize(
    ("metric", "score", "order", "means", "winner"),
    [
        ("val/loss", "last", ["0.1", "1", "0.01", "10"], [1.5, 1.9, 2.2, None], 2),
        ("val/loss", "best", ["0.01", "0.1", "1", "10"], [0.6, 1.4, 1.7, None], 0),
        ("val/f1", "last", ["0.01", "1", "0.1", "10"], [0.8, 0.5, 0.3, None], 3),
        ("val/perplexity", "last", ["0.1", "1", "0.01", "10"], [5, 6, 9, None], 2),
    ],
)
def test_each_metric_is_ranked_in_its_own_direction(
    unequal: points.Sweep, metric: str, score: str, order: list[str], means: list[float | None], winner: int
) -> None:
    groups = ranking.ranked(unequal, metric, score)
    assert rates(groups) == order
    assert [g.mean for g in groups] == [None if m is None else pytest.approx(m) for m in means]
    assert groups[0].best is not None and groups[0].best.num == winner


def test_a_point_without_a_score_leaves_its_group_incomplete(unequal: points.Sweep) -> None:
    groups = {g.settings["optim.lr"]: g for g in ranking.ranked(unequal, "val/loss")}
    assert {lr: [p.num for p in g.points] for lr, g in groups.items()} == {
        "0.01": [0, 3],
        "0.1": [2, 4, 6],
        "1": [1, 5],
        "10": [7],
    }
    assert {lr: [p.num for p, _ in g.scored] for lr, g in groups.items()} == {
        "0.01": [0, 3],
        "0.1": [2, 4, 6],
        "1": [5],
        "10": [],
    }
    assert {lr: g.complete for lr, g in groups.items()} == {"0.01": True, "0.1": True, "1": False, "10": False}
    assert groups["10"].best is None
    # sample deviations: sqrt((0.2^2 + 0.2^2) / 1), sqrt((0.5^2 + 0 + 0.5^2) / 2)
    assert groups["0.01"].deviation == pytest.approx(math.sqrt(0.08))
    assert groups["0.1"].deviation == pytest.approx(0.5)
    assert groups["1"].deviation is None and groups["10"].deviation is None


def test_importance_is_the_share_between_levels_and_what_chance_alone_would_give(unequal: points.Sweep) -> None:
    """Six scores of mean 1.8: 2.0 2.4, 1.0 1.5 2.0, 1.9. Squares about the mean 1.18; within the levels 0.08 + 0.5."""
    found = ranking.importance(ranking.ranked(unequal, "val/loss"))
    (share,) = found.shares
    assert (share.name, found.num_scores) == ("optim.lr", 6)
    assert share.share == pytest.approx(1 - 0.58 / 1.18)
    assert share.chance == pytest.approx((3 - 1) / (6 - 1))
    assert share.levels == [("0.01", pytest.approx(2.2), 2), ("0.1", pytest.approx(1.5), 3), ("1", 1.9, 1)]
    assert found.noise == pytest.approx(0.58 / 1.18)


def group(scores: list[float], num_points: int | None = None, **settings: str) -> Group:
    """Return a group of points with these scores; further points of it have none."""
    made = [Point(i, (), Path("x")) for i in range(num_points or len(scores))]
    return Group(settings, made, list(zip(made, scores, strict=False)), made[0] if scores else None)


def test_the_verdicts_standard_error_pools_every_group_and_counts_both_contestants_seeds(unequal: points.Sweep) -> None:
    """1.5 of three seeds against 1.9 of one. Pooled variance (0.08 * 1 + 0.25 * 2) / 3; error its root times
    sqrt(1/3 + 1/1) = 0.5077; 0.4 / 0.5077 = 0.79."""
    text = ranking.verdict(ranking.ranked(unequal, "val/loss"))
    assert text == "The next best is 0.4 behind: 0.8 standard errors of the seeds' noise, no more than noise."


@pytest.mark.parametrize(
    ("second", "says"),
    [
        # Scores 1 +- 0.1 (variance 0.02) and the same about the second mean; error 0.1414 * sqrt(1/2 + 1/2) = 0.1414.
        (1.20, "The next best is 0.2 behind: 1.4 standard errors of the seeds' noise, no more than noise."),
        (1.23, "The next best is 0.23 behind: 1.6 standard errors of the seeds' noise, perhaps noise."),
        (1.42, "The next best is 0.42 behind: 3.0 standard errors of the seeds' noise, perhaps noise."),
        (1.44, "The next best is 0.44 behind: 3.1 standard errors of the seeds' noise, more than noise explains."),
        (0.56, "The next best is 0.44 behind: 3.1 standard errors of the seeds' noise, more than noise explains."),
    ],
)
def test_the_verdict_judges_by_one_and_a_half_and_three_standard_errors(second: float, says: str) -> None:
    assert ranking.verdict([group([0.9, 1.1]), group([second - 0.1, second + 0.1])]) == says


def test_the_verdict_says_what_it_cannot_judge() -> None:
    assert ranking.verdict([group([1.0, 1.0]), group([2.0, 2.0])]) == (
        "The next best is 1 behind; the seeds made no difference."
    )
    assert ranking.verdict([group([1.0]), group([1.25])]) == (
        "The next best is 0.25 behind. Without several seeds nothing tells whether that is noise."
    )
    assert ranking.verdict([group([1.0])]) == ""
    assert ranking.verdict([group([1.0]), group([], 1)]) == ""
    assert ranking.verdict([group([], 1), group([], 1)]) == ""
    # a third group's seeds tell of the noise too: variance 0.02, error 0.1414 * sqrt(1 + 1) = 0.2
    noisy = [group([1.0]), group([1.5]), group([3.9, 4.1])]
    assert ranking.verdict(noisy).startswith("The next best is 0.5 behind: 2.5 standard errors")


def test_shares_are_sorted_and_levels_in_the_order_of_numbers() -> None:
    rows = [("2", "a", 1.0), ("10", "a", 2.0), ("2", "b", 4.0), ("10", "b", 5.0)]
    groups = [group([score], lr=lr, kind=kind) for lr, kind, score in rows]
    found = ranking.importance(groups)
    # mean 3, squares 4 + 1 + 1 + 4 = 10; within the kinds 0.5 + 0.5, within the rates 4.5 + 4.5
    assert [(s.name, s.share) for s in found.shares] == [("kind", pytest.approx(0.9)), ("lr", pytest.approx(0.1))]
    assert [s.chance for s in found.shares] == [pytest.approx(1 / 3)] * 2 and found.noise is None
    assert [level for level, _, _ in found.shares[1].levels] == ["2", "10"]


def test_importance_needs_three_scores_that_differ_and_levels_that_repeat() -> None:
    assert ranking.importance([group([1.0], a="1"), group([2.0], a="2")]).shares == []
    assert ranking.importance([group([1.0, 1.0], a="1"), group([1.0, 1.0], a="2")]).shares == []
    three = ranking.importance([group([1.0, 1.1], a="1"), group([2.0], a="2")])
    assert three.num_scores == 3 and three.shares == []  # two levels of three scores: chance alone takes half
    assert [s.name for s in ranking.importance([group([1.0, 1.1], a="1"), group([2.0, 3], a="2")]).shares] == ["a"]
    one_level = ranking.importance([group([1.0, 1.1, 2.0], a="1")])
    assert one_level.shares == [] and one_level.noise == pytest.approx(1)


def test_more_than_six_numbers_are_cut_into_quarters_by_rank() -> None:
    assert ranking.levels_of(["1", "2", "3", "4", "5", "6"]) == ["1", "2", "3", "4", "5", "6"]
    assert ranking.levels_of([*"7163542"]) == [
        "6 to 7",
        "1 to 2",
        "6 to 7",
        "3 to 4",
        "5 to 5",
        "3 to 4",
        "1 to 2",
    ]
    mixed = ["1", "2", "3", "4", "5", "6", "7", "auto"]
    assert ranking.levels_of(mixed) == mixed  # a word among them: each is a level of its own
    assert ranking.number("inf") is None and ranking.number("1e-3") == 0.001 and ranking.number("x") is None


def test_numbers_come_before_words_in_order() -> None:
    assert sorted(["b", "10", "9 to 11", "a", "2"], key=ranking.order) == ["2", "9 to 11", "10", "a", "b"]


def test_spread_is_the_sum_of_squares_about_the_mean() -> None:
    assert ranking.spread([1.0, 2.0, 6.0]) == 14.0  # mean 3: 4 + 1 + 9

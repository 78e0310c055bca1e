"""The answer of a sweep: settings ranked by a metric over their seeds, and which hyperparameters mattered.

Pure functions over points. The score of a point is the last value of the metric, which belongs to the model that it
leaves behind. `score=best` takes the best over the run instead: a choice made on the validation data, which flatters.
"""

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

from sftlab.common.metrics import lower_is_better
from sftlab.sweeps.points import Point
from sftlab.sweeps.record import Sweep

SEEDS = ("seed",)  # swept to measure the noise, not to be chosen
MOST_LEVELS = 6  # a numeric hyperparameter with more values than this is divided into quarters by rank


@dataclass(frozen=True)
class Group:
    """The points that differ only in their seed, with their scores."""

    settings: dict[str, str]
    points: list[Point]
    scored: list[tuple[Point, float]]
    best: Point | None

    @property
    def mean(self) -> float | None:
        """Return the mean score of the points that have one."""
        return statistics.fmean(score for _, score in self.scored) if self.scored else None

    @property
    def deviation(self) -> float | None:
        """Return the sample standard deviation (n - 1) of the scores, None for fewer than two."""
        return statistics.stdev(score for _, score in self.scored) if len(self.scored) > 1 else None

    @property
    def complete(self) -> bool:
        """Return whether every point has a score. A mean over the seeds that survived may flatter."""
        return len(self.scored) == len(self.points)


@dataclass(frozen=True)
class Share:
    """The share of the scores' variance between the levels of a hyperparameter, and the share expected by chance."""

    name: str
    share: float
    chance: float
    levels: list[tuple[str, float, int]]


@dataclass(frozen=True)
class Importance:
    """The shares of the variance of all scores: per hyperparameter and for the seeds, and the number of scores."""

    shares: list[Share]
    noise: float | None
    num_scores: int


def ranked(sweep: Sweep, metric: str, score: str = "last") -> list[Group]:
    """Return the groups of points, best mean first; those without a score come last.

    Only finished points have a score: a running point may still change, and a pruned one stopped early.
    """
    better: Callable[..., float] = min if lower_is_better(metric) else max
    sign = 1 if lower_is_better(metric) else -1
    names = [name for name in sweep.swept if name not in SEEDS]
    members: dict[tuple[str, ...], list[Point]] = {}
    for point in sweep.points:
        members.setdefault(tuple(point.settings.get(n, "") for n in names), []).append(point)
    groups = []
    for values, points in members.items():
        scored = [(p, v) for p in points if p.state == "finished" and (v := p.value(metric, score)) is not None]
        best_score = better((v for _, v in scored), default=math.nan)
        best = next((p for p, v in scored if v == best_score), None)
        groups.append(Group(dict(zip(names, values, strict=True)), points, scored, best))
    return sorted(groups, key=lambda g: math.inf if g.mean is None else sign * g.mean)


def importance(groups: Sequence[Group]) -> Importance:
    """Return which hyperparameters mattered: the share of the scores' variance between the levels of each alone.

    In a full grid the shares of the hyperparameters, of their interactions and of the seeds add up to 1. In other
    designs levels of one come with levels of another, and shares overlap. `chance` is the share that k levels of n
    scores take of pure noise, (k - 1) / (n - 1): a share near it says nothing. Many values are divided into quarters.
    """
    rows = [(g.settings, score) for g in groups for _, score in g.scored]
    scores = [score for _, score in rows]
    if len(rows) < 3 or (total := spread(scores)) == 0:
        return Importance([], None, len(rows))
    shares = []
    for name in groups[0].settings:
        levels: dict[str, list[float]] = {}
        for level, score in zip(levels_of([s[name] for s, _ in rows]), scores, strict=True):
            levels.setdefault(level, []).append(score)
        if 1 < len(levels) <= len(rows) / 2:  # with more levels, chance alone takes half of the variance
            between = 1 - sum(map(spread, levels.values())) / total
            means = [(level, statistics.fmean(v), len(v)) for level, v in levels.items()]
            means.sort(key=lambda m: order(m[0]))
            shares.append(Share(name, between, (len(levels) - 1) / (len(rows) - 1), means))
    seeds = [g for g in groups if len(g.scored) > 1]
    noise = sum(spread([s for _, s in g.scored]) for g in seeds) / total if seeds else None
    return Importance(sorted(shares, key=lambda s: -s.share), noise, len(rows))


def verdict(groups: Sequence[Group]) -> str:
    """Return in a sentence how far the winner is ahead, measured by the noise of the seeds."""
    if len(groups) < 2 or groups[0].mean is None or groups[1].mean is None:
        return ""
    gap = abs(groups[1].mean - groups[0].mean)
    if not gap:
        return "The next best has the same score."
    text = f"The next best is {gap:.4g} behind"
    squares = [(g.deviation**2, len(g.scored) - 1) for g in groups if g.deviation is not None]
    if not squares:
        return f"{text}. Without several seeds nothing tells whether that is noise."
    noise = math.sqrt(sum(square * n for square, n in squares) / sum(n for _, n in squares))
    error = noise * math.sqrt(1 / len(groups[0].scored) + 1 / len(groups[1].scored))
    if not error:
        return f"{text}; the seeds made no difference."
    times = gap / error
    judged = "more than noise explains" if times > 3 else "perhaps noise" if times > 1.5 else "no more than noise"
    return f"{text}: {times:.1f} standard errors of the seeds' noise, {judged}."


def levels_of(values: Sequence[str]) -> list[str]:
    """Return the level of each value: the value, or its quarter if there are more than MOST_LEVELS numbers."""
    numbers = [number(v) for v in values]
    distinct = sorted({n for n in numbers if n is not None})
    if len(distinct) <= MOST_LEVELS or None in numbers:
        return list(values)
    edges = [round(i * len(distinct) / 4) for i in range(5)]
    quarters = [distinct[a:b] for a, b in pairwise(edges)]
    names = {n: f"{quarter[0]:.3g} to {quarter[-1]:.3g}" for quarter in quarters for n in quarter}
    return [names[n] for n in numbers if n is not None]


def spread(values: Sequence[float]) -> float:
    """Return the sum of squared distances from the mean."""
    mean = statistics.fmean(values)
    return math.fsum((v - mean) ** 2 for v in values)


def number(text: str) -> float | None:
    """Return an override's value as a number, None if it is none."""
    try:
        value = float(text)
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def order(text: str) -> tuple[float, str]:
    """Return a sort key: numbers (and ranges, by their start) by size, then text."""
    value = number(text.split(" to ")[0])
    return (math.inf if value is None else value, text)

"""Scores of a model from its lines, and the differences between two models with bootstrap intervals.

The bootstrap is paired because both models answer the same examples. It resamples prefix groups because questions on
one passage are not independent: resampling single questions would give intervals that are too narrow.
Source: Efron and Tibshirani, An Introduction to the Bootstrap, 1993.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

Line = Mapping[str, Any]
Parts = Mapping[str, tuple[float, float]]
RESAMPLES = 2000
CONFIDENCE = 0.95


def parts_of(line: Line) -> dict[str, tuple[float, float]]:
    """Return the (numerator, denominator) that one example adds to each score."""
    parts: dict[str, tuple[float, float]] = {}
    if "nll" in line:
        parts["loss"] = (line["nll"], line["targets"])
        parts["token_accuracy"] = (line["correct"], line["targets"])
    return parts | {name: (float(value), 1.0) for name, value in line.get("scores", {}).items()}


def scores_of(lines: Sequence[Line]) -> dict[str, float]:
    """Return the scores over all lines: loss in nats per target, perplexity, and fractions from 0 to 1."""
    tops: dict[str, float] = {}
    bottoms: dict[str, float] = {}
    for line in lines:
        for name, (top, bottom) in parts_of(line).items():
            tops[name], bottoms[name] = tops.get(name, 0.0) + top, bottoms.get(name, 0.0) + bottom
    scores: dict[str, float] = {}
    for name, top in tops.items():
        scores[name] = top / bottoms[name] if bottoms[name] else math.nan
        if name == "loss":
            scores["perplexity"] = math.exp(min(scores[name], 700.0))
    return scores


def differences(ours: Sequence[Line], theirs: Sequence[Line], groups: Sequence[int]) -> dict[str, dict[str, float]]:
    """Return {score: {value, low, high}} of ours minus theirs; both hold a line for each of the same examples.

    `low` and `high` bound the middle 95 % of the differences in resamples of the groups, drawn with replacement.
    """
    _, group = np.unique(np.asarray(groups), return_inverse=True)
    tables = [grouped([parts_of(line) for line in lines], group) for lines in (ours, theirs)]
    rng, num = np.random.default_rng(0), int(group.max()) + 1
    drawn = [rng.multinomial(num, np.full(num, 1 / num), size=100) for _ in range(RESAMPLES // 100)]
    values, exact = scores_of(ours), scores_of(theirs)
    found = {}
    for name in tables[0].keys() & tables[1].keys():
        a, b = (np.concatenate([ratio(counts @ table[name]) for counts in drawn]) for table in tables)
        tail = 50 * (1 - CONFIDENCE)
        low, high = np.nanpercentile(a - b, [tail, 100 - tail])
        found[name] = {"value": values[name] - exact[name], "low": float(low), "high": float(high)}
    return {name: found[name] for name in values if name in found}


def grouped(parts: Sequence[Parts], group: NDArray[np.int64]) -> dict[str, NDArray[np.float64]]:
    """Return for each score the summed (numerator, denominator) of every group, (groups, 2)."""
    tables: dict[str, NDArray[np.float64]] = {}
    for g, part in zip(group, parts, strict=True):
        for name, pair in part.items():
            tables.setdefault(name, np.zeros((int(group.max()) + 1, 2)))[g] += pair
    return tables


def ratio(sums: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return numerators divided by denominators, NaN where a resample holds nothing that is scored."""
    with np.errstate(invalid="ignore", divide="ignore"):
        quotient: NDArray[np.float64] = sums[:, 0] / sums[:, 1]
    return quotient

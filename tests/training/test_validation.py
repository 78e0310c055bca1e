"""Evaluation within a run: perplexity and accuracy by hand, which examples are answered, how answers are shown."""

import math
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from sftlab.data.example import Example
from sftlab.data.loader import RowLayout
from sftlab.data.plan import Plan
from sftlab.models.scorer import Score
from sftlab.training.validation import LossEvaluator, sample


def examples(weights: list[int]) -> list[Example]:
    """Return examples of 8 tokens, the last `weight` of which are targets."""
    return [Example(np.arange(8, dtype=np.int32), np.arange(8) >= 8 - w, id=f"e{i}") for i, w in enumerate(weights)]


def evaluated(world: Any, weights: list[int], nll: Any, correct: float, batch_size: int = 2) -> dict[str, float]:
    """Return the scores where each microbatch's nll and the weight of right guesses are so much per unit of weight."""

    def scorer(batch: Any) -> Score:
        assert not torch.is_grad_enabled()
        weight = float(batch.weight.sum())
        return Score(torch.tensor(float(nll(weight))), torch.tensor(weight * correct))

    given = examples(weights)
    plan = Plan(np.arange(len(given)), batch_size, 0, shuffle=False, group_by_prefix=False)
    row_layout = RowLayout("padded", 16, 1, 0, 1, pad_token=2)
    return dict(LossEvaluator(scorer, given, plan, row_layout, world)().scores)  # type: ignore[arg-type]


def test_loss_perplexity_and_accuracy_by_hand(one: Any) -> None:
    """Examples of 1, 2 and 5 targets in two steps: (1 + 4 + 25) / 8 = 3.75 nats a target, not the mean of 1, 2 and 5.

    e^3.75 = 42.5211.
    """
    found = evaluated(one, [1, 2, 5], nll=lambda weight: weight**2, correct=0.75)
    assert found == {"loss": 3.75, "perplexity": pytest.approx(42.5211, rel=1e-6), "token_accuracy": 0.75}


def test_a_loss_too_large_for_a_perplexity_is_no_error(one: Any) -> None:
    found = evaluated(one, [1, 2], nll=lambda weight: weight * 5000, correct=0.0)
    assert found["loss"] == 5000 and found["perplexity"] == pytest.approx(1.0142320547e304)
    assert evaluated(one, [1], nll=lambda weight: weight * 699, correct=0.0)["perplexity"] == math.exp(699)


def test_without_a_target_nothing_is_known(one: Any) -> None:
    found = evaluated(one, [0, 0], nll=lambda weight: 0.0, correct=0.0)
    assert found.keys() == {"loss", "perplexity", "token_accuracy"} and all(map(math.isnan, found.values()))


class Read:
    """Examples of which every third has no answer, and which note which of them was read."""

    def __init__(self, num: int) -> None:
        self.num, self.read = num, list[int]()

    def __len__(self) -> int:
        return self.num

    def __getitem__(self, i: int) -> Any:
        self.read.append(i)
        return SimpleNamespace(number=i, references=() if i % 3 == 0 else ("yes",))

    def __iter__(self) -> Iterator[Any]:
        raise AssertionError("in the order in which they lie, all would be of the first passage")


def test_a_sample_is_of_examples_with_answers_the_same_ones_in_every_run() -> None:
    chosen = [e.number for e in sample(Read(300), 20)]  # type: ignore[arg-type]
    assert chosen == [e.number for e in sample(Read(300), 20)]  # type: ignore[arg-type]
    assert len(set(chosen)) == 20 and all(i % 3 for i in chosen)
    assert chosen != sorted(chosen) and min(chosen) < 100 and max(chosen) >= 200, "from everywhere"
    more = [e.number for e in sample(Read(300), 21)]  # type: ignore[arg-type]
    assert more[:20] == chosen


def test_a_sample_takes_what_there_is_and_reads_no_more_than_it_needs() -> None:
    few = Read(9)
    assert sorted(e.number for e in sample(few, 64)) == [1, 2, 4, 5, 7, 8]  # type: ignore[arg-type]
    none = Read(9)
    assert sample(none, 0) == [] and none.read == []  # type: ignore[arg-type]
    many = Read(10_000)
    sample(many, 2)  # type: ignore[arg-type]
    assert len(many.read) < 20

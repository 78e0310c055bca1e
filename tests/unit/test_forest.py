"""The forest's one rule, against plain attention over separate rows."""

import numpy as np
import pytest

from sftlab.data.example import Example
from sftlab.data.forest import LAYOUTS, assign_to_ranks, best_fit, lay_out
from tests.support import random_examples


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_prediction_is_made_once(layout: str) -> None:
    examples = random_examples(20)
    rows = lay_out(examples, layout, row_length=128)
    assert sum(r.weight.sum() for r in rows) == sum(e.supervised.sum() for e in examples)
    assert sum(r.num_examples for r in rows) == len(examples)
    assert all(len(r) <= 128 for r in rows)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_what_a_token_sees_is_its_example(layout: str) -> None:
    examples = random_examples(12, seed=1)
    texts = {e.tokens.tobytes() for e in examples}
    prefixes = {t[: 4 * n] for t in texts for n in range(1, len(t) // 4 + 1)}
    for r in lay_out(examples, layout, row_length=128):
        index = np.arange(len(r))
        for i in range(len(r)):
            seen = index[(index <= i) & (i < r.reach)]
            assert list(r.position[seen]) == list(range(len(seen)))
            assert r.tokens[seen].astype(np.int32).tobytes() in prefixes


def test_tree_shares_and_packed_does_not() -> None:
    examples = random_examples(20)
    total = sum(len(e) for e in examples)
    assert sum(map(len, lay_out(examples, "tree", 128))) < total
    assert sum(map(len, lay_out(examples, "packed", 128))) == total


def test_too_long_an_example_is_named() -> None:
    with pytest.raises(ValueError, match=r"example e0 has \d+ tokens, more than data.row_length=3"):
        lay_out(random_examples(1), "tree", 3)


def test_best_fit_and_deal() -> None:
    assert best_fit([5, 4, 3, 2, 1], 6) == [[0, 4], [1, 3], [2]]
    assert assign_to_ranks([5, 4, 3, 2], 2) == [[0, 3], [1, 2]]


def test_several_ranks_get_as_many_rows_each_and_even_ones() -> None:
    examples = random_examples(30, seed=3)
    longest = max(map(len, examples))
    for layout in ("tree", "packed"):
        alone = lay_out(examples, layout, 512)
        for num_ranks in (2, 3, 4):
            rows = lay_out(examples, layout, 512, num_ranks)
            assert len(alone) <= len(rows) <= -(-len(alone) // num_ranks) * num_ranks
            assert max(map(len, rows)) - min(map(len, rows)) <= longest
            assert sum(r.num_examples for r in rows) == len(examples)


def test_a_beginning_that_all_share_takes_room_once_a_row() -> None:
    examples = []
    for i in range(40):
        tokens = np.concatenate([np.arange(3, 13), np.full(20, 50 + i)]).astype(np.int32)  # 10 tokens in common, 20 not
        examples.append(Example(tokens, np.arange(30) > 10, str(i)))
    rows = lay_out(examples, "tree", 210)
    assert [(len(r), r.num_examples) for r in rows] == [(210, 10)] * 4

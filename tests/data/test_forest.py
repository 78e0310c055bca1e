"""The forest's one rule, against plain attention over separate rows."""

import numpy as np
import pytest

from sftlab.data.example import Example
from sftlab.data.forest import (
    LAYOUTS,
    SHORT_TREE,
    assign_to_ranks,
    best_fit,
    common_prefix,
    lay_out,
    pack,
    row,
    shared_units,
    sort_key,
)
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
            assert max(map(len, rows)) - min(map(len, rows)) <= max(longest, SHORT_TREE)
            assert sum(r.num_examples for r in rows) == len(examples)


def test_a_short_beginning_that_all_share_is_no_root_of_a_long_tree() -> None:
    """Else every block of the row attends to it."""

    def sharing(num: int) -> list[Example]:
        stem = np.arange(3, 3 + num)
        texts = [np.concatenate([stem, np.full(20, 50 + i)]).astype(np.int32) for i in range(40)]
        return [Example(text, np.arange(len(text)) > num, str(i)) for i, text in enumerate(texts)]

    (made,) = lay_out(sharing(10), "tree", 4096)
    roots = made.reach[made.position == 0]
    assert len(made) == 8 * (10 + 5 * 20) and roots.tolist() == [110 * i for i in range(1, 9)], "5 in each of 8 trees"
    assert max(len(r) for r in lay_out(sharing(10), "tree", 90)) == 90, "4 where a row holds no more"
    (made,) = lay_out(sharing(16), "tree", 4096)
    assert len(made) == 16 + 40 * 20 and (made.reach[:16] == len(made)).all()


def of(*tokens: int, name: str = "e") -> Example:
    return Example(np.array(tokens, np.int32), np.arange(len(tokens)) > 0, name)


def test_a_tree_has_one_token_for_every_text_that_examples_begin_with() -> None:
    for seed in range(3):
        examples = random_examples(20, seed=seed, vocab=50_000)  # tokens of one byte, and of two
        beginnings = {e.tokens[:n].tobytes() for e in examples for n in range(1, len(e) + 1)}
        assert len(row([sorted(examples, key=sort_key)])) == len(beginnings)


def test_examples_are_sorted_by_their_tokens_as_numbers() -> None:
    texts = [(1,), (1, 2), (255,), (256,), (256, 0), (257,), (65_536,), (70_000, 3)]
    for turned in (texts, texts[::-1]):
        assert [tuple(e.tokens) for e in sorted((of(*t) for t in turned), key=sort_key)] == texts


def test_a_common_prefix_by_hand() -> None:
    def shared(a: tuple[int, ...], b: tuple[int, ...]) -> int:
        return common_prefix(np.array(a, np.int32), np.array(b, np.int32))

    assert shared((1, 2, 3), (1, 2, 4, 3)) == 2 and shared((1, 2), (1, 2, 3)) == 2 and shared((1, 2, 3), (1, 2)) == 2
    assert shared((), (1,)) == 0 and shared((2,), (1,)) == 0 and shared((7, 8), (7, 8)) == 2


def test_sixteen_tokens_in_common_make_a_unit_and_fifteen_do_not() -> None:
    stem = tuple(range(10, 26))
    long = [of(*stem, 1, 2), of(*stem, 3)]
    assert [(len(es), size) for es, size in shared_units(long, 100)] == [(2, 19)]
    short = [of(*stem[:15], 1, *range(113 - 2)), of(*stem[:15], 3, 4)]
    assert [(len(es), size) for es, size in shared_units(short, 200)] == [(1, 127), (1, 17)], "together 129"
    assert [(len(es), size) for es, size in shared_units([short[0], of(*stem[:15], 3)], 200)] == [(2, 128)]
    assert [(len(es), size) for es, size in shared_units([of(1), of(2)], 200)] == [(1, 1), (1, 1)], "nothing in common"
    assert [(len(es), size) for es, size in shared_units(long, 19)] == [(2, 19)], "a unit may fill a row"
    assert [(len(es), size) for es, size in shared_units(long, 18)] == [(1, 18), (1, 17)]


def test_a_row_by_hand() -> None:
    made = row([[of(3, 4, 5), of(3, 4, 5, 6), of(3, 7)], [of(3, 9)]])
    assert made.tokens.tolist() == [3, 4, 5, 6, 7, 3, 9]
    assert made.position.tolist() == [0, 1, 2, 3, 1, 0, 1]
    assert made.reach.tolist() == [5, 4, 4, 4, 5, 7, 7]
    asked = list(zip(made.at.tolist(), made.target.tolist(), made.weight.tolist(), strict=True))
    assert asked == [(0, 4, 2), (1, 5, 2), (2, 6, 1), (0, 7, 1), (5, 9, 1)]
    assert [p.tolist() for p in made.paths] == [[0, 1, 2], [0, 1, 2, 3], [0, 4], [5, 6]]
    assert made.num_examples == 4 and len(made) == 7


def test_rows_of_a_layout_by_hand() -> None:
    examples = [of(3, 4, 5), of(3, 4), of(8, 9, 10, 11)]
    assert [[p.tolist() for p in r.paths] for r in lay_out(examples, "padded", 4)] == [
        [[0, 1, 2]],
        [[0, 1]],
        [[0, 1, 2, 3]],
    ]
    assert [len(r) for r in lay_out(examples, "packed", 7)] == [7, 2]
    assert lay_out([], "tree", 7) == [] == lay_out([], "packed", 7, 3)
    with pytest.raises(ValueError, match=r"data\.layout=bushy: expected one of tree, packed, padded"):
        lay_out(examples, "bushy", 7)
    with pytest.raises(ValueError, match=r"example e has 4 tokens, more than data\.row_length=3"):
        lay_out(examples, "packed", 3)


@pytest.mark.parametrize("num_ranks", [2, 3, 5])
def test_for_several_ranks_rows_are_as_short_as_their_number_allows(num_ranks: int) -> None:
    for seed in range(8):
        sizes = np.random.default_rng(seed).integers(5, 60, 37).tolist()
        fewest = len(best_fit(sizes, 100))
        bins = pack(sizes, 100, num_ranks)
        largest = max(sum(sizes[i] for i in b) for b in bins)
        assert len(bins) <= -(-fewest // num_ranks) * num_ranks and sorted(i for b in bins for i in b) == list(
            range(37)
        )
        assert len(best_fit(sizes, largest - 1)) > -(-fewest // num_ranks) * num_ranks
    assert pack([5, 4, 3, 2, 1], 6, 1) == [[0, 4], [1, 3], [2]]
    assert pack([], 6, 4) == [] and pack([3], 9, 4) == [[0]]


def test_a_full_bin_and_a_full_rank_take_no_more() -> None:
    assert best_fit([6, 6], 6) == [[0], [1]] and best_fit([4, 3, 2], 9) == [[0, 1, 2]]
    assert best_fit([7, 5, 3, 3], 10) == [[0, 2], [1, 3]], "into the fullest bin that still has room"
    assert assign_to_ranks([9, 1, 1, 1], 2) == [[0, 3], [1, 2]], "no rank has more rows than it must"
    assert assign_to_ranks([9, 5, 4, 1, 1], 3) == [[0], [1, 4], [2, 3]]
    assert (
        assign_to_ranks([1, 2, 3], 1) == [[2, 1, 0]]
        and assign_to_ranks([], 2) == [[], []]
        and assign_to_ranks([4], 3) == [[0], [], []]
    )
